"""evaluate.py: estimators against exact values, intervals against a loop, files against hand-counted figures."""
import array
import itertools
import json
import math
import os
import random
import subprocess
import sys
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest

import evaluate
from data.files import run


def row(key, sample, correct, **more):
    return {"id": key, "task": "countdown", "numbers": [1, 2], "target": 3, "n_solutions": 4, "sample": sample,
            "completion": "1+2", "prompt_ids": [1, 2], "completion_ids": [1, 2, 3], "logprobs": [-0.1, -0.2, -0.3],
            "finish_reason": "stop", "pred": "1+2", "correct": correct, "reason": "ok" if correct else "value",
            "solution": f"s{sample % 2}" if correct else None, "reward": float(correct), **more}


def write(path, rows, sampling=None):
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    if sampling:
        (path.parent / (path.name + ".meta.json")).write_text(json.dumps({"sampling": sampling}))
    return str(path)


def random_rows(seed, problems=30, n=16, skill=0.0):
    """Problems of very unequal difficulty, the same problems for each seed."""
    rng = random.Random(seed)
    return [row(f"p{p:03d}", s, rng.random() < min(1, p / problems / 2 + skill))
            for p in range(problems) for s in range(n)]


def main(*argv):
    args = evaluate.parse_args([str(one) for one in argv])
    run(evaluate.main, args)


def report(tmp_path, *argv):
    out = tmp_path / "eval.json"
    out.unlink(missing_ok=True)
    main("--out", out, "--resamples", 500, *argv)
    return json.loads(out.read_text())


def refused(capsys, *argv):
    """The one line on stderr of a call that must end with exit code 2."""
    with pytest.raises(SystemExit) as end:
        main(*argv)
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1 and err.startswith("evaluate.py: error: ")
    return err


# ---- The estimator ----------------------------------------------------------------------------------------------------
def test_equals_the_share_of_subsets_with_a_correct_sample():
    for n in range(1, 9):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
            assert evaluate.pass_at_k(n, k)[c] == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-14)


@pytest.mark.parametrize("n, k", [(256, 1), (256, 2), (256, 255), (256, 256), (1024, 100)])
def test_product_form_is_exact_at_large_n(n, k):
    exact = [float(1 - Fraction(math.comb(n - c, k), math.comb(n, k))) for c in range(n + 1)]
    np.testing.assert_allclose(evaluate.pass_at_k(n, k), exact, rtol=0, atol=1e-12)


def test_equals_the_textbook_formula_for_all_counts_up_to_64():
    """1 - C(n-c, k) / C(n, k), the estimator of Chen et al. 2021 as human-eval has it, in whole numbers."""
    for n in range(1, 65):
        for k in range(1, n + 1):
            textbook = [1 - math.comb(n - c, k) / math.comb(n, k) for c in range(n + 1)]
            np.testing.assert_allclose(evaluate.pass_at_k(n, k), textbook, rtol=0, atol=1e-13)


def test_unbiased_where_the_plug_in_is_not():
    n, k, p = 16, 8, 0.1
    chance = np.array([math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)])
    truth = 1 - (1 - p) ** k
    assert chance @ evaluate.pass_at_k(n, k) == pytest.approx(truth, abs=1e-12)
    assert chance @ (1 - (1 - np.arange(n + 1) / n) ** k) < truth - 0.05


def test_k_above_n_is_an_error(tmp_path, capsys):
    with pytest.raises(ValueError, match="k = 5"):
        evaluate.pass_at_k(4, 5)
    scored = write(tmp_path / "a.jsonl", [row("p", s, True) for s in range(4)])
    assert "k = 8 needs 8 samples a problem, but n is 4" in refused(capsys, scored, "--k", 1, 8)


def test_majority_vote():
    def votes(*answers):    # upper case: correct; None: no answer
        return array.array("q", [0 if one is None else ord(one.lower()) << 1 | one.isupper() for one in answers])

    assert evaluate.majority_at_k(votes("A", "A", "b"), 3) == 1
    assert evaluate.majority_at_k(votes("A", "b", "b"), 3) == 0
    assert evaluate.majority_at_k(votes("A", "b", None), 3) == 0.5               # a tie is shared
    assert evaluate.majority_at_k(votes(None, None, "A"), 3) == 1                # no answer, no vote
    assert evaluate.majority_at_k(votes(None, None), 2) == 0
    assert evaluate.majority_at_k(votes("A", "A", "b", "b", "A"), 2) == 0.5      # two blocks; the fifth is left out
    assert evaluate.majority_at_k(votes("A", "a", "b"), 3) == 0.5                # one text judged both ways: its share
    assert evaluate.majority_at_k(votes("A", "b", None, "C"), 1) == 0.5          # maj@1 is Pass@1


# ---- Intervals --------------------------------------------------------------------------------------------------------
def test_bootstrap_equals_a_loop():
    columns = np.random.default_rng(1).random((7, 3))
    rng = np.random.default_rng(5)
    loop = [np.mean([columns[i] for i in rng.integers(7, size=7)], axis=0) for _ in range(40)]
    np.testing.assert_allclose(evaluate.bootstrap(columns, 40, np.random.default_rng(5)), loop, atol=1e-14)


def test_bootstrap_does_not_depend_on_its_chunks():
    columns = np.random.default_rng(1).random((3000, 2))     # 349 resamples a chunk
    rng = np.random.default_rng(5)
    loop = [columns[rng.integers(3000, size=3000)].mean(axis=0) for _ in range(800)]
    np.testing.assert_allclose(evaluate.bootstrap(columns, 800, np.random.default_rng(5)), loop, atol=1e-13)


def test_interval_covers_the_truth():
    """Problems with p ~ Beta(1, 2), whose mean Pass@4 is known: 95 % intervals hold it in about 95 of 100 data sets."""
    rng, n, k = np.random.default_rng(0), 8, 4
    truth, held = 1 - 2 / (k + 2), 0
    for _ in range(200):
        values = evaluate.pass_at_k(n, k)[rng.binomial(n, rng.beta(1, 2, size=60))]
        low, high = np.quantile(evaluate.bootstrap(values[:, None], 1000, rng), [0.025, 0.975])
        held += low <= truth <= high
    assert 180 <= held <= 198


def test_differences_are_paired(tmp_path):
    """Problems differ far more than runs do, so the paired interval is much narrower than the two intervals apart."""
    base, better = random_rows(1, problems=60, n=64), random_rows(2, problems=60, n=64, skill=0.1)
    first, second = write(tmp_path / "a.jsonl", base), write(tmp_path / "b.jsonl", better)
    a, b = report(tmp_path, first, second, "--resamples", 5000)["runs"]
    one, two = a["pass_at_k"]["1"], b["pass_at_k"]["1"]
    assert two["diff"] == pytest.approx(two["value"] - one["value"], abs=1e-12)
    assert two["diff_low"] <= two["diff"] <= two["diff_high"]
    assert two["diff_high"] - two["diff_low"] < 0.5 * math.hypot(one["high"] - one["low"], two["high"] - two["low"])
    assert [one[key] for key in ("diff", "diff_low", "diff_high")] == [0, 0, 0]
    counts = [np.array([sum(r["correct"] for r in rows if r["id"] == f"p{p:03d}") for p in range(60)]) / 64
              for rows in (base, better)]
    for values, width in ((counts[0], one["high"] - one["low"]), (counts[1], two["high"] - two["low"]),
                          (counts[1] - counts[0], two["diff_high"] - two["diff_low"])):
        assert width == pytest.approx(2 * 1.96 * np.std(values) / math.sqrt(60), rel=0.08)
    # The interval of a run is the same in whatever company it stands.
    alone = report(tmp_path, second, "--resamples", 5000)["runs"][0]["pass_at_k"]["4"]
    assert alone["low"] == pytest.approx(b["pass_at_k"]["4"]["low"], abs=1e-12)


def test_other_problems_are_refused(tmp_path, capsys):
    a = write(tmp_path / "a.jsonl", [row("p", 0, True), row("q", 0, True)])
    b = write(tmp_path / "b.jsonl", [row("p", 0, True)])
    for files in ((a, b), (b, a)):
        assert f"{b}: problem 'q' is missing, which {a} has" in refused(capsys, *files)
    c = write(tmp_path / "c.jsonl", [row("p", 0, True, target=5), row("q", 0, True)])
    assert f"{c}: 'p' is another problem than in {a}" in refused(capsys, a, c)


def test_problems_that_are_all_alike_are_no_certainty(tmp_path):
    """Clopper and Pearson's bound for 0 of 30 is 0.1157, in every table; a run is exactly equal to itself alone."""
    share = 1 - 0.025 ** (1 / 30)
    assert share == pytest.approx(0.1157, abs=5e-5)
    files = [write(tmp_path / f"{c}.jsonl", [row(f"p{p}", s, s < c) for p in range(30) for s in range(4)]) for c in (0, 4, 2)]
    none, every, half = (run["pass_at_k"]["1"] for run in report(tmp_path, *files)["runs"])
    expected = {"value": 0, "low": 0, "high": share, "diff": 0, "diff_low": 0, "diff_high": 0}
    assert none == pytest.approx(expected)
    assert every == pytest.approx({"value": 1, "low": 1 - share, "high": 1, "diff": 1, "diff_low": 1 - 2 * share, "diff_high": 1})
    assert half == pytest.approx({"value": 0.5, "low": 0.5 - share / 2, "high": 0.5 + share / 2, "diff": 0.5,
                                  "diff_low": 0.5 - 1.5 * share, "diff_high": 0.5 + share / 2})
    # One problem that differs, and the bootstrap speaks.
    rows = [row(f"p{p}", s, p == 0) for p in range(30) for s in range(4)]
    cell = report(tmp_path, write(tmp_path / "a.jsonl", rows), "--resamples", 10_000)["runs"][0]["pass_at_k"]["1"]
    assert cell["low"] == 0 and cell["high"] == pytest.approx(0.1)


def test_an_interval_of_hopeless_problems_holds_the_truth():
    """One problem in fifty is solvable: of 30 drawn, all or nearly all fail, and the interval must still hold 0.02."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(300):
        column = (rng.random((30, 1)) < 0.02).astype(float)
        low, high = np.quantile(evaluate.bootstrap(column, 500, rng), [0.025, 0.975])
        below, above = evaluate.unlike(column, 0, 1)
        held += low - below <= 0.02 <= high + above
    assert held >= 285


def test_more_solutions_than_exist_are_refused(tmp_path, capsys):
    rows = [row("p", s, True, solution=f"s{s}", n_solutions=3) for s in range(4)]
    scored = write(tmp_path / "a.jsonl", [{**one, "id": "o"} for one in rows[:3]] + [{**rows[3], "id": "o", "solution": "s0"}] + rows)
    assert (f"{scored}: problem 'p' has 4 different correct solutions, more than its n_solutions, 3; mend or delete that field"
            in refused(capsys, scored))
    for rows in ([{**one, "n_solutions": None} for one in rows], rows[:3]):
        run = report(tmp_path, write(tmp_path / "a.jsonl", rows))["runs"][0]
        assert run["distinct"] == len(rows) and run["solution_coverage"] == (1.0 if len(rows) == 3 else None)


@pytest.mark.parametrize("n_solutions", [None, 4])
def test_the_data_s_own_solution_was_not_found_by_the_model(tmp_path, n_solutions):
    """A task of one's own may carry a worked-out `solution`; only some verifiers write there what they found."""
    rows = [row("p", s, True, task="reverse", solution=["worked", "out"], n_solutions=n_solutions) for s in range(2)]
    run = report(tmp_path, write(tmp_path / "a.jsonl", rows))["runs"][0]
    assert run["distinct"] is None and run["solution_coverage"] is None
    assert run["pass_at_k"]["1"]["value"] == 1


def test_solutions_of_a_task_that_is_named_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "WITH_SOLUTIONS", ("countdown", "reverse"))
    rows = [row("p", s, s < 3, task="reverse") for s in range(4)]
    run = report(tmp_path, write(tmp_path / "a.jsonl", rows))["runs"][0]
    assert run["distinct"] == 2 and run["solution_coverage"] == 0.5


def test_every_row_of_an_id_is_the_same_problem(tmp_path, capsys):
    """Not the first alone: four problems under one id would be one problem of four samples."""
    for other in ({"target": 5}, {"numbers": [1, 4]}, {"prompt": "3 4"}, {"messages": [{"role": "user", "content": "?"}]},
                  {"source": "b"}, {"answer": "7"}, {"n_solutions": 5}, {"task": "math"}):
        mixed = write(tmp_path / "a.jsonl", [row("p", 0, True), row("q", 0, True), row("q", 1, False), row("p", 1, True, **other)])
        assert f"{mixed}:4: 'p' is another problem than in the rows above" in refused(capsys, mixed)
    # Another file may pose the same problem in other words.
    a, b = (write(tmp_path / f"{name}.jsonl", [row("p", 0, True, prompt=name)]) for name in "ab")
    main(a, b)


# ---- What is counted -------------------------------------------------------------------------------------------------
def test_hand_counted_file(tmp_path):
    rows = [row("p", 0, True), row("p", 1, True), row("p", 2, True, completion_ids=[1] * 7),
            row("p", 3, False, finish_reason="length"),
            row("q", 0, False), row("q", 1, False), row("q", 2, False), row("q", 3, False, n_solutions=4)]
    sampling = {"temperature": 1.0, "top_p": 1.0}
    result = report(tmp_path, write(tmp_path / "a.jsonl", rows, sampling), "--k", 2, 1, 2)
    run = result["runs"][0]
    assert result["reference"] == "a" and result["k"] == [1, 2] and result["resamples"] == 500
    assert {key: run[key] for key in run if key != "pass_at_k"} == {
        "name": "a", "file": str(tmp_path / "a.jsonl"), "n": 4, "sampling": sampling, "problems": 2,
        "maj_at_k": None, "distinct": 1.0, "solution_coverage": 0.25, "truncated_frac": 0.125, "completion_len": 3.5,
        "samples_to_match": 2}      # c = 3 of 4: any two samples hold a correct one, so Pass@2 is Pass@4
    assert {k: cell["value"] for k, cell in run["pass_at_k"].items()} == {"1": 0.375, "2": 0.5}
    assert run["pass_at_k"]["1"]["low"] == 0 and run["pass_at_k"]["1"]["high"] == 0.75


def test_default_k_and_unrounded_figures(tmp_path):
    rows = [row(f"p{p}", s, s < p) for p in range(3) for s in range(12)]
    run = report(tmp_path, write(tmp_path / "a.jsonl", rows))["runs"][0]
    assert list(run["pass_at_k"]) == ["1", "2", "4", "8"]
    assert run["pass_at_k"]["1"]["value"] == pytest.approx(3 / 36, abs=1e-15)


def test_samples_to_match(tmp_path):
    """The run with c = 2 of 4 reaches the reference's Pass@4 = 1 at k = 3, a worse one never."""
    files = [write(tmp_path / f"{c}.jsonl", [row(key, s, key == "p" and s < c) for key in "pq" for s in range(4)])
             for c in (1, 2, 0)]
    assert [run["samples_to_match"] for run in report(tmp_path, *files)["runs"]] == [4, 3, None]


def test_rewards_are_not_read(tmp_path):
    rows = random_rows(3)
    plain = report(tmp_path, write(tmp_path / "a.jsonl", rows))
    shaped = [{**one, "reward": 0.1 if not one["correct"] else -one["reward"]} for one in rows]
    shuffled = random.Random(0).sample(rows, len(rows))
    for same in (shaped, shuffled):
        assert report(tmp_path, write(tmp_path / "a.jsonl", same)) == plain


def test_maths_rows(tmp_path):
    answers = {"p": "7779", "q": "3 55"}     # a blank: no answer; 7 and 5 are correct
    rows = [row(key, s, text in "75", task="math", solution="worked out", n_solutions=None, pred=text.strip() or None)
            for key, texts in answers.items() for s, text in enumerate(texts)]
    run = report(tmp_path, write(tmp_path / "a.jsonl", rows))["runs"][0]
    assert {k: cell["value"] for k, cell in run["maj_at_k"].items()} == {"1": 0.625, "2": (0.75 + 0.5) / 2, "4": 1.0}
    assert run["maj_at_k"]["1"] == run["pass_at_k"]["1"]
    assert run["distinct"] is None and run["solution_coverage"] is None


def test_sources_and_their_mean(tmp_path):
    easy = [row(f"e{p}", s, s < 4, source="easy") for p in range(10) for s in range(4)]
    hard = [row(f"h{p}", s, s < p, source="hard") for p in range(3) for s in range(4)]
    run = report(tmp_path, write(tmp_path / "a.jsonl", easy + hard))["runs"][0]
    assert run["problems"] == 13 and [run["sources"][name]["problems"] for name in ("easy", "hard")] == [10, 3]
    assert run["sources"]["hard"]["pass_at_k"]["1"]["value"] == pytest.approx(0.25)
    assert run["pass_at_k"]["1"]["value"] == pytest.approx((1 + 0.25) / 2)       # not (40 + 3) / 52
    width, hard_width = (cell["high"] - cell["low"] for cell in (
        one["pass_at_k"]["1"] for one in (run, run["sources"]["hard"])))
    assert width == pytest.approx(hard_width / 2 + (1 - 0.025 ** (1 / 10)) / 2)  # the ten easy ones are all alike
    alone = report(tmp_path, write(tmp_path / "a.jsonl", hard))["runs"][0]
    twin = [{**one, "id": one["id"] + "'", "source": "twin"} for one in hard]
    both = report(tmp_path, write(tmp_path / "a.jsonl", hard + twin), "--resamples", 5000)["runs"][0]
    draws = [part["pass_at_k"]["1"] for part in (both, both["sources"]["hard"])]
    assert draws[0]["high"] - draws[0]["low"] < 0.85 * (draws[1]["high"] - draws[1]["low"])    # drawn independently
    assert alone["sources"]["hard"] == run["sources"]["hard"]
    assert alone["pass_at_k"] == run["sources"]["hard"]["pass_at_k"]


def test_same_seed_same_file_another_seed_other_intervals(tmp_path):
    scored = write(tmp_path / "a.jsonl", random_rows(3))
    first, again, other = report(tmp_path, scored), report(tmp_path, scored), report(tmp_path, scored, "--seed", 1)
    assert first == again
    one, two = (result["runs"][0]["pass_at_k"]["4"] for result in (first, other))
    assert one["value"] == two["value"] and one["low"] != two["low"] == pytest.approx(one["low"], abs=0.05)


# ---- Terminal, files, figures ----------------------------------------------------------------------------------------
def test_table(tmp_path, capsys):
    base, grpo = write(tmp_path / "a.jsonl", random_rows(1)), write(tmp_path / "b.jsonl", random_rows(2, skill=0.2))
    main(base, grpo, "--names", "base", "--names", "grpo", "--k", 1, "--k", 16)  # a flag given again adds to it
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("30 problems, n 16") and lines[2].split("   ")[-1].strip() == "grpo - base"
    assert [line.split()[0] for line in lines[3:]] == [
        "pass@1", "pass@16", "distinct", "solution_coverage", "truncated_frac", "completion_len", "samples_to_match"]
    assert lines[3].count("[") == 3 and lines[3].count("+") == 3


def test_nobody_need_read_the_table(tmp_path):
    """evaluate.py ... | head: quiet, and exit 0, wherever the reader stops; here it is gone before the first line."""
    scored, out = write(tmp_path / "a.jsonl", random_rows(1)), tmp_path / "eval.json"
    read, written = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "evaluate.py", scored, "--out", str(out), "--resamples", "9"], stdout=written,
                          stderr=subprocess.PIPE, text=True)
    os.close(written)
    assert (done.returncode, [line for line in done.stderr.splitlines() if "rows" not in line]) == (0, []) and out.exists()


def test_other_sampling_settings_are_told(tmp_path, capsys):
    alike = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}
    a = write(tmp_path / "a.jsonl", random_rows(1), alike)
    b = write(tmp_path / "b.jsonl", random_rows(2), alike)
    main(a, b)
    assert capsys.readouterr().err == ""
    for other in (write(tmp_path / "c.jsonl", random_rows(2), {**alike, "temperature": 0.7}),
                  write(tmp_path / "d.jsonl", random_rows(2)),
                  write(tmp_path / "e.jsonl", random_rows(2, n=8), alike)):
        main(a, b, other)
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "warning: the runs were not sampled alike" in err


def test_complete_output_is_printed_again_and_left_alone(tmp_path, capsys):
    scored, out = write(tmp_path / "a.jsonl", random_rows(1)), tmp_path / "eval.json"
    main(scored, "--out", out)
    table, before = capsys.readouterr().out, out.stat()
    main(scored, "--out", out, "--plot", tmp_path / "p.png")
    after = capsys.readouterr()
    assert after.out == table and "complete, left alone" in after.err
    assert (out.stat().st_ino, out.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert (tmp_path / "p.png").exists()
    meta = json.loads((tmp_path / "eval.json.meta.json").read_text())
    assert meta["stage"] == "evaluate.py" and meta["flags"]["seed"] == 0 and len(meta["inputs"][scored]) == 64
    assert "made with other seed" in refused(capsys, scored, "--out", out, "--seed", 1)
    write(tmp_path / "a.jsonl", random_rows(2))
    assert "made with other inputs" in refused(capsys, scored, "--out", out)


def drawn(monkeypatch):
    """The figures that are saved, kept for a look at what is in them."""
    kept, save = [], evaluate.save
    monkeypatch.setattr(evaluate, "save", lambda figure, path: (kept.append(figure), save(figure, path)))
    return kept


def png_size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) > 10_000
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def test_figure_has_the_base_on_the_same_axes(tmp_path, monkeypatch, capsys):
    files = [write(tmp_path / f"{name}.jsonl", random_rows(len(name))) for name in ("base", "grpo", "ds-grpo")]
    kept = drawn(monkeypatch)
    main(*files, "--plot", tmp_path / "p.png")
    assert png_size(tmp_path / "p.png") == (1880, 720)
    for axis in kept[0].axes:
        assert [line.get_label() for line in axis.lines] == ["base", "grpo", "ds-grpo"] and len(axis.collections) == 3
        assert axis.get_xscale() == "log"
        assert [tick.get_text() for tick in axis.get_xticklabels()] == ["1", "2", "4", "8", "16"]
    assert kept[0].get_supxlabel() == "k  (30 problems, n = 16; bands: 95 % over problems)"
    files.append(write(tmp_path / "half.jsonl", random_rows(2, n=8)))
    main(*files, "--plot", tmp_path / "p.png")
    assert "n = 16, 8;" in kept[1].get_supxlabel()
    assert "30 problems, n 16 | n 8; [95 % interval over problems]\n" in capsys.readouterr().out
    main(files[0], "--plot", tmp_path / "one.svg", "--k", 1)
    assert (tmp_path / "one.svg").read_text().lstrip().startswith("<?xml")
    assert not list(tmp_path.glob("*.partial"))


def metrics(updates):
    return [{"step": step + 1, "pass@1": 0.2 + 0.001 * step, "entropy": 1 / (step + 1),
             "entropy_correct": None if step % 3 else 0.4, "entropy_wrong": 0.6, "completion_len": 11, "grad_norm": 0.5,
             "more": [1]} for step in range(updates)]


def test_training_curves(tmp_path, monkeypatch, capsys):
    kept = drawn(monkeypatch)
    for number, updates in ((999, 4), (1000, 8), (1001, None)):     # the newest that holds metrics counts; 1000 > 999
        folder = tmp_path / "run" / f"round-{number:03d}"
        folder.mkdir(parents=True)
        if updates:
            write(folder / "metrics.jsonl", metrics(updates))
    (tmp_path / "run" / "round-2000.partial").mkdir()
    folder = tmp_path / "run" / "round-999"
    for source, updates in ((tmp_path / "run", 8), (folder, 4), (folder / "metrics.jsonl", 4)):
        main("--training", source, "--plot", tmp_path / "t.png")
        assert png_size(tmp_path / "t.png") == (1880, 1080)
        assert [len(axis.lines) for axis in kept[-1].axes] == [2, 2, 6, 2]     # each update, and the running mean
        assert all(len(line.get_xdata()) == updates for axis in kept[-1].axes for line in axis.lines)
    assert "no metrics.jsonl here" in refused(capsys, "--training", tmp_path, "--plot", tmp_path / "t.png")
    write(folder / "metrics.jsonl", [{"step": 1}])
    told = refused(capsys, "--training", folder, "--plot", tmp_path / "t.png")
    assert "metrics.jsonl:1: missing field 'pass@1'" in told


@pytest.mark.parametrize("change, told", [
    *(({name: None}, f"missing field '{name}'") for name in
      ("id", "sample", "task", "correct", "finish_reason", "completion_ids", "solution")),
    ({"correct": 1}, "field 'correct': Expected bool, got int"), ({"sample": True}, "field 'sample': Expected int"),
    ({"sample": -1}, "field 'sample': Expected int >= 0"), ({"sample": 10**9}, "field 'sample': Expected int <= 1048575"),
    ({"id": 3}, "field 'id': Expected str, got int"), ({"completion_ids": 3}, "field 'completion_ids': Expected array"),
    ({"solution": 5}, "field 'solution': Expected str, got 5"), ({"finish_reason": "eos"}, "field 'finish_reason': "),
    ({"n_solutions": "2"}, "field 'n_solutions': Expected int | null"), ({"source": 1}, "field 'source': Expected str"),
])
def test_bad_rows_are_named(tmp_path, capsys, change, told):
    bad = {key: value for key, value in {**row("q", 0, True), **change}.items() if value is not None}
    scored = write(tmp_path / "a.jsonl", [row("p", 0, True), bad])
    assert f"{scored}:2: {told}" in refused(capsys, scored)


def test_bad_files_are_named(tmp_path, capsys):
    assert "nowhere.jsonl: No such file" in refused(capsys, tmp_path / "nowhere.jsonl")
    assert "no rows in this file" in refused(capsys, write(tmp_path / "a.jsonl", []))
    twice = write(tmp_path / "b.jsonl", [row("p", 0, True), row("p", 0, True)])
    assert f"{twice}:2: sample 0 of problem 'p' stands twice" in refused(capsys, twice)
    ragged = write(tmp_path / "c.jsonl", [row("p", 0, True), row("p", 1, True), row("q", 0, True)])
    assert f"{ragged}: problem 'q' has 1 samples but 'p' has 2" in refused(capsys, ragged)
    torn = tmp_path / "d.jsonl"
    torn.write_text(json.dumps(row("p", 0, True)) + "\n" + json.dumps(row("p", 1, True))[:40])
    assert f"{torn}:2: not a valid JSON row" in refused(capsys, torn)


@pytest.mark.parametrize("argv, told", [
    ([], "give one or more SCORED.jsonl"), (["--plot", "c.png"], "give one or more SCORED.jsonl"),
    (["--training", "b"], "--training RUN goes with --plot FILE.png"), (["a", "--training", "b", "--plot", "c.png"], "and nothing else"),
    *((["--training", "b", "--plot", "c.png", *flag], "and nothing else")
      for flag in (["--out", "d"], ["--k", "1"], ["--names", "x"], ["--resamples", "9"], ["--seed", "0"])),
    (["a", "b", "--names", "x"], "2 different names"), (["a", "b", "--names", "x", "x"], "2 different names"),
    (["x/a.jsonl", "y/a.jsonl"], "2 different names"), (["a", "--k", "0"], "0 is below 1"),
    (["a", "--k", "x"], "invalid"),
    (["a", "--plot", "p.bmp"], "must end in .png"), (["a", "--seed", "-1"], "below 0"),
    (["a", "--resamples", "0"], "0 is below 1"), (["a", "--no-such-flag"], "unrecognized"),
])
def test_wrong_flags_take_one_line(capsys, argv, told):
    assert told in refused(capsys, *argv)


def test_memory_grows_with_problems_and_not_with_rows(tmp_path):
    peaks = []
    for n in (50, 1000):
        scored = write(tmp_path / f"{n}.jsonl", [row(f"p{p}", s, s % 3 == 0) for s in range(n) for p in range(10)])
        tracemalloc.start()
        evaluate.read_problems(scored)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 20_000      # 9,500 more rows of 400 bytes


def test_neither_torch_nor_matplotlib_is_imported():
    code = ("import sys, evaluate\n"
            "evaluate.parse_args(['a.jsonl'])\n"
            "print([name for name in ('torch', 'transformers', 'matplotlib') if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    shown = subprocess.run([sys.executable, "evaluate.py", "--help"], capture_output=True, text=True, check=True).stdout
    assert all(flag in shown for flag in ("--names", "--k", "--out", "--plot", "--training", "--resamples", "--seed"))
