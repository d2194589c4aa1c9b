"""train.py and generate.py as several processes (torchrun, gloo, CPU): the results of one process,
and what happens when a rank fails.

A launch costs seconds a rank, so each does many rounds: `RANKS` below calls main once for each list
of flags. In fp64 (as in test_train.py) the ranks' gradient must be that of one process to 1e-9, in
fp32 to 1e-6.
"""
import contextlib
import glob
import json
import os
import pathlib
import random
import re
import socket
import subprocess
import sys
import textwrap
import types

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import train
from conftest import refusal, set_rank
from test_train import (  # noqa: F401  fixtures among them
    VERDICTS, Round, arguments, distance, fp64, make_model, make_rows, model, rollouts, run,
    same_round, write)

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RANKS = f"""
    import json, os, re, signal, sys
    sys.path[:0] = [{ROOT!r}, {os.path.join(ROOT, "tests")!r}]
    from data import models
    from transformers.models.qwen2 import modeling_qwen2
    stage = __import__(sys.argv[1])
    sys.argv[0] = sys.argv[1] + ".py"  # as in a start of its own, it then handles signals
    # What happens to a rank in the middle of its work.
    kind, rank, call = os.environ.get("FAULT", "none,-1,0").split(",")
    name, calls, wide = {{"train": "token_losses", "generate": "run_chunk"}}[sys.argv[1]], 0, False
    unsummed = []  # passes of a sharded update before which no gradient has been summed over ranks
    original = getattr(stage, name)

    def faulty(*args, **options):
        global calls
        calls += 1
        if os.environ["RANK"] == rank and calls == int(call):
            if kind == "raise":
                raise ValueError("a fault")
            os.kill(os.getpid(), {{"kill": signal.SIGKILL, "stop": signal.SIGSTOP}}[kind])
        return original(*args, **options)

    def peak():  # ru_maxrss would begin at the peak of the process that started this one
        with open("/proc/self/status") as file:
            return int(re.search(r"VmHWM:\\s+(\\d+)", file.read())[1])

    def watched(module, *rest):  # every pass of train.py, also one without rows
        if args.shard and stage.torch.is_grad_enabled():
            unsummed.append(all(weight.grad is None for weight in module.parameters()))
        return forward(module, *rest)

    setattr(stage, name, faulty)
    forward, stage.forward = getattr(stage, "forward", None), watched  # of train.py
    imports = peak()
    for port, dtype, flags in json.loads(sys.argv[2]):
        if port:  # each round meets at a port of its own
            os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
            os.environ["MASTER_PORT"] = str(port)
        models.LARGEST_FILE = 4_000 if dtype == "files" else 2 * 10**9
        if dtype == "fp64" and not wide:
            __import__("test_train").use_fp64()
            wide = True
        unsummed.clear()
        args = stage.parse_args(flags)
        stage.run(stage.main, args)
        # FSDP2 would keep a whole gradient on every rank until it is summed: only an update's first
        # pass finds none.
        assert sum(unsummed) == (args.updates if getattr(args, "shard", False) else 0), unsummed
    if "PEAKS" in os.environ:  # KiB above what imports took
        with open(f"{{os.environ['PEAKS']}}/{{os.environ['RANK']}}", "w") as file:
            file.write(str(peak() - imports))
"""


def free_ports(count):
    """Different ones, below those that the system gives away, as it might before ours are used."""
    ports = set()
    while len(ports) < count:
        with contextlib.closing(socket.socket()) as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port := random.randrange(15_000, 32_000)))
            ports.add(port)
    return list(ports)


def start(folder, ranks, stage, jobs, fault="", options=("--standalone",)):
    """torchrun with `ranks` processes that do `jobs`, [(dtype, flags)], one after another."""
    script = os.path.join(folder, "ranks.py")
    with open(script, "w", encoding="utf-8") as file:
        file.write(textwrap.dedent(RANKS))
    ports = free_ports(len(jobs)) if len(jobs) > 1 else [None]
    jobs = [(port, dtype, list(map(str, flags))) for port, (dtype, flags) in zip(ports, jobs)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **({"FAULT": fault} if fault else {})}
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *options, "--nproc-per-node", str(ranks),
         script, stage, json.dumps(jobs)],
        env=environment, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process, limit=300):
    """(exit code, stderr) of a torchrun that ends by itself within `limit` seconds."""
    try:
        stderr = process.communicate(timeout=limit)[1]
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its ranks, the stopped ones after 30 s
        raise
    return process.returncode, stderr


def launch(ranks, stage, out, *flags):
    code, stderr = finish(start(out.parent, ranks, stage, [("fp32", [*flags, "--out", out])]))
    assert code == 0, stderr


# ---- The same results as one process -------------------------------------------------------------
ONE = "--max-grad-norm 1e9 --lr 1e-3"
CASES = {  # name: (rows, flags); ALL is the file of those rows
    "one update": ("all", f"{ONE} --entropy-coef 0.1"),
    "three updates": ("all", "--updates 3 --lr 0.03 --micro-batch-tokens 20 --smooth-level mean "
                             "--gamma-p 0.3"),
    "masked, reward": ("all", "--updates 2 --lr 0.03 --micro-batch-tokens 40 --smooth-level reward "
                              "--truncated mask"),
    "dead groups, rehearsal": ("all", "--method grpo --updates 3 --lr 0.03 --rehearse ALL "
                                      "--micro-batch-tokens 20 --rehearse-coef 0.5 --rehearse-n 2"),
    "uneven": ("uneven", f"{ONE} --micro-batch-tokens 30"),
    "ranks without rows": ("few", ONE),
    "no rows at all": ("few", "--truncated mask --lr 1e-3")}
NEXT = ["--lr", 0.01, "--updates", 2]
KINDS = {"plain": [], "sharded": ["--shard"]}


@pytest.fixture(scope="module")
def files(model, rollouts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    uneven = make_rows(model, VERDICTS[:4], [[1, 1, 1, 1]] * 3 + [[7, 8, 9, 7]], cut=())
    few = make_rows(model, VERDICTS[:2], [[0, 0, 4, 0], [0, 0, 0, 0]], cut={(0, 2)})
    return {"all": rollouts, "uneven": write(folder / "uneven.jsonl", uneven),
            "few": write(folder / "few.jsonl", few)}


def flags_of(name, files):
    return [files["all"] if flag == "ALL" else flag for flag in CASES[name][1].split()]


@pytest.fixture(scope="module", params=[2, *[pytest.param(n, marks=pytest.mark.slow)
                                             for n in (3, 4)]])
def ranks(request, model, files, tmp_path_factory):
    """All cases on 2, 3 and 4 ranks, plain and sharded: `folder` holds the rounds."""
    folder, jobs = str(tmp_path_factory.mktemp("ranks")), []
    untied = make_model(f"{folder}/untied", 0)  # by its files, whatever its config says
    weights = load_file(f"{untied}/model.safetensors")
    save_file({**weights, "lm_head.weight": weights["model.embed_tokens.weight"].flip(0)},
              f"{untied}/model.safetensors", {"format": "pt"})

    def job(dtype, out, source, rows, *flags):
        jobs.append((dtype, ["--model", source, "--rollouts", files[rows], "--out",
                             f"{folder}/{out}", *flags]))

    one = flags_of("one update", files)
    for kind, more in KINDS.items():
        job("fp32", f"fp32 {kind}", model, "all", *one, *more)
    job("files", "many files", model, "all", *one, "--shard")
    for before in "fp32 sharded", "many files":
        job("fp32", f"after {before}", f"{folder}/{before}", "all", *NEXT, "--shard")
    job("fp32", "untied sharded", untied, "all", *one, "--shard")
    for kind, more in KINDS.items():
        for name, (rows, _) in CASES.items():
            job("fp64", f"{name} {kind}", model, rows, *flags_of(name, files), *more)
    job("fp64", "sharded then plain", f"{folder}/three updates sharded", "all", *NEXT)
    job("fp64", "plain then sharded", f"{folder}/three updates plain", "all", *NEXT, "--shard")
    job("fp64", "refused", model, "all", "--updates", 2, "--lr", 1e300)
    code, stderr = finish(start(folder, request.param, "train", jobs), 600)
    assert os.path.exists(f"{folder}/plain then sharded"), stderr  # the last one that is to succeed
    return types.SimpleNamespace(folder=folder, code=code, stderr=stderr)


def test_ranks_and_shards_give_the_gradient_of_one_process(ranks, model, files, tmp_path, fp64):
    """Also where a rank has fewer rows than the others, or none, or none to rehearse: weights,
    moments and metrics, plain and sharded."""
    for name, (rows, _) in CASES.items():
        one = run(model, files[rows], tmp_path / name, *flags_of(name, files))
        for kind in KINDS:
            same_round(Round(f"{ranks.folder}/{name} {kind}"), one)
        if name == "three updates":
            after = run(one.folder, files["all"], tmp_path / "after", *NEXT)
            assert after.step == 5 and len(after.metrics) == 5
            for order in "sharded then plain", "plain then sharded":
                same_round(Round(f"{ranks.folder}/{order}"), after)


def tensors_of(folder, stem):
    files = glob.glob(f"{folder}/{stem}*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}, len(files)


def test_shards_in_one_file_and_in_many(ranks):
    """The same bits are written and read, with an index; nothing is left of the ranks' parts."""
    for one, many in ("fp32 sharded", "many files"), ("after fp32 sharded", "after many files"):
        for stem in "model", "optimizer":
            expected, files = tensors_of(f"{ranks.folder}/{one}", stem)
            found, parts = tensors_of(f"{ranks.folder}/{many}", stem)
            assert files == 1 and (parts > 1) == (many == "many files")
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in expected)
    folder = f"{ranks.folder}/many files"
    assert all(os.path.isfile(f"{folder}/{name}") for name in os.listdir(folder))
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    weights = tensors_of(folder, "model")[0]
    assert all(torch.equal(loaded[name], weight) for name, weight in weights.items())


def test_ranks_in_fp32_also_of_a_model_that_its_config_ties_and_its_files_do_not(
        ranks, model, files, tmp_path):
    """The gradient to 1e-6; after Adam 99.9 % of the weights within 1e-6, none further than a tenth
    of a step. Where the files are not tied, the model that they hold is trained."""
    flags, lr, untied = flags_of("one update", files), 1e-3, f"{ranks.folder}/untied"
    ones = {source: run(source, files["all"], tmp_path / os.path.basename(source), *flags)
            for source in (model, untied)}
    assert "lm_head.weight" in ones[untied].weights
    for name, one in (("fp32 plain", ones[model]), ("fp32 sharded", ones[model]),
                      ("untied sharded", ones[untied])):
        many = Round(f"{ranks.folder}/{name}")
        assert distance(many.gradient, one.gradient) < 1e-6
        apart = torch.cat([(many.weights[name] - one.weights[name]).abs().flatten()
                           for name in one.weights])
        assert (apart < 1e-6).float().mean() > 0.999 and apart.max() < 0.1 * lr
        assert all(weight.dtype == torch.float32 for weight in many.weights.values())
        assert sorted(os.listdir(many.folder)) == sorted(os.listdir(one.folder))
    config = json.loads(pathlib.Path(many.folder, "config.json").read_text())
    assert config["tie_word_embeddings"] is False


def test_ranks_refuse_a_step_that_is_not_finite_together(ranks):
    """The last of the rounds: rank 0 says it in one line, all end with exit 3, nothing is
    published."""
    assert ranks.code != 0
    assert len(re.findall(r"train\.py: error: step 2: .* is refused", ranks.stderr)) == 1
    assert re.findall(r"exitcode  : (\d+)", ranks.stderr).count("3") >= 1
    assert "[rank" not in ranks.stderr
    assert not os.path.exists(f"{ranks.folder}/refused")
    assert os.path.exists(f"{ranks.folder}/refused.refused.jsonl")


def test_a_decoder_without_layers_is_not_sharded(capsys):
    policy = types.SimpleNamespace(model=types.SimpleNamespace(get_decoder=torch.nn.Module))
    line = refusal(capsys, train.over_ranks, policy, "cpu", 2, True)
    assert "--shard: unsupported architecture" in line


@pytest.mark.slow
def test_the_memory_of_the_largest_of_four_ranks(tmp_path, monkeypatch):
    """110M parameters, two updates; a key projection with fewer rows than there are ranks."""
    peaks, source = {}, make_model(
        tmp_path / "model", 0, vocab_size=32_000, hidden_size=768, num_hidden_layers=12,
        num_attention_heads=12, num_key_value_heads=1, head_dim=2, intermediate_size=3072,
        max_position_embeddings=128)
    rows = write(tmp_path / "scored.jsonl", [
        {"id": f"{group}", "sample": k, "prompt_ids": [3 + group] * 32,
         "completion_ids": [2 + (group + k + i) % 11 for i in range(60)], "logprobs": [-1.0] * 60,
         "finish_reason": "stop", "correct": k % 2 == 0, "reward": 1.0 - k % 2}
        for group in range(4) for k in range(4)])
    # glibc keeps freed blocks; with a fixed threshold what a tensor took is given back.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    for ranks in (1, 4):
        os.mkdir(folder := tmp_path / f"peaks-{ranks}")
        monkeypatch.setenv("PEAKS", str(folder))
        launch(ranks, "train", tmp_path / f"out-{ranks}", "--model", source, "--rollouts", rows,
               "--updates", 2, "--micro-batch-tokens", 512, "--device", "cpu", "--shard",
               "--method", "grpo")
        peaks[ranks] = max(int(path.read_text()) for path in folder.iterdir())
    print(f"peaks of 1 and 4 ranks: {peaks} KiB")
    assert peaks[4] <= 0.40 * peaks[1]  # 0.38 when this was written
    one, four = (tensors_of(tmp_path / f"out-{ranks}", "model")[0] for ranks in (1, 4))
    assert distance(four, one) < 1e-5


# ---- Faults --------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("stage, more", [("train", []), ("train", ["--shard"]), ("generate", [])])
def test_faults_of_one_of_four_ranks_are_one_line_and_undone(stage, more, model, rollouts,
                                                             tiny_model, prompts, tmp_path):
    """Rank 1 is killed, stopped or raises in the middle: torchrun ends by itself (a stopped rank
    costs --rank-timeout, 15 s, and torchrun's 30 s), the others say in a line of ours what
    happened, without a traceback, and nothing has the final name. The same command then makes it:
    train.py does the round again; of generate.py what the others finished is kept."""
    flags, ranks, stopped, names = {
        "train": (["--model", model, "--rollouts", rollouts, "--updates", 2, "--lr", 0.01,
                   "--micro-batch-tokens", 20, *more], 4, "did not answer in 15 s",
                  ["model.safetensors", "optimizer.safetensors"]),
        "generate": (["--model", tiny_model, "--prompts", prompts, "--n", 4, "--max-new-tokens", 12,
                      "--max-batch-tokens", 100], 1, "did not come from the other ranks in 15 s",
                     [""])}[stage]
    flags += ["--rank-timeout", 15]
    launch(ranks, stage, tmp_path / "undisturbed", *flags)
    for kind in "kill", "stop", "raise":
        out, says = tmp_path / kind, stopped if kind == "stop" else "another rank ended|terminated"
        jobs = [("fp32", [*flags, "--out", out])]
        code, stderr = finish(start(tmp_path, 4, stage, jobs, f"{kind},1,2"))
        lines = re.findall(rf"^{stage}\.py: error: .*$", stderr, re.MULTILINE)
        assert code != 0 and any(re.search(says, line) for line in lines), stderr
        assert all("; the same command " in line for line in lines), stderr
        tracebacks = set(re.findall(r"^\[rank(\d)\]:", stderr, re.MULTILINE))
        assert tracebacks <= ({"1"} if kind == "raise" else set()), stderr
        assert not os.path.exists(out) and not os.path.exists(f"{out}.meta.json")
        launch(4, stage, out, *flags)
        assert not os.path.exists(f"{out}.partial")
        for name in names:
            assert (out / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes(), kind


def test_a_rank_waits_for_rank_0_not_for_ever_and_hashes_no_input(model, rollouts, tmp_path,
                                                                  monkeypatch, capsys):
    """Then it reads its rows and goes on to the meeting of the ranks, without a digest."""
    set_rank(monkeypatch, 1)
    args = arguments(model, rollouts, tmp_path / "out", "--rank-timeout", 0.1)
    assert "rank 1: rank 0 did not start" in refusal(capsys, train.main, args, code=4)
    os.mkdir(tmp_path / "out.partial")  # rank 0 has claimed it
    monkeypatch.setattr(train, "start_ranks", lambda *args: 1 / 0)
    for name in "describe", "claim_empty":
        monkeypatch.setattr(train, name, None)
    with pytest.raises(ZeroDivisionError):
        train.train(args)


# ---- Two nodes -----------------------------------------------------------------------------------
def two_nodes(folder, ranks, *flags):
    """(exit code, stderr) of two torchruns that meet on this machine's loopback."""
    options = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint",
               f"127.0.0.1:{free_ports(1)[0]}", "--rdzv-id", "round"]
    nodes = [start(str(folder), ranks, "train", [("fp32", flags)], options=options) for _ in "ab"]
    return [finish(node) for node in nodes]


@pytest.mark.slow
@pytest.mark.parametrize("each, more", [(1, []), (2, []), (2, ["--shard"])],
                         ids=["one each", "plain", "sharded"])
def test_two_nodes_on_loopback(each, more, model, rollouts, tmp_path):
    """The gradient of one process."""
    for code, stderr in two_nodes(tmp_path, each, "--model", model, "--rollouts", rollouts, "--out",
                                  tmp_path / "two", *ONE.split(), *more):
        assert code == 0, stderr
    one, two = run(model, rollouts, tmp_path / "one", *ONE.split()), Round(tmp_path / "two")
    assert two.meta["world_size"] == 2 * each and distance(two.gradient, one.gradient) < 1e-6


@pytest.mark.slow
def test_bad_input_ends_both_nodes(model, rollouts, tmp_path):
    """Rank 0 says what is wrong; the ranks of the other node do not wait for it for ever."""
    nodes = two_nodes(tmp_path, 2, "--model", model, "--rollouts", rollouts, "--out",
                      tmp_path / "out", "--updates", 8, "--rank-timeout", 15)
    assert all(code != 0 for code, _ in nodes)
    assert sum(stderr.count("--updates 8 is more than the 7 groups") for _, stderr in nodes) == 1
