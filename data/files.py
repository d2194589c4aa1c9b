"""The contract between the stages, in code: reading rows, claiming and publishing outputs.

Whoever replaces a stage reads this file first. Every stage is `run(main, parse_args())`; its main
is

    meta = describe(args, [args.rollouts], ...)    # what the output will be made of
    partial = claim(args.out, meta)                # OUT.partial, locked; None if OUT is complete
    for where, line, row in read_rows(args.rollouts, Rollout): ...
    publish(args.out, meta)                        # to disk, OUT.meta.json, then the name OUT

so that a stage that is killed and started again ends as if it had never been killed, and nobody
reads half a file. Errors are one line on stderr and exit 2 (`fail`). The structs below document the
fields of the rows; a stage decodes those it uses, and every other field of a row passes through all
stages as the bytes it came in.
"""
import argparse
import contextlib
import errno
import fcntl
import functools
import gc
import hashlib
import importlib.metadata
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import typing
from typing import Annotated, Literal

import msgspec

STAGE = os.path.basename(sys.argv[0])  # who speaks in messages and metas; a Parser sets it
LONGEST_LINE = 2**24  # bytes; a longer one is refused unread
LFS_POINTER = b"version https://git-lfs"  # a file that begins so stands for one that git left out
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # of a file system that has none

# ---- Rows ----------------------------------------------------------------------------------------
Sample = Annotated[int, msgspec.Meta(ge=0, lt=2**20)]
TokenId = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
Number = Annotated[float, msgspec.Meta(gt=-1e9, lt=1e9)]


class Part(msgspec.Struct):
    """A part of a turn's content: text; pictures are refused."""
    type: Literal["text"]
    text: str


class Message(msgspec.Struct):
    """One turn of a chat, rendered with the model's own chat template."""
    role: str
    content: str | list[Part] | None  # null: of a turn that holds something else, a tool call


Messages = Annotated[list[Message], msgspec.Meta(min_length=1)]


class Problem(msgspec.Struct):
    """A line of prompts.jsonl, as generate.py reads it: a prompt or messages, one of the two.

    It also holds `task` ("countdown", "math", ...) and the task's own fields (data/countdown.py,
    data/maths.py), and may hold `source`, the name of the benchmark it is from."""
    id: str  # unique in the file; a text, never a file name
    prompt: str | Messages | None = None  # the text to continue, or a chat
    messages: Messages | None = None  # a chat; where it is null, `prompt` counts


class Rollout(msgspec.Struct):
    """A line of rollouts.jsonl, a sampled completion, as score.py reads it.

    It also holds the problem's fields, and the ids and log-probs that `Scored` names. Rows stand in
    the prompt file's order, then by sample."""
    id: str
    sample: Sample  # 0 .. n - 1 within its problem
    completion: str  # the sampled text, special tokens removed
    finish_reason: Literal["stop", "length"]  # by itself, or cut at the length limit


class Scored(msgspec.Struct):
    """A line of scored.jsonl, a rollout with its verdict, as train.py reads it.

    It also holds `pred` (the extracted answer, or null), `reason` (ok, no_answer, parse, numbers,
    value, truncated, timeout) and, for Countdown, `solution` (the canonical form of a right
    answer)."""
    id: str
    sample: Sample
    prompt_ids: Annotated[list[TokenId], msgspec.Meta(min_length=1)]  # unpadded
    completion_ids: list[TokenId]  # unpadded; the end-of-text token included when it was sampled
    logprobs: list[Number]  # of each completion id: full softmax of logits / T, whatever top-p was
    finish_reason: Literal["stop", "length"]
    correct: bool  # decides the sign of the smoothing; not the same as reward > 0
    reward: Number


REASONS = ("ok", "no_answer", "parse", "numbers", "value", "truncated", "timeout")


class Verdict(msgspec.Struct):
    """What a task's `verify` says of a completion. score.py writes it at the end of the row, with
    `correct` and `reward`."""
    pred: str | None  # the extracted answer, or null
    reason: str  # one of REASONS; the completion is correct where it is "ok"
    # By this evaluate.py counts distinct solutions (of the tasks that evaluate.py names); null
    # if the answer is wrong.
    solution: str | None | msgspec.UnsetType = msgspec.UNSET
    reward: float | None = None  # 1.0 if correct, else 0.0, unless the task says otherwise


# ---- What is said to people ----------------------------------------------------------------------
def fail(message, code=2):
    """End the stage with one line on stderr: `score.py: error: rows.jsonl:17: missing 'id'`."""
    line = " ".join(str(message).split())
    # It may quote hostile text, which must not command the terminal.
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
    print(f"{STAGE}: error: {line}", file=sys.stderr)
    sys.exit(code)


def echo(text):
    """Print as long as somebody reads: `stage | head` still completes its output, quietly."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def end_on_signals():
    """Make Ctrl-C and SIGTERM end the process with one line, also while it imports torch."""
    def end(what, code):
        return lambda *_: fail(f"{what}; the same command carries on from here", code)

    signal.signal(signal.SIGTERM, end("terminated", 143))
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a background job ignores it
        signal.signal(signal.SIGINT, end("interrupted", 130))


class Parser(argparse.ArgumentParser):
    """argparse whose errors are `fail`'s.

    file: the __file__ of the stage, whose name stands in all messages and metas."""

    def __init__(self, file, **options):
        global STAGE
        STAGE = os.path.basename(file)
        if os.path.basename(sys.argv[0]) == STAGE:  # started by itself, not called by a program
            end_on_signals()
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                         **options)
        # Python 3.11 takes -0.5 for a number but -1e-3 for a flag.
        self._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$", re.I)
        self.add_argument("--check-flags", action="store_true",
                          help="do nothing but say what is wrong with the flags")

    def add_machine(self, rank_timeout):
        """The flags that all stages with a model have; add_argument of their group."""
        add = self.add_argument_group("machine").add_argument
        add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"],
            help="of the forward pass; auto: float32 on a CPU, bfloat16 on CUDA (train.py: "
                 "autocast over fp32 master weights)")
        add("--device", default="auto", choices=["auto", "cpu", "cuda"],
            help="auto: cuda if there is one")
        add("--rank-timeout", type=float, default=rank_timeout,
            help="seconds that one rank waits for another (default %(default)s)")
        add("--trust-remote-code", action="store_true",
            help="run Python code that the model's folder brings along")
        return add

    def at_least(self, args, **lowest):
        """Refuse numbers that are not finite, and those below flag=LOWEST."""
        for name, value in vars(args).items():
            if isinstance(value, float) and not math.isfinite(value):
                self.error(f"--{name.replace('_', '-')} must be a finite number")
        for name, low in lowest.items():
            if getattr(args, name) is not None and getattr(args, name) < low:
                self.error(f"--{name.replace('_', '-')} must be at least {low}")

    def checked(self, args):
        """args, after a stage's own checks; with --check-flags the stage ends here, with exit 0."""
        if getattr(args, "rank_timeout", 1) <= 0:
            self.error("--rank-timeout must be above 0")
        if args.check_flags:
            sys.exit()
        del args.check_flags
        return args

    def error(self, message):
        fail(f"{message} (see --help)")


def run(main, args):
    """Call main(args); a full disk or a missing file ends it with one line."""
    sys.stdout.reconfigure(errors="backslashreplace")  # names may hold bytes that are not UTF-8
    gc.freeze()  # what the imports made stays
    gc.enable()
    try:
        main(args)
    except OSError as error:
        fail(f"{error.filename or args.out or 'stdout'}: {error.strerror or error}")
    finally:
        gc.unfreeze()  # or modules by nanobind report leaks


def rank_and_world():
    """(rank, number of ranks), which torchrun sets in the environment; (0, 1) without torchrun."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    rank, world, local = (os.environ.get(name, default) for name, default in zip(names, "010"))
    if not (rank + world + local).isdecimal() or "" in (rank, world, local):
        wrong = f"{rank!r}, {world!r} and {local!r} are not three numbers"
    elif int(rank) >= int(world):
        wrong = f"rank {rank} of {world} does not exist"
    else:
        return int(rank), int(world)
    fail(f"{', '.join(names)} in the environment: {wrong}; start with torchrun, or unset all three")


# ---- Reading -------------------------------------------------------------------------------------
def read_rows(path, kind=dict):
    """Yield (where, line, row) for each line of a JSONL file: 'file:number' for messages, the
    bytes, the decoded row.

    kind: a msgspec.Struct with the fields that are wanted, a union of tagged ones, or dict for all.
    Ends the stage on the first line that is no such row: torn, of wrong types, not finite, without
    a field, or above 16 MB; and on a file without any row. Of a key that stands twice in a row, the
    last one counts: a decoder that looked for both would be three times slower.
    """
    decode, empty = msgspec.json.Decoder(kind).decode, True
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(LONGEST_LINE + 1):
            number += 1
            where = f"{path}:{number}"
            if len(line) > LONGEST_LINE:
                fail(f"{where}: a line above 16 MB is refused unread")
            line = line.removeprefix(b"\xef\xbb\xbf" if number == 1 else b"").strip()
            if not line:
                continue
            try:
                if not line.isascii():
                    line.decode()  # msgspec skips unasked fields without looking at their UTF-8
                row = decode(line)
            except msgspec.ValidationError as error:
                fail(f"{where}: {explain(error, kind)}")
            except (ValueError, RecursionError) as error:
                if line.startswith(LFS_POINTER):
                    fail(f"{path}: a git-lfs pointer, not the file itself; run `git lfs pull`")
                fail(f"{where}: not a valid JSON row ({error}); each line must be one JSON object")
            empty = False
            yield where, line, row
    if empty:
        fail(f"{path}: no rows in this file")


def read_once(path, kind):
    """read_rows of a file in which every `id` stands once."""
    places = {}
    for where, line, row in read_rows(path, kind):
        if row.id in places:
            fail(f"{where}: duplicate id {row.id[:80]!r}, first in {places[row.id]}")
        places[row.id] = where
        yield where, line, row


CHAT = '"messages": [{"role": "user", "content": "a text"}]'
HINTS = {"id": 'write a text, such as "id": "17"',
         **dict.fromkeys(("messages", "role", "content"), f"write {CHAT}"),
         "prompt": f'write "prompt": "a text", or {CHAT}'}  # of the fields that data sets bring
FIRST = {"sample": "generate.py", "correct": "score.py", "reward": "score.py"}  # who adds a field


def explain(error, kind):
    """msgspec's message with the field first, as the row spells it."""
    text = str(error)
    if text.startswith("field '"):  # by a row's own __post_init__
        return text.removesuffix(" - at `$`")
    missing = re.fullmatch(r"Object missing required field `(.*?)`( - at `.*`)?", text)
    if missing:
        first = FIRST.get(missing[1])
        hint = f"run {first} first" if first else HINTS.get(missing[1])
        return f"missing field '{missing[1]}'" + (f"; {hint}" if hint else "")
    what, _, place = text.replace("`", "").partition(" - at $")
    field = re.sub(r"\[[^]]*\]$", "", place.lstrip("."))  # of a value in a list, the list's name
    if not field:  # the whole row, or a value of a field that has no type here
        return f"not a valid JSON row ({what}); correct or delete this line"
    kinds = [one.__struct_config__ for one in typing.get_args(kind)
             if hasattr(one, "__struct_config__")]
    if field in {one.tag_field for one in kinds}:  # by it a union of structs decides what a row is
        return f"field '{field}' must be one of {', '.join(one.tag for one in kinds)}"
    hint = HINTS.get(re.match(r"\w*", field)[0])
    return f"field '{field}': {what}" + (f"; {hint}" if hint else "")


# ---- Writing -------------------------------------------------------------------------------------
def files_of(path, unread=()):
    """The (name, path) of every file that a stage reads of an input.

    Of a folder those right in it whose names do not begin with one of `unread`; none where `path`
    is no path, but a name that stands for itself.
    """
    if not os.path.isdir(path):
        return [("", path)] if os.path.exists(path) else []
    names = sorted(name for name in os.listdir(path) if not name.startswith(tuple(unread)))
    files = [(name, os.path.join(path, name)) for name in names]
    return [(name, file) for name, file in files if os.path.isfile(file)]


def digest(path, unread=()):
    """sha256 of an input: a file's bytes, or a folder's names and digests; no path is its own."""
    digests = []
    for name, file in files_of(path, unread):
        with open(file, "rb") as source:
            digests.append(name + hashlib.file_digest(source, "sha256").hexdigest())
    if os.path.isdir(path):
        return hashlib.sha256("".join(digests).encode()).hexdigest()
    return digests[0] if digests else path


def stamp(path, unread=()):
    """[name, bytes, time of the last change in ns] of each of these files; no path is its own.

    While it stays the same so do the files; unlike the digest, it is there at once.
    """
    stats = [(name, os.stat(file)) for name, file in files_of(path, unread)]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats] or path


@functools.cache
def software():
    """{"git": the commit of this code, or None, "versions": of Python and the packages}."""
    def version(package):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(package)

    commit, here = None, os.path.dirname(os.path.abspath(__file__))
    with contextlib.suppress(OSError):
        git = ["git", "-C", here, "rev-parse", "--verify", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    packages = ("torch", "transformers", "tokenizers", "safetensors", "triton", "numpy",
                "math-verify")
    return {"git": commit, "versions": {"python": sys.version.split()[0],
                                        **{name: version(name) for name in packages}}}


def describe(args, inputs, unread=(), **more):
    """The meta of an output: what made it and from what.

    inputs: files or folders, whose sha256 it holds, or names that stand for themselves, such as a
    Hub id at a commit; unread: as `files_of` takes it; more: further entries. It reads all of the
    inputs: where several processes share a stage, rank 0 alone calls it.
    """
    return {"stage": STAGE, "argv": sys.argv, "flags": vars(args), **software(),
            "inputs": {path: digest(path, unread) for path in inputs}, **more}


def claim(out, meta, ignore=(), folder=False):
    """Lock and return the path `out`.partial; None if `out` is complete; refuse one made otherwise.

    ignore: flags that change no byte of the output, and those that name inputs, whose digests are
    compared; folder: whether `out`.partial is one. Its lock is then a file beside it, as NFS locks
    only what is open for writing. The lock is held until the process ends."""
    out = out.rstrip("/")
    partial = out + ".partial"
    lock = partial + ".lock" if folder else partial
    if os.path.exists(out):
        if folder:
            with contextlib.suppress(OSError):
                os.remove(lock)  # of a run that was killed before it could
        with contextlib.suppress(Exception), open(out + ".meta.json", encoding="utf-8") as file:
            metas = json.load(file), json.loads(json.dumps(meta))
            stages = [one["stage"] for one in metas]
            old, new = ({**one["flags"], "inputs": list(one["inputs"].values())} for one in metas)
            flags = (old.keys() | new.keys()) - set(ignore)
            differ = sorted(flag for flag in flags if old.get(flag) != new.get(flag))
            if stages[0] != stages[1]:
                fail(f"{out}: written by {stages[0]}; delete it or choose another --out")
            if not differ:
                return print(f"{out}: complete, left alone", file=sys.stderr)
            fail(f"{out}: made with other {', '.join(differ)}; delete it or choose another --out")
        fail(f"{out}: exists, and no {out}.meta.json says how it was made; delete it or choose "
             "another --out")
    if folder:
        os.makedirs(partial, exist_ok=True)
    claim.lock = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    with contextlib.suppress(FileNotFoundError):
        if lock_file(claim.lock, out) and os.path.samestat(os.fstat(claim.lock), os.stat(lock)):
            if not os.path.exists(out):
                return partial
    fail(f"{out}: another run is writing it; wait for it or choose another --out")


def claim_empty(out, meta, ignore):
    """Claim the folder `out` without what a killed run left, for a stage that starts from its
    input files alone. False if `out` is complete."""
    partial = claim(out, meta, ignore=ignore, folder=True)
    for name in os.listdir(partial) if partial else ():
        path = f"{partial}/{name}"
        shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
    return partial is not None


def wait_for_rank_0(out, timeout):
    """Return when rank 0 has claimed `out`, after `timeout` seconds at most; False if `out` is
    complete."""
    began = time.monotonic()
    while not os.path.isdir(out + ".partial"):
        if os.path.exists(out):
            return False
        if time.monotonic() - began > timeout:
            fail(f"rank {os.environ['RANK']}: rank 0 did not start to write {out} in "
                 f"{timeout:.0f} s: no shared file system?", 4)
        time.sleep(0.1)
    return True


def lock_file(handle, out):
    """Is the lock of `handle` ours? Where the file system has none, say so and go on."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        print(f"{STAGE}: this file system has no locks ({error.strerror}): nothing keeps a second "
              f"run from writing {out}", file=sys.stderr)
    return True


def write_synced(path, content, part="partial"):
    """Write content (text or bytes) to disk as `path`.`part`, then rename: never half a file."""
    try:
        with open(f"{path}.{part}", "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.remove(f"{path}.{part}")
        raise


def publish(out, meta, partial=None):
    """Give `partial` (`out`.partial) its name: contents to disk, the meta, the rename."""
    def sync(path):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)

    out = out.rstrip("/")
    partial = partial or out + ".partial"
    for root, _, names in os.walk(partial):
        for path in [os.path.join(root, name) for name in names] + [root]:
            sync(path)
    sync(partial)
    write_synced(out + ".meta.json", json.dumps(meta, indent=1) + "\n")
    os.replace(partial, out)
    sync(os.path.dirname(os.path.abspath(out)))
    with contextlib.suppress(OSError):
        os.remove(out + ".partial.lock")  # of a folder


def sampling_of(path):
    """The sampling settings in the meta of a row file; None of rows that another program wrote."""
    try:
        with open(path + ".meta.json", encoding="utf-8") as file:
            return json.load(file).get("sampling")
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError, RecursionError) as error:
        fail(f"{path}.meta.json: not a valid meta ({error})")
