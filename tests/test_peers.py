"""Peers as oracles: one step of TRL's GRPOTrainer on the same rollouts has the same gradient.

    python -m venv /tmp/peers
    python -c 'import site; print(site.getsitepackages()[0])' \
        > /tmp/peers/lib/python3.11/site-packages/project.pth
    /tmp/peers/bin/pip install trl && /tmp/peers/bin/python -m pytest -m slow tests/test_peers.py

TRL is no dependency: install it into an environment of its own; without it the tests are skipped.
"""
import pytest
import torch

import train
from conftest import forced, load
from test_train import RIVALS, distance, run, write

GROUPS, N = 4, 4
GAMMA_P, GAMMA_N = 0.3, 0.1
DS = f"--method ds-grpo --gamma-p {GAMMA_P} --gamma-n {GAMMA_N}"
NO_STD = "--adv-norm none"
MASK = {"mask_truncated_completions": True}
# Flags of train.py, settings of TRL, and whose log-probs pi_old's are: the policy's own, or
# another's, so that rho is clipped.
CASES = {
    "grpo": (f"--method grpo {NO_STD}", {}, "policy"),
    "clipped": (f"--method grpo {NO_STD}", {}, "other"),
    "masked": (f"--method grpo {NO_STD} --truncated mask", MASK, "policy"),
    # plain k3; its default multiplies it by rho
    "kl": (f"--method grpo {NO_STD} --kl-coef 0.3",
           {"beta": 0.3, "use_bias_correction_kl": False}, "policy"),
    "entropy": (f"--method grpo {NO_STD} --entropy-coef 0.2", {"entropy_coef": 0.2}, "policy"),
    "ds-token": (f"{DS} {NO_STD}", {}, "policy"),
    "ds-token clipped": (f"{DS} {NO_STD}", {}, "other"),
    "ds-mean": (f"{DS} {NO_STD} --smooth-level mean", {}, "policy"),
    "ds-reward": (f"{DS} --smooth-level reward", {}, "policy"),
    "ds-reward masked": (f"{DS} --smooth-level reward --truncated mask", MASK, "policy"),
    # its epsilon_high is the largest rho, not what is above 1
    "cispo": (f"--method {RIVALS}:cispo", {"loss_type": "cispo", "epsilon_high": 1.25}, "other"),
}


def make_rows(policy, eos):
    """Rollouts and prompts of unequal lengths, some truncated, with the policy's log-probs; the
    last group is all right."""
    generator, rows = torch.Generator().manual_seed(0), []

    def ids(low, high):
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(3, policy.config.vocab_size, (length,), generator=generator).tolist()

    for group in range(GROUPS):
        prompt = ids(3, 9)
        for sample in range(N):
            truncated = sample == group
            correct = (sample * (2 * group + 1)) % N == 1 or group == GROUPS - 1
            completion = ids(1, 12) + [eos] * (not truncated)
            with torch.no_grad():
                logp = forced(policy, prompt, completion, 1)[range(len(completion)), completion]
            rows.append({"id": f"g{group}", "sample": sample, "prompt_ids": prompt,
                         "completion_ids": completion, "logprobs": logp.tolist(),
                         "finish_reason": "length" if truncated else "stop",
                         "correct": correct, "reward": float(correct)})
    return rows


def for_trl(flags, rows):
    """What a case adds to TRL's own objective: (the reward of each row, what is added to its
    advantage at each token or None)."""
    rewards = [row["reward"] for row in rows]
    terms = [[(-GAMMA_P if row["correct"] else GAMMA_N) * logp for logp in row["logprobs"]]
             for row in rows]
    means = [sum(of_row) / len(of_row) for of_row in terms]
    if "cispo" in flags:  # GRPO's advantage with the population's standard deviation
        std = torch.tensor(rewards).double().view(GROUPS, N).std(1, correction=0)
        return (torch.tensor(rewards) / (std + 1e-6).repeat_interleave(N)).tolist(), None
    if "reward" in flags:
        return [reward + mean for reward, mean in zip(rewards, means)], None
    if "mean" in flags:
        terms = [[mean] * len(of_row) for mean, of_row in zip(means, terms)]
    return rewards, terms if "ds-grpo" in flags else None


def update_of_the_rows(job, *arguments, update_step=train.update_step):
    """Stands in for train.update_step: pi_old is that of whoever sampled the rows, as in every
    update but a round's first."""
    job.old_logp = {i: torch.as_tensor(row.logprobs) for i, row in enumerate(job.rows)}
    return update_step(job, *arguments)


def trl_gradient(tmp_path, model, other, rows, flags, sampler, settings):
    """{weight.exp_avg: gradient} of GRPOTrainer's first step on the same rollouts; its reference
    model is `other`."""
    import trl
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback

    gradients = {}
    rewards, added = for_trl(flags, rows)

    def rollouts(prompts, trainer):
        left = {prompt: [i for i, row in enumerate(rows) if row["id"] == prompt]
                for prompt in prompts}
        number = [left[prompt].pop(0) for prompt in prompts]
        return {"prompt_ids": [rows[i]["prompt_ids"] for i in number],
                "completion_ids": [rows[i]["completion_ids"] for i in number],
                "logprobs": None, "number": number}

    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **_):
            gradients.update((f"{name}.exp_avg", weight.grad.clone())
                             for name, weight in model.named_parameters())

    class WithOurAdvantage(trl.GRPOTrainer):
        """GRPOTrainer whose batch is given pi_old, and an advantage per token: it takes one as well
        as one per completion."""
        def _generate_and_score_completions(self, inputs):
            batch = super()._generate_and_score_completions(inputs)

            def table(values):
                values = [torch.tensor(values[one["number"]]) for one in inputs]
                return torch.nn.utils.rnn.pad_sequence(values, batch_first=True)

            if sampler == "other":
                batch["old_per_token_logps"] = table([row["logprobs"] for row in rows])
            if added:
                batch["advantages"] = batch["advantages"][:, None] + table(added)
            return batch

    config = trl.GRPOConfig(**{
        "output_dir": str(tmp_path / "trl"), "per_device_train_batch_size": GROUPS * N,
        "num_generations": N, "max_steps": 1, "loss_type": "dapo", "scale_rewards": "none",
        "epsilon": 0.2, "epsilon_high": 0.25, "temperature": 1.0, "max_completion_length": 16,
        "max_grad_norm": 0.0, "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
        "report_to": "none", "save_strategy": "no", "disable_tqdm": True, **settings})
    trainer = WithOurAdvantage(
        model=load(model), args=config,
        reward_funcs=lambda completions, number, **_: [rewards[i] for i in number],
        processing_class=AutoTokenizer.from_pretrained(model), rollout_func=rollouts,
        callbacks=[Gradients()],
        train_dataset=Dataset.from_list([{"prompt": f"g{group}"} for group in range(GROUPS)]))
    if config.beta:
        trainer.ref_model.load_state_dict(load(other).state_dict())
    trainer.train()
    return gradients


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_gradient_of_one_update_is_trls(name, tiny_model, tmp_path, monkeypatch):
    pytest.importorskip("trl")
    from transformers import AutoTokenizer
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    flags, settings, sampler = CASES[name]
    policies = {"policy": load(tiny_model), "other": load(tiny_model)}
    other = str(tmp_path / "other")  # a reference and a sampler that is not the policy
    with torch.no_grad():
        for weight in policies["other"].parameters():
            weight.mul_(1.05)
    policies["other"].save_pretrained(other)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.save_pretrained(other)
    rows = make_rows(policies[sampler], tokenizer.eos_token_id)
    if sampler == "other":
        monkeypatch.setattr(train, "update_step", update_of_the_rows)
    reference = f" --ref-model {other}" if "kl" in flags else ""
    ours = run(tiny_model, write(tmp_path / "scored.jsonl", rows, None), tmp_path / "out",
               "--temperature", 1, "--max-grad-norm", 1e9, "--device", "cpu",
               *(flags + reference).split())
    theirs = trl_gradient(tmp_path, tiny_model, other, rows, flags, sampler, settings)
    clipped = (ours.metrics[0]["clip_high_frac"] > 0, ours.metrics[0]["clip_low_frac"] > 0)
    assert clipped == (sampler == "other", sampler == "other" and name != "cispo")
    assert torch.cat([one.flatten() for one in theirs.values()]).norm() > 1e-3
    relative = distance(ours.gradient, theirs)
    print(f"{name}: relative difference {relative:.1e}")
    assert relative < 1e-5
