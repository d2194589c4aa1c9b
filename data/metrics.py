"""The metrics of an update: the line of metrics.jsonl, which data/README.md explains key by key."""
import resource

import torch
import torch.distributed as dist


class Metrics:
    """Sums and maxima over the completion tokens of an update, of all micro-batches and ranks."""
    SUMS = ("loss", "entropy", "entropy_correct", "right", "nll", "gap", "low", "high", "kl", "adv",
            "adv2", "smooth", "rehearsed")
    PEAKS = ("gap", "ratio")

    def __init__(self):
        self.sums, self.peaks = dict.fromkeys(self.SUMS, 0.0), dict.fromkeys(self.PEAKS, 0.0)

    def add(self, **terms):
        """A value a token, (tokens,), of each of SUMS."""
        for name, term in terms.items():
            self.sums[name] = self.sums[name] + term.double().sum()

    def peak(self, **terms):
        """A value a token, at least 0, of each of PEAKS."""
        for name, term in terms.items():
            self.peaks[name] = term.max().double().clamp(min=self.peaks[name])

    def reduce(self, device, world):
        """Over all ranks; then each is a number."""
        sums, peaks = (torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device)
                                    for value in of.values()]) for of in (self.sums, self.peaks))
        if world > 1:
            dist.all_reduce(sums)
            dist.all_reduce(peaks, dist.ReduceOp.MAX)
        self.sums = dict(zip(self.SUMS, sums.tolist()))
        self.peaks = dict(zip(self.PEAKS, peaks.tolist()))

    def line(self, step, tokens, rehearsal, norm, lr, seconds, device, rows, reward, correct):
        """The update's line. rows: all of its rows; reward: (groups, n), correct: (rows,) of them;
        tokens: of those in the loss; rehearsal: its coefficient and tokens."""
        sums, count = self.sums, max(tokens, 1)
        mean, wrong = {name: value / count for name, value in sums.items()}, tokens - sums["right"]
        of_wrong = sums["entropy"] - sums["entropy_correct"]
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if device != "cpu":
            memory = torch.cuda.max_memory_allocated()
        more, (coef, rehearsed) = {}, rehearsal
        if rehearsed:
            more["rehearse_nll"] = sums["rehearsed"] / rehearsed
            mean["loss"] += coef * more["rehearse_nll"]
        return {
            "step": step,
            "loss": mean["loss"],
            "reward": reward.mean().item(),
            "pass@1": correct.float().mean().item(),
            "entropy": mean["entropy"],
            "entropy_correct": sums["entropy_correct"] / sums["right"] if sums["right"] else None,
            "entropy_wrong": of_wrong / wrong if wrong else None,
            "nll": mean["nll"],
            "logprob_gap": mean["gap"],
            "logprob_gap_max": self.peaks["gap"],
            "ratio_max": self.peaks["ratio"],
            "clip_low_frac": mean["low"],
            "clip_high_frac": mean["high"],
            "approx_kl": mean["kl"],
            "grad_norm": norm,
            "lr": lr,
            "adv_std": max(mean["adv2"] - mean["adv"] ** 2, 0) ** 0.5,
            "smooth_abs": mean["smooth"],
            "dead_groups": (reward == reward[:, :1]).all(1).float().mean().item(),
            "completion_len": sum(len(row.completion) for row in rows) / len(rows),
            "truncated_frac": sum(row.cut for row in rows) / len(rows),
            "tokens": tokens,
            "tokens_per_s": tokens / seconds,
            "peak_mem_bytes": memory,
            **more,
        }
