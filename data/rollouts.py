"""The rows of a scored file as the update needs them: in groups, in micro-batches, to rehearse."""
import dataclasses
import json
import math
import typing

import msgspec
import numpy as np

from data import files
from data.files import Scored, fail, read_rows, write_synced


@dataclasses.dataclass(slots=True, kw_only=True)
class Trajectory:
    """A scored rollout as the update needs it."""
    where: str  # file:line, for messages
    id: str
    sample: int
    group: int  # an index
    prompt: list  # ids; the rows of a group share one list
    completion: np.ndarray  # ids
    logprobs: np.ndarray  # the sampler's, fp32
    correct: bool
    reward: float
    truncated: bool  # cut at the length limit
    used: bool  # False where --truncated mask leaves it out of the loss
    fields: dict  # those that the objective reads


def trajectory(where, scored, group, fields=()):
    """The Trajectory of a Scored row of the group with this index."""
    return Trajectory(
        where=where, id=scored.id, sample=scored.sample, group=group, prompt=scored.prompt_ids,
        completion=np.array(scored.completion_ids, np.int64),
        logprobs=np.array(scored.logprobs, np.float32), correct=scored.correct,
        reward=scored.reward, truncated=scored.finish_reason == "length", used=True,
        fields={name: getattr(scored, name) for name in fields})


def load_rollouts(path, truncated="wrong", fields=()):
    """The rows of a scored file by `id`, in the order of `sample`: a list of groups of n, and n."""
    declared = {field.name for field in msgspec.structs.fields(Scored)}
    extra = [(name, typing.Any) for name in fields if name not in declared]
    groups, numbers = {}, {}  # by id
    kind = msgspec.defstruct("Scored", extra, bases=(Scored,), kw_only=True)
    for where, _, scored in read_rows(path, kind):
        ids, logprobs = scored.completion_ids, scored.logprobs
        if len(logprobs) != len(ids):
            fail(f"{where}: {len(logprobs)} logprobs for {len(ids)} completion_ids")
        group = groups.setdefault(scored.id, {})
        if scored.sample in group:
            fail(f"{where}: duplicate sample {scored.sample} of id {scored.id!r}")
        number = numbers.setdefault(scored.id, len(numbers))
        group[scored.sample] = row = trajectory(where, scored, number, fields)
        row.used = not (row.truncated and truncated == "mask")
        # score.py calls a truncated rollout correct where it holds a complete right answer.
        if row.truncated and truncated == "wrong" and not row.correct:
            row.reward = 0.0
    n = len(next(iter(groups.values())))
    for group in groups.values():
        first = next(iter(group.values()))
        if len(group) != n:
            fail(f"{first.where}: id {first.id!r} has {len(group)} samples, others have {n}: a "
                 f"group is not whole")
        for row in group.values():
            share_prompt(row, first)
    return [[group[sample] for sample in sorted(group)] for group in groups.values()], n


def share_prompt(row, first):
    """Give a row the list of ids of the first one of its group, which must be equal."""
    if row.prompt != first.prompt:
        fail(f"{row.where}: prompt_ids differ from those of the other samples of id {row.id!r}")
    row.prompt = first.prompt


def check_ids(rows, vocabulary, positions, name):
    """Refuse rows of another model: ids beyond its vocabulary, more tokens than it has positions.

    positions: None where the model has no limit; name: of the model, for messages."""
    for row in rows:
        length = len(row.prompt) + len(row.completion)
        if positions and length > positions:
            fail(f"{row.where}: {length} tokens of prompt and completion exceed the "
                 f"{positions} positions of {name}")
        if max(max(row.prompt), row.completion.max(initial=0)) >= vocabulary:
            fail(f"{row.where}: a token id beyond the vocabulary of {vocabulary} of {name}: "
                 f"rollouts of another model?")


def load_answers(path, temperature, weight="samples", off_policy=False):
    """The right rollouts of each problem of a scored file, a list of rows a problem.

    weight: "samples" keeps each, "distinct" one of each completion. Groups may be of any size;
    problems without a right rollout are left out. They are learned at `temperature`, so they must
    have been sampled at it; and from the whole distribution, unless off_policy.
    """
    sampling = files.sampling_of(path)
    if sampling is not None:
        if temperature_of(path, sampling) != temperature:
            fail(f"{path}: sampled at temperature {sampling['temperature']}, the rollouts at "
                 f"{temperature}")
        if not off_policy:
            check_sampler(path, sampling)
    problems, numbers = {}, {}  # by id
    for where, _, scored in read_rows(path, Scored):
        if not scored.correct or not scored.completion_ids:
            continue
        answers = problems.setdefault(scored.id, {})
        number = numbers.setdefault(scored.id, len(numbers))
        row = trajectory(where, scored, number)
        share_prompt(row, next(iter(answers.values()), row))
        key = tuple(scored.completion_ids) if weight == "distinct" else len(answers)
        answers.setdefault(key, row)
    if not problems:
        fail(f"{path}: no correct rollout to rehearse")
    return [list(answers.values()) for answers in problems.values()]


def draw_answers(problems, count, seed):
    """`count` rows: problems equally often (up to one), and for each one of its answers.

    seed: (seed, steps done), so that every update draws others."""
    rng, drawn = np.random.default_rng(seed), []
    while problems and len(drawn) < count:
        order = rng.permutation(len(problems))[:count - len(drawn)]
        drawn += [problems[i][rng.integers(len(problems[i]))] for i in order]
    return drawn


def write_rollouts(path, rows):
    """Write rows as a scored file that load_rollouts reads again."""
    write_synced(path, "".join(json.dumps({
        "id": row.id, "sample": row.sample, "where": row.where, "prompt_ids": row.prompt,
        "completion_ids": row.completion.tolist(), "logprobs": row.logprobs.tolist(),
        "correct": row.correct, "reward": row.reward,
        "finish_reason": "length" if row.truncated else "stop"}) + "\n" for row in rows))


def temperature_of(path, sampling):
    """The temperature in a meta's sampling settings."""
    temperature = sampling.get("temperature") if isinstance(sampling, dict) else None
    if type(temperature) not in (int, float) or not 0 <= temperature < math.inf:
        fail(f"{path}.meta.json: not a valid meta (temperature {temperature}); delete it and give "
             f"--temperature")
    return temperature


def sampling_of(args):
    """The sampling settings of the rollouts' meta; without a meta --temperature stands for them."""
    path, sampling = args.rollouts, files.sampling_of(args.rollouts)
    if sampling is None:
        if args.temperature is None:
            fail(f"{path}: no meta beside it says how it was sampled; run generate.py and "
                 f"score.py, or give --temperature")
        return {"temperature": args.temperature}
    temperature = temperature_of(path, sampling)
    if args.temperature not in (None, temperature):
        fail(f"{path}: sampled at temperature {temperature}, not at --temperature "
             f"{args.temperature}")
    if temperature == 0:
        fail(f"{path}: greedy rollouts have no distribution to learn from; sample at a temperature "
             f"above 0")
    if not args.allow_off_policy:
        check_sampler(path, sampling)
    return sampling


def check_sampler(path, sampling):
    """End the stage where rows were not drawn from the policy's whole distribution."""
    off = {"top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}
    changed = [f"{key} {sampling[key]}" for key in off if sampling.get(key, off[key]) != off[key]]
    if changed:
        fail(f"{path}: sampled with {', '.join(changed)}: the log-probs are not those of the "
             f"policy; sample without, or give --allow-off-policy")


# ---- Micro-batches -------------------------------------------------------------------------------
def micro_batches(rows, members, budget, share):
    """Cut members (row indices) into micro-batches of at most `budget` tokens, at least one row.

    share: the rows of a group stand together, and a prompt counts once in each micro-batch that
    holds one of them, padded to the longest; otherwise rows stand by length, and padding counts.
    """
    def place(i):
        prompt, completion = len(rows[i].prompt), len(rows[i].completion)
        return (prompt, rows[i].group) if share else (prompt + completion, i)

    batches, count, groups, tokens = [], 0, set(), 0  # the last three: of the last batch
    for i in sorted(members, key=place):  # each is the longest so far
        prompt, completion, group = len(rows[i].prompt), len(rows[i].completion), rows[i].group
        count, groups, tokens = count + 1, groups | {group}, tokens + completion
        cost = len(groups) * prompt + tokens if share else count * (prompt + completion)
        if not batches or cost > budget:
            batches.append([])
            count, groups, tokens = 1, {group}, completion
        batches[-1].append(i)
    return batches


def plan_update(rows, members, rank, world, budget, share):
    """This rank's micro-batches (lists of row indices) of one update.

    The ranks' shares are cut from one order of the members by their tokens. Every rank gets equally
    many micro-batches, at least one; an empty one takes part with weight 0.
    """
    siblings = np.bincount([rows[i].group for i in members])
    order = sorted((i for i in members if len(rows[i].completion)),
                   key=lambda i: (len(rows[i].prompt), rows[i].group))
    cost = np.cumsum([len(rows[i].completion)
                      + len(rows[i].prompt) / (siblings[rows[i].group] if share else 1)
                      for i in order])
    bounds = np.linspace(0, cost[-1] if order else 0, world + 1)[1:-1]
    bounds = [0, *np.searchsorted(cost, bounds, side="right").tolist(), len(order)]
    plans = []
    for start, end in zip(bounds, bounds[1:]):
        own = [i for i in order[start:end] if rows[i].used]
        plans.append(micro_batches(rows, own, budget, share))
    return plans[rank] + [[]] * (max(1, *map(len, plans)) - len(plans[rank]))
