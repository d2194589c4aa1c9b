"""Scored files as counts: what evaluate.py keeps of every problem, however many rows it has."""
import array
import contextlib
import dataclasses
import json
from typing import Any, Literal

import msgspec
from tqdm import tqdm

from data.files import Sample, fail, read_rows

# The tasks whose verdicts say which solution was found. In the rows of another one `solution` may
# be the data's own, worked out.
WITH_SOLUTIONS = ("countdown",)


class Row(msgspec.Struct):
    """A line of scored.jsonl, as far as evaluate.py reads it."""
    id: str
    sample: Sample
    task: str
    correct: bool
    finish_reason: Literal["stop", "length"]
    completion_ids: list[int]  # their number alone counts
    solution: Any = msgspec.UNSET  # WITH_SOLUTIONS: canonical form of a correct answer
    pred: Any = msgspec.UNSET  # maths: the extracted answer, or null
    # What the problem is
    source: str = ""  # the benchmark
    numbers: Any = None
    target: Any = None
    answer: Any = None
    n_solutions: int | None = None  # existing solutions
    prompt: str | None = None
    messages: Any = None


@dataclasses.dataclass(slots=True)
class Tally:
    """What is kept of a problem's samples."""
    stated: tuple  # the fields that say what the problem is, the prompt's two in front
    source: str
    n_solutions: int | None
    seen: int = 0  # bit s is set once sample s was read
    correct: int = 0  # c of n
    truncated: int = 0
    tokens: int = 0
    solutions: set | None = None  # hashes of the different correct solutions
    # Maths, 8 bytes a sample: the hash of `pred`, its lowest bit `correct`; 0: no answer.
    votes: array.array | None = None


def read_problems(path):
    """({id: Tally}, n) of one scored file."""
    problems = {}
    for where, _, row in tqdm(read_rows(path, Row), desc=path, unit=" rows", disable=None):
        stated = (row.prompt, row.messages, row.source, row.task, row.numbers, row.target,
                  row.answer, row.n_solutions)
        problem = problems.get(row.id)
        if problem is None:
            problem = problems[row.id] = Tally(stated, row.source, row.n_solutions)
        elif problem.stated != stated:
            fail(f"{where}: '{row.id}' is another problem than in the rows above")
        if problem.seen >> row.sample & 1:
            fail(f"{where}: sample {row.sample} of problem '{row.id}' stands twice")
        problem.seen |= 1 << row.sample
        problem.correct += row.correct
        problem.truncated += row.finish_reason == "length"
        problem.tokens += len(row.completion_ids)
        if row.task == "math":
            add_vote(problem, row, where)
        elif row.task in WITH_SOLUTIONS:
            add_solution(problem, row, where)

    first = next(iter(problems))
    n = problems[first].seen.bit_count()
    for key, problem in problems.items():
        if problem.seen.bit_count() != n:
            samples = problem.seen.bit_count()
            fail(f"{path}: problem '{key}' has {samples} samples but '{first}' has {n}")
        found, existing = len(problem.solutions or ()), problem.n_solutions
        if existing is not None and found > existing:
            fail(f"{path}: problem '{key}' has {found} different correct solutions, more than its "
                 f"n_solutions, {existing}; mend or delete that field")
    return problems, n


def add_solution(problem, row, where):
    """Remember a correct answer's canonical form."""
    if problem.solutions is None:
        problem.solutions = set()
    if row.correct:
        if row.solution is msgspec.UNSET:
            fail(f"{where}: missing field 'solution'")
        if not isinstance(row.solution, str):
            fail(f"{where}: field 'solution': Expected str, got {row.solution!r:.40}")
        problem.solutions.add(hash(row.solution))


def add_vote(problem, row, where):
    """Remember an answer for the majority vote."""
    if row.pred is msgspec.UNSET:
        fail(f"{where}: missing field 'pred'")
    if problem.votes is None:
        problem.votes = array.array("q")
    vote = 0 if row.pred is None else hash(repr(row.pred)) >> 1 << 1 | row.correct
    problem.votes.append(vote)


def read_run(path, name, reference=None):
    """One file as {"name", "file", "n", "sampling", "problems"}.

    Ends the stage unless it holds the same problems as the reference, which is another such run.
    """
    problems, n = read_problems(path)
    sampling = None  # rows of other programs have no meta: one that cannot be read is no news
    with contextlib.suppress(OSError, ValueError, AttributeError, RecursionError):
        with open(path + ".meta.json", encoding="utf-8") as file:
            sampling = json.load(file).get("sampling")
    run = {"name": name, "file": path, "n": n, "problems": problems,
           "sampling": sampling if isinstance(sampling, dict) else None}
    for one, other in ((run, reference), (reference, run)) if reference else ():
        for key, problem in one["problems"].items():
            if key not in other["problems"]:
                fail(f"{other['file']}: problem '{key}' is missing, which {one['file']} has")
            # The prompt may be another one: runs may pose a problem in different words.
            if problem.stated[2:] != other["problems"][key].stated[2:]:
                fail(f"{path}: '{key}' is another problem than in {reference['file']}")
    return run
