"""experiments/figures.py: paths compared as worked out by hand, Student's t against its tables, the
files and the READMEs against what it prints."""
import contextlib
import io
import itertools
import os
import re
import shutil

import numpy as np
import pytest

from experiments import figures, frontier, suite

HERE = os.path.join(suite.ROOT, "experiments")


def printed(function, *arguments):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        function(*arguments)
    return out.getvalue()


# ---- Intervals ---------------------------------------------------------------------------------
def test_intervals_by_hand():
    # 1, 2, 6: mean 3, sd sqrt(7), t(2) = 4.302653
    assert figures.interval([1, 2, 6]) == (3.0, pytest.approx(4.302653 * 7**0.5 / 3**0.5))
    assert figures.text_of([0.1, 0.3]) == "0.200 ± 1.271"
    assert figures.text_of([0.1, 0.3, -0.1], signed=True) == "+0.100 [-0.397, +0.597] (2/3)"
    # One seed says nothing of the spread over seeds: no interval.
    assert figures.text_of([0.25]) == "0.250"
    assert figures.text_of([0.25], signed=True) == "+0.250 (1/1)"


# ---- The paths, by hand ------------------------------------------------------------------------
def path(*points):
    """A run's checkpoints out of (Pass@1, Pass@256)."""
    checkpoints = {number: {"1": x, "256": y} for number, (x, y) in enumerate(points)}
    return figures.path_of(checkpoints, "256")


def test_paths_at_equal_pass_at_1():
    base = (0.1, 0.9)
    one, other = path(base, (0.2, 0.8), (0.3, 0.6)), path(base, (0.25, 0.5))
    assert figures.shared(one, other) == 0.25
    assert figures.at_equal(one, other) == pytest.approx(0.7 - 0.5)
    # differences at Pass@1 0.1, 0.2, 0.25 are 0, 0.8 - (0.9 - 0.4 * 2/3), 0.2; trapezoids over 0.15
    middle = 0.8 - (0.9 - 0.4 * 2 / 3)
    area = 0.1 * middle / 2 + 0.05 * (middle + 0.2) / 2
    assert figures.gap(one, other) == pytest.approx(area / 0.15)
    assert figures.gap(other, one) == pytest.approx(-area / 0.15)
    # a checkpoint that falls back is passed over, a collapse is the base
    back = path(base, (0.3, 0.7), (0.2, 0.1), (0.4, 0.6))
    assert np.allclose(back, [[0.1, 0.3, 0.4], [0.9, 0.7, 0.6]])
    collapsed = path(base, (0.05, 0.2), (0.0, 0.0))
    assert np.allclose(collapsed, [[0.1], [0.9]])
    assert figures.at_equal(back, collapsed) == figures.gap(back, collapsed) == 0


def test_runs_are_compared_at_checkpoints_that_both_have():
    def points(*rounds):  # all on one curve
        return {number: {**dict.fromkeys(("1", "4", "16", "64", "coverage"), number / 20),
                         "256": 1 - (number / 20) ** 2} for number in rounds}

    whole, few, short = points(0, 5, 10, 15, 20), points(0, 10, 20), points(0, 5, 10)
    assert list(figures.alike(whole, few)) == list(figures.alike(few, whole)) == [0, 10, 20]
    # one that ended earlier: nothing is left out
    assert figures.alike(whole, short) == whole and figures.alike(short, whole) == short
    runs_of = {("grpo", "1e-4"): {1: few}, ("ds-token", "2e-4"): {1: whole}}
    out = printed(figures.differences, runs_of, ("grpo", "1e-4"))
    assert re.findall(r"[+-]\d\.\d{3}", out.splitlines()[-1]) == 6 * ["+0.000"]
    equal = [line.split(" | ")[1] for line in out.splitlines() if line.startswith("| DS-GRPO")]
    assert equal[:-1] == ["10", "20"]


def test_differences_are_paired_by_seed():
    """Two seeds, differences 0.1 and 0.3: mean 0.2, sd 0.1414, t(1) = 12.706, half width 1.271."""
    measures = ("4", "16", "64", "256", "coverage")

    def run_of(x, y):
        return {0: {"1": 0.1, **dict.fromkeys(measures, 0.9)},
                20: {"1": x, **dict.fromkeys(measures, y)}}

    grpo = {1: run_of(0.2, 0.5), 2: run_of(0.2, 0.5), 3: run_of(0.3, 0.1)}
    smoothed = {1: run_of(0.2, 0.6), 2: run_of(0.2, 0.8), 4: run_of(0.9, 0.9)}
    runs_of = {("grpo", "1e-4"): grpo, ("ds-token", "1e-4"): smoothed}
    out = printed(figures.differences, runs_of, ("grpo", "1e-4"))
    # Pass@4 once, 16, 64, 256 and coverage twice: without seeds 3 and 4
    assert out.count("+0.200 [-1.071, +1.471] (2/2)") == 5 + 4
    assert out.count("equal rounds") == out.count("equal Pass@1") == 1
    assert "+0.000 [+0.000, +0.000] (2/2)" in out  # Pass@1
    assert "+0.100 [-0.535, +0.735] (2/2)" in out  # the gap: half of the end's, as both begin alike


# ---- The files ---------------------------------------------------------------------------------
def write_study(folder):
    """Two seeds of six arms at two bases and a pre-trained one, with figures that are known."""
    arms = {("base", "0"): (0, 0), ("grpo", "2e-4"): (0.01, -0.02),
            ("grpo", "1e-4"): (0.005, -0.01), ("ds-token", "2e-4"): (0.01, -0.01),
            ("grpo-rehearsal", "2e-4"): (0.008, 0.001),
            ("grpo-rehearsal-samples", "2e-4"): (0.008, 0.002)}
    results, points = [], []
    tops = (("weak-base", 256), ("strong-base", 256), ("pre-trained", 128))
    for (regime, top), (arm, lr), seed in itertools.product(tops, arms, (1, 2)):
        first, large = arms[arm, lr]
        for number in (0,) if arm == "base" else (5, 10):
            head = {"regime": regime, "arm": arm, "lr": lr, "seed": seed, "round": number,
                    "split": "test"}
            points.append({**head, "coverage": 0.5, "distinct": 2.0, "train_s": number,
                           "entropy": 0.6 if number else ""})
            results += [{**head, "k": 2**i,
                         "pass_at_k": 0.1 + seed / 100 + number * (large if i else first)}
                        for i in range(top.bit_length())]
    suite.write_csv(f"{folder}/results.csv", results)
    suite.write_csv(f"{folder}/checkpoints.csv", points)


def test_the_figure_and_tables_of_a_study(tmp_path):
    assert {arm.removesuffix("/2") for arm in figures.LINES} <= set(frontier.ARMS)
    write_study(tmp_path)
    figures.main(["--folder", str(tmp_path)])
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")
    summary = (tmp_path / "frontier.md").read_text()
    out = printed(figures.main, ["--folder", str(tmp_path), "--tables"])
    assert summary.removeprefix(figures.TITLE).strip() in out
    after_10 = summary.partition("| after 10 rounds |")[2]
    weighting = "GRPO + rehearsal, by samples minus GRPO + rehearsal"
    for pair, k, cell in (("GRPO minus base", 1, "+0.100 [+0.100, +0.100] (2/2)"),
                          (weighting, "largest", "+0.010 [+0.010, +0.010] (2/2)")):
        assert f"| {pair} | {k} | {cell} | {cell} | {cell} |" in after_10
    assert f"| {weighting} | entropy | +0.000 " in after_10
    assert "rehearsal alone minus base" not in summary  # not measured: no row
    weak, strong, pretrained = (
        out.index(f"\n## {title}\n") for title in ("weak base", "strong base", "SmolLM2-135M"))
    assert weak < strong < pretrained
    # At the second rate only what was run at it.
    table = out[weak:strong].partition("| minus GRPO, lr 2e-4, equal rounds |")[2]
    rows = [line.split(" | ")[:2] for line in table.partition("\n\n")[0].splitlines()[2:]]
    assert rows == [[f"| {name}", number] for name in (
        "GRPO, lr 1e-4", "DS-GRPO, lr 2e-4", "GRPO + rehearsal, lr 2e-4",
        "GRPO + rehearsal, by samples, lr 2e-4") for number in ("5", "10")]
    assert out.count("| minus base, equal rounds |") == 3 and "minus base, equal Pass" not in out
    assert "minus GRPO, lr 1e-4" not in out[weak:strong]  # nothing but GRPO was run at it
    assert "Pass@256" in out[weak:strong] and "Pass@128 |" in out[pretrained:]
    for name in ("results.csv", "checkpoints.csv"):
        rows = suite.read_csv(f"{tmp_path}/{name}")
        suite.write_csv(f"{tmp_path}/{name}", [row for row in rows if row["arm"] != "base"])
    with pytest.raises(SystemExit, match="no run together with the base"):
        figures.main(["--folder", str(tmp_path)])


def test_the_summary_in_the_repository_is_that_of_its_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "draw", lambda *_: None)
    for name in ("results.csv", "checkpoints.csv"):
        shutil.copy(f"{HERE}/{name}", tmp_path)
    figures.main(["--folder", str(tmp_path)])
    with open(f"{HERE}/frontier.md") as file:
        assert file.read() == (tmp_path / "frontier.md").read_text()


# ---- The READMEs -------------------------------------------------------------------------------
def intervals_of(text):
    """The 'mean [low, high]' of a text as (mean, low, high) in thousandths."""
    number = r"([+-]?\d\.\d{3})"
    found = re.findall(rf"{number} \[{number}, {number}\]", " ".join(text.split()))
    found = {tuple(round(1000 * float(value)) for value in one) for one in found}
    assert all(low <= mean <= high for mean, low, high in found)
    return found


def sections(path):
    """The parts of a Markdown file between headings."""
    with open(path, encoding="utf-8") as file:
        return re.split(r"^#+ ", file.read(), flags=re.MULTILINE)


def test_the_readmes_say_what_figures_py_prints():
    """Under README.md's results and each question of experiments/README.md that is not of others:
    each interval, also of a pair the other way round, and each 'mean ± half' stands in its tables.
    Of which arm, the readers must see to."""
    tables = printed(figures.main, ["--tables"])
    known = intervals_of(tables)
    known |= {(-mean, -high, -low) for mean, low, high in known}
    ends = re.compile(r"\d\.\d{3} ± \d\.\d{3}")
    texts = [text for text in sections(f"{suite.ROOT}/README.md") if text.startswith("Results")]
    texts += [text for text in sections(f"{HERE}/README.md")
              if re.match(r"(?!What did others).*\?\n", text)]
    assert len(texts) > 4 and sum(len(intervals_of(text)) for text in texts) > 10
    for text in texts:
        assert intervals_of(text) - known == set()
        assert set(ends.findall(text)) - set(ends.findall(tables)) == set()


def test_the_table_of_the_pre_trained_model():
    """After 8, 12 and 16 rounds Pass@1, then Pass@128; the seeds in a cell in their order."""
    runs_of = figures.panels_of(figures.load(HERE))["pre-trained", "test"]
    text, = (text for text in sections(f"{HERE}/README.md") if text.startswith("On a pre-trained"))
    for arm in ("grpo", "grpo/2", "ds-token", "grpo-rehearsal"):
        runs = figures.runs_at(runs_of, arm).values()
        cells = ["; ".join(f"{points[after][k]:.{digits}f}" for points in runs)
                 for k, digits in (("1", 3), ("128", 2)) for after in (8, 12, 16)]
        assert f"| {figures.LABELS[arm]} | {' | '.join(cells)} |" in text


ALIASES = {"the base itself": "base", "uniform entropy bonus": "uniform bonus",
           "GRPO at half the rate": "GRPO, half the rate",
           "GRPO + rehearsal, coefficient 0.3 from round 11 on; 51 rounds":
           "GRPO + rehearsal, less later"}


def test_the_readmes_table_has_the_end_points_of_its_arms():
    """Cell by cell, in percent, rounded once: 'mean ± half' of Pass@1 and Pass@256
    after the last round, from the weak and from the strong base."""
    panels = figures.panels_of(figures.load(HERE))
    arms = {label: arm for arm, label in figures.LABELS.items()}
    text, = (text for text in sections(f"{suite.ROOT}/README.md") if text.startswith("Results"))
    lines = [line for line in text.splitlines() if line[:1] == "|" and "±" in line]
    assert len(lines) > 3
    for line in lines:
        name, *cells = [re.sub(r" \(`.*`\)$", "", cell.strip()) for cell in line.split("|")[1:-1]]
        columns = [(base, k) for base in ("weak-base", "strong-base") for k in ("1", "256")]
        assert len(cells) == len(columns)
        for cell, (base, k) in zip(cells, columns):
            runs = figures.runs_at(panels[base, "test"], arms[ALIASES.get(name, name)])
            figure = figures.interval([points[max(points)][k] for points in runs.values()])
            for shown, value in zip(cell.split(" ± "), figure, strict=True):
                digits = len(shown.partition(".")[2])
                error = abs(float(shown) - 100 * value)
                assert error <= 0.5 * 10**-digits + 1e-9, (name, cell)
