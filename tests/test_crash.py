"""A small slice of the fault campaign (crash.py; the whole of it: python tests/crash.py), and
hostile rows and metas.

The kinds of faults are described in crash.py. A loss is an output that is half, missing, doubled or
different in the end.
"""
import itertools
import os
import pathlib
import re
import signal
import types
from unittest import mock

import pytest

import crash
import evaluate
import score
import train
from conftest import refusal, write
from data import files


# ---- Faults --------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    return crash.Campaign(str(tmp_path_factory.mktemp("campaign")), seed=1)


@pytest.mark.parametrize("name, kind", [
    (name, kind) for name, (_, _, torn) in crash.STAGES.items() for kind in crash.KINDS
    if (kind != "torn" or torn) and (kind != "disk" or name in ("generate", "train"))])
def test_faults_lose_nothing(campaign, name, kind):
    """Of the steps towards the disk every one of score.py, every ninth elsewhere."""
    campaign.losses.clear()
    steps = (0, 1) if name == "score" else (list(crash.STAGES).index(name), 9)
    campaign.disturb(name, kind, itertools.count(*steps), {"instant": 2, "disk": 3}.get(kind, 1))
    least = 10 if steps[1] == 1 and kind in ("kill", "power", "full") else 1
    assert not campaign.losses
    assert campaign.faults[name, kind] >= {"twice": 2, "disk": 2}.get(kind, least)


def test_the_campaign_sees_a_loss(campaign):
    """Its own test: stages that leave something half-done, differing or behind are found out."""
    folder = campaign.fresh("score")
    assert campaign.differing("score", folder, whole=False) == []
    assert campaign.start("score", folder).wait() == 0
    pathlib.Path(folder, "scored.jsonl.partial").touch()
    assert campaign.differing("score", folder, whole=True) == ["scored.jsonl.partial"]
    pathlib.Path(folder, "scored.jsonl").write_text("\n")
    assert campaign.differing("score", folder, whole=False) == ["scored.jsonl"]
    child = campaign.start("score", campaign.fresh("score"), kind="kill", at=0)
    assert child.wait() == -signal.SIGKILL
    assert crash.one_line("score", 1, "Traceback")
    assert crash.one_line("score", 2, "score.py: error: a\nscore.py: error: b\n")


# ---- Hostile rows --------------------------------------------------------------------------------
ROW = {"id": "a", "sample": 0, "task": "countdown", "numbers": [1, 2], "target": 3,
       "n_solutions": 1, "completion": "1+2", "prompt_ids": [3, 4], "completion_ids": [5, 6],
       "logprobs": [-1.0, -0.5], "finish_reason": "stop", "correct": True, "reward": 1.0,
       "solution": "1+2", "pred": "1+2", "reason": "ok", "source": "s"}
ROWS = [{**ROW, "id": name, "sample": sample}
        for name in ("../../etc/passwd", "test/807.json\x1b[2J") for sample in (0, 700)]
ODD = [..., None, True, 0.5, 1.0, -1, 2**20, 10**30, 1e300, "x", "", "0", [], {}, [None], ["x"],
       [0.5], [True], [[1]], [-1], [2**40], [1e300, 1e300], [1.0, 2], [1, "2"], {"a": 1}]


class Read(Exception):
    """All rows were taken: next the model would be loaded, or the figures computed."""


def written(folder, rows):
    write(folder / "scored.jsonl.meta.json", [{"sampling": {"temperature": 1.0}}])
    return str(write(folder / "scored.jsonl", rows))


@pytest.fixture
def read(tmp_path, monkeypatch, capfd):
    """read(stage, rows): the one line with which the stage refuses them; None if it takes all."""
    reached = mock.Mock(side_effect=Read)
    for stage, name in ((train, "describe"), (evaluate, "evaluate"), (score, "publish")):
        monkeypatch.setattr(stage, name, reached)
    monkeypatch.setattr(train, "check_model", lambda *args: {})
    monkeypatch.setattr(score, "claim", lambda *args, **flags: os.devnull)
    path, out = str(tmp_path / "scored.jsonl"), str(tmp_path / "out")
    args = {train: train.parse_args(["--model", "m", "--rollouts", path, "--out", out]),
            evaluate: evaluate.parse_args([path]), score: score.parse_args([path, "--out", out])}

    def call(stage, rows):
        files.STAGE = f"{stage.__name__}.py"
        written(tmp_path, rows)
        capfd.readouterr()
        try:
            stage.main(args[stage])
        except Read:
            return None
        except SystemExit as end:
            err = capfd.readouterr().err
            assert end.code == 2 and err.count("\n") == 1 and err[:-1].isprintable()
            assert err.startswith(f"{stage.__name__}.py: error: {path}")
            return err.removeprefix(f"{stage.__name__}.py: error: {path}").strip()
    yield call
    # an id is no file name
    assert sorted(os.listdir(tmp_path)) == ["scored.jsonl", "scored.jsonl.meta.json"]


TEXTS, STAGES = ["x", "", "0"], [score, train, evaluate]
FINE = {  # what of ODD a field may hold; the fields that a stage does not read may hold anything
    score: {"id": TEXTS, "sample": [], "task": [], "completion": TEXTS, "finish_reason": [],
            "numbers": [[-1], [2**40]], "target": [-1, 2**20, 10**30]},
    train: {"id": TEXTS, "sample": [], "prompt_ids": [], "completion_ids": [[]],
            "logprobs": [[], [0.5], [-1], [1.0, 2]], "finish_reason": [], "correct": [True],
            "reward": [0.5, 1.0, -1, 2**20]},
    evaluate: {"id": TEXTS, "sample": [], "task": TEXTS, "completion_ids": [[], [-1], [2**40]],
               "finish_reason": [], "correct": [True], "source": [..., *TEXTS],
               "n_solutions": [..., None, -1, 2**20, 10**30], "solution": TEXTS}}
CONFLICTS = "samples|logprobs for|another|prompt_ids differ|more than its n_solutions"


@pytest.mark.parametrize("stage", STAGES)
def test_wrong_types_in_every_field(stage, read):
    for field, value in itertools.product(ROW, ODD):
        odd = {key: one for key, one in {**ROW, field: value}.items() if one is not ...}
        said = read(stage, [{**ROW, "id": "b"}, {**ROW, "id": "b", "sample": 1}, odd,
                            {**ROW, "sample": 1}])
        fine = FINE[stage].get(field, ODD)
        if any(value is one or value == one and type(value) is type(one) for one in fine):
            # taken, it may not go with the other rows
            assert said is None or re.search(CONFLICTS, said), (field, value, said)
        else:
            first = "; run generate.py first" if field == "sample" else ""
            expected = f"missing field '{field}'{first}" if value is ... else f"field '{field}"
            assert said.startswith(f":3: {expected}"), (field, value, said)


@pytest.mark.parametrize("stage", STAGES)
def test_a_hostile_id_names_no_file_and_does_not_command_the_terminal(stage, read):
    assert read(stage, ROWS) is None
    said = read(stage, ROWS + ROWS[-1:])
    assert said.startswith(":5: ") and "\\x1b[2J" in said and "sample 700" in said


@pytest.mark.parametrize("meta", ["", "5", "{}", "[" * 10**5, '{"sampling": 5}',
                                  '{"sampling": [1]}', "\udc80"])
def test_a_hostile_meta_is_refused_by_train_and_no_news_to_evaluate(meta, tmp_path, capfd):
    path = written(tmp_path, ROWS)
    (tmp_path / "scored.jsonl.meta.json").write_bytes(meta.encode(errors="surrogateescape"))
    refusal(capfd, train.sampling_of, types.SimpleNamespace(
        rollouts=path, temperature=None, allow_off_policy=False))
    evaluate.main(evaluate.parse_args([path, "--resamples", "10"]))
    assert "2 problems" in capfd.readouterr().out
