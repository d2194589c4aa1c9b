"""data/chunks.py by generate.py: what happens when a run is cut short, started again, or shared by
several ranks. tests/test_crash.py kills processes."""
import os
import shutil
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file

import data.chunks
import generate
from data.files import claim
from test_generate import (ROOT, bpe_model, copy_of, meta_of, read, refused,  # noqa: F401
                           release, run, turn, write_prompts)


def interrupted(*args):
    raise KeyboardInterrupt


def begin(monkeypatch, *args):
    """Start a run that ends in its first chunk."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(generate, "run_chunk", interrupted)
        run(*args)
    release()


def test_chunks_hold_every_item_once_and_keep_to_the_budget():
    lengths = [5, 3, 9, 3, 40, 1, 9]
    for budget in (1, 50, 64, 200, 10**6):
        chunks = generate.chunks_of(lengths, 4, 8, budget)
        items = [item for chunk in chunks for item in chunk]
        assert sorted(items) == [(problem, k) for problem in range(7) for k in range(4)]
        order = [lengths[problem] for problem, _ in items]
        assert order == sorted(order)
        assert all(len(chunk) == 1 or
                   len(chunk) * (max(lengths[problem] for problem, _ in chunk) + 8) <= budget
                   for chunk in chunks)
    assert len(chunks) == 1


def test_ranks_change_no_bit(tiny_model, prompts, tmp_path, monkeypatch):
    """Ranks take whole chunks. Here rank 1 works while rank 0 waits for its chunks."""
    flags = ["--temperature", 0.7, "--max-batch-tokens", 400, "--n", 4]
    run(tiny_model, prompts, tmp_path / "one.jsonl", *flags)
    out, wait, chunks = tmp_path / "two.jsonl", generate.wait_for_chunks, {}
    write_synced = data.chunks.write_synced

    def rank_1_works(*args):
        monkeypatch.setenv("RANK", "1")
        generate.main(ARGS)
        wait(*args)

    def counted(path, lines, rank=0):
        if path.endswith(".jsonl"):
            chunks.setdefault(rank, []).append(path)
        write_synced(path, lines, rank)

    ARGS = generate.parse_args([*map(str, (
        "--model", tiny_model, "--prompts", prompts, "--out", out, "--device", "cpu",
        "--max-new-tokens", 24, *flags))])
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(generate, "wait_for_chunks", rank_1_works)
    monkeypatch.setattr(data.chunks, "write_synced", counted)
    generate.main(ARGS)
    assert out.read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    assert meta_of(out)["world_size"] == 2 and not os.path.exists(f"{out}.partial")
    assert len(chunks[0]) + len(chunks[1]) == meta_of(out)["chunks"]
    assert abs(len(chunks[0]) - len(chunks[1])) <= 1 < len(chunks[0])


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_of_torchrun_change_no_bit(ranks, tiny_model, prompts, tmp_path):
    flags = ["--temperature", "0.7", "--max-batch-tokens", "300"]
    run(tiny_model, prompts, tmp_path / "one.jsonl", *flags)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
         str(ranks), "generate.py", "--model", tiny_model, "--prompts", prompts, "--out",
         str(tmp_path / "many.jsonl"), "--device", "cpu", "--max-new-tokens", "24", *flags],
        cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"on cpu x {ranks}" in done.stderr and " 1 chunks" not in done.stderr
    assert (tmp_path / "many.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()


def test_a_run_cut_short_and_resumed_ends_byte_equal(tiny_model, prompts, tmp_path, monkeypatch,
                                                     capfd):
    """With the same flags; others are refused. tests/test_crash.py kills the process."""
    flags, out = ["--max-batch-tokens", 400, "--n", 4], tmp_path / "out.jsonl"
    run(tiny_model, prompts, tmp_path / "whole.jsonl", *flags)
    run_chunk, made = generate.run_chunk, []

    def cut_short(chunk, *args):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(chunk)
        return run_chunk(chunk, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(generate, "run_chunk", cut_short)
        run(tiny_model, prompts, out, *flags)
    locks = [claim.lock]
    assert "another run is writing it" in refused(capfd, tiny_model, prompts, out, *flags)
    for lock in {*locks, claim.lock}:
        os.close(lock)
    assert "begun with other flags" in refused(capfd, tiny_model, prompts, out, *flags, "--n", 3)
    release()
    (tmp_path / "out.jsonl.partial" / "000002.jsonl.0").write_text('{"sample": 0, "compl')  # torn
    monkeypatch.setattr(generate, "run_chunk",
                        lambda chunk, *args: made.append(chunk) or run_chunk(chunk, *args))
    run(tiny_model, prompts, out, *flags)
    assert len(made) == meta_of(out)["chunks"] > 3  # none was done twice
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not (tmp_path / "out.jsonl.partial").exists()


def another_day(*args):
    return [5, *PROMPT_IDS(*args)]


def cut_by_another_version(lengths, n, *args):
    return data.chunks.chunks_of(lengths, n, *args)[::-1]


PROMPT_IDS = generate.prompt_ids


@pytest.mark.parametrize("name, changed", [("prompt_ids", another_day),
                                           ("chunks_of", cut_by_another_version)])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_restart_that_encodes_or_cuts_otherwise_is_refused(name, changed, rank, bpe_model,
                                                             tmp_path, monkeypatch, capfd):
    """A chat template may render the date: chunks of yesterday's ids are of other rows."""
    problems = write_prompts(tmp_path / "p.jsonl", [
        {"id": str(i), "messages": [turn("3 * 4 " * i)]} for i in range(1, 5)])
    command = bpe_model, problems, tmp_path / "out.jsonl", "--max-batch-tokens", 100, "--n", 2
    begin(monkeypatch, *command)
    with monkeypatch.context() as patch:
        patch.setattr(generate, name, changed)
        for variable, value in {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank}.items():
            patch.setenv(variable, str(value))
        line = refused(capfd, *command)
    assert "begun with other token ids of the same prompts" in line and "delete that folder" in line
    if rank == 0:
        release()
    assert len(run(*command)) == 8  # the same ids are welcome


def test_a_complete_output_is_left_alone_and_other_flags_are_refused(tiny_model, prompts, tmp_path,
                                                                     capfd):
    model, out = copy_of(tiny_model, tmp_path / "model"), tmp_path / "out.jsonl"
    flags = ["--n", 2, "--limit", 4]
    run(model, prompts, out, *flags)
    before = out.stat().st_mtime_ns, out.read_bytes(), meta_of(out)
    capfd.readouterr()
    run(tiny_model, prompts, out, *flags)  # the same contents at another place
    assert capfd.readouterr().err == f"{out}: complete, left alone\n"
    for name in ("optimizer.safetensors", "metrics.jsonl", "trainer_state.json"):
        (tmp_path / "model" / name).write_text("{}")  # what only train.py reads
    run(model, prompts, out, *flags)
    assert "complete, left alone" in capfd.readouterr().err
    assert "made with other n;" in refused(capfd, model, prompts, out, *flags, "--n", 3)
    assert "made with other seed, temperature;" in refused(
        capfd, model, prompts, out, *flags, "--seed", 1, "--temperature", 0.5)
    other = write_prompts(tmp_path / "other.jsonl", read(prompts)[:-1])
    assert "made with other inputs;" in refused(capfd, model, other, out, *flags)
    (tmp_path / "model" / "generation_config.json").write_text("{}")
    assert "made with other inputs;" in refused(capfd, model, prompts, out, *flags)
    assert (out.stat().st_mtime_ns, out.read_bytes(), meta_of(out)) == before
    assert not (tmp_path / "out.jsonl.partial").exists()


def as_rank_1(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)


def test_a_rank_that_comes_late_leaves_a_merged_output_alone(tiny_model, prompts, tmp_path,
                                                             monkeypatch):
    """Rank 0 of a restart may have merged all chunks while rank 1 still loads its model."""
    flags, load_model = ("--max-batch-tokens", 2000, "--n", 2), generate.load_model
    command = tiny_model, prompts, tmp_path / "out.jsonl", *flags

    def rank_0_is_done_meanwhile(*args):
        monkeypatch.setattr(generate, "load_model", load_model)
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "1")
        run(*command)
        return load_model(*args)

    begin(monkeypatch, *command)
    monkeypatch.setattr(generate, "load_model", rank_0_is_done_meanwhile)
    as_rank_1(monkeypatch)
    assert len(run(*command)) == 24
    assert not (tmp_path / "out.jsonl.partial").exists()


def test_rank_0_alone_hashes_the_inputs(tiny_model, prompts, tmp_path, monkeypatch, capfd):
    """Other ranks compare sizes and times, and digests where these differ."""
    model, out = copy_of(tiny_model, tmp_path / "model"), tmp_path / "out.jsonl"
    command = ["--model", model, "--prompts", prompts, "--out", str(out), "--device", "cpu",
               "--max-new-tokens", "24", "--n", "1"]
    begin(monkeypatch, model, prompts, out, "--n", 1)
    as_rank_1(monkeypatch)
    monkeypatch.setattr(generate, "describe", None)
    hashed, digest = [], data.chunks.digest
    monkeypatch.setattr(data.chunks, "digest",
                        lambda path, unread: hashed.append(path) or digest(path, unread))
    generate.main(generate.parse_args(command))
    assert not hashed
    os.utime(f"{model}/config.json", (0, 0))
    generate.main(generate.parse_args(command))
    assert len(hashed) == 2
    with open(f"{model}/config.json", "a") as file:
        file.write("\n")
    capfd.readouterr()
    with pytest.raises(SystemExit) as end:  # another model, which rank 0 will refuse
        generate.main(generate.parse_args([*command, "--rank-timeout", "0.3"]))
    assert end.value.code == 4
    assert capfd.readouterr().err == (
        f"generate.py: error: rank 1: rank 0 did not begin {out}.partial in 0 s: no shared file "
        f"system?\n")


def test_a_rank_waits_for_a_folder_of_its_own_command(tiny_model, prompts, tmp_path, monkeypatch):
    """What a killed run with other flags left must not start rank 1 while rank 0 refuses it."""
    class Waiting(Exception):
        pass

    def wait(seconds):
        raise Waiting

    folder = tmp_path / "out.jsonl.partial"
    folder.mkdir()
    (folder / "command.json").write_text('["of another run"]')
    as_rank_1(monkeypatch)
    monkeypatch.setattr(generate.time, "sleep", wait)
    with pytest.raises(Waiting):
        run(tiny_model, prompts, tmp_path / "out.jsonl")
    assert [path.name for path in folder.iterdir()] == ["command.json"]


COMMITS = {"one": "1" * 40, "other": "2" * 40}


@pytest.fixture
def hub(tiny_model, tmp_path, monkeypatch):
    """owner/one and owner/other, of equal shapes, in the Hub's cache, and there is no network."""
    for name, commit in COMMITS.items():
        folder = tmp_path / "hub" / f"models--owner--{name}"
        copy_of(tiny_model, folder / "snapshots" / commit)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(commit)
    path = folder / "snapshots" / commit / "model.safetensors"
    weights = {key: weight * 1.1 for key, weight in load_file(path).items()}
    save_file(weights, path, {"format": "pt"})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_another_hub_id_is_another_input(hub, prompts, tmp_path, monkeypatch, capfd):
    """Its commit is compared: of what is complete and of what is half done."""
    flags, out, half = ["--n", 1], tmp_path / "out.jsonl", tmp_path / "half.jsonl"
    run("owner/one", prompts, out, *flags)
    assert list(meta_of(out)["inputs"].values())[1] == f"owner/one@{COMMITS['one']}"
    assert "made with other inputs;" in refused(capfd, "owner/other", prompts, out, *flags)
    run("owner/one", prompts, out, *flags)
    assert "complete, left alone" in capfd.readouterr().err
    begin(monkeypatch, "owner/one", prompts, half, *flags)
    assert "begun with other flags or inputs" in refused(capfd, "owner/other", prompts, half,
                                                         *flags)
    release()
    run("owner/one", prompts, half, *flags)
    assert half.read_bytes() == out.read_bytes()
    assert "owner/none: cannot be loaded" in refused(capfd, "owner/none", prompts,
                                                     tmp_path / "none.jsonl", *flags)


@pytest.mark.parametrize("name", ["encode", "run_chunk"])
def test_a_prompt_file_that_changes_meanwhile_changes_no_row(name, tiny_model, prompts, tmp_path,
                                                             monkeypatch, capfd):
    """Rows are of the file as it was read; before its digest is taken a change ends the stage."""
    path, out, called = tmp_path / "in.jsonl", tmp_path / "out.jsonl", getattr(generate, name)
    shutil.copy(prompts, path)

    def meddled(*args):
        path.write_bytes(path.read_bytes().replace(b"4 6=24:", b"4 6=100:"))
        return called(*args)

    monkeypatch.setattr(generate, name, meddled)
    if name == "encode":
        assert "changed while it was read" in refused(capfd, tiny_model, path, out, "--n", 1)
        return
    rows = run(tiny_model, path, out, "--n", 1)
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in read(prompts)]
    assert "made with other inputs" in refused(capfd, tiny_model, path, out, "--n", 1)
