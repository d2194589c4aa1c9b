"""The tasks of the library reasoning-gym: problems, and the verdict by the library's own scorers.

    pip install reasoning-gym
    python -m data.gym --out prompts.jsonl --task chain_sum --n 1000 --seed 0
    python -m data.gym --out hard.jsonl --task spell_backward --config min_word_len=8

Writes one problem a line (and OUT.meta.json): id, task "gym", prompt or messages, gym (the name of
the library's task), entry (the library's own: question, answer, metadata), source (the same name).

The verdict (score.py calls `verify`, which hands it to a worker). The answer is the last complete
innermost <answer>..</answer>; without any <answer>, the whole completion. It is right where the
scorer of the task, at its default settings, gives 1; partial credit counts as wrong. Scorers that
evaluate the answer as Python are not taken: --task refuses them; those of countdown and puzzle24
get the parser of data/countdown.py in place of eval. So are tasks whose scorer does not know its
own answer again once it has been through JSON.
"""
import json

from data.countdown import OPERATE, last_answer, parse
from data.files import Parser, Rollout, Verdict, claim, describe, fail, publish, run
from data.sandbox import Judge, Pending

LONGEST = 10_000  # characters of an answer
EVALUATED = ("bitwise_arithmetic", "intermediate_integration", "polynomial_multiplication",
             "simple_integration")
INSTRUCTION = "Think step by step, then give the answer alone inside <answer> </answer>."
JUDGE = Judge("data.gym", "judge", package="reasoning-gym")


def parse_args(argv=None):
    parser = Parser(__file__, description=__doc__)
    flag = parser.add_argument
    flag("--out", required=True, help="the JSONL file to write")
    flag("--task", required=True, metavar="NAME", help="the library's name of a task")
    flag("--n", type=int, default=1000, help="problems to write (default %(default)s)")
    flag("--seed", type=int, default=0, help="seed of the draw (default %(default)s)")
    flag("--config", action="append", default=[], metavar="KEY=VALUE",
         help="a setting of the task, as its config class names it; may be repeated")
    flag("--template", default="chat", choices=["chat", "base", "plain"],
         help="chat: messages, the question and an instruction; base: the same as text; "
         "plain: the question alone (default %(default)s)")
    args = parser.parse_args(argv)
    if args.n < 1 or not 0 <= args.seed < 2**32:
        parser.error("--n must be at least 1, --seed a number of 32 bits")
    if args.task in EVALUATED:
        parser.error(f"--task {args.task}: its scorer evaluates answers as Python, refused here")
    if not all("=" in setting for setting in args.config):
        parser.error("--config takes KEY=VALUE")
    return parser.checked(args)


# ---- The verdict ---------------------------------------------------------------------------------
class Row(Rollout, tag_field="task", tag="gym"):
    """A rollout of this task, as score.py reads it."""
    gym: str
    entry: dict


def verify(completion, row):
    """The Verdict on a completion, or one that is Pending."""
    tagged = "<answer>" in completion
    answer = ((last_answer(completion) or "") if tagged else completion).strip()
    if row.finish_reason == "length" and not tagged:
        return Verdict(answer[:LONGEST] or None, "no_answer")  # it might have gone on
    if not answer or len(answer) > LONGEST:
        return Verdict(answer[:LONGEST] or None, "parse" if answer else "no_answer")
    return Pending(answer, JUDGE, [answer, row.gym, row.entry])


def prepare():
    """Make every scorer, in a worker: they read their files now, and later none."""
    global SCORERS
    from reasoning_gym.algorithmic import number_sorting
    from reasoning_gym.factory import DATASETS, get_score_answer_fn
    from reasoning_gym.games import countdown, puzzle24

    countdown.parse_expr = puzzle24.parse_expr = lambda text: parse(text, int, OPERATE)
    number_sorting.eval = lambda text: json.loads(text.replace("'", '"'))
    SCORERS = {name: get_score_answer_fn(name) for name in DATASETS.keys()
               - {*EVALUATED, "composite"}}  # composite needs others to be named
    return ()


def judge(answer, name, entry):
    """ok or value, by the library's scorer. Sums of partial credit may come out above 1."""
    return "ok" if SCORERS[name](answer, entry) == 1 else "value"


# ---- Problems ------------------------------------------------------------------------------------
def dataset_of(args):
    try:
        import reasoning_gym
    except ImportError:
        fail("reasoning-gym is not installed (pip install reasoning-gym)")
    config = {}
    for setting in args.config:
        key, _, value = setting.partition("=")
        try:
            config[key] = json.loads(value)
        except ValueError:
            config[key] = value
    try:
        return reasoning_gym.create_dataset(args.task, size=args.n, seed=args.seed, **config)
    except (ValueError, TypeError, AssertionError) as error:
        fail(f"--task {args.task} {' '.join(args.config)}: {error}")


def problems(dataset, args):
    """Yield the problem rows of a dataset of the library."""
    for number in range(args.n):
        entry = dataset[number]
        stored = json.loads(json.dumps(entry))
        if entry["answer"] is not None and dataset.score_answer(entry["answer"], stored) != 1:
            fail(f"--task {args.task}: its scorer does not take its own answer to problem "
                 f"{number} as right; it cannot be used with rows of JSON")
        question = entry["question"]
        if args.template != "plain":
            question += f"\n\n{INSTRUCTION}"
        prompt = {"prompt": question + "\n"}
        if args.template == "chat":
            prompt = {"messages": [{"role": "user", "content": question}]}
        yield {"id": f"{args.task}-{args.seed}-{number}", "task": "gym", **prompt,
               "gym": args.task, "entry": stored, "source": args.task}


def main(args):
    meta = describe(args, [])
    partial = claim(args.out, meta, ignore=("out",))
    if partial is None:
        return
    dataset = dataset_of(args)
    with open(partial, "w", encoding="utf-8") as file:
        for problem in problems(dataset, args):
            file.write(json.dumps(problem, ensure_ascii=False) + "\n")
    publish(args.out, meta)


if __name__ == "__main__":
    run(main, parse_args())
