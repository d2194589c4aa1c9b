"""Stage 1: sample n completions of every prompt from a Hugging Face causal language model.

    python generate.py --model data/tiny-countdown --prompts prompts.jsonl --out rollouts.jsonl --n 16 --max-new-tokens 24
    torchrun --nproc-per-node 8 generate.py --model Qwen/Qwen2.5-Math-1.5B --prompts prompts.jsonl --out rollouts.jsonl \
        --n 8 --temperature 0.7 --max-new-tokens 2048

Reads prompts.jsonl: one problem a line with `id`, `prompt` (text) or `messages` (chat, put through the model's own chat
template), and any other fields, which pass through untouched.
Writes rollouts.jsonl: one sample a line, in the order of the prompt file: the problem's fields, then `sample` (0..n-1),
`completion` (text without special tokens), `prompt_ids`, `completion_ids` (with the end-of-text token when it was sampled),
`logprobs` (one per completion id: log-softmax of logits / T in fp32, whatever top-p and top-k were; 0 when greedy) and
`finish_reason` ("stop" or "length"). OUT.meta.json says how.

How it works, in the order of the code:
  1. every (prompt, sample) is an item; items are sorted by prompt length and cut into chunks of at most --max-batch-tokens;
  2. rank r of W takes the chunks r, r + W, ...; each finished chunk is one file in OUT.partial/, so a restart loses one
     chunk at most; nothing but the file system is shared between ranks;
  3. in a chunk, each prompt is computed once; its samples share its key-value cache, or get copies of it (--attention); one
     token a row and step is drawn by inverse CDF from one uniform number that depends on (seed, id, sample, step) alone;
     finished rows are dropped;
  4. when all chunks are there, rank 0 merges them in the prompts' order and gives the file its name.
"""
import contextlib
import hashlib
import json
import math
import os
import shutil
import sys
import time

from data.files import Parser, claim, describe, fail, publish, read_rows, run


def parse_args(argv=None):
    parser = Parser(__file__, description=__doc__)
    # files
    parser.add_argument("--model", required=True, help="folder of a Hugging Face model, or a Hub id such as Qwen/Qwen2.5-0.5B")
    parser.add_argument("--prompts", required=True, help="JSONL file of problems")
    parser.add_argument("--out", required=True, help="JSONL file to write; OUT.partial/ holds the finished chunks until then")
    parser.add_argument("--limit", type=int, help="only the first so many problems (default: all)")
    # sampling; nothing is taken from the model's generation_config.json but its end-of-text ids
    parser.add_argument("--n", type=int, default=8, help="samples a problem (default %(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="T; 0 is greedy (default %(default)s)")
    parser.add_argument("--top-p", type=float, default=1.0, help="keep the smallest set of this probability; 1 is off (default %(default)s)")
    parser.add_argument("--top-k", type=int, default=0, help="keep the k likeliest tokens; 0 is off (default %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="longest completion, in tokens (default %(default)s)")
    parser.add_argument("--stop", nargs="+", default=[], metavar="TEXT", help="end a completion when it contains one of these texts")
    parser.add_argument("--ignore-eos", action="store_true", help="go on past end-of-text tokens, to --max-new-tokens")
    parser.add_argument("--seed", type=int, default=0, help="seed of all randomness (default %(default)s)")
    # machine
    parser.add_argument("--max-batch-tokens", type=int, default=65536, help="most rows x (prompt + new tokens) at once: bounds the "
                        "key-value cache (default %(default)s)")
    parser.add_argument("--attention", default="auto", choices=["auto", "model", "shared"], help="model: as transformers picks, on copies of "
                        "the prompt's cache; shared: to one cache for all samples of a prompt; auto: shared on a CPU where possible")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="auto: float32 on a CPU, bfloat16 on CUDA")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto: cuda if there is one")
    parser.add_argument("--rank-timeout", type=float, default=1800, help="seconds that rank 0 waits for the next chunk of another rank "
                        "(default %(default)s)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that the model's folder brings along")
    args = parser.parse_args(argv)
    for flag, low in (("n", 1), ("temperature", 0), ("top_k", 0), ("max_new_tokens", 1), ("max_batch_tokens", 1), ("limit", 1)):
        if not low <= (getattr(args, flag) if getattr(args, flag) is not None else low) < math.inf:
            parser.error(f"--{flag.replace('_', '-')} must be a finite number of at least {low}")
    if not 0 < args.top_p <= 1:
        parser.error("--top-p must be above 0 and at most 1")
    if "" in args.stop:
        parser.error("--stop takes texts that are not empty")
    return parser.checked(args)


if __name__ == "__main__":
    ARGS = parse_args()  # before the heavy imports: --help and a wrong flag answer at once

import numpy as np
import torch
import transformers
from tqdm import tqdm
from transformers.cache_utils import DynamicCache, DynamicLayer

from data.models import check_model, load, load_model, load_tokenizer

# By its own folder, not as `kernels.`: that name is also a package of Hugging Face, and both may be installed.
sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "kernels"))
from shared_prompt import RoomyLayer, SharedLayer, choose_attention, shared_attention

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()  # what matters of its warnings is an error here

ROLLOUT_FIELDS = ("sample", "completion", "prompt_ids", "completion_ids", "logprobs", "finish_reason")


def load_problems(path, limit=None):
    """[(where, row)] of a prompt file, checked: unique string ids, and either a prompt or messages."""
    problems, seen = [], set()
    for where, _, row in read_rows(path):
        if "id" not in row:
            fail(f"{where}: missing field 'id'")
        if not isinstance(row["id"], str):
            fail(f"{where}: 'id' must be a string")
        if row["id"] in seen:
            fail(f"{where}: duplicate id {row['id']!r}")
        if ("prompt" in row) == ("messages" in row):
            fail(f"{where}: needs either 'prompt' or 'messages'")
        if not isinstance(row.get("prompt", ""), str):
            fail(f"{where}: 'prompt' must be a string")
        messages = row.get("messages", [{"role": "", "content": ""}])
        if not isinstance(messages, list) or not messages or not all(
                isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str) for turn in messages):
            fail(f"{where}: 'messages' must be a list of objects with the strings 'role' and 'content'")
        seen.add(row["id"])
        problems.append((where, {key: row[key] for key in ("id", "prompt", "messages") if key in row}))
        if len(problems) == limit:
            break
    return problems


def encode(problems, tokenizer, config, max_new_tokens):
    """Token ids of every prompt, unpadded. A chat template writes its own special tokens; for a text the tokenizer does."""
    positions, rope = getattr(config, "max_position_embeddings", None), getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":  # past this length it turns all keys anew, also those that are cached
        positions = rope["original_max_position_embeddings"]
    encoded = []
    for where, row in tqdm(problems, "tokenizing", disable=None):
        try:
            if "prompt" in row:
                ids = tokenizer(row["prompt"])["input_ids"]
            else:
                text = tokenizer.apply_chat_template(row["messages"], tokenize=False, add_generation_prompt=True)
                ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        except Exception as error:  # no chat template, or one that refuses these roles
            fail(f"{where}: the prompt cannot be encoded: {error}")
        if not ids:
            fail(f"{where}: an empty prompt: this tokenizer gives it no token to start from")
        if max(ids) >= config.vocab_size:
            fail(f"{where}: token id {max(ids)} is beyond the model's vocabulary of {config.vocab_size}: a tokenizer of another model?")
        if positions and len(ids) + max_new_tokens > positions:
            fail(f"{where}: {len(ids)} prompt tokens + {max_new_tokens} new ones exceed the model's {positions} positions; "
                 f"lower --max-new-tokens")
        encoded.append(ids)
    return encoded


def end_ids(model, tokenizer):
    """All end-of-text ids: the model's generation config may name several, the tokenizer one."""
    found = model.generation_config.eos_token_id
    found = set(found if isinstance(found, list) else [found]) | {tokenizer.eos_token_id}
    return sorted(token for token in found if isinstance(token, int) and 0 <= token < model.config.get_text_config().vocab_size)


def chunks_of(lengths, n, max_new_tokens, budget):
    """Cut all items (problem, sample), shortest prompts first, into chunks with rows x (longest prompt + new) <= budget."""
    items = [(problem, sample) for problem in np.argsort(lengths, kind="stable").tolist() for sample in range(n)]
    chunks, start = [], 0
    for end in range(1, len(items) + 1):
        if end == len(items) or (end + 1 - start) * (lengths[items[end][0]] + max_new_tokens) > budget:
            chunks.append(items[start:end])
            start = end
    return chunks


def uniforms(seed, identity, sample, steps):
    """`steps` uniform numbers in [0, 1) from a counter-based generator (Philox) keyed by (seed, id, sample) alone."""
    key = hashlib.sha256(json.dumps([seed, identity, sample]).encode()).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(key[:16], dtype=np.uint64))).random(steps)




def truncated(probs, top_p, top_k):
    """Zero all but the top_k likeliest tokens, then all but the smallest set with a share of top_p. probs: (rows, vocab)."""
    ordered, index = probs.sort(-1, descending=True)
    if top_k:
        ordered[:, top_k:] = 0
    before = ordered.cumsum(-1) - ordered
    ordered[before >= top_p * ordered.sum(-1, keepdim=True)] = 0
    return torch.zeros_like(probs).scatter_(-1, index, ordered)


def draw(logits, uniform, temperature, top_p=1.0, top_k=0):
    """One token a row by inverse CDF. logits: (rows, vocab), uniform: (rows,) fp64 -> ids (rows,), log-probs (rows,) fp32."""
    if temperature == 0:
        return logits.argmax(-1), 0 * logits.amax(-1).float()  # the limit T -> 0: certain, log-prob 0 (and NaN stays NaN)
    logp = torch.log_softmax(logits.float() / temperature, dim=-1)
    probs = logp.exp()
    if top_p < 1 or top_k:
        probs = truncated(probs, top_p, top_k)
    cdf = probs.cumsum(-1, dtype=torch.float64)  # fp64: over 152k tokens fp32 sums drift by more than small probabilities
    ids = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True).squeeze(-1)  # the first with cdf > u: never a zero
    ids = ids.clamp_(max=logits.shape[-1] - 1)
    return ids, logp.gather(-1, ids[:, None]).squeeze(-1)


@torch.inference_mode()
def sample(model, prompts, owner, uniform, ends, stopped, args):
    """Sample one completion a row. prompts: distinct lists of ids; owner: (rows,) index of each row's prompt;
    uniform: (rows, max_new_tokens); ends: end-of-text ids; stopped(ids): does a stop text stand at the end of this completion?
    Returns ids and log-probs, both (rows, max_new_tokens), lengths (rows,) and whether each row stopped by itself (rows,)."""
    device, longest = model.device, max(map(len, prompts))
    # 1. Every prompt once, padded on the left; without any padding no mask is needed at all.
    padding = torch.tensor([longest - len(ids) for ids in prompts], device=device)
    ids = torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts], device=device)
    mask = (torch.arange(longest, device=device) >= padding[:, None]).long() if padding.any() else None
    positions = (torch.arange(longest, device=device) - padding[:, None]).clamp(min=0)
    shared_attention.cache = cache = DynamicCache(config=model.config)
    shared = model.config._attn_implementation == "shared"
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
                   logits_to_keep=1).logits[:, -1]
    # 2. Its cache and last logits once per sample.
    owner = torch.as_tensor(owner, device=device)
    for layer in cache.layers:
        if type(layer) is DynamicLayer:
            layer.__class__ = SharedLayer if shared else RoomyLayer
            layer.spread(owner, padding, args.max_new_tokens - 1)
        else:
            layer.batch_select_indices(owner)
    logits, positions = logits[owner], positions[owner, -1:]
    mask = mask[owner] if mask is not None and not shared else None
    # 3. One token a row and step; `alive` holds the rows that are still in the batch.
    rows = len(owner)
    uniform, ends = torch.as_tensor(uniform, device=device), torch.tensor(ends, dtype=torch.long, device=device)
    tokens = torch.zeros(rows, args.max_new_tokens, dtype=torch.long, device=device)
    logprobs = torch.zeros(rows, args.max_new_tokens, device=device)
    lengths = torch.full((rows,), args.max_new_tokens, device=device)
    alive = torch.arange(rows, device=device)
    done = torch.zeros(rows, dtype=torch.bool, device=device)
    stops = torch.zeros(rows, dtype=torch.bool, device=device)
    tail = 8 + max(map(len, args.stop), default=0) * 4  # tokens that can hold a stop text: a token is a byte at the least
    for step in range(args.max_new_tokens):
        token, logp = draw(logits, uniform[alive, step], args.temperature, args.top_p, args.top_k)
        tokens[alive, step], logprobs[alive, step] = token, logp
        ended = torch.isin(token, ends)
        if args.stop:
            ended |= torch.tensor([stopped(row) for row in tokens[alive, max(0, step - tail):step + 1].tolist()], device=device)
        ended &= ~done
        lengths[alive[ended]] = step + 1
        stops[alive[ended]] = True
        done |= ended
        left = len(done) - int(done.sum())
        if not left or step + 1 == args.max_new_tokens:
            break
        if left < len(done):
            keep = torch.arange(left, device=device)  # the last rows take the places of those that are finished
            keep[done[:left]] = left + (~done[left:]).nonzero().squeeze(-1)
            alive, token, positions, done = alive[keep], token[keep], positions[keep], done[keep]
            cache.batch_select_indices(keep)
            mask = mask[keep] if mask is not None else None
        positions = positions + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], -1) if mask is not None else None
        logits = model(input_ids=token[:, None], attention_mask=mask, position_ids=positions, past_key_values=cache,
                       use_cache=True, logits_to_keep=1).logits[:, -1]
    return tokens.cpu(), logprobs.cpu(), lengths.tolist(), stops.tolist()


def run_chunk(chunk, problems, encoded, model, tokenizer, ends, args):
    """The JSONL lines (str) of one chunk's items: the fields that this stage adds."""
    wanted = list(dict.fromkeys(problem for problem, _ in chunk))
    place = {problem: i for i, problem in enumerate(wanted)}
    uniform = np.stack([uniforms(args.seed, problems[problem][1]["id"], k, args.max_new_tokens) for problem, k in chunk])

    def stopped(ids):
        text = tokenizer.decode(ids, skip_special_tokens=True)
        return any(stop in text for stop in args.stop)

    tokens, logprobs, lengths, stops = sample(model, [encoded[problem] for problem in wanted], [place[problem] for problem, _ in chunk],
                                              uniform, [] if args.ignore_eos else ends, stopped, args)
    if not torch.isfinite(logprobs).all():
        fail(f"{args.model}: logits that are not finite, for the prompt {problems[chunk[0][0]][1]['id']!r} or near it")
    completions = [row[:length] for row, length in zip(tokens.tolist(), lengths)]
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    return [json.dumps({"sample": k, "completion": text, "prompt_ids": encoded[problem], "completion_ids": ids,
                        "logprobs": logp[:len(ids)], "finish_reason": "stop" if stop else "length"}, ensure_ascii=False) + "\n"
            for (problem, k), text, ids, logp, stop in zip(chunk, texts, completions, logprobs.tolist(), stops)]


def merge(path, problems, folder, chunks, out):
    """Write the finished chunks to `out` in the order of the prompt file: each problem's own fields, then the chunk's."""
    where = {}  # problem -> [(chunk, offset of its first line there, lines)]
    for number, chunk in enumerate(chunks):
        with open(f"{folder}/{number:06d}.jsonl", "rb") as file:
            for problem, _ in chunk:
                offset = file.tell()
                file.readline()
                if problem in where and where[problem][-1][0] == number:
                    where[problem][-1][2] += 1
                else:
                    where.setdefault(problem, []).append([number, offset, 1])
    with open(out, "wb") as target:
        rows = read_rows(path)
        for problem, (place, known) in enumerate(problems):
            _, line, row = next(rows, (None, None, {}))
            if known != {key: row.get(key) for key in known}:
                fail(f"{place}: changed while its completions were sampled")
            if any(key in row for key in ROLLOUT_FIELDS):
                line = json.dumps({key: value for key, value in row.items() if key not in ROLLOUT_FIELDS}, ensure_ascii=False).encode()
            head = line[:-1] + b", "
            for number, offset, lines in where[problem]:
                with open(f"{folder}/{number:06d}.jsonl", "rb") as file:
                    file.seek(offset)
                    for _ in range(lines):
                        target.write(head + file.readline()[1:])


def main(args):
    began, rank, world = time.monotonic(), int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    # 1. Everything that can be wrong with the input is found before a model is loaded.
    problems = load_problems(args.prompts, args.limit)
    options = check_model(args.model, args.trust_remote_code)
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: no CUDA device here; use --device cpu")
    device = "cpu" if args.device == "cpu" or not torch.cuda.is_available() else f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    dtype = {"auto": torch.bfloat16 if device != "cpu" else torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16}[args.dtype]
    meta = describe(args, [args.prompts, args.model], device=device, dtype=str(dtype).removeprefix("torch."), world_size=world,
                    sampling={"temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k, "repetition_penalty": 1.0,
                              "max_new_tokens": args.max_new_tokens})
    same = [meta["flags"] | {key: None for key in ("out", "prompts", "model", "rank_timeout")}, list(meta["inputs"].values()), meta["dtype"]]
    folder = args.out + ".partial"

    def begun():  # the command that this folder belongs to
        with contextlib.suppress(OSError, ValueError), open(f"{folder}/command.json", encoding="utf-8") as file:
            return json.load(file)

    if rank == 0:
        if claim(args.out, meta, ignore=("out", "prompts", "model", "rank_timeout"), folder=True) is None:
            return shutil.rmtree(folder, ignore_errors=True)
        if begun() is None:
            for name in os.listdir(folder):
                os.remove(f"{folder}/{name}")
            with open(f"{folder}/command.json.new", "w", encoding="utf-8") as file:
                json.dump(same, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(f"{folder}/command.json.new", f"{folder}/command.json")
        elif begun() != same:
            fail(f"{folder}: begun with other flags or inputs; delete that folder or choose another --out")
    while rank and begun() != same:  # rank 0 alone checks, locks and complains
        if os.path.exists(args.out):
            return
        time.sleep(0.1)

    # 2. The prompts' ids, the model and the chunks.
    config, tokenizer = load(transformers.AutoConfig, args.model, options), load_tokenizer(args.model, options)
    encoded = encode(problems, tokenizer, config.get_text_config(), args.max_new_tokens)
    model = load_model(args.model, dtype, device, options)
    try:
        choose_attention(model, device if args.attention == "auto" else args.attention)
    except ValueError as error:
        fail(f"{args.model}: {error}")
    ends = end_ids(model, tokenizer)
    if not (ends or args.stop or args.ignore_eos):
        fail(f"{args.model}: neither the tokenizer nor generation_config.json names an end-of-text token; give --stop or --ignore-eos")
    chunks = chunks_of([len(ids) for ids in encoded], args.n, args.max_new_tokens, args.max_batch_tokens)
    meta.update(attention=model.config._attn_implementation, end_ids=ends, chunks=len(chunks))
    if rank == 0:
        print(f"{args.model} on {device} x {world}, {meta['dtype']}, attention {meta['attention']}: {len(problems)} prompts x {args.n} "
              f"samples in {len(chunks)} chunks, T = {args.temperature}, top-p {args.top_p}, top-k {args.top_k}", file=sys.stderr)

    # 3. This rank's chunks.
    made, busy = 0, 0.0
    for number in tqdm(range(rank, len(chunks), world), "chunks", disable=None if rank == 0 else True):
        path = f"{folder}/{number:06d}.jsonl"
        if os.path.exists(path) or os.path.exists(args.out):  # done before; rank 0 may even have merged it already
            continue
        start = time.monotonic()
        lines = run_chunk(chunks[number], problems, encoded, model, tokenizer, ends, args)
        with open(f"{path}.{rank}", "w", encoding="utf-8") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.{rank}", path)
        busy += time.monotonic() - start
        made += sum(line.count(",", line.index('"completion_ids"'), line.index('"logprobs"')) for line in lines)
    if rank:
        return

    # 4. All chunks, in the prompts' order.
    missing, since = len(chunks) + 1, time.monotonic()
    while missing:
        before, missing = missing, sum(not os.path.exists(f"{folder}/{number:06d}.jsonl") for number in range(len(chunks)))
        since = time.monotonic() if missing < before else since
        if time.monotonic() - since > args.rank_timeout:
            fail(f"{missing} of {len(chunks)} chunks did not come from the other ranks in {args.rank_timeout:.0f} s; "
                 f"the same command carries on from here")
        time.sleep(0.2 if missing else 0)
    merge(args.prompts, problems, folder, chunks, f"{folder}/merged.jsonl")
    meta["wall_s"] = time.monotonic() - began
    publish(args.out, meta, f"{folder}/merged.jsonl")
    shutil.rmtree(folder, ignore_errors=True)
    if busy:
        print(f"{args.out}: {len(problems) * args.n} rows; {made / busy:.0f} tokens/s on rank 0", file=sys.stderr)


if __name__ == "__main__":
    run(main, ARGS)
