"""The fault campaign: disturb every stage, start it again with the same command, compare with an
undisturbed run.

    python tests/crash.py                  the whole campaign; prints the table of tests/README.md
    python tests/crash.py --stages score train --kills 20
    python tests/crash.py --endurance 60   instead: rounds of run.sh for so many minutes, with their
                                           memory, handles and disk

One warm process imports torch, transformers and the stages once and forks a child for each start of
a stage, so that hundreds of starts take minutes. A child may carry a fault; its *steps* are what it
does to the disk below its folder: an open for writing, a write (half of it is done first), an
fsync, a rename, a removal, a new folder.

    kill      SIGKILL at the i-th step, for every i
    power     the same, and every file that was not yet fsynced loses its second half
    full      the i-th step alone fails with "No space left on device", for every i: exit 2, one
              line, nothing goes on
    instant   SIGKILL, SIGTERM or SIGINT at a random instant
    process   the same, with a process of its own instead of a forked child
    disk      a file system of too few bytes (tmpfs; without root, a limit on the size of files)
    read-only the folder cannot be written
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

REACHED = b"(here the fault)\n"  # on stderr
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
KINDS = ("kill", "power", "full", "instant", "process", "disk", "read-only", "twice", "torn",
         "clock")
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
    the answer is the child's process id, then its exit code and CPU time."""
    sys.path[:0] = [ROOT, os.path.join(ROOT, "data")]
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    modules = {name: importlib.import_module(name) for name in (*STAGES, "maths")}
    modules["select"] = importlib.import_module("data.select")  # `select` is the standard library's
    report = modules["evaluate"]
    report.save(report.new_figure(1, 2, 9, 4)[0], base + ".png")  # the first picture loads fonts
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = importlib.import_module("make_tiny").make_tokenizer()
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
            # a lock of this process must not outlive it in another
            os.closerange(3, connection.fileno() + 4)
            os.chdir(request["cwd"])
            sys.argv = request["argv"]
            stage = modules[os.path.basename(sys.argv[0]).removesuffix(".py")]
            args = stage.parse_args(sys.argv[1:])
            if request["fault"]:
                inject(**request["fault"])
            files = importlib.import_module("data.files")
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
            # as Python starts: the stage replaces it
            signal.signal(signal.SIGINT, signal.default_int_handler)
            files.end_on_signals()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
            files.run(stage.main, args)
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
    _, status, usage = os.wait4(pid, 0)
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(
            f"{os.waitstatus_to_exitcode(status)} {usage.ru_utime + usage.ru_stime}\n".encode())
    os._exit(0)


def inject(kind, at=0, bytes=0):
    """Give this process a fault; `at` is the number of the step that fails."""
    # dirty: inodes written since their last fsync
    root, steps, dirty = os.getcwd() + os.sep, iter(range(10**9)), set()

    def step(half=None, error=None):
        if next(steps) != at:
            return
        os.write(2, REACHED)
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
            dirty.add(os.fstat(self.fileno()).st_ino)
            step(lambda: io.FileIO.write(self, data[:len(data) // 2]))
            return super().write(data)

    def open_file(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, **more):
        if not below(file) or not set(mode) & set("wax+"):
            return plain_open(file, mode, buffering, encoding, errors, newline, **more)
        step()
        raw = Raw(file, mode.replace("b", "").replace("t", ""))
        dirty.add(os.fstat(raw.fileno()).st_ino)
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

    def change(name, plain):  # of a folder's entries; only what takes room can find the disk full
        def changed(path, *more, **also):
            takes_room = (name in ("rename", "replace")
                          or name == "mkdir" and not os.path.exists(path))
            if (below(path) or "dir_fd" in also) and (takes_room or kind != "full"):
                step()
            return plain(path, *more, **also)
        return changed

    # a function of a Rust library that writes the file arguments[place]
    def foreign(plain, place, error):
        def write(*arguments, **also):
            path = arguments[place]

            def half():
                plain(*arguments, **also)
                os.truncate(path, os.path.getsize(path) // 2)
                dirty.add(os.stat(path).st_ino)
            step(half, error)
            result = plain(*arguments, **also)
            dirty.add(os.stat(path).st_ino)
            return result
        return write

    def send(to, *arguments):
        dirty.add(os.fstat(to).st_ino)
        step()
        return plain_send(to, *arguments)

    if kind == "clock":
        rng, now = random.Random(at), time.time
        time.time = lambda: now() + rng.uniform(-1e7, 1e7)
    elif kind == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (bytes, bytes))
    else:
        plain_open, plain_sync = builtins.open, os.fsync
        plain_handle, plain_send = os.open, os.sendfile
        builtins.open = io.open = open_file
        os.fsync, os.open, os.sendfile = sync, open_handle, send
        for name in ("mkdir", "rmdir", "unlink", "remove", "rename", "replace"):
            setattr(os, name, change(name, getattr(os, name)))
        import safetensors.torch
        import tokenizers
        full = "No space left on device (os error 28)"
        safetensors.torch.serialize_file = foreign(
            safetensors.torch.serialize_file, 1,
            safetensors.SafetensorError(f"Error while serializing: I/O error: {full}"))
        tokenizers.Tokenizer.save = foreign(tokenizers.Tokenizer.save, 1, Exception(full))


class Warm:
    """The warm process, seen from outside: .base is its model, .start() a stage."""

    def __init__(self):
        self.folder = tempfile.mkdtemp(prefix="crash-")
        self.path, self.base = f"{self.folder}/socket", f"{self.folder}/base"
        atexit.register(self.close)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
                       "MPLBACKEND": "agg"}
        self.process = subprocess.Popen(
            [sys.executable, os.path.abspath(__file__), "--serve", self.path, self.base],
            env=environment,
            start_new_session=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if self.process.stdout.readline() != "ready\n":
            sys.exit("crash.py: the warm process did not start")

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def start(self, argv, cwd, fault=None):
        return Child(self.path, argv, cwd, fault)


class Child:
    """A stage at work: .pid; .wait() gives its exit code (minus the signal that ended it); .err is
    its stderr then."""
    seconds = 0.0  # CPU time of all

    def __init__(self, path, argv, cwd, fault=None):
        self.connection = socket.socket(socket.AF_UNIX)
        self.connection.connect(path)
        request = json.dumps({"argv": argv, "cwd": cwd, "fault": fault}).encode()
        self.file = tempfile.TemporaryFile()
        with open(os.devnull, "r+b") as null:
            socket.send_fds(self.connection, [request],
                            [null.fileno(), null.fileno(), self.file.fileno()])
        self.lines = self.connection.makefile()
        self.pid = int(self.lines.readline())

    def wait(self):
        code, cpu = self.lines.readline().split()
        Child.seconds += float(cpu)
        self.lines.close()
        self.connection.close()
        self.file.seek(0)
        self.err = self.file.read().decode()
        self.file.close()
        return int(code)


@functools.cache
def warm():
    return Warm()


# ---- The undisturbed run, and comparing with it --------------------------------------------------
def content(path):
    """What must not differ, of a file or folder. {relative path: bytes}, timings and argv taken
    out."""
    if os.path.isdir(path):
        return {f"{name}/{deeper}": data for name in sorted(os.listdir(path))
                for deeper, data in content(os.path.join(path, name)).items()}
    with open(path, "rb") as file:
        data = file.read()
    if path.endswith(".meta.json"):
        data = {key: value for key, value in json.loads(data).items()
                if key not in ("argv", "git", "wall_s", "wall_time")}
    elif path.endswith("metrics.jsonl"):
        data = [{key: value for key, value in json.loads(line).items()
                 if key not in ("tokens_per_s", "peak_mem_bytes")}
                for line in data.splitlines()]
    return {"": data}


class Campaign:
    def __init__(self, folder, seed=0):
        self.folder, self.rng, self.number = folder, random.Random(seed), 0
        self.faults, self.losses, self.seconds = collections.Counter(), [], {}
        self.reference = os.path.join(folder, "undisturbed")
        os.makedirs(self.reference)
        os.symlink(warm().base, os.path.join(self.reference, "base"))
        for name in STAGES:
            if name == "train":  # an earlier round, whose optimizer and metrics are carried on
                command = STAGES[name][0].replace("first", "base")
                self.undisturbed(command.replace("second", "first"))
            self.seconds[name] = self.undisturbed(STAGES[name][0])
        self.outputs = {name: {out + end: content(os.path.join(self.reference, out + end))
                               for out in STAGES[name][1]
                               for end in ("", ".meta.json")
                               if os.path.exists(os.path.join(self.reference, out + end))}
                        for name in STAGES}

    def undisturbed(self, command):
        began = time.monotonic()
        child = warm().start(command.split(), self.reference)
        if child.wait():
            sys.exit(f"crash.py: {command}: {child.err}")
        return time.monotonic() - began

    def fresh(self, name, folder=None):
        """A new folder with links to the inputs of a stage."""
        self.number += 1
        folder = folder or os.path.join(self.folder, f"{name}-{self.number}")
        os.makedirs(folder, exist_ok=True)
        for entry in os.listdir(self.reference):
            if entry not in self.outputs[name]:
                os.symlink(os.path.join(self.reference, entry), os.path.join(folder, entry))
        return folder

    def start(self, name, folder, **fault):
        return warm().start(STAGES[name][0].split(), folder, fault or None)

    def differing(self, name, folder, whole):
        """What bears a final name and is not as it should be; with `whole`, also what is missing or
        left over."""
        wrong = []
        for entry, expected in self.outputs[name].items():
            path = os.path.join(folder, entry)
            try:
                if not os.path.exists(path) and not whole or content(path) == expected:
                    continue
            except (OSError, ValueError):
                pass
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
        began = time.monotonic()
        code = again.wait()
        self.seconds[name] = 0.8 * self.seconds[name] + 0.2 * (time.monotonic() - began)
        if code:
            problems.append(f"started again it ends with {code}: {again.err.strip()}")
        problems += [f"{entry} differs in the end"
                     for entry in self.differing(name, folder, whole=True)
                     if not (litter and entry.endswith(".partial"))]
        self.faults[name, kind] += 1
        if problems:
            self.losses.append((name, kind, f"{told}: {'; '.join(problems)}"))
            print(f"LOSS: {name}, {kind}, {told}: {'; '.join(problems)} (see {folder})",
                  file=sys.stderr)
        else:
            shutil.rmtree(folder)

    # ---- The kinds of faults ---------------------------------------------------------------------
    def steps(self, name, kind, stride=1, first=0):
        """Every stride-th step, until a start has fewer."""
        for at in range(first, 10**6, stride):
            folder = self.fresh(name)
            child = self.start(name, folder, kind=kind, at=at)
            code = child.wait()
            if REACHED.decode() not in child.err:
                return shutil.rmtree(folder)
            problems = []
            if kind == "full":
                problems = one_line(name, code, child.err)
            elif code != -signal.SIGKILL:
                problems = [f"ended with {code}: {child.err.strip()}"]
            self.check(name, kind, folder, f"step {at}", problems)

    def instants(self, name, count, process=False):
        """`count` starts that were really ended by a signal at a random instant."""
        kind = "process" if process else "instant"
        numbers = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]
        took, tries = 8.0 if process else self.seconds[name], 0
        while self.faults[name, kind] < count and tries < 4 * count:
            tries += 1
            number = numbers[(self.faults[name, kind] + tries // (3 * count)) % 3]
            folder = self.fresh(name)
            wait = self.rng.uniform(0, took if process else self.seconds[name])
            if process:
                command = STAGES[name][0].split()
                began = time.monotonic()
                module = command[0].removesuffix(".py").replace("/", ".")
                child = subprocess.Popen(
                    [sys.executable, "-P", "-m", module, *command[1:]], cwd=folder, text=True,
                    env={**os.environ, "PYTHONPATH": ROOT}, stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(wait)
                    took = time.monotonic() - began
                child.send_signal(number)
                err, code = child.communicate()[1], child.returncode
            else:
                child = self.start(name, folder)
                time.sleep(wait)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child.pid, number)
                code, err = child.wait(), child.err
            if code == 0:
                shutil.rmtree(folder)
                continue
            problems = []
            if code not in (-number, 128 + number):
                problems = [f"ended with {code}: {err.strip()}"]
            # a process that is still importing may show one at Ctrl-C
            elif "Traceback" in err and not process:
                problems = [f"a traceback: {err.strip()}"]
            self.check(name, kind, folder, f"{signal.Signals(number).name} after {wait:.3f} s",
                       problems)

    def disk(self, name, parts):
        """A disk of too few bytes, then a larger one."""
        paths = [os.path.join(self.reference, out, inner)
                 for out, found in self.outputs[name].items() for inner in found]
        pages = [-(-os.path.getsize(path.rstrip("/")) // 4096) for path in paths]
        for room in sorted({max(1, sum(pages) * part // parts) for part in range(parts)}):
            folder = os.path.join(self.folder, f"{name}-disk-{room}")
            os.makedirs(folder)
            if mounted := os.geteuid() == 0 and mount_tmpfs(folder, 4096 * room):
                child = self.start(name, self.fresh(name, folder))
            else:
                child = self.start(name, self.fresh(name, folder), kind="limit",
                                   bytes=4096 * max(pages) * room // sum(pages))
            code = child.wait()
            if mounted:  # the restart has room
                shutil.copytree(folder, folder + "-larger", symlinks=True)
                subprocess.run(["umount", folder], check=True)
                os.rmdir(folder)
                folder += "-larger"
            if code:
                self.check(name, "disk", folder, f"{room} of {sum(pages)} pages",
                           one_line(name, code, child.err))
            else:
                shutil.rmtree(folder)

    def read_only(self, name):
        folder = os.path.join(self.folder, "read-only")
        os.makedirs(folder)
        root = os.geteuid() == 0
        if root and not mount_tmpfs(folder, 2**28):
            os.rmdir(folder)
            return
        self.fresh(name, folder)
        if root:
            subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        else:
            os.chmod(folder, 0o555)
        child = self.start(name, folder)
        problems = one_line(name, child.wait(), child.err)
        subprocess.run(["umount", folder], check=True) if root else os.chmod(folder, 0o755)
        shutil.rmtree(folder)
        self.check(name, "read-only", self.fresh(name), "a folder that cannot be written", problems)

    def twice(self, name, count):
        for at in [self.rng.randrange(20) for _ in range(count)]:
            folder = self.fresh(name)
            first = self.start(name, folder, kind="stop", at=at)
            while not (stopped := state(first.pid) == "T") and state(first.pid) not in "ZX":
                time.sleep(0.005)
            second = self.start(name, folder)
            refused = second.wait()
            problems = self.differing(name, folder, whole=False)
            if stopped:
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
            problems = []
            if codes not in ([0, 0], [0, 2]):
                problems = [f"ended with {codes}: {both[0].err} {both[1].err}"]
            self.check(name, "twice", folder, "at once", problems, litter=True)

    def torn(self, name):
        source, folder = STAGES[name][2], self.fresh(name)
        with open(os.path.join(self.reference, source), "rb") as file:
            data = file.read()
        last = data.rindex(b"\n", 0, -1)
        os.remove(os.path.join(folder, source))
        with open(os.path.join(folder, source), "wb") as file:
            file.write(data[:(last + len(data)) // 2])
        child = self.start(name, folder)
        code = child.wait()
        problems = one_line(name, code, child.err)
        number = data.count(b"\n")
        if f"{source}:{number}: not a valid JSON row" not in child.err:
            problems.append(f"the line is not named: {child.err}")
        os.remove(os.path.join(folder, source))
        os.symlink(os.path.join(self.reference, source), os.path.join(folder, source))
        self.check(name, "torn", folder, "last line", problems)

    def clock(self, name, seed):
        folder = self.fresh(name)
        child = self.start(name, folder, kind="clock", at=seed)
        code = child.wait()
        problems = self.differing(name, folder, whole=True)
        if code:
            problems = [f"ended with {code}: {child.err}"]
        self.check(name, "clock", folder, "jumps", problems)


def one_line(name, code, err):
    """What is wrong with the end of a stage that must fail with exit 2 and one line of its own as
    the last on stderr."""
    stage = os.path.basename(STAGES[name][0].split()[0])
    start = f"{stage}: error: "
    fine = (code == 2 and err.count(start) == 1 and err.splitlines()[-1].startswith(start)
            and "Traceback" not in err and "ignored" not in err)
    return [] if fine else [f"not one line and exit 2, but {code}: {err.strip()}"]


def state(pid):
    """T stopped, Z or X ended, anything else at work."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def mount_tmpfs(folder, bytes):
    return subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={bytes}", "tmpfs", folder],
                          capture_output=True).returncode == 0


# ---- Endurance -----------------------------------------------------------------------------------
def endurance(minutes, keep=2):
    """Rounds of run.sh with a tiny random model, each a continuation of the run before; a line a
    round."""
    folder = tempfile.mkdtemp(prefix="endurance-")
    base = warm().base
    for name in ("run.sh", "generate.py", "score.py", "train.py", "evaluate.py", "data", "kernels",
                 "experiments"):
        os.symlink(os.path.join(ROOT, name), os.path.join(folder, name))
    os.mkdir(temporary := os.path.join(folder, "tmp"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": temporary}
    environment["PATH"] = os.path.dirname(sys.executable) + os.pathsep + environment["PATH"]
    began, rows = time.monotonic(), []
    print("round  seconds  peak RSS MiB  most handles  processes  files  disk KiB  metrics KiB  "
          "temporary files")
    while time.monotonic() - began < 60 * minutes:
        start, handles, most = time.monotonic(), 0, 0
        command = ["bash", "run.sh", "--name", "endless", "--model", base, "--rounds",
                   str(len(rows) + 1), "--keep", str(keep), "--eval-problems", "0",
                   "--prompts-per-round", "16", "--n", "8", "--max-new-tokens", "12", "--updates",
                   "2", "--lr", "2e-4"]
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.PIPE)
        os.set_blocking(process.stderr.fileno(), False)
        err = b""
        while True:
            # usage: of bash and all that it waited for
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            err += process.stderr.read() or b""
            if pid:
                break
            found = family(process.pid)
            most = max(most, len(found))
            handles = max([handles, *(count_handles(one) for one in found)])
            time.sleep(0.1)
        if status:
            code = os.waitstatus_to_exitcode(status)
            sys.exit(f"crash.py: round {len(rows) + 1} ended with {code}: {err.decode()}")
        files = [os.path.join(where, name) for where, _, names in os.walk(f"{folder}/runs")
                 for name in names]
        sizes = {path: os.path.getsize(path) for path in files}
        metrics = sum(size for path, size in sizes.items() if path.endswith("metrics.jsonl"))
        rows.append((len(rows) + 1, time.monotonic() - start, usage.ru_maxrss / 1024, handles, most,
                     len(files), (sum(sizes.values()) - metrics) / 1024, metrics / 1024,
                     len(os.listdir(temporary))))
        print("{:5d}  {:7.1f}  {:12.1f}  {:12d}  {:9d}  {:5d}  {:8.1f}  {:11.1f}  {:15d}".format(
            *rows[-1]), flush=True)
    rows, third = rows[keep:], max(1, (len(rows) - keep) // 3)
    print(f"{len(rows) + keep} rounds in {(time.monotonic() - began) / 60:.1f} minutes; first and "
          f"last third, mean (the first {keep} rounds aside):")
    for column, name in ((2, "peak RSS MiB"), (3, "most handles"), (5, "files"),
                         (6, "disk KiB without metrics.jsonl"), (8, "temporary files")):
        first, last = (sum(row[column] for row in part) / third
                       for part in (rows[:third], rows[-third:]))
        print(f"  {name:32} {first:10.1f} {last:10.1f}")
    shutil.rmtree(folder)


def family(pid):
    """A process and all its descendants."""
    found = [pid]
    for one in found:
        with contextlib.suppress(OSError), open(f"/proc/{one}/task/{one}/children") as file:
            found += map(int, file.read().split())
    return found


def count_handles(pid):
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0


# ---- The campaign --------------------------------------------------------------------------------
def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES,
                        help="which stages (default: all)")
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS,
                        help="which faults (default: all)")
    parser.add_argument("--kills", type=int, default=200,
                        help="random instants, over all stages (default %(default)s)")
    parser.add_argument("--processes", type=int, default=1,
                        help="kills of true processes, a stage (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0,
                        help="seed of the instants (default %(default)s)")
    parser.add_argument("--endurance", type=float, metavar="MINUTES",
                        help="rounds of run.sh instead")
    return parser.parse_args(argv)


def main(args):
    if args.endurance:
        return endurance(args.endurance)
    began, folder = time.monotonic(), tempfile.mkdtemp(prefix="campaign-")
    campaign = Campaign(folder, args.seed)
    kinds = {
        "kill": lambda name: campaign.steps(name, "kill"),
        "power": lambda name: campaign.steps(name, "power"),
        "full": lambda name: campaign.steps(name, "full"),
        "instant": lambda name: campaign.instants(name, -(-args.kills // len(args.stages))),
        "process": lambda name: campaign.instants(name, args.processes, process=True),
        "disk": lambda name: campaign.disk(name, 8),
        "read-only": campaign.read_only, "twice": lambda name: campaign.twice(name, 5),
        "torn": lambda name: STAGES[name][2] and campaign.torn(name),
        "clock": lambda name: [campaign.clock(name, seed) for seed in range(3)]}
    for name in args.stages:
        for kind in args.kinds:
            kinds[kind](name)
            losses = sum(loss[:2] == (name, kind) for loss in campaign.losses)
            print(f"{name}, {kind}: {campaign.faults[name, kind]} faults, {losses} losses "
                  f"({time.monotonic() - began:.0f} s, {Child.seconds:.0f} s of CPU)",
                  file=sys.stderr)
    shown = [kind for kind in KINDS if kind in args.kinds]
    print("| stage | " + " | ".join(shown) + " | faults | losses |\n|---|"
          + "---|" * (len(shown) + 2))
    for name in [*args.stages, "all"]:
        counts = [sum(campaign.faults[stage, kind] for stage in args.stages
                      if name in (stage, "all")) for kind in shown]
        losses = sum(name in (loss[0], "all") for loss in campaign.losses)
        print(f"| {name} | {' | '.join(map(str, counts))} | {sum(counts)} | {losses} |")
    print(f"{time.monotonic() - began:.0f} s, of which the forked stages worked "
          f"{Child.seconds:.0f} s")
    if campaign.losses:
        sys.exit(1)
    shutil.rmtree(folder)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(*sys.argv[2:])
    else:
        main(parse_args())
