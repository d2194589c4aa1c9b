"""data/chunks.py by generate.py: what happens when a run is cut short, started again, or shared by
several ranks. tests/test_crash.py kills processes."""
import os
import shutil

import pytest

import data.chunks
import generate
from conftest import meta_of, read, refusal, set_rank, write
from test_generate import bpe_model, copy_of, refused, release, run, start, turn  # noqa: F401


def begin(monkeypatch, *args, chunks=0):
    """Start a run that ends after so many chunks, which it returns."""
    run_chunk, made = generate.run_chunk, []

    def cut_short(chunk, *args):
        if len(made) == chunks:
            raise KeyboardInterrupt
        made.append(chunk)
        return run_chunk(chunk, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(generate, "run_chunk", cut_short)
        run(*args)
    release()
    return made


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
    """Ranks take whole chunks. Here rank 1 works while rank 0 waits for its chunks. test_run.py and
    test_distributed.py start processes."""
    flags = ["--temperature", 0.7, "--max-batch-tokens", 400, "--n", 4]
    run(tiny_model, prompts, tmp_path / "one.jsonl", *flags)
    out, wait, made = tmp_path / "two.jsonl", generate.wait_for_chunks, {0: [], 1: []}
    write_synced = data.chunks.write_synced

    def rank_1_works(folder, *args):
        set_rank(monkeypatch, 1)
        start(tiny_model, prompts, out, *flags)
        wait(folder, *args)

    def counted(path, lines, rank=0):
        if path.endswith(".jsonl"):
            made[rank].append(path)
        write_synced(path, lines, rank)

    set_rank(monkeypatch, 0)
    monkeypatch.setattr(generate, "wait_for_chunks", rank_1_works)
    monkeypatch.setattr(data.chunks, "write_synced", counted)
    run(tiny_model, prompts, out, *flags)
    assert out.read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    assert meta_of(out)["world_size"] == 2 and not os.path.exists(f"{out}.partial")
    assert len(made[0]) + len(made[1]) == meta_of(out)["chunks"]
    assert abs(len(made[0]) - len(made[1])) <= 1 < len(made[0])


def test_a_run_cut_short_is_resumed(tiny_model, prompts, tmp_path, monkeypatch, capfd):
    """With the same flags; others are refused. tests/test_crash.py kills the process."""
    flags, out = ["--max-batch-tokens", 400, "--n", 4], tmp_path / "out.jsonl"
    run(tiny_model, prompts, tmp_path / "whole.jsonl", *flags)
    made = begin(monkeypatch, tiny_model, prompts, out, *flags, chunks=2)
    assert "begun with other flags" in refused(capfd, tiny_model, prompts, out, *flags, "--n", 3)
    release()
    (tmp_path / "out.jsonl.partial" / "000002.jsonl.0").write_text('{"sample": 0, "compl')  # torn
    run_chunk = generate.run_chunk
    monkeypatch.setattr(generate, "run_chunk",
                        lambda chunk, *args: made.append(chunk) or run_chunk(chunk, *args))
    run(tiny_model, prompts, out, *flags)
    assert len(made) == meta_of(out)["chunks"] > 3  # none was done twice
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not (tmp_path / "out.jsonl.partial").exists()


PROMPT_IDS = generate.prompt_ids
OTHERWISE = {  # a template that renders the date; another version of the code
    "prompt_ids": lambda *args: [5, *PROMPT_IDS(*args)],
    "chunks_of": lambda *args: data.chunks.chunks_of(*args)[::-1]}


@pytest.mark.parametrize("name", OTHERWISE)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_restart_that_encodes_or_cuts_otherwise_is_refused(name, rank, bpe_model, tmp_path,
                                                             monkeypatch, capfd):
    problems = write(tmp_path / "p.jsonl", [
        {"id": str(i), "messages": [turn("3 * 4 " * i)]} for i in range(1, 5)])
    command = bpe_model, problems, tmp_path / "out.jsonl", "--max-batch-tokens", 100, "--n", 2
    begin(monkeypatch, *command)
    with monkeypatch.context() as patch:
        patch.setattr(generate, name, OTHERWISE[name])
        set_rank(patch, rank)
        line = refused(capfd, *command)
    assert "begun with other token ids of the same prompts" in line and "delete that folder" in line
    if rank == 0:
        release()
    assert len(run(*command)) == 8  # the same ids are welcome


def test_what_counts_as_the_same_command(tiny_model, prompts, tmp_path, capfd):
    """Contents, wherever they stand, but for what only train.py reads; test_files.py has the
    rest."""
    model, out = copy_of(tiny_model, tmp_path / "model"), tmp_path / "out.jsonl"
    flags = ["--n", 2, "--limit", 4]
    run(model, prompts, out, *flags)
    before = out.stat().st_mtime_ns, out.read_bytes(), meta_of(out)
    for name in ("optimizer.safetensors", "metrics.jsonl", "trainer_state.json"):
        (tmp_path / "model" / name).write_text("{}")
    for folder in tiny_model, model:
        capfd.readouterr()
        run(folder, prompts, out, *flags)
        assert capfd.readouterr().err == f"{out}: complete, left alone\n"
    assert "made with other n;" in refused(capfd, model, prompts, out, *flags, "--n", 3)
    other = write(tmp_path / "other.jsonl", read(prompts)[:-1])
    assert "made with other inputs;" in refused(capfd, model, other, out, *flags)
    (tmp_path / "model" / "generation_config.json").write_text("{}")
    assert "made with other inputs;" in refused(capfd, model, prompts, out, *flags)
    assert (out.stat().st_mtime_ns, out.read_bytes(), meta_of(out)) == before


def test_a_rank_that_comes_late(tiny_model, prompts, tmp_path, monkeypatch):
    """Rank 0 of a restart may have merged all chunks while rank 1 still loads its model."""
    flags, load_model = ("--max-batch-tokens", 2000, "--n", 2), generate.load_model
    command = tiny_model, prompts, tmp_path / "out.jsonl", *flags

    def rank_0_is_done_meanwhile(*args):
        monkeypatch.setattr(generate, "load_model", load_model)
        set_rank(monkeypatch, 0, world=1)
        run(*command)
        return load_model(*args)

    begin(monkeypatch, *command)
    monkeypatch.setattr(generate, "load_model", rank_0_is_done_meanwhile)
    set_rank(monkeypatch, 1)
    assert len(run(*command)) == 24 and not (tmp_path / "out.jsonl.partial").exists()


def test_rank_0_alone_hashes_the_inputs(tiny_model, prompts, tmp_path, monkeypatch, capfd):
    """Other ranks compare sizes and times, and digests where these differ. They wait where a killed
    run with other flags or inputs left a folder, which rank 0 will refuse."""
    model, out = copy_of(tiny_model, tmp_path / "model"), tmp_path / "out.jsonl"
    command = model, prompts, out, "--n", 1
    begin(monkeypatch, *command)
    set_rank(monkeypatch, 1)
    monkeypatch.setattr(generate, "describe", None)
    hashed, digest = [], data.chunks.digest
    monkeypatch.setattr(data.chunks, "digest",
                        lambda path, unread: hashed.append(path) or digest(path, unread))
    start(*command)
    assert not hashed
    os.utime(f"{model}/config.json", (0, 0))
    start(*command)
    assert len(hashed) == 2
    begun = tmp_path / "out.jsonl.partial" / "command.json"
    text = begun.read_text()
    assert '"n": 1,' in text
    for text, end in [(text.replace('"n": 1,', '"n": 2,'), ""), ('["of another run"]', ""),
                      (text, "\n")]:
        begun.write_text(text)
        with open(f"{model}/config.json", "a") as file:
            file.write(end)  # another model
        assert refusal(capfd, start, *command, "--rank-timeout", 0.3, code=4) == (
            f"generate.py: error: rank 1: rank 0 did not begin {out}.partial in 0 s: no shared "
            f"file system?")
        assert begun.read_text() == text


COMMITS = {"one": "1" * 40, "other": "2" * 40}


@pytest.fixture
def hub(tiny_model, tmp_path, monkeypatch):
    """owner/one and owner/other, equal but for their commits, in the Hub's cache; no network."""
    for name, commit in COMMITS.items():
        folder = tmp_path / "hub" / f"models--owner--{name}"
        copy_of(tiny_model, folder / "snapshots" / commit)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(commit)
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
    line = refused(capfd, "owner/other", prompts, half, *flags)
    assert "begun with other flags or inputs" in line
    release()
    run("owner/one", prompts, half, *flags)
    assert "owner/none: cannot be loaded" in refused(capfd, "owner/none", prompts,
                                                     tmp_path / "none.jsonl", *flags)


@pytest.mark.parametrize("name", ["encode", "run_chunk"])
def test_a_prompt_file_that_changes(name, tiny_model, prompts, tmp_path, monkeypatch, capfd):
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
