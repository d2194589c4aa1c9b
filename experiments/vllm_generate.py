"""Stage 1 with vLLM in the place of generate.py: the same rows, the same meta.

    pip install vllm                              # 0.10.2 or newer, into an environment of its own
    python experiments/vllm_generate.py --model Qwen/Qwen2.5-Math-1.5B --prompts prompts.jsonl \
        --out rollouts.jsonl --n 8 --temperature 0.7 --max-new-tokens 2048

Not run on a GPU by its authors: its test (tests/test_vllm.py) runs it against a stand-in for vLLM's
API, and trains on what it wrote. Whoever runs it looks at `logprob_gap` in the first metrics.jsonl
(about 1e-2 in bfloat16); a large one means that the engine's log-probs are other than asked for.

- `logprobs_mode="processed_logprobs"`: of softmax(logits / T). vLLM's default, raw_logprobs, is
  taken before the temperature. top-p and top-k stay off, since they would change these log-probs.
- vLLM stops at the end-of-text ids of the tokenizer and of generation_config.json, as generate.py
  does, and hands them over as the last of `token_ids`. The text is decoded here from all ids.
- Each prompt has a seed of its own, from which vLLM derives those of its n samples. An engine that
  batches requests as they come may still give other bits from run to run.
"""
import hashlib
import json
import os
import shutil
import sys
import time

if __name__ == "__main__":  # the repository's root, not this folder
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from data.files import Parser, describe, fail, publish, run

CHUNK = 512  # prompts a file of OUT.partial/: what a restart loses at most


def parse_args(argv=None):
    parser = Parser(__file__, description=__doc__)
    add = parser.add_argument
    # files
    add("--model", required=True, help="folder of a Hugging Face model, or a Hub id")
    add("--prompts", required=True, help="JSONL file of problems")
    add("--out", required=True, help="JSONL file to write")
    add("--limit", type=int, help="only the first so many problems (default: all)")
    # sampling
    add("--n", type=int, default=8, help="samples a problem (default %(default)s)")
    add("--temperature", type=float, default=1.0, help="T, above 0 (default %(default)s)")
    add("--max-new-tokens", type=int, default=64,
        help="longest completion, in tokens (default %(default)s)")
    add("--stop", nargs="+", default=[], metavar="TEXT",
        help="end a completion when it contains one of these texts")
    add("--seed", type=int, default=0, help="seed of all randomness (default %(default)s)")
    # machine
    add("--tensor-parallel-size", type=int, default=1,
        help="GPUs that share the model (default %(default)s)")
    add("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"],
        help="of weights and cache (default %(default)s)")
    args = parser.parse_args(argv)
    if min(args.n, args.max_new_tokens, args.tensor_parallel_size, args.limit or 1) < 1:
        parser.error("--n, --max-new-tokens, --tensor-parallel-size, --limit must be at least 1")
    if not 0 < args.temperature < 1e6:
        parser.error("--temperature must be above 0; for greedy samples take generate.py")
    return parser.checked(args)


def fields(output, sample, prompt_ids, tokenizer):
    """The fields of one row that this stage adds, from a CompletionOutput of vLLM's."""
    if output.finish_reason not in ("stop", "length"):
        fail(f"vLLM ended sample {sample} of a prompt with {output.finish_reason!r}")
    ids = list(output.token_ids)
    return {"sample": sample, "completion": tokenizer.decode(ids, skip_special_tokens=True),
            "prompt_ids": prompt_ids, "completion_ids": ids,
            "logprobs": [step[token].logprob for token, step in zip(ids, output.logprobs)],
            "finish_reason": output.finish_reason}


def main(args):
    try:
        import vllm
    except ImportError:
        fail("vLLM is not installed here: pip install vllm, or take generate.py")

    import transformers

    from data.chunks import begin, chunk_path, merge, write_synced
    from data.models import OF_TRAINING, check_model, load, load_tokenizer, source_of
    from generate import SAMPLED, encode, load_problems, problem_lines

    # 1. The prompts, read, checked and encoded as generate.py does.
    began = time.monotonic()
    problems, options = load_problems(args.prompts, args.limit), check_model(args.model)
    tokenizer = load_tokenizer(args.model, options)
    config = load(transformers.AutoConfig, args.model, options).get_text_config()
    encoded = encode(problems, tokenizer, config, args.max_new_tokens)
    sampling = {"temperature": args.temperature, "top_p": 1.0, "top_k": 0,
                "repetition_penalty": 1.0, "max_new_tokens": args.max_new_tokens}
    meta = describe(args, [args.prompts, source_of(args.model, options)], OF_TRAINING,
                    sampling=sampling, device="cuda", dtype=args.dtype,
                    world_size=args.tensor_parallel_size, engine=f"vllm {vllm.__version__}")
    folder = begin(args.out, meta, ("model", "prompts", "out"), OF_TRAINING)
    if folder is None:
        return

    # 2. The engine.
    longest = max(map(len, encoded)) + args.max_new_tokens
    engine = vllm.LLM(model=args.model, dtype=args.dtype, seed=args.seed, max_model_len=longest,
                      tensor_parallel_size=args.tensor_parallel_size,
                      logprobs_mode="processed_logprobs")

    def request(problem):
        key = hashlib.sha256(json.dumps([args.seed, problem.id]).encode()).digest()
        return vllm.SamplingParams(
            n=args.n, temperature=args.temperature, top_p=1.0, top_k=0, logprobs=0,
            max_tokens=args.max_new_tokens, stop=args.stop or None,
            seed=int.from_bytes(key[:6], "little"))

    # 3. The chunks, then all of them in the prompts' order.
    chunks = [[(problem, sample) for problem in range(start, min(start + CHUNK, len(problems)))
               for sample in range(args.n)] for start in range(0, len(problems), CHUNK)]
    for number, chunk in enumerate(chunks):
        if os.path.exists(chunk_path(folder, number)):
            continue
        wanted = sorted({problem for problem, _ in chunk})
        found = engine.generate([{"prompt_token_ids": encoded[problem]} for problem in wanted],
                                [request(problems[problem][1]) for problem in wanted])
        rows = [fields(output, sample, encoded[problem], tokenizer)
                for problem, answer in zip(wanted, found, strict=True)
                for sample, output in enumerate(answer.outputs)]
        write_synced(chunk_path(folder, number), [json.dumps(row, ensure_ascii=False) + "\n"
                                                  for row in rows])
    merge(problem_lines(args.prompts, problems), folder, chunks, SAMPLED, f"{folder}/merged.jsonl")
    publish(args.out, {**meta, "wall_s": time.monotonic() - began}, f"{folder}/merged.jsonl")
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    run(main, parse_args())
