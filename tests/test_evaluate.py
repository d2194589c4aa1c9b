"""evaluate.py: estimators and intervals against closed forms, files against counts by hand."""
import array
import json
import math
import os
import random
import tracemalloc
from fractions import Fraction

import interval_coverage
import numpy as np
import pytest

import evaluate
from conftest import meta_of, refusal, write
from data.files import run


def row(key, sample, correct, **more):
    return {"id": key, "task": "countdown", "numbers": [1, 2], "target": 3, "n_solutions": 4,
            "sample": sample, "completion_ids": [1, 2, 3], "finish_reason": "stop",
            "correct": correct, "solution": f"s{sample % 2}" if correct else None,
            "reward": float(correct), **more}


def random_rows(seed, problems=30, n=16, skill=0.0):
    """Problems of very unequal difficulty, the same problems for each seed."""
    rng = random.Random(seed)
    return [row(f"p{p:03d}", s, rng.random() < min(1, p / problems / 2 + skill))
            for p in range(problems) for s in range(n)]


def main(*argv):
    run(evaluate.main, evaluate.parse_args([str(one) for one in argv]))


def report_of(tmp_path, *runs, flags=()):
    files = [write(tmp_path / f"{index}.jsonl", rows) for index, rows in enumerate(runs)]
    out = tmp_path / "eval.json"
    out.unlink(missing_ok=True)
    main("--out", out, "--resamples", 500, *files, *flags)
    return json.loads(out.read_text())["runs"]


def refused(capsys, *argv):
    line = refusal(capsys, main, *argv)
    assert line.startswith("evaluate.py: error: ")
    return line


# ---- The estimators ------------------------------------------------------------------------------
@pytest.mark.parametrize("n, ks", [*((n, range(1, n + 1)) for n in (1, 2, 16, 33)),
                                   (256, (1, 2, 255, 256)), (1024, (100,))])
def test_product_form_is_exact(n, ks):
    """The share of the subsets of k samples that hold a correct one, C(n-c, k) / C(n, k) not."""
    for k in ks:
        exact = [float(1 - Fraction(math.comb(n - c, k), math.comb(n, k))) for c in range(n + 1)]
        np.testing.assert_allclose(evaluate.pass_at_k(n, k), exact, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=f"k = {n + 1} is not"):
        evaluate.pass_at_k(n, n + 1)


@pytest.mark.parametrize("answers, k, share", [
    ("AAb", 3, 1), ("Abb", 3, 0), ("Ab ", 3, 0.5), ("  A", 3, 1), ("  ", 2, 0), ("AAbbA", 2, 0.5),
    ("Aab", 3, 0.5), ("Ab C", 1, 0.5)])
def test_majority_vote(answers, k, share):
    """Upper case: correct; a blank: no answer, no vote. A tie is shared, and so is a text that was
    judged both ways; what fills no block is left out."""
    votes = [0 if one == " " else ord(one.lower()) << 1 | one.isupper() for one in answers]
    assert evaluate.majority_at_k(array.array("q", votes), k) == share


# ---- Intervals -----------------------------------------------------------------------------------
@pytest.mark.parametrize("problems, resamples", [(7, 40), (3000, 800)])  # one chunk, and three
def test_bootstrap_equals_a_loop_and_does_not_depend_on_its_chunks(problems, resamples):
    columns = np.random.default_rng(1).random((problems, 2))
    draws, unseen = evaluate.bootstrap(columns, resamples, np.random.default_rng(5))
    rng = np.random.default_rng(5)
    for draw, left in zip(draws, unseen):
        weights = rng.dirichlet(np.ones(problems + 1))
        np.testing.assert_allclose(draw, weights[:-1] @ columns, atol=1e-13)
        assert left == pytest.approx(weights[-1], abs=1e-14)


@pytest.mark.parametrize("successes", [0, 2, 29, 30])
def test_of_zeros_and_ones_the_interval_is_clopper_and_pearsons(successes):
    """At its ends as many successes or more, or as many or fewer, have a probability of 0.025."""
    def chance(p, counts):
        return sum(math.comb(30, c) * p**c * (1 - p)**(30 - c) for c in counts)

    more, fewer = range(successes, 31), range(successes + 1)
    draws, unseen = evaluate.bootstrap(np.arange(30)[:, None] < successes, 40_000,
                                       np.random.default_rng(0))
    low, high = np.ravel(evaluate.interval(draws, unseen, 0, 1))
    assert (chance(low - 0.004, more) < 0.025 < chance(low + 0.004, more) if successes
            else low == 0)
    assert (chance(high + 0.004, fewer) < 0.025 < chance(high - 0.004, fewer) if successes < 30
            else high == 1)
    # Scaled, these are differences of -1 and 1.
    scaled = np.ravel(evaluate.interval(2 * draws + unseen[:, None] - 1, unseen, -1, 1))
    assert scaled == pytest.approx([2 * low - 1, 2 * high - 1], abs=1e-9)


@pytest.mark.parametrize("setting, plain", [
    # problems, n, ks, Beta, hopeless; of a second run g, lost, gained; the plain bootstrap's worst
    ((30, 16, (1, 8, 16), (8, 2), 0.0, None), 0.7),  # all but solved
    ((30, 64, (1, 16, 64), (0.3, 3), 0.9, None), 0.9),
    ((30, 64, (1, 64), (8, 2), 0.03, (1, 0.01, 0)), 0.5)])
def test_intervals_cover_the_truth(setting, plain):
    """A few settings of tests/interval_coverage.py's grid."""
    methods = "evaluate.py", "plain bootstrap"
    found = interval_coverage.simulate(setting, methods, 300, 500, seed=0)
    assert found["evaluate.py"][0].min() >= 0.93
    assert found["plain bootstrap"][0].min() <= plain


def test_differences_are_paired(tmp_path):
    """Problems differ far more than runs do: the paired interval is the narrower one."""
    runs = random_rows(1, problems=60, n=64), random_rows(2, problems=60, n=64, skill=0.1)
    a, b = report_of(tmp_path, *runs, flags=("--resamples", 5000))
    one, two = a["pass_at_k"]["4"], b["pass_at_k"]["4"]
    assert two["diff"] == pytest.approx(two["value"] - one["value"], abs=1e-12)
    widths = [cell["high"] - cell["low"] for cell in (one, two)]
    assert two["diff_high"] - two["diff_low"] < 0.8 * math.hypot(*widths)
    alone = report_of(tmp_path, runs[1], flags=("--resamples", 5000))[0]["pass_at_k"]["4"]
    assert alone["low"] == pytest.approx(two["low"], abs=1e-12)  # beside whatever other run


# ---- What is counted -----------------------------------------------------------------------------
def test_solutions_are_counted_and_more_than_exist_are_refused(tmp_path, capsys):
    rows = [row("p", s, True, solution=f"s{s}", n_solutions=3) for s in range(4)]
    other = [{**one, "id": "o", "solution": f"s{one['sample'] % 3}"} for one in rows]
    scored = write(tmp_path / "a.jsonl", other + rows)
    assert (f"{scored}: problem 'p' has 4 different correct solutions, more than its n_solutions, "
            "3; mend or delete that field") in refused(capsys, scored)
    for rows, share in (([{**one, "n_solutions": None} for one in rows], None), (rows[:3], 1.0)):
        result = report_of(tmp_path, rows)[0]
        assert (result["distinct"], result["solution_coverage"]) == (len(rows), share)
    # A task of one's own may carry a worked-out `solution`, which the model did not find.
    for existing in (None, 4):
        result = report_of(tmp_path, [row("p", s, True, task="reverse", solution=["worked", "out"],
                                          n_solutions=existing) for s in range(2)])[0]
        assert result["distinct"] is result["solution_coverage"] is None


@pytest.mark.parametrize("other", [
    {"target": 5}, {"numbers": [1, 4]}, {"prompt": "3 4"}, {"source": "b"}, {"answer": "7"},
    {"messages": [{"role": "user", "content": "?"}]}, {"n_solutions": 5}, {"task": "math"}])
def test_every_row_of_an_id_is_the_same_problem(tmp_path, capsys, other):
    """Not the first alone: four problems under one id would be one problem of four samples."""
    mixed = write(tmp_path / "a.jsonl", [row("p", 0, True), row("q", 0, True), row("q", 1, False),
                                         row("p", 1, True, **other)])
    assert f"{mixed}:4: 'p' is another problem than in the rows above" in refused(capsys, mixed)


def test_files_hold_the_same_problems(tmp_path, capsys):
    a = write(tmp_path / "a.jsonl", [row("p", 0, True), row("q", 0, True)])
    b = write(tmp_path / "b.jsonl", [row("p", 0, True)])
    for files in ((a, b), (b, a)):
        assert f"{b}: problem 'q' is missing, which {a} has" in refused(capsys, *files)
    b = write(tmp_path / "b.jsonl", [row("p", 0, True, target=5), row("q", 0, True)])
    assert f"{b}: 'p' is another problem than in {a}" in refused(capsys, a, b)
    report_of(tmp_path, *([row("p", 0, True, prompt=text)] for text in "ab"))  # in other words


def test_hand_counted_file(tmp_path):
    rows = [row("p", 0, True), row("p", 1, True), row("p", 2, True, completion_ids=[1] * 7),
            row("p", 3, False, finish_reason="length"), *(row("q", s, False) for s in range(4))]
    sampling = {"temperature": 1.0, "top_p": 1.0}
    write(tmp_path / "0.jsonl.meta.json", [{"sampling": sampling}])
    result = report_of(tmp_path, rows, flags=("--k", 2, 1, 2))[0]
    values = [cell["value"] for cell in result.pop("pass_at_k").values()]
    assert values == [0.375, 0.5] and result == {
        "name": "0", "file": str(tmp_path / "0.jsonl"), "n": 4, "sampling": sampling,
        "problems": 2, "maj_at_k": None, "distinct": 1.0, "solution_coverage": 0.25,
        "truncated_frac": 0.125, "completion_len": 3.5, "samples_to_match": 2}  # of c = 3 of 4
    whole = list(json.loads((tmp_path / "eval.json").read_text()).items())[:4]
    assert whole == [("reference", "0"), ("k", [1, 2]), ("seed", 0), ("resamples", 500)]


def test_samples_to_match(tmp_path):
    """With c = 2 of 4 a run reaches the reference's Pass@4 = 1 at k = 3, a worse one never."""
    found = report_of(tmp_path, *([row(key, s, key == "p" and s < c) for key in "pq"
                                   for s in range(4)] for c in (1, 2, 0)))
    assert [one["samples_to_match"] for one in found] == [4, 3, None]
    assert list(found[0]["pass_at_k"]) == ["1", "2", "4"]  # the default: powers of two


def test_neither_rewards_nor_the_order_of_rows_matter_and_the_seed_only_to_intervals(tmp_path):
    rows = random_rows(3)
    plain = report_of(tmp_path, rows)
    shaped = [{**one, "reward": -one["reward"] if one["correct"] else 0.1} for one in rows]
    for same in (rows, shaped, random.Random(0).sample(rows, len(rows))):
        assert report_of(tmp_path, same) == plain
    one, two = (result[0]["pass_at_k"]["4"]
                for result in (plain, report_of(tmp_path, rows, flags=("--seed", 1))))
    assert one["value"] == two["value"] and 0 < abs(one["low"] - two["low"]) < 0.05


def test_maths_rows(tmp_path):
    answers = {"p": "7779", "q": "3 55"}  # a blank: no answer; 7 and 5 are correct
    result = report_of(tmp_path, [
        row(key, s, text in "75", task="math", solution="worked out", pred=text.strip() or None)
        for key, texts in answers.items() for s, text in enumerate(texts)])[0]
    assert [cell["value"] for cell in result["maj_at_k"].values()] == [0.625, 0.625, 1.0]
    assert result["maj_at_k"]["1"] == result["pass_at_k"]["1"]


def test_sources_and_their_mean(tmp_path):
    easy = [row(f"e{p}", s, s < 4, source="easy") for p in range(10) for s in range(4)]
    hard = [row(f"h{p}", s, s < p, source="hard") for p in range(3) for s in range(4)]
    result = report_of(tmp_path, easy + hard)[0]
    parts = [result["sources"]["easy"], result["sources"]["hard"], result]
    assert [part["problems"] for part in parts] == [10, 3, 13]
    assert [part["pass_at_k"]["1"]["value"] for part in parts] == pytest.approx(
        [1, 0.25, (1 + 0.25) / 2])  # not (40 + 3) / 52
    alone = report_of(tmp_path, hard)[0]
    assert alone.pop("sources")["hard"] == parts[1] and parts[1].items() <= alone.items()


# ---- Terminal, files, figures --------------------------------------------------------------------
def test_table(tmp_path, capsys):
    base = write(tmp_path / "a.jsonl", random_rows(1))
    grpo = write(tmp_path / "b.jsonl", random_rows(2, skill=0.2))
    main(base, grpo, "--names", "base", "--names", "grpo", "--k", 1, "--k", 16, "--resamples", 50)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("30 problems, n 16") and lines[2].endswith(" grpo - base")
    assert [line.split()[0] for line in lines[3:-2]] == [
        "pass@1", "pass@16", "distinct", "solution_coverage", "truncated_frac", "completion_len",
        "samples_to_match"]
    assert lines[3].count("[") == 3 and lines[3].count("+") == 3
    one, n = (line.split() for line in lines[3:5])
    assert lines[-1] == f"Pass@1 and Pass@16: base {one[1]} and {n[1]}; grpo {one[4]} and {n[4]}"
    main(base, "--k", 1, "--resamples", 50)
    assert capsys.readouterr().out.splitlines()[-1] == f"Pass@1: a {one[1]}"


def test_other_sampling_settings_are_named(tmp_path, capsys):
    def sampled(name, n, sampling):
        if sampling:
            write(tmp_path / f"{name}.jsonl.meta.json", [{"sampling": sampling}])
        return write(tmp_path / f"{name}.jsonl", random_rows(1, n=n))

    alike = {"temperature": 1.0, "top_k": 0}
    a = sampled("a", 16, alike)
    others = (16, alike, 0), (16, {**alike, "temperature": 0.7}, 1), (8, alike, 1), (16, None, 1)
    for index, (n, sampling, lines) in enumerate(others):
        main(a, sampled(index, n, sampling), "--resamples", 9)
        err = capsys.readouterr().err
        assert err.count("\n") == lines == err.count("warning: the runs were not sampled alike")


def test_complete_output_is_printed_again_and_left_alone(tmp_path, capsys):
    scored, out = write(tmp_path / "a.jsonl", random_rows(1)), tmp_path / "eval.json"
    main(scored, "--out", out)
    table, before = capsys.readouterr().out, out.stat()
    main(scored, "--out", out, "--plot", tmp_path / "p.png")
    after = capsys.readouterr()
    assert after.out == table and "complete, left alone" in after.err
    assert (out.stat().st_ino, out.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    meta = meta_of(out)
    assert meta["stage"] == "evaluate.py" and len(meta["inputs"][str(scored)]) == 64
    assert "made with other seed" in refused(capsys, scored, "--out", out, "--seed", 1)
    write(tmp_path / "a.jsonl", random_rows(2))
    assert "made with other inputs" in refused(capsys, scored, "--out", out)


@pytest.fixture
def figures(monkeypatch):
    kept = []
    monkeypatch.setattr(evaluate, "save", lambda figure, path: kept.append(figure))
    return kept


def texts(axis):
    return [text.get_text() for text in axis.texts]


def passk_figure(tmp_path, *names, flags=()):
    files = [write(tmp_path / f"{index}.jsonl", random_rows(index, problems=5, n=4))
             for index in range(len(names))]
    main(*files, "--names", *names, "--resamples", 50, "--plot", tmp_path / "p.svg", *flags)


def test_passk_figure(tmp_path, figures):
    titles = ["Pass@k", "Pass@k minus base, paired", "Pass@4 against Pass@1"]
    for names in (["base"], ["base", "grpo"], ["base", "grpo", "ds-grpo"]):
        passk_figure(tmp_path, *names)
        axes, left = figures[-1].axes, figures[-1].axes[0]
        assert [axis.get_title("left") for axis in axes] == titles[:len(names)]
        for axis in axes[:2]:
            assert sorted(texts(axis)) == sorted(names) and len(axis.collections) == len(names)
            assert [tick.get_text() for tick in axis.get_xticklabels()] == ["1", "2", "4"]
        ends = sorted((line.get_ydata()[-1], text) for line, text in zip(left.lines, names))
        assert texts(left) == [name for _, name in ends]  # each beside its line's end
        places = [text.get_position()[1] for text in left.texts]
        assert all(later - earlier > 0.04 for earlier, later in zip(places, places[1:]))
    passk_figure(tmp_path, "base", "grpo", "ds-grpo", flags=("--k", 2))
    assert len(figures[-1].axes) == 2  # with one k there is nothing to draw it against


def test_rounds_are_a_path_from_the_reference(tmp_path, figures):
    def path_of(*names):
        passk_figure(tmp_path, *names)
        curves, path = figures[-1].axes[0], figures[-1].axes[-1]
        starts, ends = ([(line.get_xdata()[at], line.get_ydata()[at]) for line in path.lines[::2]]
                        for at in (0, -1))
        assert [y for _, y in ends] == [line.get_ydata()[-1] for line in curves.lines]
        return starts, ends, texts(path)

    starts, ends, names = path_of("base", "005", "10", "15")
    assert names == ["base", "round 5", "round 10", "round 15"]
    assert starts == [ends[0], *ends[:-1]]
    starts, ends, _ = path_of("base", "5", "10", "grpo")  # no rounds: each from the reference
    assert starts == [ends[0]] * 4


def test_names_are_literal_and_an_error_leaves_nothing_behind(tmp_path, monkeypatch):
    names = ["_base", "$x", r"\frac{$", "a$b$c^2", "wo\nrd", "long" * 100]
    passk_figure(tmp_path, *names)
    drawn = (tmp_path / "p.svg").read_text()
    for name in ("_base", "$x", r"\frac{$", "a$b$c^2", "wo?rd", "longlonglon…longlonglong"):
        assert drawn.count(f"<!-- {name} -->") == 3, name  # of the glyphs, as matplotlib writes it
    assert "<!-- Pass@k minus _base, paired -->" in drawn
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(SystemExit):
        passk_figure(tmp_path, "a")
    assert (tmp_path / "p.svg").read_text() == drawn
    assert not list(tmp_path.glob("*.partial"))


def metrics(updates, **more):
    return [{"step": step + 1, "pass@1": 0.2 + 0.001 * step, "entropy": 1 / (step + 1),
             "entropy_correct": None if step % 3 else 0.4, "entropy_wrong": 0.6,
             "completion_len": 11, "grad_norm": 0.5, **more} for step in range(updates)]


def test_training_curves(tmp_path, figures, capsys):
    run, plot, newer = tmp_path / "run", tmp_path / "t.png", {"pass@n": 0.5}
    for name, updates in (("1001/policy", 0), ("1000/policy", 8), ("2000.partial", 8),
                          ("999/policy", 4)):  # the newest round with metrics counts
        (folder := run / name).mkdir(parents=True)
        write(folder / ("metrics.jsonl" if updates else "none"), metrics(updates, **newer))
    for source, updates in ((run, 8), (folder, 4), (folder / "metrics.jsonl", 4)):
        main("--training", source, "--plot", plot)
        axes = figures[-1].axes
        assert {len(line.get_xdata()) for line in axes[0].lines} == {updates}
        assert [sorted(texts(axis)) for axis in axes] == [
            ["Pass@1", "Pass@n"], [""], ["all", "correct", "wrong"], [""]]
    write(folder / "metrics.jsonl", metrics(50) + metrics(3, **newer))  # older rows lack pass@n
    main("--training", folder, "--plot", plot)
    assert len(figures[-1].axes[0].lines[-1].get_ydata()) == 3
    assert "no metrics.jsonl here" in refused(capsys, "--training", tmp_path, "--plot", plot)
    write(folder / "metrics.jsonl", [{"step": 1}])
    assert "metrics.jsonl:1: missing field 'pass@1'" in refused(capsys, "--training", folder,
                                                                "--plot", plot)


# ---- Bad input -----------------------------------------------------------------------------------
@pytest.mark.parametrize("rows, message", [
    ([], "no rows in this file"),
    ([row("p", 0, True)] * 2, ":2: sample 0 of problem 'p' occurs twice"),
    ([row("p", 0, True, task="math")], ":1: missing field 'pred'"),
    ([row("p", 0, True), row("p", 1, True), row("q", 0, True)],
     "problem 'q' has 1 samples but 'p' has 2"),
    ([row("p", s, True) for s in range(4)], "k = 8 needs 8 samples a problem, but n is 4")])
def test_bad_files_are_named(tmp_path, capsys, rows, message):
    """Rows with a field missing or of a wrong type: test_crash.py."""
    scored = write(tmp_path / "a.jsonl", rows)
    error = refused(capsys, scored, "--k", 1, 8)
    assert str(scored) in error and message in error


@pytest.mark.parametrize("argv, message", [
    ("", "give one or more SCORED.jsonl"), ("--plot c.png", "give one or more SCORED.jsonl"),
    ("--training b", "--training RUN goes with --plot FILE.png"),
    *((f"--training b --plot c.png {flag}", "and nothing else")
      for flag in ("a", "--out d", "--k 1", "--names x", "--resamples 9", "--seed 0")),
    ("a b --names x", "2 different names"), ("a b --names x x", "2 different names"),
    ("x/a.scored.jsonl y/a.jsonl", "2 different names"), ("a --plot p.bmp", "must end in .png"),
    ("a --k 0", "--k must be at least 1"), ("a --seed -1", "--seed must be at least 0"),
    ("a --resamples 0", "--resamples must be at least 1"), ("a --k x", "invalid"),
    ("a --no-such-flag", "unrecognized")])
def test_wrong_flags_take_one_line(capsys, argv, message):
    assert message in refused(capsys, *argv.split())


def test_memory_grows_with_problems_and_not_with_rows(tmp_path):
    peaks = []
    for n in (20, 200):
        scored = write(tmp_path / f"{n}.jsonl",
                       [row(f"p{p}", s, s % 3 == 0) for s in range(n) for p in range(10)])
        tracemalloc.start()
        evaluate.read_problems(scored)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 10_000  # 1,800 more rows of 300 bytes


def test_help_is_in_the_order_of_the_code(capsys):
    with pytest.raises(SystemExit):
        evaluate.parse_args(["--help"])
    text = capsys.readouterr().out
    flags = ("--names", "--k ", "--resamples", "--seed", "--out", "--plot", "--training RUN  ")
    places = [text.rindex(f"\n  {flag}") for flag in flags]
    assert places == sorted(places) and "ds-grpo \\\n" in text
