"""The sampler with and without --compile: completion tokens a CPU second, in turns, on one thread.

    python experiments/bench_compile.py --size tiny      # the embedded model, 128 rows
    python experiments/bench_compile.py --size 25m       # a random Qwen2, 64 rows that never stop

Prints what the first chunk of --compile costs, in which the step is compiled (CPU seconds of this
process and of its compilers), and the median of --rounds turns after it. CPU only.
"""
import argparse
import functools
import os
import statistics
import sys
import time

SIZES = {"toy": (4, 4, 4, 2), "tiny": (128, 12, 24, 8), "25m": (64, 64, 32, 4)}
# rows, prompt tokens, new tokens, prompts


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="tiny", choices=SIZES, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="turns (default %(default)s)")
    return parser.parse_args()


def main(args):
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    import numpy as np
    import torch
    import transformers

    import generate

    torch.set_num_threads(1)
    rows, longest, steps, count = SIZES[args.size]
    if args.size == "25m":
        torch.manual_seed(0)
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
            vocab_size=4096, hidden_size=512, num_hidden_layers=8, num_attention_heads=8,
            num_key_value_heads=2, intermediate_size=1408, tie_word_embeddings=True)).eval()
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            os.path.join(sys.path[0], "data", "tiny-countdown")).eval()
    ends = [] if args.size == "25m" else [0]
    rng = np.random.default_rng(0)
    prompts = rng.integers(3, 20, (count, longest)).tolist()
    owner = np.repeat(np.arange(count), rows // count).tolist()
    uniform = rng.random((rows, steps))
    flags = argparse.Namespace(max_new_tokens=steps, temperature=1.0, top_p=1.0, top_k=0, stop=[])
    draw = functools.partial(generate.draw, temperature=1.0)
    decoder = generate.Decoder(model, draw, rows, longest, steps, ends)

    def plain(attention):
        model.set_attn_implementation(attention)
        return generate.sample(model, prompts, owner, uniform, ends, None, flags)

    def compiled():
        model.set_attn_implementation("sdpa")
        return decoder.sample(prompts, owner, uniform, None, 0)

    def used():
        return sum(os.times()[:4])  # with the children that were waited for

    start = used()
    compiled()
    print(f"first chunk of --compile: {used() - start:.0f} CPU s")
    arms = {"--attention model": lambda: plain("sdpa"), "--compile": compiled,
            "--attention shared": lambda: plain("shared")}
    rates = {name: [] for name in arms}
    for _ in range(args.rounds):
        for name, arm in arms.items():
            start = time.process_time()
            lengths = arm()[2]
            rates[name].append(sum(lengths) / (time.process_time() - start))
    for name, found in rates.items():
        print(f"{name}: {statistics.median(found):,.0f} tokens a CPU second")


if __name__ == "__main__":
    main(parse_args())
