"""run.sh: its flags, what it starts in which order, resuming, and what it keeps on disk.

Most tests put stand-ins for all stages behind python3 (`Mock`), each a few lines of shell. Others
run the real stages, forked from a warm process (`Loop`; see crash.py), with a tiny random model.
"""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

import crash

SHARED = ("run.sh", "generate.py", "score.py", "train.py", "evaluate.py", "data", "kernels",
          "experiments")
OWN = ("--lr", "2e-4", "--max-new-tokens", "8")  # what a model that is not embedded needs
TINY = ("--prompts-per-round 6 --n 4 --updates 2 --eval-problems 6 --eval-n 4 --countdown "
        "--numbers=3 --rounds 2 --keep 1").split()
QUICK = ("--rounds", "1", "--eval-problems", "0")
FLAGS = ("--rounds 4 --eval-every 2 --keep 1 --rehearse 8 --rehearse-coef 1.5,0.3@3 --n 4 "
         "--eval-problems 6 --seed 2 --name x").split()

# With KILL set, python3 kills run.sh the first time that it has run for it with these arguments.
DIES = """[ -z "$KILL" ] || { mark=$KILL/$(echo "$0 ${all:-$*}" | cksum | tr " " -)
[ -e "$mark" ] || { : > "$mark"; kill -9 $PPID; }; }
"""
STAGES = """all="$*"; [ "$1" != -m ] || shift
stage=$1; shift
echo "$stage $*" >> calls
[[ "$all" != *--check-* ]] || exit 0
while [ $# -gt 0 ]; do case $1 in --out) out=$2 ;; --n) n=$2 ;; esac; shift; done
if [ -n "$out" ] && [ -e "$out" ]; then echo "$out: complete, left alone" >&2
else case $stage in
data.select) seq 3 > "$out" ;;
data.countdown) seq "$n" > "$out" ;;
train.py) mkdir "$out.partial"; echo "$all" > "$out.partial/weights"; mv "$out.partial" "$out" ;;
evaluate.py) [ -z "$out" ] || echo "$all" > "$out" ;;
score.py) seq 12 > "$out" ;;
*) if [ -n "$SLOW" ]; then trap 'rm lock; exit 143' TERM; : > lock; sleep 60 & wait; fi
   echo "$all" > "$out" ;;
esac; fi
case $stage in
train.py) echo "Pass@1 0.041  entropy 1.234"; ;;
evaluate.py) printf 'a table\\nPass@1 and Pass@4: base 0.1 and 0.2\\n' ;;
esac
"""


class Mock:
    """A repository whose stages are stand-ins; runs/ is its own."""

    stages, links, model = STAGES, ("run.sh",), ()

    def __init__(self, folder):
        self.folder, self.bin, self.marks = folder, folder / "bin", folder / "marks"
        self.bin.mkdir()
        self.marks.mkdir()
        for name in self.links:
            (folder / name).symlink_to(os.path.join(crash.ROOT, name))
        (folder / "other").mkdir()
        (folder / "mine.py").touch()  # run.sh looks whether a sampler is there
        self.write("python3", self.stages)

    def write(self, name, text):
        (self.bin / name).write_text(f"#!/bin/bash\n{text}code=$?\n{DIES}exit $code\n")
        (self.bin / name).chmod(0o755)

    def environment(self, **more):
        return {**os.environ, "PATH": f"{self.bin}:{os.environ['PATH']}", "KILL": "", **more}

    def start(self, *flags, script="run.sh", cwd=None, **more):
        """(exit code, stdout, stderr) of run.sh."""
        done = subprocess.run(["bash", script, *self.model, *flags], cwd=cwd or self.folder,
                              text=True, capture_output=True, env=self.environment(**more))
        return done.returncode, done.stdout, done.stderr

    def run(self, *flags, **more):
        """The lines that run.sh writes to stdout; it must succeed."""
        code, out, err = self.start(*flags, **more)
        assert code == 0, err
        return out.splitlines()

    def refused(self, *flags):
        """The line with which run.sh ends."""
        code, _, err = self.start(*flags)
        assert code == 2 and err.count("\n") == 1, err
        return err

    def calls(self, stage):
        """The flags that this stage was given, call by call, checks left out."""
        lines = (self.folder / "calls").read_text().splitlines()
        return [line for line in lines if line.startswith(stage) and "--check-" not in line]

    def names(self):
        """The curves of every table."""
        return [re.search("--names (.*) --out", call)[1] for call in self.calls("evaluate.py")
                if "--names" in call]

    def files(self, name="demo"):
        """Everything in runs/NAME, as crash.content; of a meta, without the digests, into which the
        timings in metrics.jsonl go."""
        found = crash.content(str(self.folder / "runs" / name))
        for path, data in found.items():
            if path.strip("/").endswith(".meta.json"):
                data["inputs"] = sorted(data["inputs"])
        return {path.strip("/"): data for path, data in found.items()}


class Loop(Mock):
    """The repository, in links, with the real stages and a tiny model, `base`."""

    def __init__(self, folder):
        self.links, (path, base) = SHARED, crash.warm()
        python = f'"{sys.executable}" -S -E'
        self.stages = (
            f'if [ "$1" = -m ]; then set -- "data/${{2#data.}}.py" "${{@:3}}"; fi\n'
            f'if [ "$1" = engine.py ]; then {python} "$@"\n'
            f'else {python} "{crash.ROOT}/tests/ask.py" "{path}" "$@"; fi\n')
        super().__init__(folder)
        (folder / "base").symlink_to(base)
        self.model = ["--model", "base", *OWN]


@pytest.fixture
def loop(tmp_path):
    return Loop(tmp_path)


@pytest.fixture
def mock(tmp_path):
    return Mock(tmp_path)


def write_problems(path, count):
    rows = [{"id": f"../{i}", "task": "countdown", "prompt": f"1 {i}={1 + i}:", "numbers": [1, i],
             "target": 1 + i, "n_solutions": 1} for i in range(count)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8-sig")  # with a BOM


# ---- Flags ---------------------------------------------------------------------------------------
def test_help_has_every_flag_with_its_default_and_needs_no_python(tmp_path):
    script = os.path.join(crash.ROOT, "run.sh")
    done = subprocess.run(["/bin/bash", script, "--help"], capture_output=True, text=True,
                          cwd=tmp_path, env={"PATH": "/usr/bin:/bin"})
    with open(script, encoding="utf-8") as file:
        body = re.search(r"^read_flags.*?^  while", file.read(), re.M | re.S)[0]
    names = [name for name in re.findall(r"(\w+)=", body) if name != "given"]
    assert done.returncode == 0 and not done.stderr and len(names) > 24
    for name in names:
        assert re.search(rf"^  --{name.replace('_', '-')} .*\)$", done.stdout, re.M), name


@pytest.mark.parametrize("flags, message", [
    (["--epochs", "3"], "unknown flag --epochs (see --help)"),
    (["demo"], "unknown flag demo (see --help)"), (["--rounds"], "--rounds needs a value"),
    *(([flag, value], f"{flag} must be a whole number of at least {least}, not '{value}'")
      for flag, value, least in (
          ("--rounds", "x", 1), ("--n", "1 2", 1), ("--keep", "", 1), ("--nproc", "9" * 20, 1),
          ("--keep", "0", 1), ("--seed", "-1", 0), ("--updates", "08", 1))),
    (["--prompts-per-round", "2", "--updates", "3"], "--updates: more than --prompts-per-round"),
    *((["--name", name], f"--name is a folder's name in runs/, not '{name}'")
      for name in ("../x", "")),
    *(([flag, name], f"{flag}: no file {name}") for flag, name in (
        ("--prompts", "gone.jsonl"), ("--eval-prompts", "bin"), ("--sampler", "gone.py"))),
    (["--rehearse-coef", "0.5"], "--rehearse-coef belongs to --rehearse"),
    *((["--rehearse", "8", "--rehearse-coef", coef],
       f"--rehearse-coef is C, or C,D@R with D from round R > 1 on, not '{coef}'")
      for coef in ("", "1,0.3", "1,0.3@1", "1, 0.3@2", "1,@2", "1,0.5@2,0.3@4")),
    *((["--against", name], f"--against: no round in runs/{name}, or it is this run itself")
      for name in ("demo", "x")),
    *((flags, "--method and --against: no two curves may have one name, nor one be named base")
      for flags in (["--against", "base"], ["--against", "5"], ["--method", "mine.py:base"],
                    ["--method", "grpo", "--against", "grpo"])),
    (["--generate", "--stop 'a"], "--generate: a quote in it is not closed"),
    *(([flag, flags], f"{flag}: {own} is run.sh's own flag") for flag, flags, own in (
        ("--generate", "--n 4", "--n"), ("--train", "-h", "-h"),
        ("--train", "--clip-low 0.1 --updates=3", "--updates"))),
    (["--model", "gone"], "--model gone: no such model folder (a Hub id is written owner/name)"),
    *((["--model", "other", *flags], "--model other needs --lr and --max-new-tokens; the defaults "
       "fit the embedded models") for flags in ([], ["--lr", "1"], ["--max-new-tokens", "9"])),
])
def test_wrong_flags_end_with_one_line_before_anything_is_made(mock, flags, message):
    assert mock.refused(*flags) == f"run.sh: error: {message}\n"
    assert not (mock.folder / "runs").exists()


@pytest.mark.parametrize("flags, message", [
    (["--generate", "--temp 0.5"], "generate.py: error: unrecognized arguments: --temp 0.5"),
    (["--temperature", "0"], "train.py: error: --temperature must be above 0"),
    (["--train", "--gama-p 0.1"], "train.py: error: unrecognized arguments: --gama-p 0.1"),
    (["--rehearse", "8", "--rehearse-coef", "1,x@2"],
     "train.py: error: argument --rehearse-coef: invalid float value: 'x'"),
    (["--countdown", "--numbers four"], "countdown.py: error: argument --numbers: invalid"),
    (["--prompts", "no-task.jsonl", "--updates", "1"],
     "score.py: error: no-task.jsonl:1: missing field 'task'"),
    (["--eval-prompts", "no-gold.jsonl"], "score.py: error: no-gold.jsonl:1: missing field 'answ"),
    (["--prompts", "two.jsonl", "--updates", "3"], "score.py: error: two.jsonl: 2 problems, few")])
def test_flags_and_problems_are_checked_by_the_stages_before_anything_is_made(loop, flags, message):
    (loop.folder / "no-task.jsonl").write_text('{"id": "a", "prompt": "1"}\n')
    (loop.folder / "no-gold.jsonl").write_text('{"id": "a", "prompt": "1", "task": "math"}\n')
    write_problems(loop.folder / "two.jsonl", 2)
    assert loop.refused(*TINY, *flags).startswith(message)
    assert not (loop.folder / "runs").exists()  # the name is free for the command without the typo


def test_quoted_flags_are_split_as_by_a_shell_and_not_expanded(mock):
    text = "--stop '9 9' $HOME* \"it's\" \\' '\n\n' </answer> \"\\\\b \\\"\" --max-batch-tokens 100"
    lines = mock.run(*QUICK, "--generate", text)
    assert re.fullmatch(r"  1  Pass@1 0.041  entropy 1.234  \d+ s  demo", lines[0])
    rollouts = (mock.folder / "runs/demo/001/rollouts.jsonl").read_text()
    assert "--stop 9 9 $HOME* it's ' \n\n </answer> \\b \" --max-batch-tokens 100\n" in rollouts
    settings = (mock.folder / "runs/demo/settings").read_text().splitlines()
    assert "generate=" + text.replace("\n", "\\n") in settings and len(settings) == 16
    assert "train=--gamma-p 3.0 --gamma-n 0.1" in settings  # of the embedded model
    for name, more, expected in (("a", "--clip-low 0", "--gamma-p 3.0 --gamma-n 0.1 --clip-low 0"),
                                 ("b", "--gamma-p 2", "--gamma-p 2"),  # it belongs to its level
                                 ("c", "--smooth-level mean", "--smooth-level mean")):
        mock.run(*QUICK, "--name", name, "--train", more)
        assert f"train={expected}\n" in (mock.folder / "runs" / name / "settings").read_text()


# ---- The loop ------------------------------------------------------------------------------------
def test_killed_after_every_command_it_ends_with_the_same_files(mock, tmp_path_factory):
    undisturbed, kills = Mock(tmp_path_factory.mktemp("undisturbed")), 0
    undisturbed.run(*FLAGS)
    while (end := mock.start(*FLAGS, KILL=str(mock.marks)))[0] == -9:
        kills += 1
    assert end[0] == 0 and kills >= 30 and "error" not in end[2]
    assert mock.files("x") == undisturbed.files("x")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_the_running_stage_as_well(mock, number):
    process = subprocess.Popen(
        ["bash", "run.sh", "--rounds", "1"], cwd=mock.folder, env=mock.environment(SLOW="1"),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL))  # as at a terminal
    while not (mock.folder / "lock").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait() == 128 + number and not (mock.folder / "lock").exists()
    mock.run("--rounds", "1")  # and the same command goes on


def test_seeds_rehearsal_and_evaluations_on_the_way(mock):
    """Every seed and purpose samples with a seed of its own; the rehearsal has half for all
    problems and half for hard ones."""
    out = mock.run(*FLAGS)
    assert out.count("a table") == 1 and "\n".join(out).count("Pass@1 and Pass@4") == 2
    assert mock.names() == ["base ds-grpo+rehearsal", "base 2 4"]
    once, again = [call for call in mock.calls("generate.py") if "/rehearsal/" in call]
    assert "--n 4 " in once and "--n 4 " in again  # 12 rows, 3 hard problems
    scored = (mock.folder / "runs/x/rehearsal/scored.jsonl").read_text()
    assert scored.count("\n") == 2 * 12
    weights = [re.search(r"--rehearse (\S+) --rehearse-coef (\S+)", call).groups()
               for call in mock.calls("train.py")]
    assert weights == [("runs/x/rehearsal/scored.jsonl", weight)
                       for weight in ("1.5", "1.5", "0.3", "0.3")]
    (call,) = mock.calls("data.select")
    assert "--at-most 1 --scored runs/x/rehearsal/all.scored.jsonl" in call

    mock.run(*FLAGS, "--seed", "1", "--name", "y")
    seeds = {(re.search(r"--out runs/([xy]/(?:eval|\d+|rehearsal/\w+))", call)[1],
              re.search(r"--seed (\d+)", call)[1]) for call in mock.calls("generate.py")}
    used = [seed for _, seed in seeds]
    assert len(used) == len(set(used)) == 2 * (4 + 2 + 1)  # rounds, rehearsal twice, evaluation
    assert ("y/003", "100003") in seeds and ("y/eval", "199998") in seeds


def test_other_evaluations_stand_beside_the_old_one(mock):
    mock.run(*FLAGS)
    before = mock.files("x")
    mock.run(*FLAGS, "--eval-n", "2", "--eval-every", "0")
    after = mock.files("x")
    assert {path: data for path, data in after.items() if "eval-test-6x2/" not in path} == before
    assert "eval-test-6x2/eval-004.json" in after and "eval-test-6x2/002.scored.jsonl" not in after
    mock.run(*FLAGS, "--rounds", "2")  # pruned, but evaluated
    assert mock.refused(*FLAGS, "--rounds", "2", "--eval-n", "2") == (
        "run.sh: error: round 2 was pruned; evaluate 4, or train with another --name and a larger "
        "--keep\n")
    mock.run(*FLAGS, "--rounds", "5")
    assert mock.names()[-1] == "base 2 4 5"


def test_other_flags_are_refused_and_change_nothing(mock):
    mock.run(*QUICK)
    before = mock.files()
    for flags in (["--seed", "1"], ["--lr", "1e-3"], ["--method", "grpo"], ["--n", "2"],
                  ["--train", "--gamma-p 0.5"], ["--generate", "--stop 9"],
                  ["--sampler", "mine.py"], ["--rehearse", "9"]):
        err = mock.refused(*QUICK, *flags)
        assert err.startswith("run.sh: error: runs/demo was begun with other flags")
        assert flags[0][2:] + "=" in err and mock.files() == before
    (mock.folder / "runs/demo/settings").write_text("")  # as a power cut may leave it
    mock.run(*QUICK)
    assert mock.files() == before


def test_keep_bounds_the_disk_also_when_it_changes_and_past_round_999(mock):
    def kept(*flags):
        mock.run("--eval-problems", "0", *flags)
        return sorted(path.name for path in (mock.folder / "runs/demo").iterdir() if path.is_dir())

    assert kept("--keep", "2", "--rounds", "3") == ["002", "003"]
    lock = mock.folder / "runs/demo/003/policy.partial.lock"
    lock.touch()  # train.py was killed after it had published
    assert kept("--keep", "2", "--rounds", "4") == ["003", "004"] and not lock.exists()
    for old, new in ("003", "999"), ("004", "1000"):
        shutil.move(mock.folder / "runs/demo" / old, mock.folder / "runs/demo" / new)
    assert kept("--keep", "1", "--rounds", "1001") == ["1001"]


def test_the_same_run_from_anywhere_and_with_a_slash_at_the_models_end(mock):
    (mock.folder / "caller/models").mkdir(parents=True)
    (mock.folder / "caller/models/mine").symlink_to(mock.bin)
    (mock.folder / "caller/arm.py").touch()
    write_problems(mock.folder / "caller/train.jsonl", 6)
    here = [*QUICK, *OWN, "--model", "models/mine/", "--prompts", "train.jsonl", "--method",
            "arm.py:f"]
    for script in ("../run.sh", str(mock.folder / "run.sh")):
        mock.run(*here, script=script, cwd=mock.folder / "caller")
    assert not (mock.folder / "caller/runs").exists() and len(mock.calls("train.py")) == 1
    flags = [*QUICK, *OWN, "--prompts", "caller/train.jsonl", "--method", "caller/arm.py:f"]
    mock.run(*flags, "--model", "caller/models/mine")
    assert "(model=caller/models/mine)" in mock.refused(*flags, "--model", "bin")


def test_processes_are_started_by_torchrun_but_a_sampler_is_one(mock):
    """With --n, which argparse of Python 3.11 would take for one of torchrun's flags, behind --."""
    mock.write("torchrun", 'echo "${@:1:5}" >> torchruns\nexec python3 "${@:5}"\n')
    mock.run(*QUICK, "--nproc", "2")
    mock.run(*QUICK, "--nproc", "2", "--name", "other", "--sampler", "mine.py")
    assert (mock.folder / "torchruns").read_text().splitlines() == [
        f"--standalone --nproc-per-node 2 -- {name}.py" for name in ("generate", "train", "train")]
    assert len(mock.calls("mine.py")) == 1


def test_the_demonstration_runs_two_side_by_side_and_compares_them(mock):
    lines = mock.run()
    assert sorted(line.split()[-1] for line in lines[:10]) == ["GRPO"] * 5 + ["demo"] * 5
    assert lines[10:] == ["a table", "Pass@1 and Pass@4: base 0.1 and 0.2"]
    assert re.search(r"base.scored.jsonl runs/demo/eval/GRPO-005.scored.jsonl "
                     r"runs/demo/eval/005.scored.jsonl --names base GRPO ds-grpo.rehearsal "
                     r"--out runs/demo/eval/eval-005-GRPO.json", mock.calls("evaluate.py")[0])
    assert any("--model runs/GRPO/005/policy" in call and "/demo/eval/" in call
               for call in mock.calls("generate.py"))


# ---- With the real stages ------------------------------------------------------------------------
def test_a_finished_run_is_whole_and_started_again_makes_nothing_new(loop):
    lines = loop.run(*TINY)
    files = loop.files()
    assert {"settings", "eval/eval-002.json", "eval/passk.png", "eval/training.png",
            "eval/problems.jsonl", "eval/base.scored.jsonl", "eval/002.scored.jsonl",
            "002/problems.jsonl", "002/rollouts.jsonl", "002/scored.jsonl", "002/policy.meta.json",
            "002/policy/model.safetensors"} <= files.keys()
    metrics = files["002/policy/metrics.jsonl"]
    assert [row["step"] for row in metrics] == [1, 2, 3, 4]
    runs = json.loads(files["eval/eval-002.json"])["runs"]
    assert [run["name"] for run in runs] == ["base", "ds-grpo"]
    mean = sum(row["pass@1"] for row in metrics[2:]) / 2
    assert re.fullmatch(rf"  2  Pass@1 {mean:.3f}  Pass@4 .*  \d+ s  demo", lines[1])
    assert lines[2].startswith("6 problems, n 4") and lines[-1].startswith("Pass@1 and Pass@4: ba")
    model = loop.folder / "runs/demo/002/policy/model.safetensors"
    before = model.stat().st_mtime_ns
    assert loop.run(*TINY) == lines[2:]
    assert loop.files() == files and model.stat().st_mtime_ns == before


SHIFTED = """
import json, subprocess, sys
out = sys.argv[sys.argv.index("--out") + 1]
code = subprocess.run(["python3", "generate.py", *sys.argv[1:]]).returncode
if code or "--check-flags" in sys.argv:
    sys.exit(code)
rows = [json.loads(line) for line in open(out)]
with open(out, "w") as file:
    for row in rows:
        row["logprobs"] = [value - 0.1 for value in row["logprobs"]]
        file.write(json.dumps(row) + "\\n")
"""


def test_a_sampler_whose_log_probs_are_shifted_trains_as_without_it(loop):
    """A stand-in for an engine with other numerics; with --tis-cap 1 its weights are cut to 1. The
    problems of a file are taken in turn, shuffled anew each pass."""
    (loop.folder / "engine.py").write_text(SHIFTED)
    write_problems(loop.folder / "seed=1 mine.jsonl", 5)
    names = set(os.listdir(loop.folder))
    flags = ["--prompts", "seed=1 mine.jsonl", *("--n 4 --updates 2 --rounds 2 --eval-problems 0 "
             "--method grpo --prompts-per-round 3").split()]
    loop.run(*flags)
    loop.run(*flags, "--name", "engine", "--sampler", "engine.py", "--train", "--tis-cap 1")
    files, plain = loop.files("engine"), loop.files()
    assert files["002/policy/model.safetensors"] == plain["002/policy/model.safetensors"]
    for row, other in zip(files["002/policy/metrics.jsonl"], plain["002/policy/metrics.jsonl"]):
        assert abs(row["logprob_gap"] - other["logprob_gap"] - 0.1) < 1e-4
    assert b"sampler=engine.py\n" in files["settings"]
    ids = [json.loads(line)["id"] for number in "12"
           for line in files[f"00{number}/problems.jsonl"].splitlines()]
    assert sorted(ids[:5]) == [f"../{i}" for i in range(5)] and len(set(ids[3:])) == 3
    assert set(os.listdir(loop.folder)) == {*names, "runs"}  # an id is no file name


@pytest.mark.slow
def test_the_demonstration_learns(loop):
    loop.model = ()  # without any flag
    lines = loop.run()
    with open(loop.folder / "runs/demo/eval/eval-005-GRPO.json") as file:
        runs = json.load(file)["runs"]
    assert [run["name"] for run in runs] == ["base", "GRPO", "ds-grpo+rehearsal"]
    base, *trained = [run["pass_at_k"]["1"]["value"] for run in runs]
    assert min(trained) > base + 0.015  # of this seed
    base, grpo, recipe = [run["pass_at_k"]["256"]["value"] for run in runs]
    assert grpo < base - 0.05 and recipe > grpo + 0.1
    assert lines[-1].startswith("Pass@1 and Pass@256: base ")


@pytest.mark.slow
def test_two_processes_under_torchrun(loop):
    loop.run(*TINY, *QUICK, "--nproc", "2")
    loop.run(*TINY, *QUICK, "--name", "one")
    files = loop.files()
    assert files["001/policy.meta.json"]["world_size"] == 2
    assert loop.files("one")["001/rollouts.jsonl"] == files["001/rollouts.jsonl"]
