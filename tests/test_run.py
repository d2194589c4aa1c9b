"""run.sh: its flags, what it starts in which order, resuming, and what it keeps on disk.

Most tests put stand-ins for all stages behind python3 (`Mock`), each a few lines of shell. Others
run the real stages, forked from a warm process (`Loop`; see crash.py), with a tiny random model.
"""
import collections
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

# With KILL set, python3 kills run.sh the first time that it has run for it with these arguments.
DIES = """[ -z "$KILL" ] || { mark=$KILL/$(echo "$0 ${all:-$*}" | cksum | tr " " -)
[ -e "$mark" ] || { : > "$mark"; kill -9 $PPID; }; }
"""
STAGES = """all="$*"; [ "$1" != -m ] || shift
stage=$1; shift
echo "$stage $*" >> calls
[[ "$all" != *--check-* ]] || { [[ "$all" != *wrong* ]] || exit 2; exit 0; }
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
train.py) echo "Pass@1 0.041  entropy 1.234"; [ -z "$CUT" ] || echo "$out: raise the limit" ;;
evaluate.py) printf 'a table\\nPass@1 and Pass@4: base 0.1 and 0.2\\n' ;;
esac
"""


class Mock:
    """A repository whose stages are stand-ins; runs/ is its own."""

    stages = STAGES

    def __init__(self, folder):
        self.folder, self.bin, self.marks = folder, folder / "bin", folder / "marks"
        self.bin.mkdir()
        self.marks.mkdir()
        self.link()
        self.write("python3", self.stages)

    def link(self):
        (self.folder / "run.sh").symlink_to(os.path.join(crash.ROOT, "run.sh"))
        (self.folder / "generate.py").touch()

    def write(self, name, text):
        (self.bin / name).write_text(f"#!/bin/bash\n{text}code=$?\n{DIES}exit $code\n")
        (self.bin / name).chmod(0o755)

    def environment(self, **more):
        return {**os.environ, "PATH": f"{self.bin}:{os.environ['PATH']}", "KILL": "", **more}

    def __call__(self, *flags, kill=False, script="run.sh", cwd=None, **more):
        """(exit code, stderr) of run.sh; what it wrote to stdout is in `out`."""
        done = subprocess.run(
            ["bash", script, *flags], cwd=cwd or self.folder, capture_output=True, text=True,
            env=self.environment(KILL=str(self.marks) if kill else "", **more))
        self.out = done.stdout
        return done.returncode, done.stderr

    def calls(self, stage):
        """The flags that this stage was given, call by call, checks left out."""
        lines = (self.folder / "calls").read_text().splitlines()
        return [line for line in lines if line.startswith(stage) and "--check-" not in line]

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

    def __init__(self, folder, warm):
        python = f'"{sys.executable}" -S -E'
        self.base = warm.base
        self.stages = (
            f'if [ "$1" = -m ]; then set -- "data/${{2#data.}}.py" "${{@:3}}"; fi\n'
            f'if [ "$1" = engine.py ]; then {python} "$@"\n'
            f'else {python} "{crash.ROOT}/tests/ask.py" "{warm.path}" "$@"; fi\n')
        super().__init__(folder)

    def link(self):
        for name in SHARED:
            (self.folder / name).symlink_to(os.path.join(crash.ROOT, name))
        (self.folder / "base").symlink_to(self.base)

    def __call__(self, *flags, **options):
        model = [] if "--model" in flags else ["--model", "base", *OWN]
        return super().__call__(*model, *flags, **options)


@pytest.fixture(scope="module")
def warm():
    return crash.warm()


@pytest.fixture
def loop(tmp_path, warm):
    return Loop(tmp_path, warm)


@pytest.fixture
def mock(tmp_path):
    return Mock(tmp_path)


# ---- Flags ---------------------------------------------------------------------------------------
def test_help_has_every_flag_with_its_default_and_needs_no_python(tmp_path):
    script = os.path.join(crash.ROOT, "run.sh")
    done = subprocess.run(["/bin/bash", script, "--help"], capture_output=True, text=True,
                          cwd=tmp_path, env={"PATH": "/usr/bin:/bin"})
    with open(script, encoding="utf-8") as file:
        body = re.search(r"^read_flags.*?^  for", file.read(), re.M | re.S)[0]
    names = [name for name in re.findall(r"(\w+)=", body) if name != "given"]
    assert done.returncode == 0 and not done.stderr and len(names) > 25
    for name in names:
        assert re.search(rf"^  --{name.replace('_', '-')} .*\)$", done.stdout, re.M), name


@pytest.mark.parametrize("flags, message", [
    (["--epochs", "3"], "unknown flag --epochs (see --help)"),
    (["--rounds"], "--rounds needs a value"),
    (["demo"], "unknown flag demo (see --help)"),
    (["--rounds", "x"], "--rounds must be a whole number, not 'x'"),
    (["--n", "1 2"], "--n must be a whole number, not '1 2'"),
    (["--keep", ""], "--keep must be a whole number, not ''"),
    (["--nproc", "9" * 20], f"--nproc must be a whole number, not '{'9' * 20}'"),
    (["--keep", "0"], "--keep must be at least 1"),
    (["--prompts-per-round", "2", "--updates", "3"], "--updates: more than --prompts-per-round"),
    (["--name", "../x"], "--name is a folder's name in runs/, not '../x'"),
    (["--name", ""], "--name is a folder's name in runs/, not ''"),
    (["--prompts", "gone.jsonl"], "--prompts: no file gone.jsonl"),
    (["--eval-prompts", "bin"], "--eval-prompts: no file bin"),
    (["--sampler", "gone.py"], "--sampler: no file gone.py"),
    (["--rehearse-coef", "0.5"], "--rehearse-coef belongs to --rehearse"),
    *((["--rehearse", "8", "--rehearse-coef", coef],
       f"--rehearse-coef is C, or C,D@R with D from round R > 1 on, not '{coef}'")
      for coef in ("", "1,0.3", "1,0.3@1", "1, 0.3@2", "1,@2", "1,0.5@2,0.3@4")),
    (["--against", "demo"], "--against: no round in runs/demo, or it is this run itself"),
    (["--against", "x"], "--against: no round in runs/x, or it is this run itself"),
    *((flags, "--method and --against: no two curves may have one name, nor one be named base")
      for flags in (["--against", "base"], ["--against", "5"], ["--method", "mine.py:base"],
                    ["--method", "grpo", "--against", "grpo"])),
    (["--generate", "--stop 'a"], "--generate: a quote in it is not closed"),
    (["--generate", "--n 4"], "--generate: --n is run.sh's own flag"),
    (["--train", "-h"], "--train: -h is run.sh's own flag"),
    (["--train", "--clip-low 0.1 --updates=3"], "--train: --updates is run.sh's own flag"),
    *((["--model", "other", *flags], "--model other needs --lr and --max-new-tokens; the defaults "
       "fit the embedded models") for flags in ([], ["--lr", "1"], ["--max-new-tokens", "9"])),
])
def test_wrong_flags_end_with_one_line_before_anything_is_made(mock, flags, message):
    assert mock(*flags) == (2, f"run.sh: error: {message}\n")
    assert not (mock.folder / "runs").exists()


@pytest.mark.parametrize("flags, message", [
    (["--generate", "--temp 0.5"], "generate.py: error: unrecognized arguments: --temp 0.5"),
    (["--attention", "fast"], "generate.py: error: argument --attention: invalid choice: 'fast'"),
    (["--temperature", "warm"], "generate.py: error: argument --temperature: invalid float"),
    (["--temperature", "0"], "train.py: error: --temperature must be above 0"),
    (["--train", "--gama-p 0.1"], "train.py: error: unrecognized arguments: --gama-p 0.1"),
    (["--method", "ppo"], "train.py: error: "),
    (["--rehearse", "8", "--rehearse-coef", "1,x@2"],
     "train.py: error: argument --rehearse-coef: invalid float value: 'x'"),
    (["--countdown", "--numbers four"], "countdown.py: error: argument --numbers: invalid"),
    (["--prompts", "no-task.jsonl", "--updates", "1"],
     "score.py: error: no-task.jsonl:1: missing field 'task'"),
    (["--eval-prompts", "no-gold.jsonl"], "score.py: error: no-gold.jsonl:1: missing field 'answ"),
    (["--prompts", "mine.jsonl", "--updates", "3"], "score.py: error: mine.jsonl: 2 problems, few"),
])
def test_flags_and_problems_are_checked_by_the_stages_before_anything_is_made(loop, flags, message):
    write_problems(loop.folder / "mine.jsonl", 2)
    (loop.folder / "no-task.jsonl").write_text('{"id": "a", "prompt": "1"}\n')
    (loop.folder / "no-gold.jsonl").write_text('{"id": "a", "prompt": "1", "task": "math"}\n')
    code, err = loop(*TINY, *flags)
    assert code == 2 and err.count("\n") == 1 and err.startswith(message), err
    assert not (loop.folder / "runs").exists()  # the name is free for the command without the typo


def write_problems(path, count):
    with open(path, "w", encoding="utf-8-sig") as file:  # with a BOM
        file.writelines(json.dumps({
            "id": f"../{i}", "task": "countdown", "prompt": f"1 {i}={1 + i}:", "numbers": [1, i],
            "target": 1 + i, "n_solutions": 1}) + "\n" for i in range(count))


def test_quoted_flags_are_split_as_by_a_shell_and_not_expanded(mock):
    text = "--stop '9 9' $HOME* \"it's\" \\' '\n\n' </answer> --max-batch-tokens 100"
    code, err = mock("--rounds", "1", "--eval-problems", "0", "--generate", text)
    assert code == 0, err
    rollouts = (mock.folder / "runs/demo/001/rollouts.jsonl").read_text()
    assert "--stop 9 9 $HOME* it's ' \n\n </answer> --max-batch-tokens 100\n" in rollouts
    with open(mock.folder / "runs/demo/settings", encoding="utf-8") as file:
        settings = file.read().splitlines()
    assert "generate=" + text.replace("\n", "\\n") in settings and len(settings) == 17
    assert "train=--gamma-p 3.0 --gamma-n 0.1" in settings  # of the embedded model


# ---- The loop ------------------------------------------------------------------------------------
def test_a_finished_run_is_whole_and_started_again_makes_nothing_new(loop):
    code, err = loop(*TINY)
    assert code == 0, err
    files = loop.files()
    assert {"settings", "eval/eval-002.json", "eval/passk.png", "eval/training.png",
            "eval/problems.jsonl", "eval/base.scored.jsonl", "eval/002.scored.jsonl",
            "002/problems.jsonl", "002/rollouts.jsonl", "002/scored.jsonl", "002/policy.meta.json",
            "002/policy/model.safetensors"} <= files.keys()
    assert [row["step"] for row in files["002/policy/metrics.jsonl"]] == [1, 2, 3, 4]
    runs = json.loads(files["eval/eval-002.json"])["runs"]
    assert [run["name"] for run in runs] == ["base", "ds-grpo"]
    lines = loop.out.splitlines()
    rows = files["002/policy/metrics.jsonl"][2:]
    mean = sum(row["pass@1"] for row in rows) / 2
    assert re.fullmatch(rf"  2  Pass@1 {mean:.3f}  Pass@4 .*  \d+ s  demo", lines[1])
    assert lines[2].startswith("6 problems, n 4") and lines[-1].startswith("Pass@1 and Pass@4: ba")
    model = loop.folder / "runs/demo/002/policy/model.safetensors"
    before = model.stat().st_mtime_ns
    code, err = loop(*TINY)
    assert code == 0 and "train.py" not in err and loop.out.splitlines() == lines[2:]
    assert loop.files() == files and model.stat().st_mtime_ns == before


FLAGS = ("--rounds 4 --eval-every 2 --keep 1 --rehearse 8 --rehearse-coef 1.5,0.3@3 --n 4 "
         "--eval-problems 6 --seed 2 --name x").split()


def test_killed_after_every_command_it_ends_with_the_same_files(mock, tmp_path_factory):
    undisturbed, kills = Mock(tmp_path_factory.mktemp("undisturbed")), 0
    assert undisturbed(*FLAGS)[0] == 0
    while (end := mock(*FLAGS, kill=True))[0] == -9:
        kills += 1
    assert end[0] == 0 and kills >= 30 and "error" not in end[1]
    assert mock.files("x") == undisturbed.files("x")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_the_running_stage_as_well(mock, number):
    process = subprocess.Popen(
        ["bash", "run.sh", "--rounds", "1"], cwd=mock.folder, env=mock.environment(SLOW="1"),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while not (mock.folder / "lock").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait() == 128 + number and not (mock.folder / "lock").exists()
    assert mock("--rounds", "1")[0] == 0  # and the same command goes on


def test_every_seed_and_purpose_has_sampling_seeds_of_its_own(mock):
    seeds = collections.Counter()
    for seed in "01":
        code, err = mock(*FLAGS, "--seed", seed, "--name", f"s{seed}")
        assert code == 0, err
    for call in mock.calls("generate.py"):
        purpose = re.search(r"--out runs/(s\d/(?:eval|\d+|rehearsal/\w+))", call)[1]
        seeds[purpose, re.search(r"--seed (\d+)", call)[1]] += 1
    used = [seed for _, seed in seeds]
    assert len(used) == len(set(used)) == 2 * (4 + 2 + 1)  # rounds, rehearsal twice, evaluation
    assert ("s1/003", "100003") in seeds and ("s1/eval", "199998") in seeds


def test_rehearsal_has_half_for_all_problems_and_half_for_hard_ones(mock):
    code, err = mock(*FLAGS)
    assert code == 0, err
    once, again = [call for call in mock.calls("generate.py") if "/rehearsal/" in call]
    assert "--n 4 " in once and "--n 4 " in again  # 12 rows, 3 hard problems
    scored = (mock.folder / "runs/x/rehearsal/scored.jsonl").read_text()
    assert scored.count("\n") == 2 * 12
    weights = [re.search(r"--rehearse (\S+) --rehearse-coef (\S+)", call).groups()
               for call in mock.calls("train.py")]
    assert weights == [("runs/x/rehearsal/scored.jsonl", weight)
                       for weight in ("1.5", "1.5", "0.3", "0.3")]
    (call,) = mock.calls("data.select")
    assert call.endswith("--at-most 1 --scored runs/x/rehearsal/all.scored.jsonl")


def test_evaluations_on_the_way_and_with_other_flags_beside_the_old_one(mock):
    code, err = mock(*FLAGS)
    assert code == 0, err
    assert mock.out.count("a table") == 1 and mock.out.count("Pass@1 and Pass@4") == 2
    names = [re.search("--names (.*) --out", call)[1] for call in mock.calls("evaluate.py")
             if "--names" in call]
    assert names == ["base ds-grpo+rehearsal", "base 2 4"]
    before = mock.files("x")
    code, err = mock(*FLAGS, "--eval-n", "2", "--eval-every", "0")
    assert code == 0, err
    after = mock.files("x")
    assert {path: data for path, data in after.items() if "eval-test-6x2/" not in path} == before
    assert "eval-test-6x2/eval-004.json" in after and "eval-test-6x2/002.scored.jsonl" not in after
    assert mock(*FLAGS, "--rounds", "2")[0] == 0  # pruned, but evaluated
    code, err = mock(*FLAGS, "--rounds", "2", "--eval-n", "2")
    assert code == 2 and err == (
        "run.sh: error: round 2 was pruned; evaluate 4, or train with another --name and a larger "
        "--keep\n")
    assert mock(*FLAGS, "--rounds", "5")[0] == 0
    assert "--names base 2 4 5 " in mock.calls("evaluate.py")[-2]


def test_against_another_run_there_is_one_more_curve(mock):
    other = ["--name", "other", "--method", "grpo", "--rounds", "3"]
    assert mock(*other, "--eval-problems", "0")[0] == 0
    code, err = mock("--rounds", "1", "--against", "other")
    assert code == 0, err
    call = mock.calls("evaluate.py")[0]
    assert re.search(r"base.scored.jsonl runs/demo/eval/other-003.scored.jsonl "
                     r"runs/demo/eval/001.scored.jsonl --names base other ds-grpo --out "
                     r"runs/demo/eval/eval-001-other.json", call)
    assert any("--model runs/other/003/policy" in call for call in mock.calls("generate.py"))


def test_other_flags_are_refused_and_change_nothing(mock):
    assert mock("--rounds", "1", "--eval-problems", "0")[0] == 0
    before = mock.files()
    (mock.folder / "mine.py").touch()
    for flags in (["--seed", "1"], ["--lr", "1e-3"], ["--method", "grpo"], ["--n", "2"],
                  ["--train", "--gamma-p 0.5"], ["--generate", "--stop 9"],
                  ["--sampler", "mine.py"], ["--rehearse", "9"]):
        code, err = mock("--rounds", "1", *flags)
        assert code == 2 and err.count("\n") == 1 and mock.files() == before
        assert err.startswith("run.sh: error: runs/demo was begun with other flags")
        assert flags[0].lstrip("-").replace("-", "_") + "=" in err
    (mock.folder / "runs/demo/settings").write_text("")  # as a power cut may leave it
    assert mock("--rounds", "1", "--eval-problems", "0")[0] == 0 and mock.files() == before


def test_keep_bounds_the_disk_also_when_it_changes_and_past_round_999(mock):
    def kept():
        return sorted(path.name for path in (mock.folder / "runs/demo").iterdir() if path.is_dir())

    quick = ["--eval-problems", "0"]
    assert mock(*quick, "--keep", "2", "--rounds", "3")[0] == 0 and kept() == ["002", "003"]
    for old, new in ("003", "1000"), ("002", "999"):
        shutil.move(mock.folder / "runs/demo" / old, mock.folder / "runs/demo" / new)
    assert mock(*quick, "--keep", "1", "--rounds", "1001")[0] == 0 and kept() == ["1001"]


def test_the_same_run_from_anywhere_and_with_a_slash_at_the_models_end(mock):
    (mock.folder / "caller/models").mkdir(parents=True)
    (mock.folder / "caller/models/mine").symlink_to(mock.bin)
    (mock.folder / "caller/arm.py").touch()
    write_problems(mock.folder / "caller/train.jsonl", 6)
    quick = ["--eval-problems", "0", "--rounds", "1", *OWN]
    here = [*quick, "--model", "models/mine/", "--prompts", "train.jsonl", "--method", "arm.py:f"]
    for script in ("../run.sh", str(mock.folder / "run.sh")):
        code, err = mock(*here, script=script, cwd=mock.folder / "caller")
        assert code == 0, err
    assert not (mock.folder / "caller/runs").exists() and len(mock.calls("train.py")) == 1
    flags = [*quick, "--prompts", "caller/train.jsonl", "--method", "caller/arm.py:f"]
    assert mock(*flags, "--model", "caller/models/mine")[0] == 0
    code, err = mock(*flags, "--model", "bin")
    assert code == 2 and "(model=caller/models/mine)" in err


def test_a_second_line_of_the_update_is_shown(mock):
    assert mock("--rounds", "1", "--eval-problems", "0", CUT="1")[0] == 0
    assert mock.out.splitlines()[1].endswith("policy: raise the limit")


def test_processes_are_started_by_torchrun_but_a_sampler_is_one(mock):
    """With --n, which argparse of Python 3.11 would take for one of torchrun's flags, behind --."""
    (mock.folder / "mine.py").touch()
    mock.write("torchrun", 'echo "${@:1:5}" >> torchruns\nexec python3 "${@:5}"\n')
    quick = ["--rounds", "1", "--eval-problems", "0", "--nproc", "2"]
    assert mock(*quick)[0] == 0
    assert mock(*quick, "--name", "other", "--sampler", "mine.py")[0] == 0
    assert (mock.folder / "torchruns").read_text().splitlines() == [
        f"--standalone --nproc-per-node 2 -- {stage}.py"
        for stage in ("generate", "train", "train")]
    assert len(mock.calls("mine.py")) == 1


def test_the_demonstration_runs_two_side_by_side_and_compares_them(mock):
    code, err = mock()
    assert code == 0, err
    lines = mock.out.splitlines()
    assert collections.Counter(line.split()[-1] for line in lines[:10]) == {"demo": 5,
                                                                            "demo-grpo": 5}
    assert lines[10:] == ["a table", "Pass@1 and Pass@4: base 0.1 and 0.2"]
    assert "--names base demo-grpo ds-grpo+rehearsal" in mock.calls("evaluate.py")[0]


# ---- With the real stages ------------------------------------------------------------------------
SHIFTED = """
import json, os, subprocess, sys

out = sys.argv[sys.argv.index("--out") + 1]
before = os.path.exists(out)
code = subprocess.run(["python3", "generate.py", *sys.argv[1:]]).returncode
if code or before or "--check-flags" in sys.argv:
    sys.exit(code)
with open(out) as file:
    rows = [json.loads(line) for line in file]
for row in rows:
    row["logprobs"] = [value - 0.1 for value in row["logprobs"]]
with open(out, "w") as file:
    file.writelines(json.dumps(row) + "\\n" for row in rows)
"""


def test_prompts_of_a_file_are_taken_in_turn_shuffled_anew_each_pass(loop):
    write_problems(loop.folder / "seed=1 mine.jsonl", 5)
    flags = [*TINY, "--countdown", "", "--eval-problems", "0", "--keep", "9", "--rounds", "2",
             "--prompts", "seed=1 mine.jsonl", "--prompts-per-round", "3"]
    code, err = loop(*flags)
    assert code == 0, err
    files = loop.files()
    ids = [json.loads(line)["id"] for number in "12"
           for line in files[f"00{number}/problems.jsonl"].splitlines()]
    assert sorted(ids[:5]) == [f"../{i}" for i in range(5)] and len(set(ids[3:])) == 3
    names = {*SHARED, "base", "bin", "marks", "seed=1 mine.jsonl", "runs"}
    assert set(os.listdir(loop.folder)) == names  # an id is no file name


def test_a_duplicate_id_in_the_problems_is_named(loop):
    write_problems(loop.folder / "mine.jsonl", 2)
    with open(loop.folder / "mine.jsonl", "a", encoding="utf-8") as file:
        file.write('{"id": "../1", "task": "countdown", "prompt": "1 1=2:"}\n')
    code, err = loop(*TINY, "--prompts", "mine.jsonl")
    assert code == 2 and err == ("score.py: error: mine.jsonl:3: duplicate id '../1', "
                                 "first in mine.jsonl:2\n")


def test_a_sampler_whose_log_probs_are_shifted_trains_as_without_it(loop):
    """A stand-in for an engine with other numerics; with --tis-cap 1 its weights are cut to 1."""
    (loop.folder / "engine.py").write_text(SHIFTED)
    flags = [*TINY, "--eval-every", "1", "--keep", "2", "--method", "grpo"]
    code, err = loop(*flags)
    assert code == 0, err
    code, err = loop(*flags, "--name", "engine", "--sampler", "engine.py", "--train", "--tis-cap 1")
    assert code == 0, err
    files, plain = loop.files("engine"), loop.files()
    assert files["002/policy/model.safetensors"] == plain["002/policy/model.safetensors"]
    for row, other in zip(files["002/policy/metrics.jsonl"], plain["002/policy/metrics.jsonl"]):
        assert abs(row["logprob_gap"] - other["logprob_gap"] - 0.1) < 1e-4
    runs = json.loads(files["eval/eval-002.json"])["runs"]
    assert [run["name"] for run in runs] == ["base", "1", "2"]
    with open(loop.folder / "runs/engine/settings", encoding="utf-8") as file:
        assert "sampler=engine.py\n" in file.readlines()


def test_groups_without_a_signal_can_be_left_out(loop):
    """Dynamic sampling by files: dead_groups falls to 0."""
    model = "data/tiny-countdown"
    train = f"train.py --model {model} --method grpo --lr 1e-4"
    commands = f"""set -e
python3 -m data.countdown --out all.jsonl --n 24 --split train --seed 1
python3 generate.py --model {model} --prompts all.jsonl --out r.jsonl --n 8 --max-new-tokens 24
python3 score.py r.jsonl --out s.jsonl
python3 -m data.select --scored s.jsonl --out mixed.jsonl --at-least 1 --at-most 7
python3 {train} --rollouts s.jsonl --out all
python3 {train} --rollouts mixed.jsonl --out mixed"""
    done = subprocess.run(["bash", "-c", commands], cwd=loop.folder, capture_output=True, text=True,
                          env=loop.environment())
    assert done.returncode == 0, done.stderr
    dead = {}
    for name in "all", "mixed":
        with open(loop.folder / name / "metrics.jsonl") as file:
            dead[name] = json.loads(file.readline())["dead_groups"]
    assert dead["mixed"] == 0 < dead["all"]


@pytest.mark.slow
def test_the_demonstration_learns(loop):
    done = subprocess.run(["bash", "run.sh"], cwd=loop.folder, capture_output=True, text=True,
                          env=loop.environment())
    assert done.returncode == 0, done.stderr[-3000:]
    with open(loop.folder / "runs/demo/eval/eval-005-demo-grpo.json") as file:
        runs = json.load(file)["runs"]
    assert [run["name"] for run in runs] == ["base", "demo-grpo", "ds-grpo+rehearsal"]
    base, *trained = [run["pass_at_k"]["1"]["value"] for run in runs]
    assert min(trained) > base + 0.015  # of this seed
    base, grpo, recipe = [run["pass_at_k"]["256"]["value"] for run in runs]
    assert grpo < base - 0.05 and recipe > grpo + 0.1
    assert done.stdout.splitlines()[-1].startswith("Pass@1 and Pass@256: base ")


@pytest.mark.slow
def test_two_processes_under_torchrun(loop):
    flags = [*TINY, "--rounds", "1", "--eval-problems", "0"]
    code, err = loop(*flags, "--nproc", "2")
    assert code == 0, err
    assert loop.files()["001/policy.meta.json"]["world_size"] == 2
    rollouts = loop.files()["001/rollouts.jsonl"]
    assert loop(*flags, "--name", "one")[0] == 0
    assert loop.files("one")["001/rollouts.jsonl"] == rollouts
