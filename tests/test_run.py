"""run.sh: its flags, resuming after a kill between any two commands, and what it keeps on disk.

Every stage is real; only python3 is a stand-in that has it forked from a warm process (see
crash.py), with a tiny random model. With KILL set, python3, rm and mv kill run.sh the first time
that they have run for it with these arguments.
"""
import collections
import json
import os
import re
import subprocess
import sys

import pytest

import crash

TINY = ("--prompts-per-round 6 --n 4 --max-new-tokens 8 --updates 2 --eval-problems 6 --eval-n 4 "
        "--countdown --numbers=3 --rounds 2 --keep 1").split()


@pytest.fixture(scope="module")
def warm():
    return crash.warm()


class Loop:
    """The repository, in links: runs/ is its own."""

    def __init__(self, folder, warm):
        self.folder, self.bin, self.marks = folder, folder / "bin", folder / "marks"
        for name in ("run.sh", "generate.py", "score.py", "train.py", "evaluate.py", "data",
                     "kernels", "experiments"):
            (folder / name).symlink_to(os.path.join(crash.ROOT, name))
        (folder / "base").symlink_to(warm.base)
        self.bin.mkdir()
        self.marks.mkdir()
        dies = ('[ -z "$KILL" ] || { mark=$KILL/$(echo "$0 $*" | cksum | tr " " -); '
                '[ -e "$mark" ] || { : > "$mark"; kill -9 $PPID; }; }\n')
        python = f'"{sys.executable}" -S -E'
        self.write("python3", '[ "$1" != -P ] || shift\n'
                   f'case "$1" in\n-|-c) {python} "$@" ;;\n'
                   f'-m) {python} "{crash.ROOT}/tests/ask.py" "{warm.path}" '
                   '"data/${2#data.}.py" "${@:3}" ;;\n'
                   f'*) {python} "{crash.ROOT}/tests/ask.py" "{warm.path}" "$@" ;;\nesac\n'
                   f'code=$?\n{dies}exit $code\n')
        for name in ("rm", "mv"):
            self.write(name, f'/bin/{name} "$@"\n{dies}')

    def write(self, name, text):
        (self.bin / name).write_text("#!/bin/bash\n" + text)
        (self.bin / name).chmod(0o755)

    def __call__(self, *flags, kill=False, script="run.sh", cwd=None):
        """(exit code, stderr) of run.sh; what it wrote to stdout is in `out`."""
        environment = {**os.environ, "PATH": f"{self.bin}:{os.environ['PATH']}",
                       "KILL": str(self.marks) if kill else ""}
        model = [] if "--model" in flags else ["--model", "base"]
        done = subprocess.run(["bash", script, *model, *flags], cwd=cwd or self.folder,
                              env=environment, capture_output=True, text=True)
        self.out = done.stdout
        return done.returncode, done.stderr

    def files(self, name="demo"):
        """Everything in runs/NAME, as crash.content; of a meta, without the digests, into which the
        timings in metrics.jsonl go."""
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
    script = os.path.join(crash.ROOT, "run.sh")
    done = subprocess.run(["/bin/bash", script, "--help"], capture_output=True, text=True,
                          cwd=tmp_path, env={"PATH": "/nowhere:/bin"})
    with open(script, encoding="utf-8") as file:
        case = re.search(r"^ *--name\|.*?\)", file.read(), re.M | re.S)[0]
    flags = re.findall(r"--[a-z-]+", case)
    assert done.returncode == 0 and not done.stderr and len(flags) > 20
    assert all(re.search(rf"^  {flag} ", done.stdout, re.M) for flag in flags)


@pytest.mark.parametrize("flags, told", [
    (["--epochs", "3"], "unknown flag --epochs (see --help)"),
    (["--rounds"], "--rounds needs a value"),
    (["demo"], "unknown flag demo (see --help)"),
    (["--suite", "paper"], "unknown flag --suite (see --help)"),
    (["--rounds", "x"], "--rounds must be a whole number, not 'x'"),
    (["--n", "-1"], "--n must be a whole number, not '-1'"),
    (["--n", "1 2"], "--n must be a whole number, not '1 2'"),
    (["--seed", "1.5"], "--seed must be a whole number, not '1.5'"),
    (["--keep", ""], "--keep must be a whole number, not ''"),
    (["--updates", "1e3"], "--updates must be a whole number, not '1e3'"),
    (["--nproc", "9" * 20], f"--nproc must be a whole number, not '{'9' * 20}'"),
    (["--keep", "0"], "--keep and --rounds must be at least 1"),
    (["--rounds", "0"], "--keep and --rounds must be at least 1"),
    (["--eval-n", "0"], "--eval-n must be at least 1"),
    (["--prompts-per-round", "2", "--updates", "3"], "--updates: more than --prompts-per-round"),
    (["--temperature", "0.0"], "--temperature 0: nothing is learned from greedy samples"),
    (["--method", "ppo"], "no --method 'ppo' (see --help)"),
    (["--method", "grpo passk"], "no --method 'grpo passk' (see --help)"),
    (["--name", "../x"], "--name is a folder's name in runs/, not '../x'"),
    (["--name", ".."], "--name is a folder's name in runs/, not '..'"),
    (["--name", ""], "--name is a folder's name in runs/, not ''"),
    (["--prompts", "gone.jsonl"], "--prompts: no file gone.jsonl"),
    (["--eval-prompts", "data"], "--eval-prompts: no file data"),
    (["--rehearse-coef", "0.5"], "--rehearse-coef belongs to --rehearse"),
    *((["--rehearse", "8", "--rehearse-coef", coef],
       f"--rehearse-coef is C, or C,D@R with D from round R > 1 on, not '{coef}'")
      for coef in ("", "1,0.3", "0.3@2", "1,0.3@1", "1, 0.3@2", "1,0.3@x", "1,@2", "1,0.5@2,0.3@4")),
    (["--eval-problems", "0", "--against", "x"], "--against: nothing is evaluated with --eval-problems 0"),
    (["--against", "demo"], "--against: another run than runs/demo itself"),
    (["--against", "base"],
     "--against: with base or trained for a name, figures could not be told apart"),
    (["--prompts", "run.sh", "--eval-problems", "0", "--countdown", "--numbers=3"],
     "--countdown: no problem is drawn, all are of --prompts and --eval-prompts"),
    (["--generate", "--stop 'a"], "--generate: a quote in it is not closed"),
    (["--generate", "--n 4"],
     "--generate: --n is given to the stage by run.sh itself (see --help)"),
    (["--train", "-h"], "--train: -h is no setting; ask the stage itself"),
    (["--prompts", "data/weak-countdown/config.json", "--updates", "99"],
     "--updates: more than the problems in data/weak-countdown/config.json"),
    (["--train", "--clip-low 0.1 --updates=3"],
     "--train: --updates is given to the stage by run.sh itself (see --help)"),
])
def test_wrong_flags_end_with_one_line_before_anything_is_made(loop, flags, told):
    assert loop(*flags) == (2, f"run.sh: error: {told}\n") and not (loop.folder / "runs").exists()


@pytest.mark.parametrize("flags, told", [
    (["--generate", "--stopp x"], "generate.py: error: unrecognized arguments: --stopp x"),
    (["--generate", "--temp 0.5"], "generate.py: error: unrecognized arguments: --temp 0.5"),
    (["--generate", "--top-p 2"], "generate.py: error: --top-p must be above 0 and at most 1"),
    (["--attention", "fast"], "generate.py: error: argument --attention: invalid choice: 'fast'"),
    (["--max-new-tokens", "0"], "generate.py: error: --max-new-tokens must be"),
    (["--train", "--gama-p 0.1"], "train.py: error: unrecognized arguments: --gama-p 0.1"),
    (["--train", "--kl-coef 0.1"], "train.py: error: --kl-coef and --ref-model go together"),
    (["--lr", "fast"], "train.py: error: argument --lr: invalid float value: 'fast'"),
    (["--updates", "0"], "train.py: error: --updates must be at least 1"),
    (["--rehearse", "8", "--rehearse-coef", "x,0.3@2"],
     "train.py: error: argument --rehearse-coef: invalid float value: 'x'"),
    (["--rehearse", "8", "--rehearse-coef", "1,x@2"],
     "train.py: error: argument --rehearse-coef: invalid float value: 'x'"),
    (["--countdown", "--numbers four"], "countdown.py: error: argument --numbers: invalid"),
])
def test_flags_of_the_stages_are_checked_before_anything_is_made(loop, flags, told):
    code, err = loop(*TINY, *flags)
    assert code == 2 and err.count("\n") == 1 and err.startswith(told)
    assert not (loop.folder / "runs").exists()  # the name is free for the command without the typo


def test_what_a_stage_refuses_ends_the_loop_with_its_line(loop):
    code, err = loop(*TINY, "--name", "hot", "--temperature", "warm")
    assert code == 2 and err.splitlines()[-1].startswith(
        "generate.py: error: argument --temperature: invalid float value: 'warm'")


def test_a_finished_run_is_whole_and_started_again_makes_nothing_new(undisturbed):
    files = undisturbed.files()
    assert {"eval-002.json", "passk.png", "training.png", "trained-002.scored.jsonl",
            "round-002/model.safetensors"} <= files.keys()
    assert [row["step"] for row in files["round-002/metrics.jsonl"]] == [1, 2, 3, 4]
    runs = json.loads(files["eval-002.json"])["runs"]
    assert {run["name"] for run in runs} == {"base", "ds-grpo"}
    model = undisturbed.folder / "runs/demo/round-002/model.safetensors"
    before = model.stat().st_mtime_ns
    code, err = undisturbed(*TINY)
    assert code == 0 and "train.py" not in err and err.count("complete, left alone") == 6
    assert undisturbed.files() == files and model.stat().st_mtime_ns == before


def test_killed_after_every_command_it_ends_with_the_same_files(loop, undisturbed):
    kills = 0
    while (end := loop(*TINY, kill=True))[0] == -9:
        kills += 1
    assert end[0] == 0 and end[1].count("error") == 0
    assert kills >= 26  # 3 checks, 15 stages, 2 lines, 2 records, and the removals of round 1
    assert loop.files() == undisturbed.files()


def test_killed_while_an_evaluation_is_set_aside_it_loses_nothing(loop):
    flags, kills = [*TINY, "--rounds", "1"], 0
    assert loop(*flags)[0] == 0
    before = loop.files()
    flags += ["--eval-n", "2"]
    while (end := loop(*flags, kill=True))[0] == -9:
        kills += 1
    aside = {path.removeprefix("evaluation-test-6x4/"): data for path, data in loop.files().items()
             if path.startswith("evaluation-test-6x4/")}
    assert end[0] == 0 and kills >= 14 and len(aside) > 10
    assert aside == {path: before[path] for path in aside}


def test_other_flags_are_refused_and_change_nothing(undisturbed):
    files = undisturbed.files()
    for flags in (["--seed", "1"], ["--lr", "1e-3"], ["--method", "grpo"], ["--n", "2"],
                  ["--train", "--gamma-p 0.5"], ["--generate", "--stop 9"]):
        code, err = undisturbed(*TINY, *flags)
        assert code == 2 and err.count("\n") == 1
        assert err.startswith("run.sh: error: runs/demo was begun with other flags")
        assert all(flag.lstrip("-").split()[0].replace("-", "_") in err for flag in flags[:1])
    assert undisturbed.files() == files


def test_keep_bounds_the_disk_also_when_it_changes_and_past_round_999(loop):
    quick = [*TINY, "--eval-problems", "0"]

    def kept():
        return sorted(path.name for path in (loop.folder / "runs/demo").iterdir()
                      if re.match(r"(prompts|rollouts|scored|round)-", path.name))

    def names(*rounds):
        return sorted(f"{name}{end}" for number in rounds for name in (f"round-{number}", *(
            f"{kind}-{number}.jsonl" for kind in ("prompts", "rollouts", "scored")))
            for end in ("", ".meta.json"))

    assert loop(*quick, "--keep", "2", "--rounds", "3")[0] == 0 and kept() == names("002", "003")
    for path in list((loop.folder / "runs/demo").iterdir()):  # a run that has come to round 1000
        path.rename(path.with_name(path.name.replace("003", "1000").replace("002", "999")))
    assert loop(*quick, "--keep", "1", "--rounds", "1001")[0] == 0 and kept() == names("1001")


def write_problems(path, count):
    with open(path, "w", encoding="utf-8-sig") as file:  # with a BOM
        file.writelines(json.dumps({
            "id": f"../{i}", "task": "countdown", "prompt": f"1 {i}={1 + i}:", "numbers": [1, i],
            "target": 1 + i, "n_solutions": 1}) + "\n" for i in range(count))


def test_prompts_of_a_file_are_taken_in_turn_shuffled_anew_each_pass(loop):
    write_problems(loop.folder / "seed=1 mine.jsonl", 5)
    flags = [*TINY, "--countdown", "", "--eval-problems", "0", "--keep", "9", "--rounds", "5",
             "--prompts", "seed=1 mine.jsonl", "--prompts-per-round", "3"]
    code, err = loop(*flags)
    files = loop.files()
    assert code == 0, err
    asked = [[json.loads(line)["id"] for line in files[f"prompts-00{number}.jsonl"].splitlines()]
             for number in range(1, 6)]
    every = [f"../{i}" for i in range(5)]
    one, two, three = (sum(asked, [])[start:start + 5] for start in (0, 5, 10))
    assert sorted(one) == sorted(two) == sorted(three) == every
    assert len({tuple(one), tuple(two), tuple(three), tuple(every)}) == 4
    assert all(len(set(ids)) == 3 for ids in asked)
    assert sorted(os.listdir(loop.folder)) == sorted([
        "experiments", "base", "bin", "data", "evaluate.py", "generate.py", "kernels", "marks",
        "seed=1 mine.jsonl", "run.sh", "runs", "score.py", "train.py"])  # an id is no file name
    assert loop(*flags, "--seed", "2", "--name", "two")[0] == 0
    assert loop.files("two")["prompts-001.jsonl"] != files["prompts-001.jsonl"]


def test_a_line_a_round_on_stdout(loop):
    code, err = loop(*TINY, "--keep", "2")
    assert code == 0, err
    head, one, two, *table = loop.out.splitlines()
    assert head.split() == "round Pass@1 entropy length truncated sample verify update run".split()
    updates = loop.files()["round-002/metrics.jsonl"]
    for line, rows, number in ((one, updates[:2], "1"), (two, updates[2:], "2")):
        told, mean = line.split(), lambda key: sum(row[key] for row in rows) / 2
        assert told[0] == number and told[-1] == "demo" and len(line) <= 80 and line.count(" s") == 3
        assert told[1:5] == [f"{mean('pass@1'):.3f}", f"{mean('entropy'):.3f}",
                             f"{mean('completion_len'):.1f}", f"{mean('truncated_frac'):.3f}"]
    assert table[0].startswith("6 problems, n 4") and not any("no_answer" in line for line in table)
    code, err = loop(*TINY, "--keep", "2")
    assert code == 0, err
    assert loop.out.splitlines() == table  # nothing is told of rounds that were there


@pytest.mark.slow
def test_the_demonstration(loop):
    """Without a flag: two real runs side by side, and three curves on the same problems."""
    done = subprocess.run(["bash", "run.sh"], cwd=loop.folder, capture_output=True, text=True,
                          env={**os.environ, "PATH": f"{loop.bin}:{os.environ['PATH']}"})
    assert done.returncode == 0, done.stderr[-3000:]
    told = [line.split()[-1] for line in done.stdout.splitlines() if line.count(" s") == 3]
    assert sorted(told) == ["demo"] * 5 + ["demo-grpo"] * 5
    with open(loop.folder / "runs/demo/eval-005-demo-grpo.json") as file:
        runs = json.load(file)["runs"]
    assert [run["name"] for run in runs] == ["base", "demo-grpo", "ds-grpo+rehearsal"]
    base, *trained = [run["pass_at_k"]["1"]["value"] for run in runs]
    assert min(trained) > base + 0.015  # of this one seed; GRPO's others end 0.015 to 0.030 above the base
    base, grpo, recipe = [run["pass_at_k"]["256"]["value"] for run in runs]
    assert grpo < base - 0.05 and recipe > grpo + 0.1 and (loop.folder / "runs/demo/passk.png").stat().st_size
    assert done.stdout.splitlines()[-1].startswith("Pass@1 and Pass@256: base ")


def test_flags_for_generate_and_train_reach_them_and_are_recorded(loop):
    extra = ["--generate", "--stop '9 9' $HOME* --max-batch-tokens 100", "--train", "--gamma-p 0.5"]
    code, err = loop(*TINY, "--eval-problems", "0", "--rounds", "1", *extra)
    assert code == 0, err
    files = loop.files()
    flags = files["rollouts-001.jsonl.meta.json"]["flags"]
    assert flags["stop"] == ["9 9", "$HOME*"] and flags["max_batch_tokens"] == 100
    assert files["round-001.meta.json"]["flags"]["gamma_p"] == 0.5
    with open(loop.folder / "runs/demo/settings", encoding="utf-8") as file:
        settings = file.read().splitlines()
    assert f"generate={extra[1]}" in settings and f"train={extra[3]}" in settings
    assert "model=base" in settings and len(settings) == 16


def test_a_settings_file_that_a_power_cut_emptied_locks_nobody_out(loop):
    quick = [*TINY, "--countdown", "", "--eval-problems", "0", "--rounds", "1"]
    assert loop(*quick)[0] == 0
    settings = loop.folder / "runs/demo/settings"
    before = settings.read_text()
    settings.write_text("")
    assert loop(*quick)[0] == 0 and settings.read_text() == before


def test_evaluation_flags_may_change_and_no_result_is_lost(loop):
    assert loop(*TINY)[0] == 0
    before = loop.files()
    code, err = loop(*TINY, "--eval-n", "2", "--eval-problems", "5")
    assert code == 0 and "evaluation-test-6x4" in err, err
    after, settings = loop.files(), ("settings", "evaluation")
    report = json.loads(after["eval-002.json"])["runs"][1]
    assert report["n"] == 2 and report["problems"] == 5
    moved = {path for path in before
             if path.startswith(("test", "base", "trained", "eval-", "passk"))}
    assert len(moved) > 10
    assert {path.removeprefix("evaluation-test-6x4/"): data for path, data in after.items()
            if path.startswith("evaluation-test-6x4/")} == {path: before[path] for path in moved}
    assert all(after[path] == data for path, data in before.items()
               if path not in moved and path not in settings)
    write_problems(loop.folder / "held.jsonl", 4)
    code, err = loop(*TINY, "--eval-prompts", "held.jsonl")
    assert code == 0, err
    assert json.loads(loop.files()["eval-002.json"])["runs"][0]["problems"] == 4


def test_fewer_rounds_than_are_there_and_a_pruned_one(loop):
    assert loop(*TINY, "--keep", "2", "--rounds", "3", "--eval-problems", "0")[0] == 0
    code, err = loop(*TINY, "--keep", "1", "--rounds", "2")
    files = loop.files()
    assert code == 0 and "train.py" not in err, err
    assert "eval-002.json" in files and "round-003/config.json" in files  # nothing is taken away
    code, err = loop(*TINY, "--keep", "1", "--rounds", "1")
    assert code == 2 and loop.files() == files
    assert err == (
        "run.sh: error: round 1 of 3 in runs/demo was pruned, its model is gone; evaluate with "
        "--rounds 3, or train again with another --name and a larger --keep\n")
    assert loop(*TINY, "--keep", "1", "--rounds", "3")[0] == 0
    code, err = loop(*TINY, "--keep", "1", "--rounds", "2")  # pruned by now, but evaluated before
    assert code == 0 and loop.files()["eval-002.json"] == files["eval-002.json"], err
    files = loop.files()  # with other flags it would have to be sampled again
    code, err = loop(*TINY, "--keep", "1", "--rounds", "2", "--eval-n", "2")
    assert code == 2 and "round 2 of 3 in runs/demo was pruned" in err and loop.files() == files


def test_the_same_run_from_anywhere_and_with_a_slash_at_the_models_end(loop):
    (loop.folder / "caller/models").mkdir(parents=True)
    (loop.folder / "caller/models/mine").symlink_to(loop.folder / "base")
    write_problems(loop.folder / "caller/train.jsonl", 6)
    quick = [*TINY, "--countdown", "", "--eval-problems", "0", "--rounds", "1"]
    here = [*quick, "--model", "models/mine/", "--prompts", "train.jsonl"]
    for script in ("../run.sh", str(loop.folder / "run.sh")):
        code, err = loop(*here, script=script, cwd=loop.folder / "caller")
        assert code == 0, err
    files = loop.files()
    assert not (loop.folder / "caller/runs").exists() and "round-001/config.json" in files
    code, err = loop(*quick, "--model", "caller/models/mine", "--prompts", "caller/train.jsonl")
    assert code == 0 and loop.files() == files, err
    code, err = loop(*quick, "--model", "base", "--prompts", "caller/train.jsonl")
    assert code == 2 and "(model=caller/models/mine)" in err


def test_an_objective_from_the_callers_own_file(loop):
    (loop.folder / "caller").mkdir()
    arms = os.path.join(crash.ROOT, "experiments", "arms.py")
    (loop.folder / "caller/mine.py").symlink_to(arms)
    flags = [*TINY, "--rounds", "1", "--model", "../base", "--train", "--arm k=2"]
    code, err = loop(*flags, "--method", "mine.py:passk", script="../run.sh",
                     cwd=loop.folder / "caller")
    assert code == 0, err
    files = loop.files()
    assert files["round-001.meta.json"]["flags"]["method"] == "mine.py:passk"
    assert json.loads(files["eval-001.json"])["runs"][1]["name"] == "passk"
    code, err = loop(*[*flags[:-3], "base", *flags[-2:]], "--method", "caller/mine.py:passk")
    assert code == 0 and loop.files() == files, err
    for method, told in (("gone.py:passk", "train.py: error: "), ("mine.py", "run.sh: error: ")):
        code, err = loop(*TINY, "--method", method, "--name", "x")
        assert code == 2 and err.count("\n") == 1 and err.startswith(told)


def test_against_another_run_there_is_a_third_curve(loop):
    few = [*TINY, "--rounds", "1"]
    assert loop(*few, "--against", "other") == (
        2, "run.sh: error: --against: no round in runs/other\n")
    assert loop(*few, "--name", "other", "--method", "grpo", "--eval-problems", "0")[0] == 0
    assert loop(*few)[0] == 0
    before = loop.files()
    code, err = loop(*few, "--against", "other")
    assert code == 0, err
    after = loop.files()
    runs = json.loads(after["eval-001-other.json"])["runs"]
    assert [run["name"] for run in runs] == ["base", "other", "ds-grpo"]
    assert [os.path.basename(run["file"]) for run in runs] == [
        "base.scored.jsonl", "other-001.scored.jsonl", "trained-001.scored.jsonl"]
    assert all(after[path] == data for path, data in before.items() if path != "passk.png")
    k, told = list(runs[0]["pass_at_k"])[-1], loop.out.splitlines()[-1]
    assert told.startswith(f"Pass@1 and Pass@{k}: base ") and told.count(";") == 2
    assert f"{runs[1]['pass_at_k'][k]['value']:.3f}" in told
    os.rename(loop.folder / "runs" / "other", loop.folder / "runs" / "ds-grpo")
    assert loop(*few, "--against", "ds-grpo")[0] == 0  # the method's name is taken
    runs = json.loads(loop.files()["eval-001-ds-grpo.json"])["runs"]
    assert [run["name"] for run in runs] == ["base", "ds-grpo", "demo"]


def test_rehearsal_samples_the_base_once(loop):
    flags = [*TINY, "--eval-problems", "0", "--rehearse", "8", "--rehearse-coef", "1.5,0.3@2", "--keep", "2"]
    few = ["--model", "data/tiny-countdown", "--max-new-tokens", "24", "--countdown", ""]
    code, err = loop(*flags, *few)
    assert code == 0, err
    files = loop.files()
    base = [json.loads(line) for line in files["rehearsal/scored.jsonl"].splitlines()]
    # 8 problems x 4 samples, then nearly as many for those with at most one right answer
    once, again = base[:32], base[32:]
    right = collections.Counter(row["id"] for row in once if row["correct"])
    hard = {row["id"] for row in once if right[row["id"]] <= 1}
    assert len({row["id"] for row in once}) == 8 and {row["id"] for row in again} == hard and 0 < len(hard) < 8
    assert len(again) == len(hard) * (32 // len(hard))
    assert not {row["completion"] for row in again} <= {row["completion"] for row in once}  # other draws, not the same ones
    meta = files["rehearsal/rollouts.jsonl.meta.json"]["flags"]
    assert meta["model"] == "data/tiny-countdown" and meta["seed"] == 0
    flags_of_train = [files[f"round-00{number}.meta.json"]["flags"] for number in (1, 2)]
    assert {flags["rehearse"] for flags in flags_of_train} == {"runs/demo/rehearsal/scored.jsonl"}
    assert [flags["rehearse_coef"] for flags in flags_of_train] == [1.5, 0.3]
    assert loop(*flags, *few, "--rehearse", "0")[0] == 2  # another run
    code, err = loop(*flags, *few, "--rounds", "3")
    assert code == 0 and loop.files()["rehearsal/scored.jsonl"] == files["rehearsal/scored.jsonl"]
    assert loop.files()["round-003.meta.json"]["flags"]["rehearse_coef"] == 0.3
    code, err = loop(*flags, "--train", "--rehearse x", "--name", "other")
    assert code == 2 and "--rehearse is given to the stage by run.sh itself" in err


def test_processes_are_started_by_torchrun(loop):
    """With --n, which argparse of Python 3.11 would take for one of torchrun's flags, behind --."""
    calls = loop.folder / "calls"
    loop.write("torchrun", f'echo "${{@:1:5}}" >> {calls}\nexec python3 "${{@:5}}"\n')
    code, err = loop(*TINY, "--rounds", "1", "--eval-problems", "0", "--nproc", "2")
    assert code == 0, err
    assert calls.read_text().splitlines() == [
        f"--standalone --nproc-per-node 2 -- {stage}.py" for stage in ("generate", "train")]


@pytest.mark.slow
def test_two_processes_under_torchrun(loop):
    flags = [*TINY, "--rounds", "1", "--eval-problems", "0"]
    code, err = loop(*flags, "--nproc", "2")
    assert code == 0, err
    assert loop.files()["round-001.meta.json"]["world_size"] == 2
    rollouts = loop.files()["rollouts-001.jsonl"]
    assert loop(*flags, "--name", "one")[0] == 0
    assert loop.files("one")["rollouts-001.jsonl"] == rollouts


def test_a_duplicate_id_in_the_problems_is_named(loop):
    write_problems(loop.folder / "mine.jsonl", 2)
    with open(loop.folder / "mine.jsonl", "a", encoding="utf-8") as file:
        file.write('{"id": "../1", "task": "countdown", "prompt": "1 1=2:"}\n')
    code, err = loop(*TINY, "--prompts", "mine.jsonl")
    assert code == 2 and "generate.py" not in err
    assert err.splitlines()[-1] == ("select.py: error: mine.jsonl:3: duplicate id '../1', "
                                    "first in mine.jsonl:2")
