"""Every command of experiments/recipes.md, as it stands there, with toy numbers: models of the Hub
are a random one."""
import collections
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import crash
from conftest import read, write
from test_models import make_folder
from test_run import Loop

PYTHON, slow = os.path.dirname(sys.executable), pytest.mark.slow
TOY = {  # flag: its value in the dry run; all others stay as they are
    "--prompts-per-round": "4", "--n": "4", "--max-new-tokens": "8", "--eval-problems": "3",
    "--eval-n": "2", "--nproc": "2", "--at-most": "1", "--rehearse-coef": "1.0,0.3@2"}


def recipes():
    """{heading: its bash blocks} of the file."""
    with open(os.path.join(crash.ROOT, "experiments", "recipes.md"), encoding="utf-8") as file:
        parts = re.split(r"^## (.*)\n", file.read(), flags=re.M)[1:]
    return {heading: "".join(re.findall(r"```bash\n(.*?)```", part, re.S))
            for heading, part in zip(parts[::2], parts[1::2])}


def toy(commands):
    for flag, value in TOY.items():
        commands = re.sub(rf"({flag}) \S+", rf"\1 {value}", commands)
    commands = re.sub(r"(--rehearse) \d+", r"\1 8", commands)
    commands = re.sub(r"(--model) Qwen/\S+", r"\1 model", commands)
    rounds = {"150": "2", "51": "2"}  # all others: 1
    commands = re.sub(r"(?<=--rounds )\d+", lambda found: rounds.get(found[0], "1"), commands)
    commands = commands.replace("in 1 2 3 4;", "in 1 2;")
    return re.sub(r"/(075|002|008)(\.scored|/policy)", r"/001\2", commands)


def test_toy_changes_values_alone_and_every_recipe_has_commands():
    with open(__file__, encoding="utf-8") as file:  # the slow tests below know them by name
        assert set(re.findall(r'run\(loop, "(.*?)"', file.read())) < recipes().keys()
    assert len(recipes()) == 12
    for commands in recipes().values():
        flags = re.compile(r"(?<!\S)\"?(--[a-z-]+)")
        assert flags.findall(commands) and flags.findall(toy(commands)) == flags.findall(commands)
        assert max(map(len, commands.splitlines())) <= 100


@pytest.fixture(scope="module")
def loop(tmp_path_factory):
    """A folder with the scripts, the files that the recipes start from and a random model."""
    loop = Loop(tmp_path_factory.mktemp("recipes"))
    (loop.bin / "python").symlink_to("python3")
    (loop.folder / "model").mkdir()
    make_folder("qwen2", loop.folder / "model", max_position_embeddings=1024)
    problems = [{"problem": f"What is {i} + 1?", "answer": str(i + 1), "id": i} for i in range(6)]
    long = {"problem": "What is 1 + 1? " * 200, "answer": "2", "id": 9}
    for name, part in (("math_train", [*problems, long]), ("math500", [*problems[:2], long])):
        write(loop.folder / f"{name}.jsonl", part)
    return loop


def run(loop, heading, folder=None, change=toy):
    """Run the commands of a recipe with toy numbers. folder: where `python` is; default: the
    stand-in of a warm process, which has no packages for a script on stdin."""
    environment = {**os.environ, "PATH": f"{folder or loop.bin}:{os.environ['PATH']}", "KILL": ""}
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", change(recipes()[heading])],
                          cwd=loop.folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def report(loop, name):
    return json.loads((loop.folder / "runs" / name).read_text())


@slow
def test_maths(loop):
    run(loop, "Maths, Qwen2.5-Math-1.5B, one 80 GiB GPU")
    assert len(read(loop.folder / "math.jsonl")) == 6  # without the long one
    assert report(loop, "math-1.5b/eval/eval-001.json")["runs"][0]["problems"] == 2
    flags = report(loop, "math-1.5b/001/rollouts.jsonl.meta.json")["flags"]
    assert flags["stop"] == ["<|im_end|>", "<|endoftext|>"] and flags["overlong"] == "skip"
    run(loop, "Maths, Qwen2.5-Math-7B, a node of eight 80 GiB GPUs")
    meta = report(loop, "math-7b/001/policy.meta.json")
    assert meta["world_size"] == 2 and meta["flags"]["shard"]


@slow
def test_countdown_goes_on(loop):
    run(loop, "Countdown, Qwen2.5-1.5B, one 80 GiB GPU")
    run(loop, "Stop, look, go on")
    assert report(loop, "cd/eval/eval-002.json")["runs"][0]["n"] == 2
    assert (loop.folder / "training.png").exists()


@slow
def test_hard_problems_come_twice(loop):
    run(loop, "Hard problems sampled twice", PYTHON)
    for number in (1, 2):
        both, hard = (read(loop.folder / f"{name}-{number}.jsonl") for name in ("both", "renamed"))
        right = collections.Counter()
        for row in both:
            right[row["id"]] += row["correct"]
        once = {id for id in right if not id.endswith("/again")}
        assert len(once) == 4 and len(both) == 4 * len(right)
        again = {row["id"] for row in hard}
        assert again == {f"{id}/again" for id in once if right[id] <= 1} == set(right) - once
        assert again
    assert json.loads((loop.folder / "dars-2/trainer_state.json").read_text())["step"] == 8


@slow
def test_what_is_rehearsed(loop):
    fewer = {"1500": "8", "32": "16", "124": "6"}
    run(loop, "Rehearsal of the base's right answers", PYTHON, lambda commands: re.sub(
        r"(?<=--n )\d+", lambda found: fewer[found[0]], commands))
    once, more, both = (read(loop.folder / f"{name}.jsonl")
                        for name in ("once.scored", "more.scored", "rehearse"))
    hard = {row["id"] for row in read(loop.folder / "few.jsonl")}
    assert both == once + more and hard == {row["id"] for row in more} and 0 < len(hard) < 8
    metrics = read(loop.folder / "rehearsed/metrics.jsonl")
    assert len(metrics) == 4 and all(line["rehearse_nll"] > 0 for line in metrics)


@slow
def test_objectives_that_change_on_the_way(loop):
    run(loop, "Rehearsal with a smaller coefficient later")
    assert [report(loop, f"far/00{number}/policy.meta.json")["flags"]["rehearse_coef"]
            for number in (1, 2)] == [1.0, 0.3]
    run(loop, "Negative rollouts first")
    last = report(loop, "negative-grpo/001/policy.meta.json")["flags"]
    assert last["method"] == "grpo" and "runs/negative/001/policy" in last["model"]
    first = report(loop, "negative/001/policy.meta.json")["flags"]
    assert first["arm"] == {"positive_weight": 0} and first["method"].endswith(":w_reinforce")
    run(loop, "Many samples of few problems")
    assert report(loop, "broad/001/policy.meta.json")["flags"]["updates"] == 4


@slow
def test_averaged_weights(loop):
    run(loop, "Averaged weights", PYTHON)
    folders = ("data/tiny-countdown", "runs/ends/001/policy", "averaged")
    base, trained, mixed = (load_file(loop.folder / folder / "model.safetensors")
                            for folder in folders)
    assert any((base[name] != trained[name]).any() for name in base)
    for name, weight in mixed.items():
        torch.testing.assert_close(weight, (base[name] + trained[name]) / 2)


@slow
def test_dynamic_sampling_leaves_no_group_without_signal(loop):
    run(loop, "Dynamic sampling by files", PYTHON,
        lambda commands: commands.replace("--n 384", "--n 12"))
    assert {line["dead_groups"] for line in read(loop.folder / "dynamic/metrics.jsonl")} == {0}
