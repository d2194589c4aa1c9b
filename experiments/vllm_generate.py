r"""Stage 1 with vLLM in the place of generate.py: its flags, its rows, its meta.

    pip install vllm                              # 0.10.2 or newer, into an environment of its own
    python experiments/vllm_generate.py --model Qwen/Qwen2.5-Math-1.5B --prompts prompts.jsonl \
        --out rollouts.jsonl --n 8 --temperature 0.7 --max-new-tokens 2048

run.sh can call it in the place of generate.py; it refuses what vLLM cannot do. Not run on a GPU by
its authors: its test (tests/test_vllm.py) runs it against a stand-in for vLLM's API, and trains on
what it wrote. Look at `logprob_gap` in the first metrics.jsonl (about 1e-2 in bfloat16); a large
one means that the engine's log-probs are not those of its samples. `train.py --tis-cap` corrects
for a small one.

- `logprobs_mode="processed_logprobs"`: of softmax(logits / T). vLLM's default, raw_logprobs, is
  taken before the temperature. top-p and top-k stay off, since they would change these log-probs.
- Prompts are encoded, and ends found, as generate.py does: vLLM gets ids and `stop_token_ids`, the
  last of which it returns in `token_ids`. The text is decoded here from all ids.
- Each row is a request with a seed of its own, of (seed, id, sample); vLLM's prefix cache computes
  a prompt once. An engine that batches requests as they come may still give other bits from run to
  run.
"""
import hashlib
import json
import os
import sys
import time

if __name__ == "__main__":  # the repository's root, not this folder
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import generate
from data.files import Parser, fail, rank_and_world, run


def parse_args(argv=None):
    parser = Parser(__file__, description=__doc__)
    generate.add_flags(parser)
    parser.add_argument("--tensor-parallel-size", type=int, default=1,
                        help="GPUs that share the model (default %(default)s)")
    parser.set_defaults(max_batch_tokens=2**23)  # a call of the engine, which bounds its own cache
    args = parser.parse_args(argv)
    parser.at_least(args, tensor_parallel_size=1)
    for wrong, message in [
            (args.top_p < 1 or args.top_k, "--top-p and --top-k: vLLM would return log-probs of "
             "the cut distribution; leave them off, or take generate.py"),
            (args.attention == "shared", "--attention shared is generate.py's; vLLM has its own"),
            (args.device == "cpu", "--device cpu: vLLM needs a GPU here; take generate.py"),
            (rank_and_world()[1] > 1, "one process drives all GPUs: give --tensor-parallel-size in "
             "place of torchrun")]:
        if wrong:
            parser.error(message)
    return generate.check_flags(parser, args)


def request(vllm, args, identity, sample, ends, stops):
    """The SamplingParams of one row. ends: ids; stops: texts."""
    key = hashlib.sha256(json.dumps([args.seed, identity, sample]).encode()).digest()
    return vllm.SamplingParams(
        n=1, temperature=args.temperature, top_p=1.0, top_k=0, logprobs=0,
        max_tokens=args.max_new_tokens, stop=stops or None, stop_token_ids=ends, ignore_eos=True,
        skip_special_tokens=False, seed=int.from_bytes(key[:6], "little"))


def main(args):
    try:
        import vllm
    except ImportError:
        fail("vLLM is not installed here: pip install vllm, or take generate.py")

    from data.chunks import begin, merge, publish_merged, run_chunks

    # 1. The prompts, encoded and cut into chunks, and the ends, as in generate.py.
    began, dtype = time.monotonic(), "bfloat16" if args.dtype == "auto" else args.dtype
    work = generate.plan(args)
    meta = generate.describe_output(args, work, "cuda", dtype, args.tensor_parallel_size)
    meta.update(engine=f"vllm {vllm.__version__}", attention="vllm")
    folder = begin(args.out, meta, work)
    if folder is None:
        return

    # 2. The engine.
    generate.print_summary(args, meta, work)
    engine = vllm.LLM(model=args.model, dtype=dtype, seed=args.seed,
                      max_model_len=max(map(len, work.encoded)) + args.max_new_tokens,
                      tensor_parallel_size=args.tensor_parallel_size,
                      trust_remote_code=args.trust_remote_code,
                      revision=work.options.get("revision"), logprobs_mode="processed_logprobs")
    special = generate.special_tokens(work.tokenizer)
    texts = [text for text in args.stop if text not in special]

    def sample_chunk(chunk):
        identities = [work.problems[problem][2].id for problem, _ in chunk]
        answers = engine.generate(
            [{"prompt_token_ids": work.encoded[problem]} for problem, _ in chunk],
            [request(vllm, args, identity, sample, work.ends, texts)
             for identity, (_, sample) in zip(identities, chunk)])
        lines = []
        for item, identity, answer in zip(chunk, identities, answers, strict=True):
            output, = answer.outputs
            if output.finish_reason not in ("stop", "length"):
                fail(f"vLLM ended a row of {identity!r} with {output.finish_reason!r}")
            ids = list(output.token_ids)
            logprobs = [step[token].logprob if args.temperature else 0.0  # 0 when greedy
                        for token, step in zip(ids, output.logprobs)]
            lines.append(generate.json_row(item, ids, logprobs, output.finish_reason, work))
        return lines

    # 3. The chunks, then all of them in the problems' order.
    run_chunks(sample_chunk, work.chunks, args.out)
    merge([line for _, line, _ in work.problems], folder, work.chunks, generate.SAMPLED)
    publish_merged(args.out, {**meta, "wall_s": time.monotonic() - began})


if __name__ == "__main__":
    run(main, parse_args())
