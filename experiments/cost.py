"""What a round costs, computed: bytes, FLOP and seconds of every stage, each with its formula.

    python experiments/gpu.py --cost 7b --gpus 8                 # the tables of experiments/cost.md
    python experiments/gpu.py --cost 7b --gpus 8 --out gpu.json  # at the rates that gpu.json holds

Symbols: P weights, R rollouts, T completion tokens, L new tokens a rollout, U updates, G GPUs,
B rows of a batch.
Nothing in here imports torch, and nothing in here measures: `RATES` says of every rate whether it
was measured (and where) or is assumed, and gpu.py replaces those that it measures.
"""
import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Model:
    """Qwen2's shapes: the sizes of its published configs."""
    hidden: int
    layers: int
    kv_width: int  # key-value heads x head dimension
    intermediate: int
    vocab: int
    tied: bool  # one matrix for the embedding and the head

    def weights(self):
        """P: attention with its biases, MLP, two norms a layer; embedding, head and last norm."""
        attention = 2 * self.hidden * (self.hidden + self.kv_width)
        biases = self.hidden + 2 * self.kv_width
        layer = attention + biases + 3 * self.hidden * self.intermediate + 2 * self.hidden
        return (self.layers * layer + self.hidden
                + (1 if self.tied else 2) * self.vocab * self.hidden)


MODELS = {
    "0.5b": Model(896, 24, 128, 4864, 151936, tied=True),
    "1.5b": Model(1536, 28, 256, 8960, 151936, tied=True),
    "7b": Model(3584, 28, 512, 18944, 152064, tied=False),
}


@dataclasses.dataclass(frozen=True)
class Round:
    """The paper's round: 32 problems x 8 rollouts of up to 2048 tokens; U times that, U updates."""
    updates: int = 1
    gpus: int = 1
    problems_an_update: int = 32
    n: int = 8
    prompt_tokens: int = 256
    new_tokens: int = 2048
    rows_at_once: int = 256  # of a rank: --max-batch-tokens is to be raised to 256 x 2304 for this

    def rollouts(self):
        return self.updates * self.problems_an_update * self.n

    def tokens(self):
        return self.rollouts() * self.new_tokens


HERE = "measured on a machine with one H100 80GB"
RATES = {  # name: (value, unit, where it is from)
    "start": (5.3, "s", "measured: imports and start of generate.py or train.py (README, Growth)"),
    "hash": (0.88e9, "bytes/s", f"sha256; {HERE}"),
    "load": (1.6e9, "bytes/s", "assumed: seven times what the check before took there, 0.23e9"),
    "save": (1.28e9, "bytes/s", f"write and fsync; {HERE}"),
    "row_bytes": (33.0, "bytes/token", "measured: id 7.3, log-prob 21.7, text about 4"),
    "score": (430.0, "rows/s", "measured: maths verdicts, one core"),
    "step": (0.035, "s", "decode step of 28 layers, Python and launches: 28/24 of what 24 layers "
                         f"took with 256 rows; {HERE}"),
    "copy": (3.03e12, "bytes/s", HERE),
    "product": (7.7e14, "FLOP/s", f"bf16 matrix products; {HERE}"),
    "sampling_share": (0.4, "", "assumed: of the roofline, where a step is longer than `step`"),
    "update_share": (0.4, "", "assumed: of `product`"),
}


def stages(model, work, rates):
    """[(stage, what, formula, amount, unit, seconds)] of one round, in the order of the loop.

    rates: {name: value} of all names in RATES. What the ranks do at the same time counts once.
    """
    weights, tokens, rows = model.weights(), work.tokens(), work.rollouts()
    mine = rows / work.gpus  # rollouts of a rank
    batches = math.ceil(mine / work.rows_at_once)
    batch = mine / batches
    text = rates["row_bytes"] * tokens
    context = work.prompt_tokens + work.new_tokens / 2
    cache = batch * context * 2 * model.layers * model.kv_width * 2  # bf16 keys and values
    step = max(rates["step"], (2 * weights + cache) / rates["copy"] / rates["sampling_share"],
               2 * weights * batch / rates["product"] / rates["sampling_share"])
    train = rates["product"] * rates["update_share"] * work.gpus
    earlier = 1 - 1 / work.updates  # the first update's pi_old is its own forward pass
    table = [("generate.py", "start", "1", 1, "process", rates["start"])]

    def add(stage, what, formula, amount, rate, unit="bytes"):
        table.append((stage, what, formula, amount, unit, amount / rate))

    add("generate.py", "hash weights", "4 P", 4 * weights, rates["hash"])
    add("generate.py", "load and check weights", "4 P", 4 * weights, rates["load"])
    add("generate.py", "sample", "L R / (B G) x max(step, (2 P + cache) / copy, 2 P B / product)",
        batches * work.new_tokens, 1 / step, "steps")
    add("generate.py", "write rows", "33 T", text, rates["save"])
    add("score.py", "verdicts, one core", "R", rows, rates["score"], "rows")
    add("score.py", "write rows", "33 T", text, rates["save"])
    table.append(("train.py", "start", "1", 1, "process", rates["start"]))
    add("train.py", "hash rows, weights and moments", "12 P + 33 T", 12 * weights + text,
        rates["hash"])
    add("train.py", "load and check weights and moments, a rank its rows (--shard)", "12 P / G",
        12 * weights / work.gpus, rates["load"])
    add("train.py", "pi_old", "2 P T (1 - 1 / U) / G", 2 * weights * tokens * earlier, train,
        "FLOP")
    add("train.py", "update", "6 P T / G", 6 * weights * tokens, train, "FLOP")
    add("train.py", "save weights and moments, fsync", "12 P", 12 * weights, rates["save"])
    return table


WORK = ("sample", "verdicts, one core", "pi_old", "update")


def totals(table):
    """(seconds of sampling, verdicts and updates; seconds of everything else, which is fixed)."""
    work = sum(row[-1] for row in table if row[1] in WORK)
    return work, sum(row[-1] for row in table) - work


def amount_of(amount, unit):
    """An amount for people: 91.4 GB, 2.3e+16 FLOP, 2,048 steps."""
    if unit == "bytes":
        return f"{amount / 1e9:.3g} GB"
    return f"{amount:.2g} {unit}" if unit == "FLOP" else f"{amount:,.0f} {unit}"


def markdown(name, gpus, measured=None):
    """The lines of the tables of one model: a round, larger rounds, the rates.

    measured: {name: (value, unit, where)} of rates that replace those of RATES.
    """
    model, known = MODELS[name], {**RATES, **(measured or {})}
    rates = {key: value for key, (value, *_) in known.items()}
    table = stages(model, Round(gpus=gpus), rates)
    work, fixed = totals(table)
    yield f"**{name} on {gpus} GPU{'s' * (gpus > 1)}, P = {model.weights():,}** (computed)\n"
    yield "| stage | what | formula | amount | s |\n|---|---|---|---|---|"
    for stage, what, formula, amount, unit, seconds in table:
        yield f"| {stage} | {what} | {formula} | {amount_of(amount, unit)} | {seconds:.1f} |"
    yield f"| all | | | | {work + fixed:.0f}, of which fixed {fixed:.0f} |"
    yield "\n| updates a round | s a round | s an update | fixed |\n|---|---|---|---|"
    for updates in 1, 2, 4, 8, 16:
        work, fixed = totals(stages(model, Round(updates, gpus), rates))
        yield (f"| {updates} | {work + fixed:.0f} | {(work + fixed) / updates:.0f} | "
               f"{fixed / (work + fixed):.0%} |")
    yield "\n| rate | value | from |\n|---|---|---|"
    for key, (value, unit, where) in known.items():
        yield f"| {key} | {value:.3g} {unit} | {where} |"
