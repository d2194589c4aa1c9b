"""Fixtures that all tests may use."""
import json
import os

# Before torch is imported, and for the processes that tests start: toy models are fastest on one
# thread, and only equal thread counts give equal bits.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A folder (str) of a random Qwen2 with the tokenizer of data/make_tiny.py; read only."""
    import torch

    from data import make_tiny

    folder, tokenizer = str(tmp_path_factory.mktemp("models") / "tiny"), make_tiny.make_tokenizer()
    torch.manual_seed(0)
    model = make_tiny.make_model(len(tokenizer))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(4)  # at first all tokens are about equally likely: too easy for a test
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def prompts(tmp_path_factory):
    """A JSONL file (str) of 12 Countdown problems for it, whose prompts have different lengths."""
    from data import countdown

    problems = [([1, 2], 3), ([10, 2], 5), ([4, 6], 24), ([1, 2, 3], 7), ([5, 5, 5], 30),
                ([12, 3, 4], 16), ([2, 7, 9], 81), ([1, 2, 3, 4], 24), ([8, 8, 3, 3], 24),
                ([10, 11, 12, 13], 45), ([15, 14, 1, 2], 28), ([7, 7, 7, 7], 49)]
    path = str(tmp_path_factory.mktemp("prompts") / "prompts.jsonl")
    with open(path, "w", encoding="utf-8") as file:
        for i, (numbers, target) in enumerate(problems):
            row = {"id": f"problem-{i}", "task": "countdown",
                   "prompt": f"{' '.join(map(str, numbers))}={target}:", "numbers": numbers,
                   "target": target, "n_solutions": len(countdown.solutions(numbers, target))}
            file.write(json.dumps(row) + "\n")
    return path
