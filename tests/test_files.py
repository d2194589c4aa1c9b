"""data/files.py, the contract of all stages: bad rows, metas, locks, what ends a stage.

tests/crash.py disturbs the stages themselves."""
import argparse
import errno
import fcntl
import functools
import hashlib
import json
import os
import pathlib
import signal
import subprocess
import sys
from unittest import mock

import pytest

from conftest import refusal, write
from data import files as stage

ROOT = pathlib.Path(stage.__file__).parents[1]


def refused(capsys, function, *args, code=2):
    line = refusal(capsys, function, *args, code=code)
    assert line.startswith("evaluate.py: error: ")
    return line


@pytest.fixture(autouse=True)
def as_in_a_stage(monkeypatch):
    monkeypatch.setattr(stage, "STAGE", "evaluate.py")


def make(path, content):
    pathlib.Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


# ---- What people see, and flags ------------------------------------------------------------------
def test_texts_are_printed_whatever_they_hold(capsys):
    """An error on one line; bytes of a name that are not UTF-8 escaped."""
    text = "two\nlines\r\n\u2028and\x85more \x1b[2J\udcff"
    assert refused(capsys, stage.fail, text, 3, code=3) == (
        "evaluate.py: error: two lines and more \\x1b[2J\\udcff")
    stage.run(stage.echo, "\udcff\u00e9")
    assert capsys.readouterr().out == "\\udcff\u00e9\n"


def test_flags(capsys):
    """No usage text before an error; negative numbers of every spelling are values."""
    parser = stage.Parser("evaluate.py")
    parser.add_argument("--gamma", type=float)
    assert refused(capsys, parser.parse_args, ["--gamma", "x"]).endswith("(see --help)")
    for text in "-1e-3", "-.5", "-2", "1e3", "-1.E+2":
        assert parser.parse_args(["--gamma", text]).gamma == float(text)


# ---- read_rows -----------------------------------------------------------------------------------
def test_rows_with_their_place_and_bytes(tmp_path):
    one, two = b'{"a": 1}', b'{"a": "\xc3\xa9", "b": [2.5, null]}'
    three = b'{"c": "\\ud83d\\ude00"}'
    content = b"\xef\xbb\xbf" + one + b"\r\n\n  \r\n" + two + b"\n\t" + three
    path = make(tmp_path / "a.jsonl", content)
    assert list(stage.read_rows(path)) == [
        (f"{path}:1", one, {"a": 1}), (f"{path}:4", two, {"a": "\u00e9", "b": [2.5, None]}),
        (f"{path}:5", three, {"c": "\U0001f600"})]


@pytest.mark.parametrize("line, told", [
    (b'{"id": "a", "samp', "truncated"), (b'{"a": 1} {"b": 2}', "trailing characters"),
    (b'\xef\xbb\xbf{"a": 1}', "invalid character"), (b'{"a": NaN}', "invalid character"),
    (b'{"a": 1e999}', "out of range"), (b'{"a": ' + b"[" * 100_000, "recursion"),
    (b'{"\\uDFFF": 1}', "invalid utf-16 surrogate"), (b'{"a": "\xed\xa0\x80"}', "decode"),
    (b"[1, 2]", "Expected object, got array"), (b"{'a': 1}", "object keys must be strings"),
    (b"x" * 2**25, ":3: a line above 16 MB is refused unread")], ids=range(11))
def test_a_bad_line_is_named_after_the_rows_before_it(tmp_path, capsys, line, told):
    path = make(tmp_path / "a.jsonl", b'{"a": 1}\n\n' + line + b'\n{"a": 2}\n')
    reader = stage.read_rows(path)
    assert next(reader)[2] == {"a": 1}
    message = refused(capsys, next, reader)
    assert f"{path}:3: " in message and told in message and "line" in message
    assert ("not a valid JSON row (" in message) == (len(line) < 2**24)


@pytest.mark.parametrize("content, told", [
    (b"", "no rows in this file"), (b"\xef\xbb\xbf\n \r\n", "no rows in this file"),
    (b"version https://git-lfs.github.com/spec/v1\nsize 3\n", "a git-lfs pointer")])
def test_a_file_without_rows_is_bad_input(tmp_path, capsys, content, told):
    path = make(tmp_path / "a.jsonl", content)
    assert f"{path}: {told}" in refused(capsys, list, stage.read_rows(path))


# ---- describe ------------------------------------------------------------------------------------
def test_meta_names_flags_inputs_and_versions(tmp_path, monkeypatch):
    data, folder = make(tmp_path / "in.jsonl", "x"), tmp_path / "model"
    (folder / "deeper").mkdir(parents=True)
    make(folder / "w", "1")
    flags = argparse.Namespace(n=8, out="o")
    meta = stage.describe(flags, [data, str(folder), "owner/name"], seed=3)
    assert meta["stage"] == "evaluate.py" and meta["flags"] == {"n": 8, "out": "o"}
    digests = [*meta["inputs"].values()]
    assert digests[0] == hashlib.sha256(b"x").hexdigest() and digests[2] == "owner/name"
    assert meta["versions"]["numpy"] and meta["seed"] == 3 and json.dumps(meta)
    make(folder / "w", "2")
    digests.append(stage.digest(str(folder)))
    os.rename(folder / "w", folder / "v")
    digests.append(stage.digest(str(folder)))
    assert len(set(digests)) == 5
    # no repository, and then no git program either: not known
    monkeypatch.setattr(stage, "__file__", str(tmp_path / "files.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert stage.software.__wrapped__()["git"] is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert stage.software.__wrapped__()["git"] is None


# ---- claim and publish ---------------------------------------------------------------------------
@pytest.fixture
def claim(monkeypatch):
    """stage.claim, and .release(), which lets go of its locks as the end of a process does."""
    held, lock_file = [], stage.lock_file
    monkeypatch.setattr(stage, "lock_file",
                        lambda handle, out: held.append(handle) or lock_file(handle, out))
    call = functools.partial(stage.claim)
    call.release = lambda: [os.close(held.pop()) for _ in held[:]]
    yield call
    call.release()


def meta_of(inputs=(), **flags):
    return stage.describe(argparse.Namespace(**flags), list(inputs))


def test_output_made_otherwise_is_refused_and_named(tmp_path, capsys, claim):
    """And complete output is left alone."""
    out, data = str(tmp_path / "o"), make(tmp_path / "in", "x")
    make(claim(out, meta_of()), "done")
    stage.publish(out, meta_of([data], n=8, seed=(0, 1), workers=1))
    moved = make(tmp_path / "elsewhere", "x")  # inputs are compared by content, not by name
    for source in (data, moved):
        same = meta_of([source], n=8, seed=(0, 1), workers=4)
        assert claim(out, same, ignore=("workers",)) is None
        assert capsys.readouterr().err == f"{out}: complete, left alone\n"
    for change, told in (({"n": 9, "seed": 1}, "n, seed"), ({"new": 1}, "new")):
        meta = meta_of([data], **{"n": 8, "seed": (0, 1), "workers": 1, **change})
        assert f"made with other {told}; delete it" in refused(capsys, claim, out, meta)
    make(data, "y")
    meta = meta_of([data], n=8, seed=(0, 1), workers=1)
    assert "made with other inputs;" in refused(capsys, claim, out, meta)
    for meta in ("{", "[]", "{}", '{"flags": 1, "inputs": {}}', '{"flags": {}, "inputs": []}',
                 b"\xff", None):
        make(out + ".meta.json", meta) if meta else os.remove(out + ".meta.json")
        assert f"no {out}.meta.json says how it was made" in refused(capsys, claim, out, meta_of())
    assert pathlib.Path(out).read_text() == "done" and not os.path.exists(out + ".partial")


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("kind", ["local", "nfs", "none", "broken"])
def test_one_run_at_a_time(tmp_path, capsys, claim, monkeypatch, kind, folder):
    """The second is refused; the next one finds what a killed one left. NFS locks only what is open
    for writing; Lustre may have no locks: that is printed once, and work goes on."""
    out, flock = str(tmp_path / "o"), fcntl.flock

    def network_flock(handle, how):
        read_only = fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        errors = {"none": errno.ENOSYS, "broken": errno.EIO, "nfs": read_only and errno.EBADF}
        if errors[kind]:
            raise OSError(errors[kind], os.strerror(errors[kind]))
        flock(handle, how)

    if kind != "local":
        monkeypatch.setattr(fcntl, "flock", network_flock)
    if kind == "broken":
        with pytest.raises(OSError, match="Input/output"):
            claim(out, meta_of(), folder=folder)
        return
    assert claim(out + "/" * folder, meta_of(), folder=folder) == out + ".partial"
    told = capsys.readouterr().err
    inner = make(out + ".partial" + "/part" * folder, "half")
    if kind == "none":
        assert told.startswith("evaluate.py: this file system has no locks (Function not impl")
        assert told.count("\n") == 1
    else:
        assert told == ""
        assert "another run is writing it" in refused(capsys, claim, out, meta_of(), (), folder)
    claim.release()
    claim(out, meta_of(), folder=folder)
    assert pathlib.Path(inner).read_text() == "half"
    stage.publish(out + "/" * folder, meta_of())
    claim.release()
    if folder:
        make(out + ".partial.lock", "")  # of a run that was killed at its very end
        assert claim(out + "/", meta_of(), folder=True) is None
    assert sorted(os.listdir(tmp_path)) == ["o", "o.meta.json"]


def test_partial_renamed_under_the_lock_is_not_claimed(tmp_path, capsys, claim, monkeypatch):
    """The first run finishes between the second one's look for the output and its lock: nothing is
    made twice, not even if the output was moved away at once."""
    out, flock, exists = str(tmp_path / "o"), fcntl.flock, os.path.exists
    make(tmp_path / "o.partial", "done")

    def finished_meanwhile(*args):
        os.replace(out + ".partial", out + ".moved")
        flock(*args)

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", finished_meanwhile)
        assert "another run is writing it" in refused(capsys, claim, out, meta_of())
    looks = iter([False])  # the output appears after the look for it, and its partial is gone
    monkeypatch.setattr(os.path, "exists",
                        lambda path: next(looks, True) if path == out else exists(path))
    assert "another run is writing it" in refused(capsys, claim, out, meta_of())


def test_publish_syncs_then_meta_then_name(tmp_path, monkeypatch):
    """Contents reach the disk before any name, the meta takes its name first, and then the parent
    folder is synced."""
    out, events = str(tmp_path / "o"), []
    fsync, replace = os.fsync, os.replace

    def fsync_seen(handle):
        events.append(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", fsync_seen)
    monkeypatch.setattr(os, "replace", lambda *names: events.append(names) or replace(*names))
    (tmp_path / "o.partial/deeper").mkdir(parents=True)
    for name in ("a", "deeper/b"):
        make(tmp_path / "o.partial" / name, "1")
    stage.publish(out, {"flags": {}})
    names = events.index((out + ".meta.json.partial", out + ".meta.json"))
    contents = {f"{out}.partial{rest}" for rest in ("", "/a", "/deeper", "/deeper/b")}
    assert contents | {out + ".meta.json.partial"} <= set(events[:names])
    assert events[names + 1:] == [(out + ".partial", out), str(tmp_path)]


# ---- Ranks, errors, signals ----------------------------------------------------------------------
@pytest.mark.parametrize("rank, world, local, expected", [
    (None, None, None, (0, 1)), ("3", "4", None, (3, 4)),
    ("0", "", "0", "'0', '' and '0' are not three numbers"),
    ("one", "2", "1", "'one', '2' and '1' are not"), ("0", "1", "", "'0', '1' and '' are not"),
    ("-1", "2", "0", "'-1', '2' and '0' are not"), ("1", None, None, "rank 1 of 1 does not exist"),
])
def test_ranks_are_numbers(monkeypatch, capsys, rank, world, local, expected):
    for name, value in zip(("RANK", "WORLD_SIZE", "LOCAL_RANK"), (rank, world, local)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    if isinstance(expected, str):
        told = refused(capsys, stage.rank_and_world)
        assert expected in told and "unset all three" in told
    else:
        assert stage.rank_and_world() == expected


@pytest.mark.parametrize("error, told", [
    (FileNotFoundError(errno.ENOENT, "No such file", "in.jsonl"), "in.jsonl: No such file"),
    (OSError(errno.ENOSPC, "No space left on device"), "o: No space left on device"),
    (OSError("a message alone"), "o: a message alone"),
    (BrokenPipeError(errno.EPIPE, "Broken pipe"), "stdout: Broken pipe")])
def test_what_ends_a_stage(capsys, error, told):
    args = argparse.Namespace(out=None if "stdout" in told else "o")
    message = refused(capsys, stage.run, mock.Mock(side_effect=error), args)
    assert message == f"evaluate.py: error: {told}"
    with pytest.raises(ZeroDivisionError):  # a defect shows itself
        stage.run(lambda _: 1 / 0, args)


@pytest.mark.parametrize("command, heavy", [
    ("score.py scored.jsonl --out again.jsonl --show 9", "torch transformers sympy numpy"),
    ("evaluate.py scored.jsonl --out again.json --resamples 9", "torch transformers matplotlib"),
    ("evaluate.py --help", "torch numpy matplotlib")])
def test_nobody_reads_what_a_stage_prints_and_nothing_heavy_is_imported(tmp_path, command, heavy):
    """stage | head: quiet, and the output is complete; here the reader stops before a line."""
    row = {"id": "a", "sample": 0, "task": "countdown", "numbers": [1, 2], "target": 3,
           "completion": "1+2", "completion_ids": [3], "finish_reason": "stop", "correct": True,
           "reason": "ok", "solution": "1+2"}
    write(tmp_path / "scored.jsonl", [row])
    read, written = os.pipe()
    os.close(read)
    name, *flags = command.split()
    done = subprocess.run([sys.executable, "-X", "importtime", f"{ROOT}/{name}", *flags],
                          cwd=tmp_path, stdout=written, stderr=subprocess.PIPE, text=True)
    os.close(written)
    lines = [line for line in done.stderr.splitlines()
             if not line.startswith("import time:") and "rows" not in line]
    assert not set(heavy.split()) & set(done.stderr.split())
    if flags != ["--help"]:
        assert (done.returncode, lines) == (0, [])
        assert len(list(tmp_path.glob("again.json*.meta.json"))) == 1


@pytest.mark.parametrize("name, rows, number, told", [
    ("generate.py", "--prompts", signal.SIGINT, "interrupted"),
    ("train.py", "--rollouts", signal.SIGTERM, "terminated")])
def test_signals_end_in_one_line_also_while_libraries_are_imported(name, rows, number, told,
                                                                   tmp_path):
    """Here torch never stops importing, on which a stage spends its first seconds."""
    (tmp_path / "torch.py").write_text(
        "import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    process = subprocess.Popen(
        [sys.executable, name, "--model", "m", "--out", "o", rows, "r"], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    assert process.stdout.readline() == "importing\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 128 + number
    assert err == f"{name}: error: {told}; the same command carries on from here\n"
