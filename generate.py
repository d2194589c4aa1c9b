r"""Stage 1: sample n completions of every prompt from a Hugging Face causal language model.

    python generate.py --model data/tiny-countdown --prompts prompts.jsonl --out rollouts.jsonl \
        --n 16 --max-new-tokens 24
    torchrun --nproc-per-node 8 -- generate.py --model Qwen/Qwen2.5-Math-1.5B --prompts P.jsonl \
        --out rollouts.jsonl --n 8 --temperature 0.7 --max-new-tokens 2048

Reads prompts.jsonl, one problem a line: `id`, `prompt` (text) or `messages` (a chat, rendered with
the model's own chat template; a last turn of the assistant's is continued), and any other fields,
which pass through untouched.
Writes rollouts.jsonl, one sample a line, sorted by problem, then by sample: the problem's fields,
then

    sample          0 .. n - 1
    completion      the text, without the special tokens that end it, pad it or separate turns
    prompt_ids, completion_ids    the end-of-text token included when it was sampled
    logprobs        of each completion id: log-softmax of logits / T in fp32, whatever top-p and
                    top-k were; 0 when greedy
    finish_reason   "stop" or "length"

and OUT.meta.json, which says how it was made. data/files.py holds the types of all fields.

How it works, in the order of the code:
  1. one token a row and step is drawn (`draw`) by inverse CDF from one uniform number that depends
     on (seed, id, sample, step) alone (`uniforms`);
  2. a prompt, and what several samples begin with, is computed once (`sample`); samples share the
     prompt's key-value cache, or get copies of it (--attention); finished rows are dropped;
  3. prompts become token ids (`encode`); end-of-text ids and --stop end a completion;
  4. all (problem, sample), sorted by prompt length, are cut into chunks of at most
     --max-batch-tokens (data/chunks.py), of which a restart loses one at most; rank r of W takes
     the chunks r, r + W, ...; rank 0 merges them in the problems' order.
"""
import argparse
import gc
import hashlib
import itertools
import json
import os
import re
import sys
import time

from data.files import Parser, Problem, describe, fail, rank_and_world, read_once, run, stamp


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
    add("--chat-template-kwargs", type=json_object, metavar="JSON",
        help="variables of the model's chat template, such as '{\"enable_thinking\": false}'")

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


def json_object(text):
    return {**json.loads(text)}  # what it raises of anything else, argparse reports


def check_flags(parser, args):
    parser.at_least(args, n=1, temperature=0, top_k=0, max_new_tokens=1, max_batch_tokens=1,
                    limit=1)
    if not 0 < args.top_p <= 1:
        parser.error("--top-p must be above 0 and at most 1")
    for text in args.stop:
        if not text:
            parser.error("--stop takes texts that are not empty")
        if escape := re.search(r"\\[nrt](?![a-z])", text):  # before a letter: LaTeX
            parser.error(f"--stop {text}: {escape[0]} is a backslash and a letter here; bash "
                         f"writes the character as $'{escape[0]}'")
    return parser.checked(args)


def parse_args(argv=None):
    parser = Parser(__file__, description=__doc__)
    add_flags(parser)
    return check_flags(parser, parser.parse_args(argv))


if __name__ == "__main__":
    ARGS = parse_args()  # before the heavy imports: --help and a wrong flag answer at once
    gc.disable()  # until `run`: looking through what they make takes an eighth of a start

import numpy as np
import torch
import transformers
from tqdm import tqdm
from transformers.cache_utils import DynamicCache

from data.chunks import (begin, chunks_of, merge, publish_merged, run_chunks, wait_for_chunks,
                         wait_for_folder)
from data.models import (OF_TRAINING, check_model, device_and_dtype, example_chat, hidden_ids, load,
                         load_errors, load_model, load_tokenizer, positions_of,
                         reference_tokenizer, source_of, special_tokens)

# By its own folder: `kernels` is also a package of Hugging Face, and both may be installed.
sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "kernels"))
from shared_prompt import (attention_of, branch, check_sampler, choose_attention, extend, pad_left,
                           shared_attention, spread, with_cache)

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()  # what matters of its warnings is an error here

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


def draw(logits, history, uniform, temperature, top_p=1.0, top_k=0):
    """One token a row by inverse CDF.

    logits: (histories, vocab); history, uniform (fp64): (rows,) -> ids, log-probs (fp32): (rows,).
    """
    if temperature == 0:  # the limit T -> 0: certain, log-prob 0 (and NaN stays NaN)
        return logits.argmax(-1)[history], 0 * logits.amax(-1).float()[history]
    logp = torch.log_softmax(logits.float() / temperature, dim=-1)
    probs = logp.exp()
    if top_p < 1 or top_k:
        probs = nucleus(probs, top_p, top_k)
    # fp64: over 152k tokens sums in fp32 drift by more than small probabilities.
    cdf = probs.cumsum(-1, dtype=torch.float64)
    # By bisection the first token with cdf > u, which is never one of probability zero.
    uniform, last = uniform * cdf[history, -1], logits.shape[-1] - 1
    ids, high = torch.zeros_like(history), torch.full_like(history, last)
    for _ in range(1 + last.bit_length()):
        middle = (ids + high) // 2
        beyond = cdf[history, middle] > uniform
        ids, high = torch.where(beyond, ids, middle + 1), torch.where(beyond, middle, high)
    ids = ids.clamp_(max=last)
    return ids, logp[history, ids]


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

    # 2. The batch holds histories: a prompt and some tokens after it. Rows of one history share it.
    shared, rows = attention_of(model) == "shared", len(owner)
    spread(cache, padding, rows, args.max_new_tokens - 1, shared)
    history = torch.as_tensor(owner, device=device)  # (alive,) of each row, its place in the batch
    mask, positions = None if shared else mask, positions[:, -1:]

    # 3. What is stored of all rows; and which rows go on.
    uniform = torch.as_tensor(uniform, device=device)
    ends = torch.tensor(ends, dtype=torch.long, device=device)
    tokens = torch.zeros(rows, args.max_new_tokens, dtype=torch.long, device=device)
    logprobs = torch.zeros(rows, args.max_new_tokens, device=device)
    lengths = torch.full((rows,), args.max_new_tokens, device=device)
    stops = torch.zeros(rows, dtype=torch.bool, device=device)
    alive = torch.arange(rows, device=device)  # (alive,) their places among all rows
    # A token is at least a byte of text, but for special ones, of which there may be some.
    tail = 8 + 4 * max(map(len, args.stop), default=0)

    for step in range(args.max_new_tokens):
        # 4. A token a row.
        token, logp = draw(logits, history, uniform[alive, step], args.temperature, args.top_p,
                           args.top_k)
        tokens[alive, step], logprobs[alive, step] = token, logp

        # 5. Rows that end with it leave.
        ended = torch.isin(token, ends)
        if stopped:
            recent = tokens[alive, max(0, step - tail):step + 1].tolist()
            ended |= torch.tensor([stopped(row) for row in recent], device=device)
        lengths[alive[ended]] = step + 1
        stops[alive[ended]] = True
        alive, token, history = alive[~ended], token[~ended], history[~ended]
        if not len(alive) or step + 1 == args.max_new_tokens:
            break

        # 6. The histories of the others.
        parent, token, history = branch(history, token, logits.shape[-1])
        extend(cache, parent)

        # 7. The logits of the next token.
        positions = positions[parent] + 1
        if mask is not None:
            mask = torch.cat([mask[parent], mask.new_ones(len(parent), 1)], -1)
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
    """[(where, line, Problem)] of a prompt file, each with a text as `prompt` or with `messages`.

    A chat may also stand under `prompt`, and the text of a turn in parts, as in many data sets. The
    turns keep all their keys: a template may know more than role and content.
    """
    problems = []
    for where, line, problem in itertools.islice(read_once(path, Problem), limit):
        if problem.prompt == "" and problem.messages:  # an empty column
            problem.prompt = None
        if (problem.prompt is None) == (problem.messages is None):
            fields = ", ".join(json.loads(line))
            fail(f"{where}: needs either 'prompt' or 'messages', and has {fields}; `python -m "
                 f"data.maths` converts questions with answers")
        if not isinstance(problem.prompt, str):
            key = "messages" if problem.prompt is None else "prompt"
            problem.prompt, problem.messages = None, json.loads(line)[key]
            for turn in problem.messages:
                if isinstance(turn["content"], list):
                    turn["content"] = "".join(part["text"] for part in turn["content"])
        problems.append((where, line, problem))
    return problems


def encode(problems, tokenizer, reference, config, args):
    """Unpadded token ids of every prompt; none of one that --overlong skips."""
    positions, encoded = positions_of(config), []
    for where, _, problem in tqdm(problems, "tokenizing", disable=None):
        try:
            ids = prompt_ids(problem, tokenizer, reference, args.chat_template_kwargs or {})
        except Exception as error:  # such as no chat template, or one that refuses these roles
            fail(f"{where}: the prompt cannot be encoded: {error}")
        if not ids:
            fail(f"{where}: an empty prompt: this tokenizer gives it no token to start from")
        if max(ids) >= config.vocab_size:
            fail(f"{where}: token id {max(ids)} is beyond the model's vocabulary of "
                 f"{config.vocab_size}: a tokenizer of another model?")
        if positions and len(ids) + args.max_new_tokens > positions:
            if args.overlong == "refuse":
                fail(f"{where}: {len(ids)} prompt tokens + {args.max_new_tokens} new ones exceed "
                     f"the model's {positions} positions; lower --max-new-tokens, or give "
                     f"--overlong skip")
            ids = []
        encoded.append(ids)
    if not any(encoded):
        fail(f"{args.prompts}: no prompt leaves room for {args.max_new_tokens} new tokens in the "
             f"model's {positions} positions; lower --max-new-tokens")
    return encoded


def prompt_ids(problem, tokenizer, reference, variables):
    """The token ids of one prompt; ValueError where they are not what the model was trained with.

    reference: `reference_tokenizer`; variables: of the chat template.
    """
    # 1. The text. A chat goes on with a new turn of the assistant's, or with the one it ends in.
    text, turns = problem.prompt, problem.messages
    if text is None:
        continued = turns[-1]["role"] == "assistant"
        if continued and turns[-1]["content"] == "":  # begun, but nothing is said yet
            turns, continued = turns[:-1], False
        text = tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=not continued,
            continue_final_message=continued, **variables)

    # 2. Its ids, and the text that they give, are those of tokenizer.json.
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if reference and (reference.encode(text, add_special_tokens=False).ids != ids or
                      reference.decode(ids, skip_special_tokens=False) !=
                      tokenizer.decode(ids, clean_up_tokenization_spaces=False)):
        raise ValueError(
            f"{type(tokenizer).__name__}, the tokenizer's class, splits or joins it otherwise than "
            f"tokenizer.json does; set \"tokenizer_class\": \"PreTrainedTokenizerFast\" in "
            f"tokenizer_config.json of a copy of the model")

    # 3. The special tokens that the tokenizer puts in front of a text, unless they are there, and
    # none behind it. A chat template writes its own.
    if problem.messages is None:
        whole = tokenizer(text)["input_ids"]
        fronts = [whole[:start] for start in range(len(whole) - len(ids) + 1)
                  if whole[start:start + len(ids)] == ids]
        front = fronts[-1] if fronts else []
        ids = ids if ids[:len(front)] == front else front + ids
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    if ids[:2] == [begin, begin]:
        raise ValueError(f"it begins with {tokenizer.bos_token} twice; write it without")
    if len(ids) > 1 and ids[-1] == end != begin:  # one token for both separates texts
        raise ValueError(f"it ends with the end-of-text token {tokenizer.eos_token}; leave it out")
    return ids


# ---- Where a completion ends, and its text -------------------------------------------------------
def end_ids(args, options, config, tokenizer):
    """All ids that end a completion: the special tokens among --stop, those that the model's
    generation config names (it may be several), and the tokenizer's."""
    special, hidden = special_tokens(tokenizer), hidden_ids(tokenizer)
    for text, token in itertools.product(args.stop, special):
        if token in text and text not in special and special[token] in hidden:
            fail(f"--stop {text!r}: {token} is no part of a completion's text; give it alone")
    ends = {special[text] for text in args.stop if text in special}
    if not args.ignore_eos:
        with load_errors(args.model):
            try:
                named = transformers.GenerationConfig.from_pretrained(args.model, **options)
            except OSError:  # it has no such file
                named = transformers.GenerationConfig.from_model_config(config)
        vocab, named = config.get_text_config().vocab_size, named.eos_token_id
        named = [*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id]
        ends |= {token for token in named if isinstance(token, int) and 0 <= token < vocab}
        if not ends and not args.stop:
            fail(f"{args.model}: names no end-of-text token; give --stop or --ignore-eos")
    return sorted(ends)


def text_of(ids, tokenizer, hidden):
    """The text of a completion's ids. hidden: `hidden_ids`."""
    return tokenizer.decode([token for token in ids if token not in hidden])


# ---- Chunks of work ------------------------------------------------------------------------------
def plan(args):
    """Read and check everything that a sampler needs, before a model is loaded.

    Returns a namespace: `problems` (see `load_problems`) and the ids of their prompts, `encoded`;
    `chunks` of items (problem, sample); the `tokenizer`; `ends`, the ids that end a completion;
    `hidden`, those that its text leaves out; the `options` of from_pretrained; and the model's
    `source`, a folder or a commit of the Hub.
    """
    before = stamp(args.prompts)
    problems = load_problems(args.prompts, args.limit)
    options = check_model(args.model, args.trust_remote_code)
    config = load(transformers.AutoConfig, args.model, options)
    tokenizer = load_tokenizer(args.model, options)
    chats = any(problem.messages for _, _, problem in problems)
    template = str(tokenizer.chat_template) if chats else ""
    for name in args.chat_template_kwargs or ():
        if name not in template:
            fail(f"--chat-template-kwargs: no prompt is a chat whose template has {name!r}")
    encoded = encode(problems, tokenizer, reference_tokenizer(args.model, options),
                     config.get_text_config(), args)
    ends = end_ids(args, options, config, tokenizer)
    if stamp(args.prompts) != before:  # its digest would be another file's
        fail(f"{args.prompts}: changed while it was read; start again")
    return argparse.Namespace(
        problems=problems, encoded=encoded, tokenizer=tokenizer, ends=ends,
        hidden=hidden_ids(tokenizer, ends), options=options, source=source_of(args.model, options),
        chunks=chunks_of(list(map(len, encoded)), args.n, args.max_new_tokens,
                         args.max_batch_tokens))


def run_chunk(chunk, work, model, args):
    """The JSONL lines (str) of one chunk's items: the fields that this stage adds."""
    place = {problem: i for i, problem in enumerate(dict.fromkeys(item[0] for item in chunk))}
    uniform = np.stack([uniforms(args.seed, work.problems[problem][2].id, k, args.max_new_tokens)
                        for problem, k in chunk])

    def stopped(ids):
        text = text_of(ids, work.tokenizer, work.hidden)
        return any(stop in text for stop in args.stop)

    tokens, logprobs, lengths, stops = sample(
        model, [work.encoded[problem] for problem in place], [place[item[0]] for item in chunk],
        uniform, work.ends, stopped if args.stop else None, args)
    if not torch.isfinite(logprobs).all():
        fail(f"{args.model}: logits that are not finite, near {work.problems[chunk[0][0]][0]}")
    rows = zip(chunk, tokens.tolist(), logprobs.tolist(), lengths, stops)
    return [json_row(item, ids[:length], logp[:length], "stop" if stop else "length", work)
            for item, ids, logp, length, stop in rows]


def json_row(item, ids, logprobs, finish_reason, work):
    """A JSONL line (str) with the fields that this stage adds to a problem's."""
    problem, sample = item
    values = (sample, text_of(ids, work.tokenizer, work.hidden), work.encoded[problem], ids,
              logprobs, finish_reason)
    return json.dumps(dict(zip(SAMPLED, values)), ensure_ascii=False) + "\n"


def print_summary(args, meta, work):
    """On stderr: what was chosen, and what to know before hours are spent on it."""
    after = example_chat(work.tokenizer).rpartition("answer")[2].lstrip()
    for token, index in special_tokens(work.tokenizer).items():
        if (after.startswith(token) and index not in work.ends
                and any(index in ids for ids in work.encoded)):
            print(f"{args.model}: {token} ends a turn of the prompts, but no completion; if it "
                  f"should, give --stop '{token}'", file=sys.stderr)
    skipped = f" ({meta['overlong']} too long ones skipped)" if meta["overlong"] else ""
    print(f"{args.model} on {meta['device']} x {meta['world_size']}, {meta['dtype']}, attention "
          f"{meta['attention']}: {len(work.encoded) - meta['overlong']} prompts{skipped} x "
          f"{args.n} samples in {meta['chunks']} chunks, T = {args.temperature}, top-p "
          f"{args.top_p}, top-k {args.top_k}", file=sys.stderr)


# ---- Main ----------------------------------------------------------------------------------------
def describe_output(args, work, device, dtype, world):
    """The meta of the rows, as `describe` makes it."""
    sampling = {"temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k,
                "repetition_penalty": 1.0, "max_new_tokens": args.max_new_tokens}
    return describe(args, [args.prompts, work.source], OF_TRAINING, sampling=sampling,
                    device=device, dtype=dtype, world_size=world, end_ids=work.ends,
                    chunks=len(work.chunks), overlong=work.encoded.count([]))


def main(args):
    began, (rank, world) = time.monotonic(), rank_and_world()

    # 1. Everything that can be wrong with the input is found before a model is loaded.
    device, dtype = device_and_dtype(args)
    work = plan(args)

    # 2. The folder of this command's chunks.
    kind = str(dtype).removeprefix("torch.")
    if rank == 0:
        meta = describe_output(args, work, device, kind, world)
        folder = begin(args.out, meta, work)
    else:
        folder = wait_for_folder(args, kind, work)
    if folder is None:
        return

    # 3. The model.
    model = load_model(args.model, dtype, device, work.options)
    try:
        prepare(model, device, max(map(len, work.chunks)), work.encoded, args)
    except ValueError as error:
        fail(f"{args.model}: {error}")
    if rank == 0:
        meta["attention"] = attention_of(model)
        print_summary(args, meta, work)

    # 4. This rank's chunks; then rank 0 merges all of them.
    run_chunks(lambda chunk: run_chunk(chunk, work, model, args), work.chunks, args.out)
    if rank == 0:
        wait_for_chunks(folder, len(work.chunks), args.rank_timeout)
        merge([line for _, line, _ in work.problems], folder, work.chunks, SAMPLED)
        publish_merged(args.out, {**meta, "wall_s": time.monotonic() - began})


if __name__ == "__main__":
    run(main, ARGS)
