r"""Stage 1: sample n completions of every prompt from a Hugging Face causal language model.

    python generate.py --model data/tiny-countdown --prompts prompts.jsonl --out rollouts.jsonl \
        --n 16 --max-new-tokens 24
    torchrun --nproc-per-node 8 -- generate.py --model Qwen/Qwen2.5-Math-1.5B --prompts P.jsonl \
        --out rollouts.jsonl --n 8 --temperature 0.7 --max-new-tokens 2048

Reads prompts.jsonl, one problem a line: `id`, `prompt` (text) or `messages` (a chat, rendered with
the model's own chat template), and any other fields, which pass through untouched.
Writes rollouts.jsonl, one sample a line, sorted by problem, then by sample: the problem's fields,
then

    sample          0 .. n - 1
    completion      the text, without special tokens
    prompt_ids, completion_ids    the end-of-text token included when it was sampled
    logprobs        of each completion id: log-softmax of logits / T in fp32, whatever top-p and
                    top-k were; 0 when greedy
    finish_reason   "stop" or "length"

and OUT.meta.json, which says how it was made. data/files.py holds the types of all fields.

How it works, in the order of the code:
  1. one token a row and step is drawn (`draw`) by inverse CDF from one uniform number that depends
     on (seed, id, sample, step) alone (`uniforms`);
  2. in a batch each prompt is computed once (`sample`); its samples share its key-value cache, or
     get copies of it (--attention); finished rows are dropped;
  3. prompts become token ids (`encode`); end-of-text ids and --stop end a completion;
  4. every (problem, sample) is an item; items are sorted by prompt length and cut into chunks of at
     most --max-batch-tokens (data/chunks.py);
  5. rank r of W samples the chunks r, r + W, ...; each finished chunk is one file in OUT.partial/,
     so that a restart loses one chunk at most; ranks share nothing but the file system;
  6. when all chunks are there, rank 0 merges them in the problems' order and publishes the file.
"""
import argparse
import hashlib
import itertools
import json
import os
import shutil
import sys
import time

from data.files import Parser, Problem, describe, fail, publish, read_rows, run


def add_flags(parser):
    """The flags of a sampler; experiments/vllm_generate.py takes the same."""
    add = parser.add_argument_group("files").add_argument
    add("--model", required=True,
        help="folder of a Hugging Face model, or a Hub id such as Qwen/Qwen2.5-0.5B")
    add("--prompts", required=True, help="JSONL file of problems")
    add("--out", required=True,
        help="JSONL file to write; OUT.partial/ holds the finished chunks until then")
    add("--limit", type=int, help="only the first so many problems (default: all)")

    add = parser.add_argument_group("prompts").add_argument
    add("--overlong", default="refuse", choices=["refuse", "skip"],
        help="end the stage at a prompt too long for the model's positions, or leave such problems "
             "out and count them (default %(default)s)")

    add = parser.add_argument_group(
        "sampling", "Of the model's generation_config.json only the end-of-text ids count."
    ).add_argument
    add("--n", type=int, default=8, help="samples a problem (default %(default)s)")
    add("--temperature", type=float, default=1.0, help="T; 0 is greedy (default %(default)s)")
    add("--top-p", type=float, default=1.0,
        help="keep the smallest set of this probability; 1 is off (default %(default)s)")
    add("--top-k", type=int, default=0,
        help="keep the k likeliest tokens; 0 is off (default %(default)s)")
    add("--max-new-tokens", type=int, default=64,
        help="longest completion, in tokens (default %(default)s)")
    add("--stop", nargs="+", action="extend", default=[], metavar="TEXT",
        help="end a completion when it contains one of these texts or special tokens")
    add("--ignore-eos", action="store_true",
        help="continue past end-of-text tokens, to --max-new-tokens")
    add("--seed", type=int, default=0, help="seed of all randomness (default %(default)s)")

    add = parser.add_machine(rank_timeout=1800)
    add("--max-batch-tokens", type=int, default=65536,
        help="most rows x (prompt + new tokens) at once: bounds the key-value cache "
             "(default %(default)s)")
    add("--attention", default="auto", choices=["auto", "model", "shared"],
        help="model: as transformers picks, on copies of the prompt's cache; shared: all samples "
             "of a prompt attend to one cache; auto: shared on a CPU where possible")


def check_flags(parser, args):
    parser.at_least(args, n=1, temperature=0, top_k=0, max_new_tokens=1, max_batch_tokens=1,
                    limit=1)
    if not 0 < args.top_p <= 1:
        parser.error("--top-p must be above 0 and at most 1")
    if "" in args.stop:
        parser.error("--stop takes texts that are not empty")
    return parser.checked(args)


def parse_args(argv=None):
    parser = Parser(__file__, description=__doc__)
    add_flags(parser)
    return check_flags(parser, parser.parse_args(argv))


if __name__ == "__main__":
    ARGS = parse_args()  # before the heavy imports: --help and a wrong flag answer at once

import msgspec
import numpy as np
import torch
import transformers
from tqdm import tqdm
from transformers.cache_utils import DynamicCache

from data.chunks import (begin, chunk_path, chunks_of, merge, wait_for_chunks, wait_for_folder,
                         write_synced)
from data.models import (OF_TRAINING, check_model, device_and_dtype, load, load_model,
                         load_tokenizer, positions_of, source_of)

# By its own folder, not as `kernels.`: that name is also a package of Hugging Face, and both may be
# installed.
sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "kernels"))
from shared_prompt import (attention_of, check_sampler, choose_attention, pad_left,
                           shared_attention, spread, with_cache)

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()  # what matters of its warnings is an error here

# Flags that change no byte of the output, and those that name inputs, whose digests are compared.
FREE_FLAGS = ("out", "prompts", "model", "rank_timeout")
SAMPLED = ("sample", "completion", "prompt_ids", "completion_ids", "logprobs", "finish_reason")


# ---- Drawing a token -----------------------------------------------------------------------------
def uniforms(seed, identity, sample, steps):
    """`steps` uniform numbers in [0, 1), from Philox keyed by (seed, id, sample) alone.

    It is counter-based: a row has the same stream whatever batch, rank or restart it falls into.
    """
    key = hashlib.sha256(json.dumps([seed, identity, sample]).encode()).digest()
    generator = np.random.Philox(key=np.frombuffer(key[:16], dtype=np.uint64))
    return np.random.Generator(generator).random(steps)


def nucleus(probs, top_p, top_k):
    """Zero all but the top_k likeliest, then all but the smallest set with a share of top_p.

    probs: (rows, vocab), in any scale.
    """
    ordered, index = probs.sort(-1, descending=True)
    if top_k:
        ordered[:, top_k:] = 0
    before = ordered.cumsum(-1) - ordered
    rest = (before >= top_p * ordered.sum(-1, keepdim=True)) & (before > 0)  # never the first
    ordered[rest] = 0
    return torch.zeros_like(probs).scatter_(-1, index, ordered)


def draw(logits, uniform, temperature, top_p=1.0, top_k=0):
    """One token a row by inverse CDF.

    logits: (rows, vocab), uniform: (rows,) fp64 -> ids (rows,), log-probs (rows,) fp32.
    """
    if temperature == 0:  # the limit T -> 0: certain, log-prob 0 (and NaN stays NaN)
        return logits.argmax(-1), 0 * logits.amax(-1).float()
    logp = torch.log_softmax(logits.float() / temperature, dim=-1)
    probs = logp.exp()
    if top_p < 1 or top_k:
        probs = nucleus(probs, top_p, top_k)
    # fp64: over 152k tokens sums in fp32 drift by more than small probabilities.
    cdf = probs.cumsum(-1, dtype=torch.float64)
    # The first token with cdf > u, which is never one of probability zero.
    ids = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True).squeeze(-1)
    ids = ids.clamp_(max=logits.shape[-1] - 1)
    return ids, logp.gather(-1, ids[:, None]).squeeze(-1)


# ---- Sampling a batch ----------------------------------------------------------------------------
@torch.inference_mode()
def sample(model, prompts, owner, uniform, ends, stopped, args):
    """Sample one completion a row.

    prompts   distinct lists of ids
    owner     (rows,) index of each row's prompt, ascending
    uniform   (rows, max_new_tokens) in [0, 1), fp64
    ends      end-of-text ids
    stopped   function: does the text of these ids, the end of a completion, hold a stop text?
              None where there is no stop text

    Returns ids and log-probs, both (rows, max_new_tokens), lengths (rows,), and whether each row
    stopped by itself (rows,).
    """
    # 1. Every prompt once.
    device = model.device
    ids, padding, mask, positions = pad_left(prompts, device)
    shared_attention.cache = cache = DynamicCache(config=model.config)
    logits = with_cache(model, cache, input_ids=ids, attention_mask=mask, position_ids=positions,
                        logits_to_keep=1).logits[:, -1]

    # 2. Its cache and last logits once per sample.
    owner = torch.as_tensor(owner, device=device)
    shared = attention_of(model) == "shared"
    spread(cache, owner, padding, args.max_new_tokens - 1, shared)
    logits, positions = logits[owner], positions[owner, -1:]
    mask = None if mask is None or shared else mask[owner]

    # 3. What is stored of all rows; and which rows are in the batch.
    rows = len(owner)
    uniform = torch.as_tensor(uniform, device=device)
    ends = torch.tensor(ends, dtype=torch.long, device=device)
    tokens = torch.zeros(rows, args.max_new_tokens, dtype=torch.long, device=device)
    logprobs = torch.zeros(rows, args.max_new_tokens, device=device)
    lengths = torch.full((rows,), args.max_new_tokens, device=device)
    stops = torch.zeros(rows, dtype=torch.bool, device=device)
    alive = torch.arange(rows, device=device)  # (batch,) their places among all rows
    done = torch.zeros(rows, dtype=torch.bool, device=device)  # (batch,)
    tail = tail_of(args.stop)

    for step in range(args.max_new_tokens):
        # 4. A token a row.
        token, logp = draw(logits, uniform[alive, step], args.temperature, args.top_p, args.top_k)
        tokens[alive, step], logprobs[alive, step] = token, logp

        # 5. Which rows end with it?
        ended = torch.isin(token, ends)
        if stopped:
            recent = tokens[alive, max(0, step - tail):step + 1].tolist()
            ended |= torch.tensor([stopped(row) for row in recent], device=device)
        ended &= ~done
        lengths[alive[ended]] = step + 1
        stops[alive[ended]] = True
        done |= ended
        left = len(done) - int(done.sum())
        if not left or step + 1 == args.max_new_tokens:
            break

        # 6. They leave the batch: its last rows take their places.
        if left < len(done):
            keep = torch.arange(left, device=device)
            keep[done[:left]] = left + (~done[left:]).nonzero().squeeze(-1)
            alive, token, positions, done = alive[keep], token[keep], positions[keep], done[keep]
            cache.batch_select_indices(keep)
            mask = mask if mask is None else mask[keep]

        # 7. The logits of the next token.
        positions = positions + 1
        mask = mask if mask is None else torch.cat([mask, mask.new_ones(len(mask), 1)], -1)
        logits = with_cache(model, cache, input_ids=token[:, None], attention_mask=mask,
                            position_ids=positions, logits_to_keep=1).logits[:, -1]
    return tokens.cpu(), logprobs.cpu(), lengths.tolist(), stops.tolist()


def prepare(model, device, rows, encoded, args):
    """Set the model's attention and try it on the shortest and the longest prompt.

    rows: of the largest chunk; encoded: the ids of all prompts. ValueError: the architecture is not
    supported, or not with this --attention.
    """
    choose_attention(model, device if args.attention == "auto" else args.attention)
    prompts = list(filter(None, encoded))
    shortest_and_longest = [min(prompts, key=len), max(prompts, key=len)][-rows:]
    trial = argparse.Namespace(temperature=1, top_p=1, top_k=0, stop=[],
                               max_new_tokens=min(3, args.max_new_tokens))
    uniform = np.full((len(shortest_and_longest), trial.max_new_tokens), 0.5)
    tokens, logprobs, *_ = sample(model, shortest_and_longest, range(len(uniform)), uniform, [],
                                  None, trial)
    check_sampler(model, shortest_and_longest, tokens, logprobs)


# ---- Prompts to ids ------------------------------------------------------------------------------
def load_problems(path, limit=None):
    """[(where, Problem)] of a prompt file; ids are unique, and each has a prompt or messages."""
    problems, seen = [], set()
    for where, line, problem in read_rows(path, Problem):
        if problem.id in seen:
            fail(f"{where}: duplicate id {problem.id!r}")
        if (problem.prompt is msgspec.UNSET) == (problem.messages is msgspec.UNSET):
            fail(f"{where}: needs either 'prompt' or 'messages'")
        seen.add(problem.id)
        problems.append((where, with_whole_turns(problem, line)))
        if len(problems) == limit:
            break
    return problems


def with_whole_turns(problem, line):
    """The problem whose turns hold all their keys: a template may know more than role, content."""
    if problem.messages is not msgspec.UNSET:
        problem.messages = json.loads(line)["messages"]
    return problem


def problem_lines(path, problems):
    """Yield the line (bytes) of each problem; ends the stage where the prompt file has changed."""
    rows = read_rows(path, Problem)
    for where, sampled in problems:
        _, line, problem = next(rows, (None, None, None))
        if problem is None or with_whole_turns(problem, line) != sampled:
            fail(f"{where}: changed while its completions were sampled")
        yield line


def encode(problems, tokenizer, config, max_new_tokens, overlong="refuse"):
    """Token ids of every prompt, unpadded; none of one that --overlong skips.

    A chat template writes its own special tokens; for a text the tokenizer does.
    """
    positions, encoded = positions_of(config), []
    for where, problem in tqdm(problems, "tokenizing", disable=None):
        try:
            if problem.messages is msgspec.UNSET:
                ids = tokenizer(problem.prompt)["input_ids"]
            else:
                text = tokenizer.apply_chat_template(problem.messages, tokenize=False,
                                                     add_generation_prompt=True)
                ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        except Exception as error:  # no chat template, or one that refuses these roles
            fail(f"{where}: the prompt cannot be encoded: {error}")
        if not ids:
            fail(f"{where}: an empty prompt: this tokenizer gives it no token to start from")
        if max(ids) >= config.vocab_size:
            fail(f"{where}: token id {max(ids)} is beyond the model's vocabulary of "
                 f"{config.vocab_size}: a tokenizer of another model?")
        if positions and len(ids) + max_new_tokens > positions:
            if overlong == "refuse":
                fail(f"{where}: {len(ids)} prompt tokens + {max_new_tokens} new ones exceed the "
                     f"model's {positions} positions; lower --max-new-tokens, or give --overlong "
                     f"skip")
            ids = []
        encoded.append(ids)
    if not any(encoded):
        fail(f"{problems[0][0]}: no prompt leaves room for {max_new_tokens} new tokens in the "
             f"model's {positions} positions; lower --max-new-tokens")
    return encoded


# ---- Where a completion ends ---------------------------------------------------------------------
def special_tokens(tokenizer):
    """{text: id} of the tokens that a completion's text leaves out."""
    added = tokenizer.added_tokens_decoder.items()
    return {token.content: index for index, token in added if token.special}


def stop_ids(tokenizer, stop):
    """The ids of the special tokens among the texts of --stop."""
    special = special_tokens(tokenizer)
    for text, token in itertools.product(stop, special):
        if token in text and text not in special:
            fail(f"--stop {text!r}: {token} is no part of a completion's text; give it alone")
    return {special[text] for text in stop if text in special}


def tail_of(stop):
    """How many tokens, at most, hold one of these texts and up to 8 special tokens, which are no
    text: every other token is at least one byte."""
    return 8 + 4 * max(map(len, stop), default=0)


def end_ids(model, tokenizer, stops=(), ignore_eos=False):
    """All ids that end a completion.

    The model's generation config may name several, the tokenizer one; stops: `stop_ids`.
    """
    if ignore_eos:
        return sorted(stops)
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends]) | {tokenizer.eos_token_id}
    vocab = model.config.get_text_config().vocab_size
    ends = {token for token in ends if isinstance(token, int) and 0 <= token < vocab}
    return sorted(ends.union(stops))


def turn_end(tokenizer):
    """The special token (text, id) with which the chat template ends a turn, or None."""
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception:  # no template, or one that refuses these roles
        return None
    after = text.rpartition("answer")[2].lstrip()
    special = special_tokens(tokenizer)
    return next(((token, special[token]) for token in special if after.startswith(token)), None)


# ---- Chunks of work ------------------------------------------------------------------------------
def run_chunk(chunk, problems, encoded, model, tokenizer, ends, args):
    """The JSONL lines (str) of one chunk's items: the fields that this stage adds."""
    distinct = list(dict.fromkeys(problem for problem, _ in chunk))
    place = {problem: i for i, problem in enumerate(distinct)}
    prompts, owner = [encoded[problem] for problem in distinct], [place[item[0]] for item in chunk]
    identity = [problems[problem][1].id for problem, _ in chunk]
    uniform = np.stack([uniforms(args.seed, name, k, args.max_new_tokens)
                        for name, (_, k) in zip(identity, chunk)])

    def stopped(ids):
        text = tokenizer.decode(ids, skip_special_tokens=True)
        return any(stop in text for stop in args.stop)

    tokens, logprobs, lengths, stops = sample(model, prompts, owner, uniform, ends,
                                              stopped if args.stop else None, args)
    if not torch.isfinite(logprobs).all():
        fail(f"{args.model}: logits that are not finite, for the prompt {identity[0]!r} or near it")
    completions = [row[:length] for row, length in zip(tokens.tolist(), lengths)]
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    rows = zip(chunk, texts, completions, logprobs.tolist(), stops)
    return [json.dumps({
        "sample": k, "completion": text, "prompt_ids": encoded[problem], "completion_ids": ids,
        "logprobs": logp[:len(ids)], "finish_reason": "stop" if stop else "length",
    }, ensure_ascii=False) + "\n" for (problem, k), text, ids, logp, stop in rows]


def run_chunks(chunks, folder, rank, world, args, *parts):
    """Sample this rank's chunks that `folder` does not hold yet; (tokens, seconds).

    parts: what `run_chunk` takes between the chunk and args.
    """
    tokens, seconds = 0, 0.0
    mine = range(rank, len(chunks), world)
    for number in tqdm(mine, "chunks", disable=None if rank == 0 else True):
        path = chunk_path(folder, number)
        if os.path.exists(path) or os.path.exists(args.out):  # rank 0 may even have merged it
            continue
        start = time.monotonic()
        lines = run_chunk(chunks[number], *parts, args)
        write_synced(path, lines, rank)
        seconds += time.monotonic() - start
        tokens += sum(line.count(",", line.index('"completion_ids"'), line.index('"logprobs"'))
                      for line in lines)
    return tokens, seconds


def print_summary(args, meta, encoded, turn):
    """On stderr: what was chosen, and what to know before hours are spent on it."""
    skipped = meta["overlong"]
    if skipped:
        print(f"{args.prompts}: {skipped} of {len(encoded)} problems skipped: their prompts are "
              f"too long for {args.max_new_tokens} new tokens", file=sys.stderr)
    if turn and turn[1] not in meta["end_ids"] and any(turn[1] in ids for ids in encoded):
        print(f"{args.model}: {turn[0]} ends a turn of the prompts, but no completion; if it "
              f"should, give --stop '{turn[0]}'", file=sys.stderr)
    print(f"{args.model} on {meta['device']} x {meta['world_size']}, {meta['dtype']}, attention "
          f"{meta['attention']}: {len(encoded) - skipped} prompts x {args.n} samples in "
          f"{meta['chunks']} chunks, T = {args.temperature}, top-p {args.top_p}, top-k "
          f"{args.top_k}", file=sys.stderr)


# ---- Main ----------------------------------------------------------------------------------------
def main(args):
    began, rank = time.monotonic(), int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))

    # 1. Everything that can be wrong with the input is found before a model is loaded.
    problems = load_problems(args.prompts, args.limit)
    options = check_model(args.model, args.trust_remote_code)
    device, dtype = device_and_dtype(args)
    sampling = {"temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k,
                "repetition_penalty": 1.0, "max_new_tokens": args.max_new_tokens}
    inputs = [args.prompts, source_of(args.model, options)]
    kind = str(dtype).removeprefix("torch.")
    if rank == 0:
        meta = describe(args, inputs, OF_TRAINING, sampling=sampling, device=device, dtype=kind,
                        world_size=world)
        folder = begin(args.out, meta, FREE_FLAGS, OF_TRAINING)
    else:
        folder = wait_for_folder(args.out, vars(args), kind, inputs, FREE_FLAGS, OF_TRAINING,
                                 args.rank_timeout)
    if folder is None:
        return

    # 2. The prompts' ids, the model and the chunks.
    config = load(transformers.AutoConfig, args.model, options)
    tokenizer = load_tokenizer(args.model, options)
    encoded = encode(problems, tokenizer, config.get_text_config(), args.max_new_tokens,
                     args.overlong)
    stops = stop_ids(tokenizer, args.stop)
    model = load_model(args.model, dtype, device, options)
    ends = end_ids(model, tokenizer, stops, args.ignore_eos)
    if not (ends or args.stop or args.ignore_eos):
        fail(f"{args.model}: neither the tokenizer nor generation_config.json names an end-of-text "
             f"token; give --stop or --ignore-eos")
    lengths = [len(ids) for ids in encoded]
    chunks = chunks_of(lengths, args.n, args.max_new_tokens, args.max_batch_tokens)
    try:
        prepare(model, device, max(map(len, chunks)), encoded, args)
    except ValueError as error:
        fail(f"{args.model}: {error}")
    if rank == 0:
        meta.update(attention=attention_of(model), end_ids=ends, chunks=len(chunks),
                    overlong=lengths.count(0))
        print_summary(args, meta, encoded, turn_end(tokenizer))

    # 3. This rank's chunks.
    tokens, seconds = run_chunks(chunks, folder, rank, world, args, problems, encoded, model,
                                 tokenizer, ends)
    if rank:
        return

    # 4. All chunks, in the problems' order.
    wait_for_chunks(folder, len(chunks), args.rank_timeout)
    merged = f"{folder}/merged.jsonl"
    merge(problem_lines(args.prompts, problems), folder, chunks, SAMPLED, merged)
    publish(args.out, {**meta, "wall_s": time.monotonic() - began}, merged)
    shutil.rmtree(folder, ignore_errors=True)
    if seconds:
        print(f"{args.out}: {sum(map(len, chunks))} rows; {tokens / seconds:.0f} tokens/s on "
              f"rank 0", file=sys.stderr)


if __name__ == "__main__":
    run(main, ARGS)
