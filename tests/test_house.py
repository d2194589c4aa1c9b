"""What the READMEs and docstrings say of this repository is there, and the code keeps to the sizes that make it readable."""
import ast
import collections
import importlib
import pathlib
import re
import shlex

import pytest

from data import files

ROOT = pathlib.Path(__file__).parent.parent
SOURCES = sorted(path for folder in ("", "data", "kernels", "experiments") for path in (ROOT / folder).glob("*.py"))
READMES = sorted(path for folder in ("", "data", "kernels", "experiments", "experiments/*", "tests") for path in ROOT.glob(f"{folder}/*.md".lstrip("/")))
OF_OTHERS = {"--dist", "--no-binary"}  # pytest's and pip's
TO_BE_MADE = {"data/reverse.py"}  # by the reader of data/README.md


def name_of(path):
    return str(path.relative_to(ROOT))


def comments_and_docstrings(path):
    text = path.read_text()
    if path.suffix == ".md":
        return text
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef))]
    return "\n".join([*filter(None, map(ast.get_docstring, nodes)), *re.findall(r"#.*", text)])


def slug(heading):
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("path", READMES, ids=name_of)
def test_links_lead_somewhere(path):
    links = [link for link in re.findall(r"\]\(([^)]+)\)", path.read_text()) if not link.startswith("http")]
    for link in links:
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), link
        assert not anchor or anchor in [slug(line.lstrip("# ")) for line in target.read_text().splitlines() if line[:1] == "#"], link


def test_what_the_map_names_stands_in_the_file_that_it_links():
    text = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| (?!question|---)(.*?) \| (.*) \|$", text[text.index("## Where is"):text.index("## Flags")], re.MULTILINE)
    assert len(rows) > 15
    for question, answer in rows:
        files = [ROOT / link for link in re.findall(r"\]\(([^)#]+)\)", answer)]
        source = "".join(file.read_text() for file in files if file.suffix == ".py")
        for name in re.findall(r"`(\w+)`", answer):
            assert re.search(rf"(def|class) {name}\b|^    {name}: ", source, re.MULTILINE), (question, name)


@pytest.mark.parametrize("path", [*READMES, *SOURCES], ids=name_of)
def test_files_and_flags_that_are_named_exist(path):
    text = comments_and_docstrings(path)
    for name in set(re.findall(r"(?<![\w/.])(?:data|kernels|experiments|tests)/[\w./-]*\w", text)) - TO_BE_MADE:
        assert (ROOT / name).exists() or (ROOT / f"{name}.py").exists(), name
    scripts = [file for file in (ROOT / "tests").glob("*.py") if not file.name.startswith("test_")]
    code = "".join(file.read_text() for file in [*SOURCES, *scripts, ROOT / "run.sh"])
    known = set(re.findall(r"--[a-z][a-z-]*[a-z]", "".join(re.findall(r"\"--[a-z-]+\"|^#   --.*", code, re.MULTILINE))))
    known |= OF_OTHERS | {"--help"} | {flag.replace("--", "--no-") for flag in known}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", text)) <= known


def commands():
    """(script, its arguments) of every command of a stage or of data/ that is shown somewhere, but for those with variables."""
    for path in [*READMES, *SOURCES]:
        text = comments_and_docstrings(path).replace("\\\n", " ")
        started = re.findall(r"(?:python|--) ((?:data/)?\w+\.py|-m data\.\w+)((?: [^`\n#;&|><)]*)?)", text)
        for script, rest in started:
            script = re.sub(r"-m data\.(\w+)", r"data/\1.py", script)
            if not re.search(r"[$\[{]|\.\.\.", rest) and script not in TO_BE_MADE and "parse_args" in (ROOT / script).read_text() and rest.strip():
                yield script, tuple(shlex.split(rest))


def test_commands_that_are_shown_have_flags_that_exist(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").touch()  # of README.md's example
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "STAGE", files.STAGE)
    shown = sorted(set(commands()))
    assert len(shown) > 40
    for script, args in shown:
        parse_args = importlib.import_module(script.removesuffix(".py").replace("/", ".")).parse_args
        if script == "data/make_tiny.py":  # argparse's own parser, without --check-flags
            parse_args(list(args))
            continue
        with pytest.raises(SystemExit) as end:
            parse_args([*args, "--check-flags"])
        assert not end.value.code, (script, args, capsys.readouterr().err)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["experiments", "mine.py"]  # nothing was made


def test_tests_that_tests_README_names_exist():
    defined = re.findall(r"^def (test_\w+)", "".join(file.read_text() for file in (ROOT / "tests").glob("*.py")), re.MULTILINE)
    named = re.findall(r"`(test_\w+)(\*?)`", (ROOT / "tests/README.md").read_text())
    assert len(named) > 20
    for name, star in named:
        assert any(test.startswith(name) if star else test == name for test in defined), name


def test_sizes():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            assert not isinstance(node, ast.FunctionDef) or node.end_lineno - node.lineno < 80, f"{name_of(path)}: {node.name}"


def test_nothing_of_six_lines_stands_twice():
    places = collections.defaultdict(list)
    for path in SOURCES:
        lines = [line.strip() for line in path.read_text().splitlines() if line.strip() and not line.startswith(("import ", "from "))]
        for i in range(len(lines) - 5):
            places["\n".join(lines[i:i + 6])].append(name_of(path))
    assert not {six: names for six, names in places.items() if len(names) > 1}


def test_names_of_transformers_that_may_change_stand_in_one_place():
    private = re.compile(r"_attn_implementation\b|\.__class__ =|\bpast_key_values\b|\b_raise_")
    assert [name_of(path) for path in SOURCES if private.search(path.read_text().replace("set_attn_implementation", ""))] == [
        "kernels/shared_prompt.py"]
