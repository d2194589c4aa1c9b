"""Fixtures that all tests may use, and what several of them do with files and stages."""
import json
import os

# Before torch is imported, and for the processes that tests start: toy models are fastest on one
# thread, and only equal thread counts give equal bits.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest


def read(path):
    """The rows of a JSONL file."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def meta_of(path):
    with open(f"{path}.meta.json", encoding="utf-8") as file:
        return json.load(file)


def write(path, rows):
    """A JSONL file of these rows; its path."""
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def stage(module, *flags):
    """Run a stage in this process."""
    module.main(module.parse_args(list(map(str, flags))))


def refusal(capfd, call, *args, code=2):
    """The one line on stderr of a call that must end with this exit code."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as end:
        call(*args)
    line, = capfd.readouterr().err.splitlines()
    assert end.value.code == code
    return line


def set_rank(monkeypatch, rank, world=2):
    for name, value in {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank}.items():
        monkeypatch.setenv(name, str(value))


def load(folder):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def forced(model, prompt, completion, temperature):
    """log-softmax of logits / T (completion, vocab) of a pass over one row, without cache."""
    import torch

    ids = torch.tensor([[*prompt, *completion]])
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1:-1].float()
    return torch.log_softmax(logits / temperature, -1)


def byte_level_bpe(text, size, special, splits=None):
    """A tokenizers.Tokenizer trained on `text`; then it splits texts by `splits`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(text, trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(special), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    if splits:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    return tokenizer


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
    return write(str(tmp_path_factory.mktemp("prompts") / "prompts.jsonl"), [
        {"id": f"problem-{i}", "task": "countdown",
         "prompt": f"{' '.join(map(str, numbers))}={target}:", "numbers": numbers, "target": target,
         "n_solutions": len(countdown.solutions(numbers, target))}
        for i, (numbers, target) in enumerate(problems)])
