"""Pitfall 5: text that is tokenised again gives other ids; train.py works on the ids in the file
and never tokenises."""
import json

import pytest
import transformers

import train

NAMES = ("__call__", "encode", "encode_plus", "_encode_plus", "tokenize")
OF_TIME = ("tokens_per_s", "peak_mem_bytes")


def rows(text):
    return [{"id": "a", "sample": sample, "task": "countdown", "completion": text,
             "prompt_ids": [4, 21, 5], "completion_ids": [6, 7, 0][:2 + sample],
             "logprobs": [-1.0] * (2 + sample), "finish_reason": "stop", "correct": bool(sample),
             "reward": float(sample)} for sample in (0, 1)]


def test_train_never_tokenises(tiny_model, tmp_path, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("train.py tokenised a text")

    for name in NAMES:
        if hasattr(transformers.PreTrainedTokenizerBase, name):
            monkeypatch.setattr(transformers.PreTrainedTokenizerBase, name, forbidden)
    metrics, scored = [], tmp_path / "scored.jsonl"
    for text in ("1+2", "\ufffd no such text \u00e9"):
        scored.write_text("".join(json.dumps(row) + "\n" for row in rows(text)))
        out = tmp_path / f"round-{len(metrics)}"
        train.main(train.parse_args(["--model", tiny_model, "--rollouts", str(scored), "--out",
                                     str(out), "--temperature", "1"]))
        line = json.loads((out / "metrics.jsonl").read_text())
        metrics.append({key: value for key, value in line.items() if key not in OF_TIME})
    assert metrics[0] == metrics[1] and metrics[0]["tokens"] == 5
    with pytest.raises(AssertionError, match="tokenised"):  # the trap itself works
        transformers.AutoTokenizer.from_pretrained(tiny_model)("1+2")
