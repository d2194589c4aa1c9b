"""data/files.py, the contract of all stages: bad rows, locks, crashes and full disks."""
import argparse
import errno
import fcntl
import hashlib
import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest
from hypothesis import given, settings, strategies

from data import files as stage

ROOT = pathlib.Path(stage.__file__).parents[1]

def refused(capsys, function, *args, code=2, **flags):
    """The one line on stderr of a call that must end with this exit code."""
    with pytest.raises(SystemExit) as end:
        function(*args, **flags)
    err = capsys.readouterr().err
    assert end.value.code == code
    assert err.count("\n") == 1
    assert err.startswith("evaluate.py: error: ")
    return err


@pytest.fixture(autouse=True)
def as_in_a_stage():
    name, stage.STAGE = stage.STAGE, "evaluate.py"
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    stage.STAGE = name
    for number, handler in handlers.items():
        signal.signal(number, handler)


def make(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


# ---- fail and Parser -----------------------------------------------------------------------------
def test_an_error_is_one_line_whatever_the_message(capsys):
    assert refused(capsys, stage.fail,
                   "two\nlines\r\n\u2028and\x85more") == "evaluate.py: error: two lines and more\n"
    assert refused(capsys, stage.fail, "refused", 3, code=3).endswith(" refused\n")
    done = subprocess.run([sys.executable, "evaluate.py", b"\xff\n.jsonl"], cwd=ROOT,
                          capture_output=True)
    assert done.returncode == 2
    assert done.stderr == b"evaluate.py: error: \\udcff .jsonl: No such file or directory\n"


def test_wrong_flags_print_no_usage(capsys):
    parser = stage.Parser()
    parser.add_argument("--n", type=int)
    assert refused(capsys, parser.parse_args, ["--n", "x"]).endswith("(see --help)\n")


# ---- read_rows -----------------------------------------------------------------------------------
def rows(path):
    return list(stage.read_rows(path))


def test_rows_with_their_place_and_bytes(tmp_path):
    one, two = b'{"a": 1}', b'{"a": "\xc3\xa9", "b": [2.5, null]}'
    three = b'{"c": "\\ud83d\\ude00"}'
    content = b"\xef\xbb\xbf" + one + b"\r\n\n  \r\n" + two + b"\n\t" + three
    path = make(tmp_path / "a.jsonl", content)
    assert rows(path) == [(f"{path}:1", one, {"a": 1}),
                          (f"{path}:4", two, {"a": "\u00e9", "b": [2.5, None]}),
                          (f"{path}:5", three, {"c": "\U0001f600"})]


@pytest.mark.parametrize("line, told", [
    (b'{"id": "a", "samp', "truncated"), (b'{"a": 1} {"b": 2}', "trailing characters"),
    (b'{"a": 1', "truncated"),
    (b'\xef\xbb\xbf{"a": 1}', "invalid character"), (b'{"a": NaN}', "invalid character"),
    (b'{"a": [-Infinity]}', "invalid"), (b'{"a": 1e999}', "out of range"),
    (b'{"a": ' + b"[" * 100_000, "recursion"), (b'{"a":' * 100_000, "recursion"),
    (b'{"a": "\\ud800"}', "truncated"),
    (b'{"\\uDFFF": 1}', "invalid utf-16 surrogate"), (b'{"a": "\xed\xa0\x80"}', "decode"),
    (b'{"a": "\xff"}', "decode"), (b"[1, 2]", "Expected object, got array"),
    (b"null", "Expected object, got null"), (b'"text"', "Expected object, got str"),
    (b"{'a': 1}", "object keys must be strings"), (b'{"a": "\x01"}', "invalid character"),
    (b'{"a": 01}', "invalid number"),
])
def test_a_bad_line_is_named(tmp_path, capsys, line, told):
    path = make(tmp_path / "a.jsonl", b'{"a": 1}\n\n' + line + b'\n{"a": 2}\n')
    message = refused(capsys, rows, path)
    assert f"{path}:3: not a valid JSON row (" in message
    assert told in message
    assert "mend or delete this line" in message


def test_the_rows_before_a_torn_line_are_given(tmp_path, capsys):
    reader = stage.read_rows(make(tmp_path / "a.jsonl", '{"a": 1}\n{"a": '))
    assert next(reader)[2] == {"a": 1}
    refused(capsys, next, reader)


@pytest.mark.parametrize("content", [b"", b"\n\n \r\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"])
def test_a_file_without_rows_is_bad_input(tmp_path, capsys, content):
    assert "no rows in this file" in refused(capsys, rows, make(tmp_path / "a.jsonl", content))


def test_a_git_lfs_pointer_says_what_it_is(tmp_path, capsys):
    path = make(tmp_path / "a.jsonl", "version https://git-lfs.github.com/spec/v1\nsize 3\n")
    assert f"{path}: a git-lfs pointer" in refused(capsys, rows, path)


def test_a_line_of_16_mb_is_read_and_a_longer_one_is_not(tmp_path, capsys):
    line = b'{"a": "' + b"x" * (2**24 - 10) + b'"}'
    assert len(line) == 2**24 - 1 and len(rows(make(tmp_path / "a.jsonl", line + b"\n"))) == 1
    path = make(tmp_path / "b.jsonl", b'{"a": 1}\n' + b"x" * 2**25)
    assert f"{path}:2: a line above 16 MB is refused unread" in refused(capsys, rows, path)


KEYS = strategies.text("ab\u00e9\u2028", max_size=2)
JSON = strategies.recursive(
    strategies.none() | strategies.booleans() | strategies.integers() |
    strategies.floats(allow_nan=False, allow_infinity=False) |
    # every character but half surrogates
    strategies.text(strategies.characters(exclude_categories=["Cs"])),
    lambda inner: (strategies.lists(inner, max_size=3)
                   | strategies.dictionaries(KEYS, inner, max_size=3)))


@settings(max_examples=60, deadline=None)
@given(strategies.lists(strategies.dictionaries(KEYS, JSON, max_size=4), min_size=1, max_size=4),
       strategies.booleans())
def test_what_json_writes_is_read_back(tmp_path_factory, written, ascii_only):
    path = make(tmp_path_factory.mktemp("rows") / "a.jsonl",
                "".join(json.dumps(one, ensure_ascii=ascii_only) + "\n" for one in written))
    assert [row for _, _, row in rows(path)] == written


# ---- describe ------------------------------------------------------------------------------------
def test_meta_names_flags_inputs_and_versions(tmp_path):
    data = make(tmp_path / "in.jsonl", "x")
    folder = tmp_path / "model"
    (folder / "deeper").mkdir(parents=True)
    make(folder / "w", "1")
    flags = argparse.Namespace(n=8, out="o")
    meta = stage.describe(flags, [data, str(folder), "owner/name"], seed=3)
    assert meta["stage"] == "evaluate.py"
    assert meta["flags"] == {"n": 8, "out": "o"}
    assert meta["seed"] == 3
    assert meta["inputs"][data] == hashlib.sha256(b"x").hexdigest()
    assert meta["inputs"]["owner/name"] == "owner/name"
    assert meta["versions"]["numpy"]
    assert json.dumps(meta)
    before = meta["inputs"][str(folder)]
    make(folder / "w", "2")
    assert stage.describe(flags, [str(folder)])["inputs"][str(folder)] != before
    os.rename(folder / "w", folder / "v")
    assert stage.describe(flags, [str(folder)])["inputs"][str(folder)] != before


def test_meta_without_git(tmp_path, monkeypatch):
    """No git program, no repository, a repository without a commit: null each time."""
    (tmp_path / "files.py").write_text((ROOT / "data" / "files.py").read_text())
    ask = [sys.executable, "-c",
           "import files, argparse; print(files.describe(argparse.Namespace(), [])['git'])"]
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}

    def answer(**more):
        return subprocess.check_output(ask, cwd=tmp_path, env={**environment, **more},
                                       text=True).strip()

    assert answer() == "None" and answer(PATH=str(tmp_path)) == "None"
    if subprocess.run(["git", "init", "-q", str(tmp_path)], capture_output=True).returncode == 0:
        assert answer() == "None"


# ---- claim and publish ---------------------------------------------------------------------------
@pytest.fixture
def claim():
    """stage.claim that lets go of its locks at the end, as a process does."""
    held = []

    def call(*args, **flags):
        try:
            return stage.claim(*args, **flags)
        finally:
            if hasattr(stage.claim, "lock"):
                held.append(stage.claim.__dict__.pop("lock"))
    call.release = lambda: [os.close(held.pop()) for _ in range(len(held))]
    yield call
    call.release()


def meta_of(inputs=(), **flags):
    return stage.describe(argparse.Namespace(**flags), list(inputs))


def finish(claim, out, meta, content="done"):
    make(pathlib.Path(claim(out, meta)), content)
    stage.publish(out, meta)
    claim.release()


def test_complete_output_is_left_alone(tmp_path, capsys, claim):
    out, data = str(tmp_path / "o"), make(tmp_path / "in", "x")
    finish(claim, out, meta_of([data], n=8, workers=1, top=(1, 2)))
    moved = make(tmp_path / "elsewhere", "x")       # inputs are compared by content, not by name
    for inputs in (data, moved):
        assert claim(out, meta_of([inputs], n=8, workers=4, top=(1, 2)),
                     ignore=("workers",)) is None
        assert capsys.readouterr().err == f"{out}: complete, left alone\n"
    assert os.listdir(tmp_path) and not os.path.exists(out + ".partial")


def test_output_made_otherwise_is_refused_and_named(tmp_path, capsys, claim):
    out, data = str(tmp_path / "o"), make(tmp_path / "in", "x")
    finish(claim, out, meta_of([data], n=8, seed=0))
    assert "made with other n, seed; delete it" in refused(capsys, claim, out,
                                                           meta_of([data], n=9, seed=1))
    assert "made with other extra;" in refused(capsys, claim, out,
                                               meta_of([data], n=8, seed=0, extra=1))
    make(tmp_path / "in", "y")
    assert "made with other inputs;" in refused(capsys, claim, out, meta_of([data], n=8, seed=0))
    assert pathlib.Path(out).read_text() == "done"


@pytest.mark.parametrize("meta", [
    None, "", "{", "[]", "{}", '{"flags": 1, "inputs": {}}', '{"flags": {}, "inputs": []}',
    "\ud800"])
def test_output_of_unknown_origin_is_refused(tmp_path, capsys, claim, meta):
    out = make(tmp_path / "o", "somebody's work")
    if meta is not None:
        (tmp_path / "o.meta.json").write_text(meta, errors="surrogatepass")
    assert f"no {out}.meta.json says how it was made" in refused(capsys, claim, out, meta_of())
    assert pathlib.Path(out).read_text() == "somebody's work"


@pytest.mark.parametrize("folder", [False, True])
def test_second_run_is_refused_while_the_first_works(tmp_path, capsys, claim, folder):
    out = str(tmp_path / "o")
    assert claim(out, meta_of(), folder=folder) == out + ".partial"
    assert "another run is writing it" in refused(capsys, claim, out, meta_of(), folder=folder)
    code = f"from data import files; files.claim({out!r}, {{}}, folder={folder})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "another run is writing it" in done.stderr
    claim.release()
    assert claim(out, meta_of(), folder=folder) == out + ".partial"


@pytest.mark.parametrize("folder", [False, True])
def test_partial_of_a_killed_run_is_taken_over_with_its_content(tmp_path, claim, folder):
    out = str(tmp_path / "o")
    code = ("import os, signal\nfrom data import files\n"
            f"name = files.claim({out!r}, {{}}, folder={folder})\n"
            f"open(name + '/part' * {folder}, 'w').write('half')\n"
            "os.kill(os.getpid(), signal.SIGKILL)")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == -signal.SIGKILL
    partial = pathlib.Path(claim(out, meta_of(), folder=folder))
    assert (partial / "part" if folder else partial).read_text() == "half"


def test_partial_renamed_under_the_lock_is_not_claimed(tmp_path, capsys, claim, monkeypatch):
    """The first run finishes between the second one's look for the output and its lock: nothing is
    made twice."""
    out, flock = str(tmp_path / "o"), fcntl.flock
    make(tmp_path / "o.partial", "done")

    def finished_meanwhile(*args):
        if os.path.exists(out + ".partial"):
            os.replace(out + ".partial", out)
        flock(*args)

    monkeypatch.setattr(fcntl, "flock", finished_meanwhile)
    assert "another run is writing it" in refused(capsys, claim, out, meta_of())
    monkeypatch.undo()
    os.replace(out, out + ".other")
    exists = os.path.exists     # the output appears after the look for it, and its partial is gone
    looks = iter([False])
    monkeypatch.setattr(os.path, "exists",
                        lambda path: next(looks, True) if path == out else exists(path))
    assert "another run is writing it" in refused(capsys, claim, out, meta_of())


@pytest.mark.parametrize("kind", ["nfs", "none"])
@pytest.mark.parametrize("folder", [False, True])
def test_locks_of_network_file_systems(tmp_path, capsys, claim, monkeypatch, kind, folder):
    """NFS locks what is open for writing; Lustre may have no locks: said once, and work goes on."""
    out, flock = str(tmp_path / "o"), fcntl.flock

    def network_flock(handle, how):
        if kind == "none":
            raise OSError(errno.ENOSYS, "Function not implemented")
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", network_flock)
    partial = claim(out, meta_of(), folder=folder)
    told = capsys.readouterr().err
    if kind == "nfs":
        assert told == ""
        assert "another run is writing it" in refused(capsys, claim, out, meta_of(), folder=folder)
    else:
        assert told.startswith("evaluate.py: this file system has no locks (Function not impl")
        assert told.count("\n") == 1
    make(pathlib.Path(partial, "part") if folder else pathlib.Path(partial), "done")
    stage.publish(out, meta_of())
    assert sorted(os.listdir(tmp_path)) == ["o", "o.meta.json"]


def test_another_fault_of_a_lock_is_no_missing_lock(tmp_path, claim, monkeypatch):
    def broken(handle, how):
        raise OSError(errno.EIO, "Input/output error")
    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(OSError, match="Input/output"):
        claim(str(tmp_path / "o"), meta_of())


def test_the_lock_of_a_run_that_was_killed_at_its_end_goes(tmp_path, capsys, claim):
    out = str(tmp_path / "o")
    os.mkdir(claim(out, meta_of(), folder=True) + "/inner")
    stage.publish(out, meta_of())
    claim.release()
    make(tmp_path / "o.partial.lock", "")
    assert claim(out, meta_of(), folder=True) is None
    assert sorted(os.listdir(tmp_path)) == ["o", "o.meta.json"]


def test_folder_with_a_slash_at_the_end(tmp_path, claim):
    out = str(tmp_path / "o")
    partial = claim(out + "/", meta_of(out=1), folder=True)
    assert partial == out + ".partial"
    make(pathlib.Path(partial) / "w", "1")
    stage.publish(out + "/", meta_of(out=1))
    assert sorted(os.listdir(tmp_path)) == ["o", "o.meta.json"] and os.listdir(out) == ["w"]
    assert claim(out + "/", meta_of(out=1), folder=True) is None


def test_publish_syncs_then_meta_then_name(tmp_path, monkeypatch):
    """Contents reach the disk before any name, the meta takes its name first, and then the parent
    folder is synced."""
    out, events = str(tmp_path / "o"), []
    fsync, replace = os.fsync, os.replace

    def fsync_seen(handle):
        events.append(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    def replace_seen(old, new):
        events.append((old, new))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", fsync_seen)
    monkeypatch.setattr(os, "replace", replace_seen)
    (tmp_path / "o.partial" / "deeper").mkdir(parents=True)
    for name in ("a", "deeper/b"):
        make(tmp_path / "o.partial" / name, "1")
    stage.publish(out, {"flags": {}})
    names = events.index((out + ".meta.json.partial", out + ".meta.json"))
    contents = {f"{out}.partial{rest}" for rest in ("", "/a", "/deeper", "/deeper/b")}
    assert contents | {out + ".meta.json.partial"} <= set(events[:names])
    assert events[names + 1:] == [(out + ".partial", out), str(tmp_path)]


@pytest.mark.parametrize("calls", [0, 1])
def test_killed_between_the_two_renames(tmp_path, claim, monkeypatch, calls):
    """Whatever rename it dies before, the output's name is not there, and the same command then
    finishes it."""
    out, meta, replace, left = str(tmp_path / "o"), meta_of(n=1), os.replace, [calls]

    def dies(old, new):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        replace(old, new)

    make(pathlib.Path(claim(out, meta)), "done")
    monkeypatch.setattr(os, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        stage.publish(out, meta)
    assert not os.path.exists(out) and os.path.exists(out + ".meta.json") == bool(calls)
    monkeypatch.undo()
    claim.release()
    assert pathlib.Path(claim(out, meta)).read_text() == "done"
    stage.publish(out, meta)
    assert sorted(os.listdir(tmp_path)) == ["o", "o.meta.json"]


def test_full_disk_at_the_sync_leaves_the_output_unnamed(tmp_path, capsys, claim, monkeypatch):
    out = str(tmp_path / "o")

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    def work(args):
        make(pathlib.Path(claim(out, meta_of())), "done")
        monkeypatch.setattr(os, "fsync", full)
        stage.publish(out, meta_of())

    assert refused(capsys, stage.run, work, argparse.Namespace(out=out)) == (
        f"evaluate.py: error: {out}: No space left on device\n")
    assert os.listdir(tmp_path) == ["o.partial"]


# ---- rank_and_world ------------------------------------------------------------------------------
@pytest.mark.parametrize("rank, world, local, expected", [
    (None, None, None, (0, 1)), ("0", "1", "0", (0, 1)), ("3", "4", None, (3, 4)),
    ("", None, None, "'', '1' and '0' are not three numbers"),
    ("0", "", "0", "'0', '' and '0' are not"), ("one", "2", "1", "'one', '2' and '1' are not"),
    ("0", "1", "", "'0', '1' and '' are not"), ("-1", "2", "0", "'-1', '2' and '0' are not"),
    ("1", None, None, "rank 1 of 1 does not exist"), ("4", "4", "0", "rank 4 of 4 does not"),
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


# ---- run -----------------------------------------------------------------------------------------
def test_run_tells_errors_in_one_line(tmp_path, capsys):
    def end(error, out="o"):
        def main(args):
            raise error
        return refused(capsys, stage.run, main, argparse.Namespace(out=out))

    assert end(FileNotFoundError(errno.ENOENT, "No such file",
                                 "in.jsonl")).endswith(" in.jsonl: No such file\n")
    assert end(OSError(errno.ENOSPC, "No space left on device")).endswith(
        " o: No space left on device\n")
    assert end(OSError("a message alone")).endswith(" o: a message alone\n")
    assert end(BrokenPipeError(errno.EPIPE, "Broken pipe"),
               out=None).endswith(" stdout: Broken pipe\n")
    told = refused(capsys, stage.run, lambda args: rows(str(tmp_path)), argparse.Namespace(out="o"))
    assert told.endswith(f" {tmp_path}: Is a directory\n")


def test_run_lets_a_defect_show_itself():
    def main(args):
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError):
        stage.run(main, argparse.Namespace(out="o"))


@pytest.mark.parametrize("stage_file", ["generate.py", "train.py"])
def test_ctrl_c_while_the_libraries_are_imported(tmp_path, stage_file):
    """The first seconds of a stage are spent on importing torch: one line there, too. Here torch
    never stops importing."""
    (tmp_path / "torch.py").write_text(
        "import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    rows = "--prompts" if stage_file == "generate.py" else "--rollouts"
    flags = ["--model", "m", "--out", "o", rows, "r"]
    process = subprocess.Popen([sys.executable, stage_file, *flags], cwd=ROOT,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "PYTHONPATH": str(tmp_path)},
                               preexec_fn=lambda: signal.signal(
                                   signal.SIGINT, signal.default_int_handler))
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert err == f"{stage_file}: error: interrupted; the same command carries on from here\n"


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_end_in_one_line(number, code):
    script = ("import argparse, signal, time\nfrom data import files\n"
              # a shell's background job starts with it ignored
              "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
              "def main(args):\n    print('ready', flush=True)\n    time.sleep(60)\n"
              "files.run(main, argparse.Namespace(out='o'))")
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=pipe, stderr=pipe,
                               text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=300)
    assert process.returncode == code
    assert err.count("\n") == 1
    assert "the same command carries on from here" in err


@pytest.mark.parametrize("text, value", [("-1e-3", -1e-3), ("-.5", -.5), ("-2", -2), ("1e3", 1000),
                                         ("-1.E+2", -100)])
def test_negative_numbers_of_every_spelling_are_values(text, value):
    parser = stage.Parser()
    parser.add_argument("--gamma", type=float)
    assert parser.parse_args(["--gamma", text]).gamma == value
