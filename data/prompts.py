"""Prompts: the problems of a file, their token ids, and the ids at which a completion ends."""
import itertools
import json
import sys

import msgspec
from tqdm import tqdm

from data.files import Problem, fail, read_rows
from data.models import positions_of


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


def unchanged(path, problems):
    """The line (bytes) of each problem in the prompt file, which still says what was sampled."""
    rows = read_rows(path, Problem)
    for where, known in problems:
        _, line, problem = next(rows, (None, None, None))
        if problem is None or with_whole_turns(problem, line) != known:
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
    """So many tokens can hold one of these texts, up to 8 special ones, which are no text, among
    them: a token is a byte at the least."""
    return 8 + 4 * max(map(len, stop), default=0)


def end_ids(model, tokenizer, stops=(), ignore_eos=False):
    """All ids that end a completion.

    The model's generation config may name several, the tokenizer one; stops: `stop_ids`.
    """
    if ignore_eos:
        return sorted(stops)
    found = model.generation_config.eos_token_id
    found = set(found if isinstance(found, list) else [found]) | {tokenizer.eos_token_id}
    vocab = model.config.get_text_config().vocab_size
    found = {token for token in found if isinstance(token, int) and 0 <= token < vocab}
    return sorted(found.union(stops))


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


def tell(args, meta, encoded, turn):
    """On stderr what was chosen, and what should be known before hours are spent on it."""
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
