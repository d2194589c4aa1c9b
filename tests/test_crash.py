"""A small slice of the fault campaign (crash.py; the whole of it: python tests/crash.py), and
hostile rows and metas.

The kinds of faults are described in crash.py. A loss is an output that is half, missing, doubled or
different in the end.
"""
import itertools
import json
import os
import shutil
import signal
import tempfile
import types

import pytest

import crash
import evaluate
import train
from data import files


# ---- Faults --------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def whole_campaign():
    folder = tempfile.mkdtemp(prefix="campaign-")
    yield crash.Campaign(folder, seed=1)
    shutil.rmtree(folder)


@pytest.fixture
def campaign(whole_campaign):
    whole_campaign.losses.clear()
    return whole_campaign


ALL = list(crash.STAGES)


@pytest.mark.parametrize("kind", ["kill", "power", "full"])
@pytest.mark.parametrize("name", ALL)
def test_at_every_step_towards_the_disk(campaign, name, kind):
    """Killed, cut off from power or out of room there, nothing is lost. Here every step of
    score.py, every ninth elsewhere."""
    stride, first = (1, 0) if name == "score" else (9, ALL.index(name))
    campaign.injected(name, kind, itertools.count(first, stride))
    assert not campaign.losses and campaign.faults[name, kind] >= (10 if stride == 1 else 1)


@pytest.mark.parametrize("name", ALL)
def test_at_random_instants(campaign, name):
    campaign.instants(name, 2)
    assert not campaign.losses and campaign.faults[name, "instant"]


@pytest.mark.parametrize("name", ALL)
def test_a_second_run_on_the_same_output_is_refused(campaign, name):
    campaign.twice(name, 1)
    assert not campaign.losses and campaign.faults[name, "twice"] == 2


@pytest.mark.parametrize("name", ["generate", "train"])
def test_a_disk_of_too_few_bytes(campaign, name):
    campaign.injected(name, "disk", campaign.rooms(name, 3))
    assert not campaign.losses and campaign.faults[name, "disk"] >= 2


@pytest.mark.parametrize("name", ALL)
def test_a_folder_that_cannot_be_written_a_clock_that_jumps_a_torn_last_line(campaign, name):
    for kind in "read-only", "clock":
        campaign.injected(name, kind, [0])
    if crash.STAGES[name][2]:
        campaign.torn(name)
    assert not campaign.losses and campaign.faults[name, "read-only"] == 1


def test_the_campaign_sees_a_loss(campaign):
    """Its own test: stages that leave something half-done, differing or behind are found out."""
    folder = campaign.fresh("score")
    assert campaign.differing("score", folder, whole=False) == []
    assert campaign.start("score", folder).wait() == 0
    with open(os.path.join(folder, "scored.jsonl.partial"), "w"):
        pass
    assert campaign.differing("score", folder, whole=True) == ["scored.jsonl.partial"]
    with open(os.path.join(folder, "scored.jsonl"), "a") as file:
        file.write("\n")
    assert campaign.differing("score", folder, whole=False) == ["scored.jsonl"]
    child = campaign.start("score", campaign.fresh("score"), kind="kill", at=0)
    assert child.wait() == -signal.SIGKILL
    assert crash.one_line("score", 1, "Traceback")
    assert crash.one_line("score", 2, "score.py: error: a\nscore.py: error: b\n")


# ---- Hostile rows --------------------------------------------------------------------------------
ROW = {"id": "a", "sample": 0, "task": "countdown", "numbers": [1, 2], "target": 3,
       "n_solutions": 1, "completion": "1+2",
       "prompt_ids": [3, 4], "completion_ids": [5, 6], "logprobs": [-1.0, -0.5],
       "finish_reason": "stop", "correct": True, "reward": 1.0,
       "solution": "1+2", "pred": "1+2", "reason": "ok", "source": "s"}
ROWS = [{**ROW, "id": name, "sample": sample}
        for name in ("../../etc/passwd", "test/807.json\x1b[2J") for sample in (0, 1)]
ODD = [None, True, 0.5, -1, 10**30, 1e300, "x", "", [], {}, [None], ["x"], [0.5], [True], [[1]],
       [-1], [2**40], [1e300, 1e300], {"a": 1}]


class Read(Exception):
    """All rows were taken: next the model would be loaded, or the figures computed."""


def written(tmp_path, rows):
    path = tmp_path / "scored.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "scored.jsonl.meta.json").write_text('{"sampling": {"temperature": 1.0}}')
    return str(path)


@pytest.fixture
def read(tmp_path, monkeypatch, capfd):
    """read(stage, rows): the one line with which the stage refuses them; None if it takes them
    all."""
    def reached(*args, **flags):
        raise Read
    monkeypatch.setattr(train, "check_model", lambda *args: {})
    monkeypatch.setattr(train, "describe", reached)
    monkeypatch.setattr(evaluate, "evaluate", reached)
    path, out = str(tmp_path / "scored.jsonl"), str(tmp_path / "out")
    args = {train: train.parse_args(["--model", "m", "--rollouts", path, "--out", out]),
            evaluate: evaluate.parse_args([path])}

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


FINE = {  # what of ODD a field may hold; the fields that a stage does not read may hold anything
    train: {"id": ["x", ""], "sample": [], "prompt_ids": [], "completion_ids": [], "logprobs": [],
            "finish_reason": [],
            "correct": [True], "reward": [0.5, -1]},
    evaluate: {"id": ["x", ""], "sample": [], "task": ["x", ""],
               "completion_ids": [[], [-1], [2**40]],
               "finish_reason": [], "correct": [True], "source": ["x", ""],
               "n_solutions": [None, -1, 10**30], "solution": ["x", ""]},
}


@pytest.mark.parametrize("stage", [train, evaluate])
def test_wrong_types_in_every_field(stage, read):
    for field in ROW:
        for value in ODD:
            said = read(stage, [{**ROW, "id": "b"}, {**ROW, "id": "b", "sample": 1},
                                {**ROW, field: value}, {**ROW, "sample": 1}])
            if stage is evaluate and said and (said.startswith(":4: 'a' is another problem")
                                               or "more than its n_solutions" in said):
                said = None  # the field was taken; what it says does not go with the other rows
            fine = FINE[stage].get(field, ODD)
            taken = any(value is one or value == one and type(value) is type(one) for one in fine)
            others = ()  # what the other rows may make of it
            if field in ("id", "completion_ids", "logprobs", "prompt_ids"):
                others = ("samples", "logprobs for", "another", "prompt_ids differ")
            case = field, value, said
            assert (said is None) == taken or any(word in said for word in others), case
            assert said is None or others or said.startswith(":3: "), case


@pytest.mark.parametrize("stage", [train, evaluate])
def test_a_hostile_id_names_no_file_and_does_not_command_the_terminal(stage, read):
    assert read(stage, ROWS) is None
    said = read(stage, ROWS + ROWS[-1:])
    assert "\\x1b[2J" in said and said.startswith(":5: ")


@pytest.mark.parametrize("meta", ["", "5", "{}", "[" * 10**5, '{"sampling": 5}',
                                  '{"sampling": [1]}', "\udc80"])
def test_a_hostile_meta_is_refused_by_train_and_no_news_to_evaluate(meta, tmp_path, capfd,
                                                                    monkeypatch):
    path = written(tmp_path, ROWS)
    (tmp_path / "scored.jsonl.meta.json").write_bytes(meta.encode(errors="surrogateescape"))
    with pytest.raises(SystemExit) as end:
        train.sampling_of(types.SimpleNamespace(rollouts=path, temperature=None,
                                                allow_off_policy=False))
    assert end.value.code == 2 and capfd.readouterr().err.count("\n") == 1
    evaluate.main(evaluate.parse_args([path, "--resamples", "10"]))
    assert "4 problems" not in capfd.readouterr().out
