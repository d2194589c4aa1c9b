"""run.sh: its flags, resuming after a kill between any two commands, and what it keeps on disk.

Every stage is real; only python3 is a stand-in that has it forked from a warm process (see crash.py), with a tiny random
model. With KILL set, python3 and rm kill run.sh the first time that they have run for it with these arguments.
"""
import json
import os
import re
import subprocess
import sys

import pytest

import crash

TINY = ("--prompts-per-round 6 --n 4 --max-new-tokens 8 --updates 2 --eval-problems 6 --eval-n 4 --countdown --numbers=3 --rounds 2 "
        "--keep 1").split()


@pytest.fixture(scope="module")
def warm():
    return crash.warm()


class Loop:
    """The repository, in links: runs/ is its own."""

    def __init__(self, folder, warm):
        self.folder, self.bin, self.marks = folder, folder / "bin", folder / "marks"
        for name in ("run.sh", "generate.py", "score.py", "train.py", "evaluate.py", "data", "kernels", "experiments"):
            (folder / name).symlink_to(os.path.join(crash.ROOT, name))
        (folder / "base").symlink_to(warm.base)
        self.bin.mkdir()
        self.marks.mkdir()
        dies = ('[ -z "$KILL" ] || { mark=$KILL/$(echo "$0 $*" | cksum | tr " " -); [ -e "$mark" ] || { : > "$mark"; '
                'kill -9 $PPID; }; }\n')
        self.write("python3", f'"{sys.executable}" -S -E "{crash.__file__}" --ask "{warm.path}" "$@"\ncode=$?\n{dies}exit $code\n')
        self.write("rm", f'/bin/rm "$@"\n{dies}')

    def write(self, name, text):
        (self.bin / name).write_text("#!/bin/bash\n" + text)
        (self.bin / name).chmod(0o755)

    def __call__(self, *flags, kill=False):
        environment = {**os.environ, "PATH": f"{self.bin}:{os.environ['PATH']}", "KILL": str(self.marks) if kill else ""}
        done = subprocess.run(["bash", "run.sh", "--model", "base", *flags], cwd=self.folder, env=environment,
                              stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        return done.returncode, done.stderr

    def files(self, name="demo"):
        """Everything in runs/NAME, as crash.content; of a meta, without the digests, into which the timings in metrics.jsonl go."""
        found = crash.content(str(self.folder / "runs" / name))
        for path, data in found.items():
            if path.strip("/").endswith(".meta.json"):
                data["inputs"] = sorted(data["inputs"])
        return {path.strip("/"): data for path, data in found.items()}


@pytest.fixture
def loop(tmp_path, warm):
    return Loop(tmp_path, warm)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, warm):
    loop = Loop(tmp_path_factory.mktemp("undisturbed"), warm)
    code, err = loop(*TINY)
    assert code == 0, err
    return loop


def test_help_names_every_flag_and_needs_no_python(tmp_path):
    done = subprocess.run(["/bin/bash", os.path.join(crash.ROOT, "run.sh"), "--help"], capture_output=True, text=True, cwd=tmp_path)
    with open(os.path.join(crash.ROOT, "run.sh"), encoding="utf-8") as file:
        flags = re.findall(r"--[a-z-]+", next(line for line in file if line.startswith("    --name|")))
    assert done.returncode == 0 and not done.stderr and len(flags) > 15
    assert all(re.search(rf"^  {flag} ", done.stdout, re.M) for flag in flags)


@pytest.mark.parametrize("flags, told", [
    (["--epochs", "3"], "unknown flag --epochs (see --help)"), (["--rounds"], "--rounds needs a value"),
    (["demo"], "unknown flag demo (see --help)"), (["--suite", "other"], "--suite knows 'paper' only"),
    *((["--" + flag, value], f"--{flag} must be a whole number, not '{value}'")
      for flag, value in (("rounds", "x"), ("n", "-1"), ("seed", "1.5"), ("keep", ""), ("updates", "1e3"), ("nproc", "9" * 20), ("n", "1 2"))),
    (["--keep", "0"], "--keep and --rounds must be at least 1"), (["--rounds", "0"], "--keep and --rounds must be at least 1"),
    (["--method", "ppo"], "no --method 'ppo' (see --help)"), (["--method", "grpo passk"], "no --method 'grpo passk' (see --help)"),
])
def test_wrong_flags_end_with_one_line_before_anything_is_made(loop, flags, told):
    assert loop(*flags) == (2, f"run.sh: error: {told}\n") and not (loop.folder / "runs").exists()


def test_what_a_stage_refuses_ends_the_loop_with_its_line(loop):
    code, err = loop(*TINY, "--name", "hot", "--temperature", "warm")
    assert code == 2 and err.splitlines()[-1].startswith("generate.py: error: argument --temperature: invalid float value: 'warm'")


def test_a_finished_run_is_whole_and_started_again_makes_nothing_new(undisturbed):
    files = undisturbed.files()
    assert {"eval-002.json", "passk.png", "training.png", "trained-002.scored.jsonl", "round-002/model.safetensors"} <= files.keys()
    assert [row["step"] for row in files["round-002/metrics.jsonl"]] == [1, 2, 3, 4]
    assert {run["name"] for run in json.loads(files["eval-002.json"])["runs"]} == {"base", "ds-grpo"}
    model = undisturbed.folder / "runs/demo/round-002/model.safetensors"
    before = model.stat().st_mtime_ns
    code, err = undisturbed(*TINY)
    assert code == 0 and "train.py" not in err and err.count("complete, left alone") == 6
    assert undisturbed.files() == files and model.stat().st_mtime_ns == before


def test_killed_after_every_command_it_ends_with_the_same_files(loop, undisturbed):
    kills = 0
    while (end := loop(*TINY, kill=True))[0] == -9:
        kills += 1
    assert end[0] == 0 and end[1].count("error") == 0 and kills >= 20  # 15 starts of stages, and the removals of round 1
    assert loop.files() == undisturbed.files()


def test_other_flags_are_refused_and_change_nothing(undisturbed):
    files = undisturbed.files()
    for flags in (["--seed", "1"], ["--lr", "1e-3"], ["--method", "grpo"], ["--n", "2"], ["--", "--gamma-p", "0.5"]):
        code, err = undisturbed(*TINY, *flags)
        assert code == 2 and err.count("\n") == 1 and err.startswith("run.sh: error: runs/demo was begun with other flags")
    assert undisturbed.files() == files


def test_keep_bounds_the_disk_also_when_it_changes_and_past_round_999(loop):
    quick = [*TINY, "--eval-problems", "0"]

    def kept():
        return sorted(path.name for path in (loop.folder / "runs/demo").iterdir() if re.match(r"(prompts|rollouts|scored|round)-", path.name))

    def names(*rounds):
        return sorted(f"{name}{end}" for number in rounds for name in (f"round-{number}", *(
            f"{kind}-{number}.jsonl" for kind in ("prompts", "rollouts", "scored"))) for end in ("", ".meta.json"))

    assert loop(*quick, "--keep", "2", "--rounds", "3")[0] == 0 and kept() == names("002", "003")
    for path in list((loop.folder / "runs/demo").iterdir()):  # a run that has come to round 1000
        path.rename(path.with_name(path.name.replace("003", "1000").replace("002", "999")))
    assert loop(*quick, "--keep", "1", "--rounds", "1001")[0] == 0 and kept() == names("1001")


def test_prompts_of_a_file_are_taken_in_turn(loop):
    with open(loop.folder / "mine.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"id": f"../{i}", "task": "countdown", "prompt": f"1 {i}={1 + i}:", "numbers": [1, i], "target": 1 + i,
                                    "n_solutions": 1}) + "\n" for i in range(5))
    code, err = loop(*TINY, "--eval-problems", "0", "--keep", "2", "--prompts", "mine.jsonl", "--prompts-per-round", "3")
    files = loop.files()
    asked = [[json.loads(line)["id"] for line in files[f"prompts-00{number}.jsonl"].splitlines()] for number in (1, 2)]
    assert code == 0 and asked == [["../0", "../1", "../2"], ["../3", "../4", "../0"]]
    assert sorted(os.listdir(loop.folder)) == sorted(["experiments", "base", "bin", "data", "evaluate.py", "generate.py", "kernels", "marks",
                                                      "mine.jsonl", "run.sh", "runs", "score.py", "train.py"])  # an id is no file name
