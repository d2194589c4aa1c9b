"""Processes that can be killed, for verdicts that may hang, explode or eat memory.

They know no task. A task whose verdict needs one returns a Pending from its `verify`: the answer,
and what is to be called with which arguments in a worker. The module named there has

    prepare()            imports what the function needs, warms it up, and returns the beginnings
                         of the source texts that its libraries write and compile themselves
    function(*arguments) the verdict: ok, value or parse

Module and function are named by code, never by a row. Arguments go to a worker as a line of JSON,
one word comes back; nothing else of a worker's is read, and nothing is unpickled. A worker has
limits (memory, files, processes), an audit hook that refuses files, network, processes and eval,
none of the parent's files, and a deadline for each answer, after which it is killed and replaced.
"""
import contextlib
import importlib
import json
import os
import re
import resource
import select
import signal
import subprocess
import sys
import time
from typing import NamedTuple

from data.files import fail

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # where `data` is imported from
WORDS = ("ok", "value", "parse")  # all that a worker may say of an answer
START = 120  # seconds that imports may take
MEMORY = 2**31  # bytes of address space of a worker
FORBIDDEN = ("socket.", "subprocess.", "os.", "shutil.", "ctypes.", "pty.", "tempfile.", "urllib.",
             "ftplib.")


class Judge(NamedTuple):
    """A function for workers, and the package that must be installed for it."""
    module: str
    function: str
    package: str


class Pending(NamedTuple):
    """A verdict that is still to be made: the answer's text (or null), and who judges it."""
    pred: str | None
    judge: Judge
    arguments: list  # of JSON


# ---- In a worker -------------------------------------------------------------------------------
def guard(may_compile):
    """An audit hook: should an answer find its way to a file, process, network or eval, it ends
    here. Modules may still be imported."""
    def hook(event, arguments):
        if event == "open":
            path, mode = str(arguments[0]), arguments[1]
            refused = not path.endswith((".py", ".pyc")) or mode not in ("r", "rb")
        elif event == "compile":
            source = arguments[0].encode() if isinstance(arguments[0], str) else arguments[0] or b""
            refused = str(arguments[1]).startswith("<") and not source.startswith(may_compile)
        else:
            refused = event.startswith(FORBIDDEN) and event not in ("os.listdir", "os.scandir")
        if refused:
            raise PermissionError(f"{event} is refused while an answer is judged")
    return hook


def limit():
    """No more memory than MEMORY, no file, no process, no core dump."""
    for name, most in (("AS", MEMORY), ("FSIZE", 0), ("NPROC", 0), ("CORE", 0)):
        kind = getattr(resource, "RLIMIT_" + name)
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))


def work(module, function, seconds):
    """Read arguments, those of a Pending a line, from stdin, and answer one word a line. Ends with
    its stdin, and dies by the kernel's alarm should the parent be gone when an answer takes too
    long."""
    module = importlib.import_module(module)
    out = os.dup(1)
    os.dup2(2, 1)  # nothing else may speak on the line to the parent
    may_compile, judge = module.prepare(), getattr(module, function)
    status = os.open("/proc/self/status", os.O_RDONLY)  # ru_maxrss begins at the parent's peak
    limit()
    sys.addaudithook(guard(may_compile))
    os.write(out, b"ready\n")
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_REAL, seconds + 1)
        try:
            word = judge(*json.loads(line))
        except MemoryError:
            return
        except Exception:
            word = "parse"
        peak = re.search(rb"VmHWM:\s+(\d+) kB", os.pread(status, 8192, 0))
        if 1024 * int(peak[1]) > MEMORY // 2:
            return  # a library may have swallowed a MemoryError
        os.write(out, word.encode() + b"\n")
        signal.setitimer(signal.ITIMER_REAL, 0)


# ---- Their keeper ------------------------------------------------------------------------------
class Workers:
    """`count` processes for one Judge, each with one answer at a time, started when first needed.

    One that overruns `timeout` seconds is killed and replaced: the word is `timeout`, other answers
    are untouched."""

    def __init__(self, judge, count, timeout):
        self.judge, self.count, self.timeout = judge, count, timeout
        self.free = []
        self.busy = {}  # process -> (deadline, list for its word, or None while it starts)

    def start(self):
        # Its own session: Ctrl-C and Ctrl-Z reach the parent alone. No open file goes along, the
        # lock on the output least of all.
        process = subprocess.Popen(
            [sys.executable, "-m", "data.sandbox", *self.judge[:2], str(self.timeout)],
            cwd=ROOT, bufsize=0, start_new_session=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.busy[process] = (time.monotonic() + START, None)

    def submit(self, pending):
        """A list that will hold the verdict's word."""
        while not self.free:
            for _ in range(self.count - len(self.busy)):
                self.start()
            self.wait()
        process, word = self.free.pop(), []
        self.busy[process] = (time.monotonic() + self.timeout, word)
        with contextlib.suppress(BrokenPipeError):  # it has died: wait() will see it
            process.stdin.write(json.dumps(pending.arguments).encode() + b"\n")
        return word

    def wait(self):
        """Until at least one worker has spoken, died or overrun."""
        first = min(deadline for deadline, _ in self.busy.values())
        pipes = [process.stdout for process in self.busy]
        ready = select.select(pipes, [], [], max(0, first - time.monotonic()))[0]
        for process, (deadline, word) in list(self.busy.items()):
            if process.stdout not in ready and time.monotonic() < deadline:
                continue
            said = b""
            if process.stdout in ready:
                said = os.read(process.stdout.fileno(), 64)
            said = said.decode(errors="replace").removesuffix("\n")
            fits = said in (("ready",) if word is None else WORDS)
            del self.busy[process]
            self.free.append(process) if fits else self.end(process)
            if word is not None:
                word.append(said if fits else "timeout")
            elif not fits:
                fail(f"no worker for {self.judge.module} starts; is {self.judge.package} "
                     "installed? (see requirements.txt)")

    def end(self, process):
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()

    def close(self):
        for process in [*self.free, *self.busy]:
            self.end(process)


if __name__ == "__main__":
    work(*sys.argv[1:3], float(sys.argv[3]))
