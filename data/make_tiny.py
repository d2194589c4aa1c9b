r"""Make the embedded models: Qwen2s of a million parameters that play Countdown, pre-trained from
scratch on random right answers.

The strong one, data/tiny-countdown/, in three phases towards larger targets (the first was stopped
after its snapshot first-3000):

    python -m data.make_tiny --out /tmp/first --max-target 100 --steps 6000 --save-every 1000
    python -m data.make_tiny --out /tmp/second --init /tmp/first-3000 --seed 1 --max-target 150 \
        --steps 1000 --lr 1e-3 --problems 80000
    python -m data.make_tiny --out data/tiny-countdown --init /tmp/second --seed 2 --steps 400 \
        --lr 6e-4 --problems 40000

The weak one, which is right in one of sixty samples, is the snapshot weak-250 of a
longer run, four minutes in, before its learning rate falls:

    python -m data.make_tiny --out /tmp/weak --steps 6000 --problems 40000 --save-every 250 \
        --threads 1

Every problem of the train split of data/countdown.py may be drawn. Its answer is drawn uniformly
among *all* its distinct solutions and written in a random order of terms and factors, so that the
base policy is diverse: it is that diversity which reinforcement learning then spends. Loss on the
answer and its end alone; AdamW, warm-up, cosine to a tenth.

Writes an ordinary Hugging Face folder (config, safetensors in fp32, character-level tokenizer),
made_from.json (the flags) and curve.jsonl: step, training loss, and the loss on problems of the
tune split. Nothing needs this script to run: both models stand in the repository.
"""
import itertools
import json
import math
import random
import time

from data import countdown  # the problems, their splits and the exact solver
from data.files import Parser


def parse_args(argv=None):
    parser = Parser(__file__, description=__doc__)
    parser.add_argument("--out", required=True, help="the folder to write")
    parser.add_argument("--init", help="start from this folder's weights (default: random ones)")
    for flag, default, help in [
            ("--seed", 0, "of the problems, the answers and the weights"),
            ("--save-every", 500, "steps between snapshots in OUT-STEP"),
            ("--max-number", 15, "numbers are 1..this"),
            ("--max-target", 300, "targets are 1..this"),
            ("--problems", 150_000, "distinct training problems"),
            ("--steps", 6000, "optimizer steps of --batch problems"),
            ("--batch", 256, "problems a step"),
            ("--lr", 2e-3, "peak learning rate"),
            ("--threads", 2, "CPU threads")]:
        parser.add_argument(flag, type=type(default), default=default,
                            help=f"{help} (default {default})")
    args = parser.parse_args(argv)
    parser.at_least(args, seed=0, save_every=1, max_number=1, max_target=1, problems=1, steps=1,
                    batch=1, threads=1)
    return parser.checked(args)


if __name__ == "__main__":
    ARGS = parse_args()  # before the heavy imports: --help and a wrong flag answer at once

import torch
from tqdm import tqdm
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer


def make_tokenizer():
    """One token a character; the end of text and the padding are tokens of their own.

    The class is that of the model's family, since AutoTokenizer gives every qwen2 folder this
    class, whatever the folder says. It works on bytes, whose spelling of the space is "\u0120"."""
    tokens = ["<|endoftext|>", "<|pad|>", "<|unk|>", *"0123456789+-*/()=:\u0120"]
    return Qwen2Tokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[],
                          eos_token="<|endoftext|>", pad_token="<|pad|>", unk_token="<|unk|>")


def make_model(vocab_size):
    return Qwen2ForCausalLM(Qwen2Config(
        vocab_size=vocab_size, hidden_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, intermediate_size=512, max_position_embeddings=256,
        tie_word_embeddings=True, eos_token_id=0, pad_token_id=1, bos_token_id=None))


def shuffled(text, rng):
    """The same solution (canonical text) with its terms and factors in a random order."""
    depths = list(itertools.accumulate((c == "(") - (c == ")") for c in text))
    outside = [(i, c) for i, c in enumerate(text) if not depths[i]]
    signs = [one for one in outside if one[1] in "+-"] or [one for one in outside if one[1] in "*/"]
    if not signs:
        return f"({shuffled(text[1:-1], rng)})" if text[0] == "(" else text
    top = "+" if signs[0][1] in "+-" else "*"
    starts, ends = [(-1, top), *signs], [*signs, (len(text), "")]
    blocks = [(sign, shuffled(text[i + 1:j], rng)) for (i, sign), (j, _) in zip(starts, ends)]
    rng.shuffle(blocks)
    # an expression cannot begin with - or /
    first = next(i for i, block in enumerate(blocks) if block[0] == top)
    blocks[0], blocks[first] = blocks[first], blocks[0]
    return blocks[0][1] + "".join(operator + part for operator, part in blocks[1:])


def solved(n, split, args):
    """[(numbers, target, all distinct solutions)] of `n` problems."""
    flags = countdown.parse_args(
        ["--out", "-", "--n", str(n), "--seed", str(args.seed), "--split", split,
         "--max-number", str(args.max_number), "--max-target", str(args.max_target)])
    found = []
    for problem in tqdm(countdown.problems(flags), f"{split} problems", n, disable=None):
        numbers, target = problem["numbers"], problem["target"]
        found.append((numbers, target, sorted(countdown.solutions(numbers, target))))
    return found


def batch_of(pool, size, rng, tokenizer):
    """`size` random problems of `pool` with answers: ids and labels (-100 on prompt and padding),
    both (size, length)."""
    rows = []
    for numbers, target, solutions in rng.choices(pool, k=size):
        order = " ".join(map(str, rng.sample(numbers, len(numbers))))
        prompt = countdown.TEMPLATES["plain"].format(numbers=order, target=target)
        rows.append((prompt, shuffled(rng.choice(solutions), rng)))
    prompts = tokenizer([prompt for prompt, _ in rows])["input_ids"]
    whole = tokenizer([prompt + answer for prompt, answer in rows])["input_ids"]
    length = max(map(len, whole)) + 1
    ids = torch.full((size, length), tokenizer.pad_token_id)
    labels = torch.full((size, length), -100)
    for i, (prompt, row) in enumerate(zip(prompts, whole)):
        row = torch.tensor(row + [tokenizer.eos_token_id])
        ids[i, :len(row)] = row
        labels[i, len(prompt):len(row)] = row[len(prompt):]
    return ids, labels


def loss_of(model, ids, labels):
    """Mean cross-entropy of the answers' tokens, in bf16 autocast over fp32 weights (1.5x here)."""
    with torch.autocast("cpu", torch.bfloat16):
        # right padding needs no mask: nothing looks ahead
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels[:, 1:].flatten())


def save(folder, model, tokenizer, args, step, curve):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with open(f"{folder}/made_from.json", "w") as file:
        made = {"script": "data/make_tiny.py", "flags": vars(args), "steps_done": step}
        json.dump(made, file, indent=1)
    with open(f"{folder}/curve.jsonl", "w") as file:
        file.writelines(json.dumps(line) + "\n" for line in curve)


def main(args):
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    rng = random.Random(args.seed)
    pool = solved(args.problems, "train", args)
    tokenizer = make_tokenizer()
    held_out = batch_of(solved(2000, "tune", args), 2000, random.Random(args.seed), tokenizer)
    if args.init:
        model = Qwen2ForCausalLM.from_pretrained(args.init, dtype=torch.float32)
    else:
        model = make_model(len(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98),
                                  weight_decay=0.01, fused=True)

    def factor(step):  # 200 steps of warm-up; a cosine from 1 to a tenth
        return min(1, (step + 1) / 200) * (0.55 + 0.45 * math.cos(math.pi * step / args.steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    curve, losses, began = [], [], time.monotonic()
    for step in tqdm(range(1, args.steps + 1), "steps", disable=None):
        loss = loss_of(model, *batch_of(pool, args.batch, rng, tokenizer))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        losses.append(loss.item())
        if step % args.save_every == 0 or step == args.steps:
            with torch.no_grad():
                tune_loss = loss_of(model, *held_out).item()
            curve.append({"step": step, "loss": sum(losses) / len(losses), "tune_loss": tune_loss,
                          "seconds": round(time.monotonic() - began)})
            losses.clear()
            tqdm.write(json.dumps(curve[-1]))
            folder = args.out if step == args.steps else f"{args.out}-{step}"
            save(folder, model, tokenizer, args, step, curve)


if __name__ == "__main__":
    main(ARGS)
