"""Speed and memory of the stages beside what one would use instead, A and B in turns.

    python experiments/bench.py --out experiments/bench_cpu.json    # all parts, three sizes
    python experiments/bench.py --sizes tiny --only generate step --rounds 5

    generate  generate.py against `model.generate` (the best of three batch sizes),
              `generate_batch` (continuous batching) and itself with --attention model; with
              --threads N on a CPU also N processes of one thread each, as torchrun starts them
    update    train.py's update against a plain one: prompt and completion in padded rows, full
              logits
    step      generate.py, score.py and train.py against a step of TRL's GRPOTrainer at equal
              settings, if TRL is there

Sizes: `tiny` is the embedded model with its own prompts and its end-of-text token, a quarter of a
round of the suite, `tiny-64` the same with 150 prompts x 64 samples of 18 tokens at most. The
others are random Qwen2 models which never stop early: 25m, and the shapes of Qwen2.5-0.5B and
1.5B. On a GPU the same arms run in bf16 (fp32 masters in the updates); there 0.5b, 1.5b make sense
and 1.5b-2048, a round of the recipe for Qwen2.5-Math-1.5B: 32 x 8 rollouts of 2048 tokens.

Before the first round each arm runs once, sampling with a quarter of the new tokens. A round
measures the machine's rates and runs all arms once; a ratio is taken within a round, and the table
shows medians and the range. Tokens are completion tokens. What `roofline` and `extra` are, and
which clock counts, stands in experiments/roofline.py. Loading of models and digests of files are
left out of all arms: experiments/bench_scale.py has them. Writes --out as JSON; the entries of an
existing file that this call does not measure stay as they are.
"""
import argparse
import contextlib
import copy
import functools
import io
import json
import logging
import os
import sys
import tempfile
from unittest import mock

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PARTS = ("generate", "update", "step")
NAMES = ("toy", "tiny", "tiny-64", "25m", "0.5b", "1.5b", "1.5b-2048")  # those of roofline.py


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["tiny", "25m", "0.5b"], choices=NAMES,
                        help="default: %(default)s")
    parser.add_argument("--only", nargs="+", default=PARTS, choices=PARTS, help="default: all")
    parser.add_argument("--rounds", type=int, default=3,
                        help="rounds after the warm-up (default %(default)s)")
    parser.add_argument("--embedded", default=os.path.join(ROOT, "data", "tiny-countdown"),
                        help="the embedded model's folder (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default %(default)s)")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"],
                        help="auto: cuda if there is one")
    parser.add_argument("--out", help="JSON file of all figures (default: the table alone)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    ARGS = parse_args()  # before the heavy imports, and before they read the number of threads
    os.environ["OMP_NUM_THREADS"] = str(ARGS.threads)

import numpy as np
import torch
import transformers

sys.path.insert(0, ROOT)
import generate
import score
import train
from data import countdown
from data import policy as policies
from data.files import read_rows
from experiments.roofline import (SIZES, Bench, Meter, generate_flags, groups_of, make_folder,
                                  needed, print_arms, rates, save, write_scored)


# ---- generate: against model.generate and generate_batch -----------------------------------------
def same_tokens(one, other, prompts, resamples=999):
    """p-value of a permutation test: do two samplers' completions hold the same tokens?

    Rows change sides within their prompt. Statistic: chi-square of the counts (in 64 classes of
    ids). one, other: [(problem, ids)].
    """
    owner = np.array([problem for problem, _ in one + other])
    counts = np.array([np.bincount(np.asarray(ids) % 64, minlength=64) for _, ids in one + other])
    side = np.repeat([1, -1], [len(one), len(other)])
    rng, found = np.random.default_rng(0), []
    for resample in range(resamples + 1):
        if resample:
            for problem in range(prompts):
                side[owner == problem] = rng.permutation(side[owner == problem])
        found.append(((side @ counts) ** 2 / np.maximum(counts.sum(0), 1)).sum())
    return float(np.mean(np.array(found) >= found[0] - 1e-9))


class Samplers:
    """The arms of `generate` on one model and one file of prompts.

    An arm is called with (new_tokens, seed) and returns a function that gives its completions,
    [(problem, ids)]: turning them into lists is not measured.
    """

    def __init__(self, bench, name):
        self.bench, self.size = bench, SIZES[name]
        self.folder, self.path = make_folder(bench, name)
        options = generate.check_model(self.folder)
        self.tokenizer = generate.load_tokenizer(self.folder, options)
        load = (self.folder, bench.dtype, bench.device, options)
        self.model, self.other = generate.load_model(*load), generate.load_model(*load)
        generate.choose_attention(self.model, bench.device)  # the other keeps transformers' own
        self.problems = generate.load_problems(self.path)
        self.ends = [] if self.size.config else generate.end_ids(self.model, self.tokenizer)
        self.prompts = generate.encode(self.problems, self.tokenizer, self.model.config,
                                       self.size.new_tokens)
        self.longest = max(map(len, self.prompts))
        self.rows = [i for i in range(len(self.prompts)) for _ in range(self.size.n)]

    def cut(self, ids):
        """A completion up to its end-of-text token."""
        last = [k for k, one in enumerate(ids) if one in self.ends][:1]
        return ids[:last[0] + 1] if last else ids

    def chunks(self, **more):
        """generate.py's flags and its chunks."""
        args = generate.parse_args(generate_flags(self.size, self.folder, self.path, "-", **more))
        lengths = [len(ids) for ids in self.prompts]
        return args, generate.chunks_of(lengths, self.size.n, args.max_new_tokens,
                                        args.max_batch_tokens)

    def run_chunk(self, chunk, model, args):
        return generate.run_chunk(chunk, self.problems, self.prompts, model, self.tokenizer,
                                  self.ends, args)

    def ours(self, new_tokens, seed, model=None):
        args, chunks = self.chunks(max_new_tokens=new_tokens, seed=seed)
        lines = [self.run_chunk(chunk, model or self.model, args) for chunk in chunks]
        return lambda: [(problem, json.loads(line)["completion_ids"])
                        for chunk, part in zip(chunks, lines)
                        for (problem, _), line in zip(chunk, part)]

    def processes(self, new_tokens, seed):
        """One process a core, as torchrun starts them; forked, since loading is not measured."""
        ranks, children, out = self.bench.threads, [], self.bench.fresh("chunk")
        budget = -(-len(self.rows) // ranks) * (self.longest + new_tokens)  # a chunk a process
        args, chunks = self.chunks(max_new_tokens=new_tokens, seed=seed, max_batch_tokens=budget)
        for rank in range(ranks):
            children.append(os.fork())
            if not children[-1]:
                torch.set_num_threads(1)
                for number in range(rank, len(chunks), ranks):
                    with open(f"{out}-{number}", "w") as file:
                        file.writelines(self.run_chunk(chunks[number], self.model, args))
                os._exit(0)
        for child in children:
            os.waitpid(child, 0)
        return lambda: [(0, row["completion_ids"]) for number in range(len(chunks))
                        for *_, row in read_rows(f"{out}-{number}")]

    def settings(self, new_tokens):
        return transformers.GenerationConfig(
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=1,
            max_new_tokens=new_tokens, eos_token_id=self.ends or None)

    def huggingface(self, new_tokens, seed, batch):
        """`model.generate` on padded batches."""
        torch.manual_seed(seed)
        found, device = [], self.bench.device
        for start in range(0, len(self.rows), batch):
            part = [self.prompts[i] for i in self.rows[start:start + batch]]
            longest = max(map(len, part))
            ids = [[1] * (longest - len(one)) + one for one in part]
            mask = [[0] * (longest - len(one)) + [1] * len(one) for one in part]
            sampled = self.other.generate(
                input_ids=torch.tensor(ids, device=device),
                attention_mask=torch.tensor(mask, device=device),
                generation_config=self.settings(new_tokens))
            found += sampled[:, longest:].tolist()
        return lambda: [(problem, self.cut(ids)) for problem, ids in zip(self.rows, found)]

    def continuous(self, new_tokens, seed):
        """`generate_batch`."""
        torch.manual_seed(seed)
        config = transformers.ContinuousBatchingConfig(return_logprobs=False)
        if self.bench.device == "cpu":  # by itself it would size its cache by a GPU's memory
            pages = -(-(self.longest + new_tokens) // 256)
            config.num_blocks = pages * len(self.rows) + 8
            config.max_batch_tokens = max(256, len(self.rows))
        found = self.other.generate_batch(
            [self.prompts[i] for i in self.rows], generation_config=self.settings(new_tokens),
            continuous_batching_config=config, progress_bar=False)
        if len(found) < len(self.rows):
            raise RuntimeError(f"{len(self.rows) - len(found)} of {len(self.rows)} rows did not "
                               "come back")
        return lambda: [(0, one.generated_tokens) for one in found.values()]


def timed(bench, arm, *args):
    """(completions, result) of an arm."""
    meter = Meter(bench.device).start()
    read = arm(*args)
    meter.stop()
    completions = read()
    return completions, meter.result(sum(len(ids) for _, ids in completions))


def bench_generate(bench, name):
    samplers = Samplers(bench, name)
    size, model, prompts = samplers.size, samplers.model, samplers.prompts
    # 1. Warm-up, in which the batch size is chosen at which model.generate is fastest.
    warm = max(1, size.new_tokens // 4)
    timed(bench, samplers.ours, warm, 0)
    batch = max(size.batches, key=lambda batch: bench.speed(
        timed(bench, samplers.huggingface, warm, 0, batch)[1]))
    peer = functools.partial(samplers.huggingface, batch=batch)
    arms = {"generate.py": samplers.ours, f"model.generate, batch {batch}": peer,
            "generate_batch": samplers.continuous}
    if generate.attention_of(model) == "shared":
        arms["generate.py --attention model"] = functools.partial(samplers.ours,
                                                                 model=samplers.other)
    if bench.device == "cpu" and bench.threads > 1:
        arms[f"generate.py, {bench.threads} processes"] = samplers.processes
    found = {arm: [] for arm in arms}
    try:
        timed(bench, samplers.continuous, warm, 0)
    except Exception as error:  # it is made for GPUs; whatever it raises belongs into the table
        found["generate_batch"] = f"{type(error).__name__}: {error}"[:200]
    # 2. The rounds.
    work, machine, pooled = [], [], {"generate.py": [], f"model.generate, batch {batch}": []}
    for seed in range(1, bench.rounds + 1):
        machine.append(rates(bench))
        for arm, sampler in arms.items():
            if isinstance(found[arm], str):
                continue
            completions, result = timed(bench, sampler, size.new_tokens, seed)
            found[arm].append(result)
            if arm == "generate.py":
                lengths = [(len(ids), [len(own) for problem, own in completions if problem == i])
                           for i, ids in enumerate(prompts)]
                work.append(needed(model.config, lengths, model.dtype.itemsize, False))
            if arm in pooled:
                pooled[arm] += completions
    bench.add("generate", name, found, work, machine,
              same_tokens_p=same_tokens(*pooled.values(), len(prompts)))


# ---- update: against a plain one -----------------------------------------------------------------
def plain_update(model, optimizer, rows, budget):
    """A GRPO update as one writes it first.

    rows: scored rollouts, one half of each group right, so that advantages are 1 and -1.
    Micro-batches of at most `budget` tokens, padding included, as in train.py.
    """
    device, tokens = model.device, sum(len(row["completion_ids"]) for row in rows)
    texts = [row["prompt_ids"] + row["completion_ids"] for row in rows]
    per = max(1, budget // max(map(len, texts)))
    for start in range(0, len(rows), per):
        part, longest = rows[start:start + per], max(map(len, texts[start:start + per]))
        ids, mask, wanted = (torch.zeros(len(part), longest, dtype=torch.long) for _ in range(3))
        for i, (row, text) in enumerate(zip(part, texts[start:])):
            ids[i, :len(text)], mask[i, :len(text)] = torch.tensor(text), 1
            wanted[i, len(row["prompt_ids"]):len(text)] = 1
        ids, mask, wanted = ids.to(device), mask.to(device), wanted[:, 1:].to(device)
        advantage = torch.tensor([2 * row["reward"] - 1 for row in part], device=device)[:, None]
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu"):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        logp = logits[:, :-1].float().log_softmax(-1)  # (rows, longest - 1, vocab)
        with torch.no_grad():
            entropy = -(logp.exp() * logp).sum(-1)
        chosen = logp.gather(-1, ids[:, 1:, None]).squeeze(-1)
        ratio = (chosen - chosen.detach()).exp()
        loss = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.25) * advantage)
        ((loss * wanted).sum() / tokens).backward()
        del logits, logp, entropy, chosen
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def at_rest(optimizer, gradients):
    """The state between two updates: moments of a first step and, if wanted, gradients of zero."""
    for group in optimizer.param_groups:
        for weight in group["params"]:
            weight.grad = torch.zeros_like(weight) if gradients else None
            optimizer.state[weight] = {
                "step": torch.ones((), device=weight.device),
                "exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}


def run_train(bench, meter, folder, model, tokenizer, rollouts, gradients, **more):
    """train.py on a model that is loaded already and is not saved.

    The running `meter` leaves out what is replaced.
    """
    def begin(optimizer, policy, folder):
        at_rest(optimizer, gradients)
        meter.base, meter.extra = None, 0
        return 1

    replaced = {"load_tokenizer": lambda *_: tokenizer,
                "load_optimizer": begin, "save_round": lambda *_: None,
                "publish": lambda *_: None, "describe": train.describe, **more}
    replaced = {name: meter.outside(function) for name, function in replaced.items()}
    unchecked = mock.patch.object(train.Policy, "check", meter.outside(lambda *_: None))
    loaded = mock.patch.object(policies, "load_model", meter.outside(lambda *_: model))
    flags = ["--model", folder, "--rollouts", rollouts, "--out", bench.fresh("round"),
             "--temperature", "1", "--device", bench.device.split(":")[0]]
    with mock.patch.multiple(train, **replaced), unchecked, loaded:
        with contextlib.redirect_stderr(io.StringIO()):
            train.main(train.parse_args(flags))
    model.zero_grad(set_to_none=True)


def load_learner(bench, folder):
    """The policy as train.py starts from it, and its tokenizer."""
    options = train.check_model(folder)
    model = policies.load_model(folder, torch.float32, bench.device, options)
    return model, train.load_tokenizer(folder, options)


def bench_update(bench, name):
    size, (folder, path) = SIZES[name], make_folder(bench, name)
    model, tokenizer = load_learner(bench, folder)
    prompts = [tokenizer(row["prompt"])["input_ids"] for *_, row in read_rows(path)]
    rollouts, n = bench.fresh("scored.jsonl"), size.update_n or size.n
    # The embedded model's answers have 7 to 19 tokens; a random model's fill all room.
    lengths = (size.new_tokens, size.new_tokens) if size.config else (7, 19)
    rows = write_scored(rollouts, prompts, n, model.config.vocab_size, lengths)
    tokens = sum(len(row["completion_ids"]) for row in rows)
    work = needed(model.config, groups_of(rows, n), 4, True)
    flags = ["--model", folder, "--rollouts", rollouts, "--out", "-"]
    budget = train.parse_args(flags).micro_batch_tokens  # the same for both
    arms, machine = {"train.py": [], "plain PyTorch": []}, []
    for _ in range(bench.rounds + 1):
        machine.append(rates(bench))
        meter = Meter(bench.device).start()
        run_train(bench, meter, folder, model, tokenizer, rollouts, True,
                  load_rollouts=train.load_rollouts)
        meter.stop()
        arms["train.py"].append(meter.result(tokens))

        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
        at_rest(optimizer, gradients=True)
        meter = Meter(bench.device).start()
        plain_update(model, optimizer, rows, budget)
        meter.stop()
        model.zero_grad(set_to_none=True)
        del optimizer
        arms["plain PyTorch"].append(meter.result(tokens))
    arms = {arm: results[1:] for arm, results in arms.items()}
    bench.add("update", name, arms, [work] * bench.rounds, machine[1:])


# ---- step: against TRL ---------------------------------------------------------------------------
def our_step(bench, meter, size, folder, path, sampler, learner, tokenizer, seed):
    """generate.py, score.py and train.py with their files, on loaded models. The rollouts."""
    rollouts, scored = bench.fresh("rollouts.jsonl"), bench.fresh("scored.jsonl")
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        with mock.patch.multiple(generate, load_model=meter.outside(lambda *_: sampler),
                                 load_tokenizer=meter.outside(lambda *_: tokenizer),
                                 describe=meter.outside(generate.describe)):
            meter.start()
            flags = generate_flags(size, folder, path, rollouts, seed=seed)
            generate.main(generate.parse_args(flags))
        with mock.patch.object(score, "describe", meter.outside(score.describe)):
            score.main(score.parse_args([rollouts, "--out", scored]))
    run_train(bench, meter, folder, learner, tokenizer, scored, False)
    meter.stop()
    return [row for *_, row in read_rows(rollouts)]


def bench_step(bench, name):
    size, (folder, path) = SIZES[name], make_folder(bench, name)
    learner, tokenizer = load_learner(bench, folder)
    sampler = generate.load_model(folder, bench.dtype, bench.device, generate.check_model(folder))
    results, machine, work = [], [], []

    def ours(seed):
        meter = Meter(bench.device)
        rows = our_step(bench, meter, size, folder, path, sampler, learner, tokenizer, seed)
        tokens = sum(len(row["completion_ids"]) for row in rows)
        results.append(meter.result(tokens))
        sizes = learner.config, groups_of(rows, size.n), sampler.dtype.itemsize
        (flop, read), (trained, _) = needed(*sizes, False), needed(*sizes, True)
        rate = machine[-1]
        # As products, the reading that the sampling waits for included.
        work.append((trained + max(flop, read * rate["flop_per_s"] / rate["bytes_per_s"]), 0))

    try:
        import datasets
        import trl
    except ImportError as error:
        for seed in range(bench.rounds + 1):
            machine.append(rates(bench))
            ours(seed)
        theirs = f"not installed ({error})"
    else:
        problems = [row for *_, row in read_rows(path)]
        data = datasets.Dataset.from_list(
            [{key: row[key] for key in ("prompt", "numbers", "target")} for row in problems])
        theirs = trl_rounds(bench, size, data, learner, tokenizer, machine, ours, trl)[1:]
    arms = {"generate.py + score.py + train.py": results[1:], "TRL": theirs}
    bench.add("step", name, arms, work[1:], machine[1:])


def trl_rounds(bench, size, data, learner, tokenizer, machine, ours, trl):
    """The results of GRPOTrainer's steps on a copy of the model, each followed by one of ours."""
    results, tokens = [], []

    def reward(completions, completion_ids, numbers, target, **_):
        tokens.append(sum(map(len, completion_ids)))
        rows = (countdown.Row("a", 0, text, "stop", tuple(one), goal)
                for text, one, goal in zip(completions, numbers, target))
        return [float(countdown.verify(row.completion, row).reason == "ok") for row in rows]

    class InTurns(transformers.TrainerCallback):
        def on_step_begin(self, *args, **flags):
            machine.append(rates(bench))
            self.meter = Meter(bench.device).start()

        def on_step_end(self, args, state, control, **flags):
            self.meter.stop()
            results.append(self.meter.result(tokens.pop()))
            ours(state.global_step)

    config = trl.GRPOConfig(
        # the algorithm, as in train.py --method grpo
        learning_rate=1e-6, lr_scheduler_type="constant", weight_decay=0.01, num_iterations=1,
        beta=0.0, epsilon=0.2, epsilon_high=0.25, loss_type="dapo", scale_rewards="group",
        temperature=1.0, top_p=1.0, top_k=0,
        # the work, all rows of a step at once
        per_device_train_batch_size=size.prompts * size.n, gradient_accumulation_steps=1,
        num_generations=size.n, max_completion_length=size.new_tokens,
        max_steps=bench.rounds + 1, gradient_checkpointing=False,
        # the machine
        bf16=bench.device != "cpu", use_cpu=bench.device == "cpu", dataloader_pin_memory=False,
        output_dir=bench.fresh("trl"), report_to="none", logging_strategy="no",
        save_strategy="no", disable_tqdm=True)
    trainer = trl.GRPOTrainer(model=copy.deepcopy(learner), reward_funcs=reward, args=config,
                              processing_class=tokenizer, callbacks=[InTurns()],
                              train_dataset=data)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    return results


# ---- Main ----------------------------------------------------------------------------------------
MEASURES = {"generate": bench_generate, "update": bench_update, "step": bench_step}


def main(args):
    torch.set_num_threads(args.threads)
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(folder, args.device, args.rounds, args.threads, args.embedded)
        for part in args.only:
            for size in args.sizes:
                MEASURES[part](bench, size)
                report = save(args.out, bench.entries)  # it is long: what is measured is kept
    print_arms(bench.entries)
    return report


if __name__ == "__main__":
    main(ARGS)
