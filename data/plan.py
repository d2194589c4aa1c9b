"""Who computes what: an update's rows dealt to ranks and cut into micro-batches.

A row is anything with `prompt` and `completion` (ids), `group` (an index) and `used` (does it
stand in the loss?); members and micro-batches are lists of row indices.
"""
import numpy as np


def micro_batches(rows, members, budget, share):
    """Cut members into micro-batches of at most `budget` tokens (at least one row each).

    share: the rows of a group stand together, and a prompt counts once in each micro-batch that
    holds one of them, padded to the longest; otherwise rows stand by length, and padding counts.
    """
    def place(i):
        prompt, completion = len(rows[i].prompt), len(rows[i].completion)
        return (prompt, rows[i].group) if share else (prompt + completion, i)

    batches, groups, tokens = [], set(), 0
    for i in sorted(members, key=place):  # each is the longest so far
        prompt, completion = len(rows[i].prompt), len(rows[i].completion)
        groups, tokens = groups | {rows[i].group}, tokens + completion
        if share:
            cost = len(groups) * prompt + tokens
        else:
            cost = (len(batches[-1]) + 1 if batches else 1) * (prompt + completion)
        if not batches or cost > budget:
            batches.append([])
            groups, tokens = {rows[i].group}, completion
        batches[-1].append(i)
    return batches


def plan_update(rows, members, rank, world, budget, share, unused=False):
    """This rank's micro-batches of one update, with or without the rows that are not `used`.

    The ranks' shares are cut from one order of the members by their tokens. Every rank gets as many
    micro-batches, at least one; an empty one takes part with weight 0.
    """
    siblings = np.bincount([rows[i].group for i in members])
    order = sorted((i for i in members if len(rows[i].completion)),
                   key=lambda i: (len(rows[i].prompt), rows[i].group))
    cost = np.cumsum([len(rows[i].completion)
                      + len(rows[i].prompt) / (siblings[rows[i].group] if share else 1)
                      for i in order])
    cuts = np.linspace(0, cost[-1] if order else 0, world + 1)[1:-1]
    cuts = [0, *np.searchsorted(cost, cuts).tolist(), len(order)]
    plans = []
    for start, end in zip(cuts, cuts[1:]):
        mine = [i for i in order[start:end] if unused or rows[i].used]
        plans.append(micro_batches(rows, mine, budget, share))
    return plans[rank] + [[]] * (max(1, *map(len, plans)) - len(plans[rank]))
