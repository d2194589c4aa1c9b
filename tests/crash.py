"""The fault campaign: disturb every stage, start it again with the same command, compare with an
undisturbed run.

    python tests/crash.py                  the whole campaign; prints the table of tests/README.md
    python tests/crash.py --stages score train --kills 20

One warm process imports torch, transformers and the stages once and forks a child for each start of
a stage, so that hundreds of starts take minutes. A child may carry a fault; its *steps* are what it
does to the disk below its folder: an open for writing, a write (half of it is done first), an
fsync, a rename, a removal, a new folder.

    kill      SIGKILL at the i-th step, for every i
    power     the same, and every file that was not yet fsynced loses its second half
    full      the i-th step alone fails with "No space left on device", for every i: exit 2, one
              line, nothing goes on
    instant   SIGKILL, SIGTERM or SIGINT at a random instant
    disk      files can have so many bytes only (RLIMIT_FSIZE)
    read-only every step fails with "Read-only file system"
    twice     a second start on the same output while the first is stopped at a random step, and two
              starts at once
    torn      the last line of the input is cut in half
    clock     time.time() jumps by months, both ways, at each call

After each fault, whatever bears a final name is compared with the undisturbed run's, and the same
command must then end with exit 0 and the same bytes: JSONL, JSON, PNG and weights as they are, a
meta without argv, git commit and wall time, metrics.jsonl without tokens_per_s and peak_mem_bytes.
Anything else is a loss. Exit status 1 if there was one.
"""
import argparse
import atexit
import builtins
import collections
import contextlib
import errno
import functools
import importlib
import io
import itertools
import json
import os
import random
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback

from ask import ask

REACHED = b"(here the fault)\n"  # on stderr
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
KINDS = ("kill", "power", "full", "read-only", "instant", "disk", "twice", "torn", "clock")
STAGES = {  # name: (command, what it writes, its input that is torn)
    "countdown": ("data/countdown.py --out prompts.jsonl --n 6 --numbers 3",
                  ["prompts.jsonl"], None),
    "generate": ("generate.py --model base --prompts prompts.jsonl --out rollouts.jsonl --n 4 "
                 "--max-new-tokens 8 --max-batch-tokens 200 --device cpu",
                 ["rollouts.jsonl"], "prompts.jsonl"),
    "score": ("score.py rollouts.jsonl --out scored.jsonl", ["scored.jsonl"], "rollouts.jsonl"),
    "train": ("train.py --model first --rollouts scored.jsonl --out second --updates 2 --lr 1e-3 "
              "--gamma-p 0.1 --device cpu", ["second"], "scored.jsonl"),
    "evaluate": ("evaluate.py scored.jsonl --out eval.json --plot passk.png --resamples 50",
                 ["eval.json", "passk.png"], "scored.jsonl"),
}


# ---- The warm process ----------------------------------------------------------------------------
def serve(path, base):
    """Save a tiny random model to `base`, then run stages until stdin is closed.

    A request on the socket `path` is JSON {"argv", "cwd", "fault"} with the three standard files;
    the answer is the child's process id, then its exit code."""
    sys.path.insert(0, ROOT)
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    modules = {name.rpartition(".")[2]: importlib.import_module(name) for name in (
        "generate", "score", "train", "evaluate", "data.countdown", "data.maths", "data.select",
        "data.make_tiny")}
    figure = modules["evaluate"].new_figure(1, 2, 9, 4)[0]
    modules["evaluate"].save(figure, base + ".png")  # the first picture loads fonts
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = modules["make_tiny"].make_tokenizer()
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, intermediate_size=32, max_position_embeddings=64,
        tie_word_embeddings=True, eos_token_id=0, pad_token_id=1, bos_token_id=None))
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)

    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    server.listen(8)
    print("ready", flush=True)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while server in select.select([server, sys.stdin], [], [])[0]:
        connection = server.accept()[0]
        if os.fork() == 0:
            answer(connection, modules)
        connection.close()


def answer(connection, modules):
    """Run one request in a child of our own, and end."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the child may be hit at its first instruction
    request, handles, _, _ = socket.recv_fds(connection, 2**16, 3)
    request = json.loads(request)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setsid()
            for number, handle in enumerate(handles):
                os.dup2(handle, number)
            os.closerange(3, connection.fileno() + 4)  # no lock may outlive its process in another
            os.chdir(request["cwd"])
            sys.argv = request["argv"]
            stage = modules[os.path.basename(sys.argv[0]).removesuffix(".py")]
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
            signal.signal(signal.SIGINT, signal.default_int_handler)  # as Python starts
            args = stage.parse_args(sys.argv[1:])
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
            if request["fault"]:
                inject(**request["fault"])
            importlib.import_module("data.files").run(stage.main, args)
            code = 0
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
            sys.stdout.flush()
            os._exit(code)
    connection.sendall(f"{pid}\n".encode())
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(f"{code}\n".encode())
    os._exit(0)


def inject(kind, at=0):
    """Give this process a fault; `at` is the number of the step that fails, the bytes of a disk or
    the seed of a clock."""
    if kind == "clock":
        rng, now = random.Random(at), time.time
        time.time = lambda: now() + rng.uniform(-1e7, 1e7)
        return
    if kind == "disk":
        resource.setrlimit(resource.RLIMIT_FSIZE, (at, at))
        return
    import safetensors.torch

    root, steps = os.getcwd() + os.sep, itertools.count()
    dirty = set()  # inodes written since their last fsync
    plain_open, plain_handle, plain_sync, plain_send = open, os.open, os.fsync, os.sendfile
    plain_serialize = safetensors.torch.serialize_file

    def written(handle_or_path):
        dirty.add(os.stat(handle_or_path).st_ino)

    def step(half=None, error=None):
        if next(steps) != at and kind != "read-only":
            return
        os.write(2, REACHED)
        if kind == "read-only":
            raise OSError(errno.EROFS, "Read-only file system")
        if half and kind != "stop":
            half()
        if kind == "full":
            raise error or OSError(errno.ENOSPC, "No space left on device")
        if kind == "power":
            for folder, _, names in os.walk("."):
                for path in (os.path.join(folder, name) for name in names):
                    if not os.path.islink(path) and os.stat(path).st_ino in dirty:
                        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGSTOP if kind == "stop" else signal.SIGKILL)

    def below(path):
        return isinstance(path, (str, os.PathLike)) and os.path.abspath(path).startswith(root)

    class Raw(io.FileIO):
        def write(self, data):
            data = memoryview(data).cast("B")
            written(self.fileno())
            step(lambda: io.FileIO.write(self, data[:len(data) // 2]))
            return super().write(data)

    def open_file(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, **more):
        if not below(file) or not set(mode) & set("wax+"):
            return plain_open(file, mode, buffering, encoding, errors, newline, **more)
        step()
        raw = Raw(file, mode.replace("b", "").replace("t", ""))
        written(raw.fileno())
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

    def sync(handle):
        step()
        plain_sync(handle)
        dirty.discard(os.fstat(handle).st_ino)

    def open_handle(path, flags, *more, **also):
        if flags & os.O_CREAT and below(path):
            step()
        return plain_handle(path, flags, *more, **also)

    def send(to, *arguments):
        written(to)
        step()
        return plain_send(to, *arguments)

    def change(name, plain):  # of a folder's entries; only what takes room can find the disk full
        def changed(path, *more, **also):
            takes_room = (name in ("rename", "replace")
                          or name == "mkdir" and not os.path.exists(path))
            if (below(path) or "dir_fd" in also) and (takes_room or kind != "full"):
                step()
            return plain(path, *more, **also)
        return changed

    def serialize(tensors, path, *more, **also):  # written by Rust
        def half():
            plain_serialize(tensors, path, *more, **also)
            os.truncate(path, os.path.getsize(path) // 2)
            written(path)
        step(half, safetensors.SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"))
        plain_serialize(tensors, path, *more, **also)
        written(path)

    builtins.open = io.open = open_file
    os.fsync, os.open, os.sendfile = sync, open_handle, send
    for name in ("mkdir", "rmdir", "unlink", "remove", "rename", "replace"):
        setattr(os, name, change(name, getattr(os, name)))
    safetensors.torch.serialize_file = serialize


@functools.cache
def warm():
    """The warm process, seen from outside: (its socket, its model's folder)."""
    folder = tempfile.mkdtemp(prefix="crash-")
    places = f"{folder}/socket", f"{folder}/base"
    process = subprocess.Popen(
        [sys.executable, os.path.abspath(__file__), "--serve", *places], start_new_session=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
             "MPLBACKEND": "agg"})

    def close():
        process.communicate()
        shutil.rmtree(folder, ignore_errors=True)

    atexit.register(close)
    if process.stdout.readline() != "ready\n":
        sys.exit("crash.py: the warm process did not start")
    return places


class Child:
    """A stage at work: .pid; .wait() gives its exit code (minus the signal that ended it); .err is
    its stderr then."""

    def __init__(self, argv, cwd, fault=None):
        self.file = tempfile.TemporaryFile()
        with open(os.devnull, "r+b") as null:
            handles = [null.fileno(), null.fileno(), self.file.fileno()]
            self.answers = ask(warm()[0], argv, handles, cwd, fault)
            self.pid = next(self.answers)

    def wait(self):
        (code,) = self.answers
        with self.file:
            self.file.seek(0)
            self.err = self.file.read().decode()
        return code


# ---- The undisturbed run, and comparing with it --------------------------------------------------
def content(path):
    """What must not differ, of a file or folder. {relative path: bytes}, timings and argv taken
    out."""
    if os.path.isdir(path):
        return {f"{name}/{deeper}": data for name in sorted(os.listdir(path))
                for deeper, data in content(f"{path}/{name}").items()}

    def without(line, *measured):
        return {key: value for key, value in json.loads(line).items() if key not in measured}

    with open(path, "rb") as file:
        data = file.read()
    if path.endswith(".meta.json"):
        data = without(data, "argv", "git", "wall_s", "wall_time")
    elif path.endswith("metrics.jsonl"):
        data = [without(line, "tokens_per_s", "peak_mem_bytes") for line in data.splitlines()]
    return {"": data}


class Campaign:
    def __init__(self, folder, seed=0):
        self.folder, self.rng, self.number = folder, random.Random(seed), 0
        self.faults, self.losses, self.seconds = collections.Counter(), [], {}
        self.reference = f"{folder}/undisturbed"
        os.makedirs(self.reference)
        os.symlink(warm()[1], f"{self.reference}/base")
        earlier = STAGES["train"][0].replace("first", "base").replace("second", "first")
        for name, (command, *_) in STAGES.items():
            if name == "train":  # an earlier round, whose optimizer and metrics are carried on
                self.undisturbed(earlier)
            self.seconds[name] = self.undisturbed(command)
        self.outputs = {name: {out + end: content(f"{self.reference}/{out}{end}")
                               for out in outputs for end in ("", ".meta.json")
                               if os.path.exists(f"{self.reference}/{out}{end}")}
                        for name, (_, outputs, _) in STAGES.items()}

    def undisturbed(self, command):
        began = time.monotonic()
        child = Child(command.split(), self.reference)
        if child.wait():
            sys.exit(f"crash.py: {command}: {child.err}")
        return time.monotonic() - began

    def fresh(self, name):
        """A new folder with links to the inputs of a stage."""
        self.number += 1
        folder = f"{self.folder}/{name}-{self.number}"
        os.makedirs(folder)
        for entry in os.listdir(self.reference):
            if entry not in self.outputs[name]:
                os.symlink(f"{self.reference}/{entry}", f"{folder}/{entry}")
        return folder

    def start(self, name, folder, **fault):
        return Child(STAGES[name][0].split(), folder, fault or None)

    def differing(self, name, folder, whole):
        """What bears a final name and is not as it should be; with `whole`, also what is missing or
        left over."""
        wrong = []
        for entry, expected in self.outputs[name].items():
            path, found = f"{folder}/{entry}", None
            with contextlib.suppress(OSError, ValueError):
                found = content(path)
            if found != expected and (whole or os.path.exists(path)):
                wrong.append(entry)
        if whole:
            wrong += sorted(set(os.listdir(folder)) - set(os.listdir(self.reference)))
        return wrong

    def check(self, name, kind, folder, told, problems=(), litter=False):
        """Count a fault; look at what it left, start the stage again, compare. `litter`: an empty
        .partial may stay."""
        problems = [*problems, *(f"{entry} is half"
                                 for entry in self.differing(name, folder, whole=False))]
        again = self.start(name, folder)
        if code := again.wait():
            problems.append(f"started again it ends with {code}: {again.err.strip()}")
        problems += [f"{entry} differs in the end"
                     for entry in self.differing(name, folder, whole=True)
                     if not (litter and entry.endswith(".partial"))]
        self.faults[name, kind] += 1
        if problems:
            loss = f"{name}, {kind}, {told}: {'; '.join(problems)} (see {folder})"
            self.losses.append((name, loss))
            print(f"LOSS: {loss}", file=sys.stderr)
        else:
            shutil.rmtree(folder)

    # ---- The kinds of faults ---------------------------------------------------------------------
    def disturb(self, name, kind, steps, count):
        """Faults of one kind: at each of `steps` to the disk, or `count` of them."""
        if kind in ("instant", "twice", "torn"):
            getattr(self, kind)(name, count)
        else:
            places = {"read-only": [0], "clock": range(count), "disk": self.rooms(name, count)}
            self.injected(name, kind, places.get(kind, steps))

    def injected(self, name, kind, places):
        """A start with the fault `kind` at each of `places`, until one does not meet it."""
        for at in places:
            folder = self.fresh(name)
            child = self.start(name, folder, kind=kind, at=at)
            code = child.wait()
            if kind == "disk" and code == 0 or kind not in ("disk", "clock") and (
                    REACHED.decode() not in child.err):
                return shutil.rmtree(folder)
            if kind == "clock":
                problems = self.differing(name, folder, whole=True)
            elif kind in ("kill", "power"):
                problems = [] if code == -signal.SIGKILL else [f"ended with {code}: {child.err}"]
            else:
                problems = one_line(name, code, child.err)
            self.check(name, kind, folder, f"at {at}", problems)

    def rooms(self, name, parts):
        """Bytes that are too few for the largest file; 4096 at least, as stderr is a file too."""
        largest = max(os.path.getsize(f"{self.reference}/{out}/{inner}".rstrip("/"))
                      for out, found in self.outputs[name].items() for inner in found)
        return sorted({max(4096, largest * part // parts) for part in range(parts)})

    def instant(self, name, count):
        """`count` starts that were really ended by a signal at a random instant."""
        for _ in range(4 * count):
            if self.faults[name, "instant"] == count:
                break
            number = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT][self.rng.randrange(3)]
            folder, wait = self.fresh(name), self.rng.uniform(0, self.seconds[name])
            child = self.start(name, folder)
            time.sleep(wait)
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, number)
            code, problems = child.wait(), []
            if code == 0:
                shutil.rmtree(folder)
                continue
            if code not in (-number, 128 + number) or "Traceback" in child.err:
                problems = [f"ended with {code}: {child.err.strip()}"]
            self.check(name, "instant", folder, f"{number.name} after {wait:.3f} s", problems)

    def twice(self, name, count):
        for at in [self.rng.randrange(20) for _ in range(count)]:
            folder = self.fresh(name)
            first = self.start(name, folder, kind="stop", at=at)
            while (state_of_first := state(first.pid)) not in "TZX":
                time.sleep(0.005)
            second = self.start(name, folder)
            refused = second.wait()
            problems = self.differing(name, folder, whole=False)
            if state_of_first == "T":
                os.kill(first.pid, signal.SIGCONT)
            done = first.wait()
            if not (refused == 2 and done == 0 and "another run is writing it" in second.err
                    or refused == 0 and done in (0, 2)):
                problems.append(f"the stopped one ended with {done}, the second with {refused}: "
                                f"{first.err} {second.err}")
            self.check(name, "twice", folder, f"stopped at step {at}", problems, litter=True)
        for _ in range(count):
            folder = self.fresh(name)
            both = [self.start(name, folder) for _ in "ab"]
            codes = sorted(child.wait() for child in both)
            problems = [] if codes in ([0, 0], [0, 2]) else [
                f"ended with {codes}: {both[0].err} {both[1].err}"]
            self.check(name, "twice", folder, "at once", problems, litter=True)

    def torn(self, name, _):
        if not (source := STAGES[name][2]):
            return
        folder = self.fresh(name)
        whole, torn = f"{self.reference}/{source}", f"{folder}/{source}"
        with open(whole, "rb") as file:
            data = file.read()
        os.remove(torn)
        with open(torn, "wb") as file:
            file.write(data[:(data.rindex(b"\n", 0, -1) + len(data)) // 2])
        child = self.start(name, folder)
        problems = one_line(name, child.wait(), child.err)
        number = data.count(b"\n")
        if f"{source}:{number}: not a valid JSON row" not in child.err:
            problems.append(f"the line is not named: {child.err}")
        os.remove(torn)
        os.symlink(whole, torn)
        self.check(name, "torn", folder, "last line", problems)


def one_line(name, code, err):
    """What is wrong with the end of a stage that must fail with exit 2 and one line of its own as
    the last on stderr."""
    start = os.path.basename(STAGES[name][0].split()[0]) + ": error: "
    fine = (code == 2 and err.count(start) == 1 and err.splitlines()[-1].startswith(start)
            and "Traceback" not in err and "ignored" not in err)
    return [] if fine else [f"not one line and exit 2, but {code}: {err.strip()}"]


def state(pid):
    """T stopped, Z or X ended, anything else at work."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]
    return "X"


# ---- The campaign --------------------------------------------------------------------------------
def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--stages", nargs="+", default=list(STAGES), choices=STAGES, help="(default: all)")
    add("--kinds", nargs="+", default=KINDS, choices=KINDS, help="of faults (default: all)")
    add("--kills", type=int, default=200,
        help="random instants, over all stages (default %(default)s)")
    add("--seed", type=int, default=0, help="seed of the instants (default %(default)s)")
    return parser.parse_args(argv)


def main(args):
    began, folder = time.monotonic(), tempfile.mkdtemp(prefix="campaign-")
    campaign = Campaign(folder, args.seed)
    counts = {"instant": -(-args.kills // len(args.stages)), "twice": 5, "disk": 8, "clock": 3}
    for name in args.stages:
        for kind in args.kinds:
            campaign.disturb(name, kind, itertools.count(), counts.get(kind, 1))
        print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr)
    print("| stage | " + " | ".join(args.kinds) + " | faults | losses |\n|---|"
          + "---|" * (len(args.kinds) + 2))
    for name in [*args.stages, "all"]:
        faults = [sum(campaign.faults[stage, kind] for stage in args.stages
                      if name in (stage, "all")) for kind in args.kinds]
        losses = sum(name in (loss[0], "all") for loss in campaign.losses)
        print(f"| {name} | {' | '.join(map(str, faults))} | {sum(faults)} | {losses} |")
    if campaign.losses:
        sys.exit(1)
    shutil.rmtree(folder)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(*sys.argv[2:])
    else:
        main(parse_args())
