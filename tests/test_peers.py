"""Peers as oracles: TRL's GRPOTrainer takes one step on the same rollouts, and the gradients are compared.

    python -m venv /tmp/peers && echo "$(python -c 'import site; print(site.getsitepackages()[0])')" \
        > /tmp/peers/lib/python3.11/site-packages/project.pth
    /tmp/peers/bin/pip install trl && /tmp/peers/bin/python -m pytest -m slow tests/test_peers.py

TRL is no dependency: it is installed into an environment of its own, and where it is missing the tests are skipped.
"""
import json

import pytest
import torch
from safetensors.torch import load_file

import train

GROUPS, N = 4, 4
GAMMA_P, GAMMA_N = 0.3, 0.1


def write_rows(path, vocab):
    """Rollouts of unequal lengths with prompts of unequal lengths; every group but the last has right and wrong ones."""
    generator, rows = torch.Generator().manual_seed(0), []

    def ids(low, high):
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(3, vocab, (length,), generator=generator).tolist()

    for group in range(GROUPS):
        prompt = ids(3, 9)
        for sample in range(N):
            completion = ids(1, 12)
            correct = (sample * (group + 1)) % N == 1 or group == GROUPS - 1
            rows.append({"id": f"g{group}", "sample": sample, "prompt_ids": prompt, "completion_ids": completion,
                         "logprobs": [-1.0] * len(completion), "finish_reason": "stop", "correct": correct, "reward": float(correct)})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def load(folder):
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def our_gradient(tmp_path, model, rollouts, flags):
    """{weight: gradient} of train.py's one update: after the first step AdamW's first moment is a tenth of it."""
    out = str(tmp_path / "out")
    train.main(train.parse_args(["--model", model, "--rollouts", str(rollouts), "--out", out, "--temperature", "1", "--updates", "1",
                                 "--adv-norm", "none", "--max-grad-norm", "1e9", "--device", "cpu", *flags.split()]))
    moments = load_file(f"{out}/optimizer.safetensors")
    return {name.removesuffix(".exp_avg"): 10 * moment for name, moment in moments.items() if name.endswith(".exp_avg")}


def trl_gradient(tmp_path, model, other, rows, tokenizer, smoothed, **settings):
    """{weight: gradient} of GRPOTrainer's first step on the same rollouts; its reference model is `other`."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import TrainerCallback

    left, gradients = {}, {}

    def rollouts(prompts, trainer):
        found = []
        for prompt in prompts:
            own = left.setdefault(prompt, [row for row in rows if row["id"] == prompt])
            found.append(own.pop(0))
        return {"prompt_ids": [row["prompt_ids"] for row in found], "completion_ids": [row["completion_ids"] for row in found],
                "logprobs": None, "verdict": [row["reward"] for row in found]}

    def reward(completions, verdict, **_):
        return verdict

    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **_):
            gradients.update((name, weight.grad.clone()) for name, weight in model.named_parameters())

    class Smoothed(trl.GRPOTrainer):
        """GRPOTrainer with Eq. 6: it takes an advantage a token as well as one a completion."""
        def _generate_and_score_completions(self, inputs):
            batch = super()._generate_and_score_completions(inputs)
            ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
            mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
            with torch.no_grad():
                logp, *_ = self._get_per_token_logps_and_entropies(self.model, ids, mask, batch["completion_ids"].shape[1])
            verdict = torch.tensor([one["verdict"] for one in inputs])[:, None]
            batch["advantages"] = batch["advantages"][:, None] + torch.where(verdict > 0, -GAMMA_P, GAMMA_N) * logp
            return batch

    config = trl.GRPOConfig(
        output_dir=str(tmp_path / "trl"), per_device_train_batch_size=GROUPS * N, num_generations=N, max_steps=1, loss_type="dapo",
        scale_rewards="none", epsilon=0.2, epsilon_high=0.25, temperature=1.0, max_completion_length=16, max_grad_norm=0.0,
        use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", save_strategy="no", disable_tqdm=True, **settings)
    trainer = (Smoothed if smoothed else trl.GRPOTrainer)(
        model=load(model), reward_funcs=reward, args=config, processing_class=tokenizer, rollout_func=rollouts, callbacks=[Gradients()],
        train_dataset=Dataset.from_list([{"prompt": f"g{group}"} for group in range(GROUPS)]))
    if config.beta:
        trainer.ref_model.load_state_dict(load(other).state_dict())
    trainer.train()
    return gradients


@pytest.mark.slow
@pytest.mark.parametrize("flags, smoothed, settings", [
    ("--method grpo", False, {}),
    ("--method grpo --kl-coef 0.3", False, {"beta": 0.3, "use_bias_correction_kl": False}),  # plain k3; its default multiplies it by rho
    ("--method grpo --entropy-coef 0.2", False, {"entropy_coef": 0.2}),
    (f"--method ds-grpo --gamma-p {GAMMA_P} --gamma-n {GAMMA_N}", True, {}),
], ids=["grpo", "kl", "entropy", "ds-token"])
def test_gradient_of_one_update_is_trls(flags, smoothed, settings, tiny_model, tmp_path, monkeypatch):
    pytest.importorskip("trl")
    from transformers import AutoTokenizer
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    policy = load(tiny_model)
    other = str(tmp_path / "other")  # a reference that is not the policy
    with torch.no_grad():
        for weight in policy.parameters():
            weight.mul_(1.05)
    policy.save_pretrained(other)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.save_pretrained(other)
    rows = write_rows(tmp_path / "scored.jsonl", policy.config.vocab_size)
    if "kl" in flags:
        flags += f" --ref-model {other}"
    ours = our_gradient(tmp_path, tiny_model, tmp_path / "scored.jsonl", flags)
    theirs = trl_gradient(tmp_path, tiny_model, other, rows, tokenizer, smoothed, **settings)
    assert ours.keys() == theirs.keys()
    one, two = (torch.cat([found[name].flatten().double() for name in sorted(ours)]) for found in (ours, theirs))
    assert two.norm() > 1e-3
    relative = float((one - two).norm() / two.norm())
    print(f"{flags.split(' --ref')[0]}: relative difference {relative:.1e}")
    assert relative < 1e-5
