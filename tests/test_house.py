"""What the READMEs and docstrings say of this repository is there, and the code keeps the shape
that makes it readable: one file per stage, few files to open, sizes that fit a sitting."""
import ast
import collections
import importlib
import os
import pathlib
import re
import shlex
import subprocess

import pytest

from data import files

ROOT = pathlib.Path(__file__).parent.parent
FOLDERS = ("", "data", "kernels", "experiments")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))
TESTS = sorted((ROOT / "tests").glob("*.py"))
READMES = sorted(path for folder in (*FOLDERS, "experiments/*", "tests")
                 for path in ROOT.glob(f"{folder}/*.md".lstrip("/")))
OF_OTHERS = {"--dist", "--no-binary", "--repo-type", "--nnodes", "--rdzv-backend",
             "--rdzv-endpoint", "--nodes", "--ntasks-per-node", "--gpus-per-node",
             "--nproc-per-node"}  # of pytest, pip, hf, torchrun and Slurm
TO_BE_MADE = {"data/reverse.py"}  # by the reader of data/README.md


def name_of(path):
    return str(path.relative_to(ROOT))


def lines_of(paths):
    return sum(path.read_text().count("\n") for path in paths)


def comments_and_docstrings(path):
    text = path.read_text()
    if path.suffix == ".md":
        return text
    kinds = ast.Module, ast.FunctionDef, ast.ClassDef
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)]
    return "\n".join([*filter(None, map(ast.get_docstring, nodes)), *re.findall(r"#.*", text)])


# ---- The shape -----------------------------------------------------------------------------------
def imported(path, seen=()):
    """The files of the project that a file imports, and those that they import."""
    names = re.findall(r"^\s*(?:from|import) ((?:data|experiments)\.\w+|\w+)", path.read_text(),
                       re.MULTILINE)
    for name in names:
        for folder in ("", "kernels"):
            other = ROOT / folder / (name.replace(".", "/") + ".py")
            if other.exists() and name_of(other) not in seen and other != path:
                seen = imported(other, (*seen, name_of(other)))
    return seen


@pytest.mark.parametrize("stage, expected", [
    ("train.py", {"data/files.py", "data/models.py", "data/rollouts.py",
                  "kernels/fused_entropy.py", "kernels/fused_linear_entropy.py",
                  "kernels/shared_prompt.py"}),
    ("generate.py", {"data/files.py", "data/models.py", "data/chunks.py",
                     "kernels/shared_prompt.py"}),
    ("evaluate.py", {"data/files.py"})])
def test_a_reader_opens_few_files(stage, expected):
    assert set(imported(ROOT / stage)) == expected


def test_one_file_per_stage():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    top = {line.partition("/")[0] for line in tracked.splitlines()}
    assert top <= {"generate.py", "score.py", "train.py", "evaluate.py", "run.sh", "kernels",
                   "data", "tests", "experiments", "requirements.txt", "README.md", "LICENSE",
                   "CITATION.cff", "pyproject.toml", ".ci", ".gitignore"}


@pytest.mark.parametrize("name, limit", [
    ("train.py", 900), ("generate.py", 520), ("evaluate.py", 550), ("score.py", 220),
    ("run.sh", 250)])
def test_a_stage_fits_a_sitting(name, limit):
    assert lines_of([ROOT / name]) <= limit


def test_sizes():
    for path in SOURCES:
        assert lines_of([path]) <= 500 or name_of(path).count("/") == 0, name_of(path)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 80, f"{name_of(path)}: {node.name}"
    shell = [ROOT / "run.sh", *(ROOT / "experiments").glob("*.sh")]
    assert lines_of([*SOURCES, *shell]) <= 8900
    assert lines_of((ROOT / "experiments").glob("*.py")) <= 2300
    assert lines_of(TESTS) <= 9370


def test_run_sh_holds_no_python():
    text = (ROOT / "run.sh").read_text()
    assert "<<" not in text.replace("<<<", "") and "python -c" not in text


def test_nothing_of_six_lines_stands_twice():
    places = collections.defaultdict(list)
    for path in SOURCES:
        lines = [line.strip() for line in path.read_text().splitlines()
                 if line.strip() and not line.startswith(("import ", "from "))]
        for i in range(len(lines) - 5):
            places["\n".join(lines[i:i + 6])].append(name_of(path))
    assert not {six: names for six, names in places.items() if len(names) > 1}


def test_names_of_transformers_that_may_change_stand_in_one_place():
    private = re.compile(r"_attn_implementation\b|\.__class__ =|\bpast_key_values\b|\b_raise_")
    found = [name_of(path) for path in SOURCES
             if private.search(path.read_text().replace("set_attn_implementation", ""))]
    assert found == ["kernels/shared_prompt.py"]


# ---- The READMEs ---------------------------------------------------------------------------------
def test_the_readme_is_short_and_shows_the_thing_first():
    text = (ROOT / "README.md").read_text()
    lines = text.splitlines()
    assert len(lines) <= 160 and len(text.split()) <= 1700
    assert len(re.findall(r"[0-9][.][0-9]", text)) <= 40
    assert len(" ".join(lines[:60]).split()) <= 450
    command = next(i for i, line in enumerate(lines, 1) if line.startswith("bash run.sh"))
    row = next(i for i, line in enumerate(lines, 1) if '"completion":' in line)
    assert row <= 25 and command <= 30
    assert sum(len(path.read_text().split()) for path in READMES) <= 16_000
    assert (ROOT / "experiments/README.md").read_text().count("\n") <= 220


def slug(heading):
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("path", READMES, ids=name_of)
def test_links_lead_somewhere(path):
    links = re.findall(r"\]\(([^)]+)\)", path.read_text())
    for link in (link for link in links if not link.startswith("http")):
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), link
        headings = [line.lstrip("# ") for line in target.read_text().splitlines()
                    if line[:1] == "#"] if anchor else []
        assert not anchor or anchor in map(slug, headings), link


def named_functions(text, heading, end):
    """(question, files, names) of a table of questions: what stands in backticks is a definition
    in one of the linked files."""
    section = text[text.index(heading):]
    section = section[:section.index(end)] if end else section
    for question, answer in re.findall(r"^\| (.*\?) \| (.*) \|$", section, re.MULTILINE):
        paths = [link for link in re.findall(r"\]\(([^)#]+)\)", answer) if link.endswith(".py")]
        yield question, paths, re.findall(r"`(\w+)`", answer)


@pytest.mark.parametrize("path, heading, end, least", [
    ("README.md", "## Real models and limits", "MIT.", 8),
    ("data/README.md", "## Ten questions", "## ", 10)])
def test_what_answers_a_question_stands_in_the_file_that_it_links(path, heading, end, least):
    text = (ROOT / path).read_text()
    end = None if end == "## " else end
    rows = list(named_functions(text, heading, end))
    assert len(rows) >= least
    for question, links, names in rows:
        source = "".join(((ROOT / path).parent / link).read_text() for link in links)
        for name in names:
            defined = rf"(def|class) {name}\b|^    {name}: |^{name} = "
            assert re.search(defined, source, re.MULTILINE), (question, name)


@pytest.mark.parametrize("path", [*READMES, *SOURCES], ids=name_of)
def test_files_and_flags_that_are_named_exist(path):
    text = comments_and_docstrings(path)
    named = set(re.findall(r"(?<![\w/.])(?:data|kernels|experiments|tests)/[\w./-]*\w", text))
    for name in named - TO_BE_MADE:
        assert (ROOT / name).exists() or (ROOT / f"{name}.py").exists(), name
    scripts = [file for file in TESTS if not file.name.startswith("test_")]
    code = "".join(file.read_text() for file in [*SOURCES, *scripts, ROOT / "run.sh"])
    quoted = "".join(re.findall(r"\"--[a-z-]+\"|^# +--.*", code, re.MULTILINE))
    known = set(re.findall(r"--[a-z][a-z-]*[a-z]", quoted))
    known |= OF_OTHERS | {"--help"} | {flag.replace("--", "--no-") for flag in known}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", text)) <= known


def commands():
    """(module, its arguments) of every command of a stage or of data/ that is shown somewhere, but
    for those with variables."""
    for path in [*READMES, *SOURCES]:
        text = comments_and_docstrings(path).replace("\\\n", " ")
        started = re.findall(
            r"(?:python|--) (-m data\.\w+|\w+\.py)((?: [^`\n#;&|><)]*)?)", text)
        for script, rest in started:
            module = script.removeprefix("-m ").removesuffix(".py")
            file = ROOT / (module.replace(".", "/") + ".py")
            if (name_of(file) not in TO_BE_MADE and rest.strip()
                    and not re.search(r"[$\[{]|\.\.\.", rest) and file.exists()
                    and "parse_args" in file.read_text()):
                yield module, tuple(shlex.split(rest))


def test_commands_that_are_shown_have_flags_that_exist(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").touch()  # of README.md's example
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "STAGE", files.STAGE)
    shown = sorted(set(commands()))
    assert len(shown) > 30
    for module, args in shown:
        parse_args = importlib.import_module(module).parse_args
        if module == "data.make_tiny":  # argparse's own parser, without --check-flags
            parse_args(list(args))
            continue
        with pytest.raises(SystemExit) as end:
            parse_args([*args, "--check-flags"])
        assert not end.value.code, (module, args, capsys.readouterr().err)
    assert sorted(os.listdir(tmp_path)) == ["experiments", "mine.py"]  # nothing was made


def test_tests_that_tests_README_names_exist():
    source = "".join(file.read_text() for file in TESTS)
    defined = re.findall(r"^def (test_\w+)", source, re.MULTILINE)
    named = re.findall(r"`(test_\w+)(\*?)`", (ROOT / "tests/README.md").read_text())
    assert len(named) > 20
    for name, star in named:
        matches = [test for test in defined if test == name or star and test.startswith(name)]
        assert matches, name


def test_the_reader_of_metrics_sends_every_update(tmp_path, monkeypatch):
    """data/README.md's five lines for trackio, W&B or TensorBoard, with a stand-in for these."""
    text = (ROOT / "data/README.md").read_text()
    (block,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)
                if "def send" in block]
    (tmp_path / "sender.py").write_text(block)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "pass@1": 0.5, "entropy_wrong": null}\n'
                                            '{"step": 2, "pass@1": 0.75, "entropy_wrong": 1.0}\n')
    sent = []
    importlib.import_module("sender").send(
        tmp_path / "metrics.jsonl", lambda metrics, step: sent.append((step, metrics)))
    assert [step for step, _ in sent] == [1, 2]
    assert sent[0][1] == {"step": 1, "pass@1": 0.5} and sent[1][1]["entropy_wrong"] == 1.0
