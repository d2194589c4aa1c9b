"""data/shards.py: models that are built without weights, filled by rows and written by tensors."""
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from data import shards

RANKS = """
import sys, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM
from data import shards

shards.LARGEST_FILE = 20_000
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (dist.get_world_size(),))
for folder in sys.argv[1:]:  # a launch costs seconds a rank: one for all models
    with shards.without_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    for layer in model.get_decoder().layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    shards.fill(model, shards.tensor_files(folder, "model"))
    logits = model(input_ids=torch.arange(6)[None], use_cache=False).logits
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    weights = {name: weight for name, weight in model.state_dict().items() if name not in tied}
    shards.write(folder + "/out", "model", weights, {"format": "pt"})
    if dist.get_rank() == 0:
        save_file({"logits": logits.detach().contiguous()}, folder + "/logits.safetensors")
dist.barrier()  # no rank leaves while another still takes its part
dist.destroy_process_group()
"""


def llama(tied):
    """A toy Llama whose dimensions no number of ranks here divides."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=37, hidden_size=20, intermediate_size=50, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=tied)).eval()


def test_parameters_take_no_memory_and_buffers_are_real():
    config = llama(False).config
    with shards.without_weights():
        model = AutoModelForCausalLM.from_config(config)
    assert all(weight.is_meta for weight in model.parameters())
    assert torch.equal(model.model.rotary_emb.inv_freq, llama(False).model.rotary_emb.inv_freq)
    assert not any(weight.is_meta for weight in llama(False).parameters())  # and it is over


def test_the_bytes_are_those_of_save_file(tmp_path):
    tensors = {"b": torch.randn(3, 5), "a.x": torch.randn(7), "e": torch.zeros(0, 4), "ü": torch.ones(())}
    for dtype in (torch.float32, torch.bfloat16):
        cast = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        save_file(cast, tmp_path / "theirs", metadata={"format": "pt"})
        shards.write(str(tmp_path), "ours", cast, {"format": "pt"})
        assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize("ranks", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_filled_by_rows_and_written_by_tensors(tmp_path, ranks):
    models = {str(tmp_path / f"tied-{tied}"): llama(tied) for tied in (False, True)}
    for folder, model in models.items():
        model.save_pretrained(folder)
        os.mkdir(f"{folder}/out")
    (tmp_path / "ranks.py").write_text(RANKS)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "--"]
    subprocess.run([*launch, str(tmp_path / "ranks.py"), *models], check=True,
                   env={**os.environ, "PYTHONPATH": os.getcwd()}, capture_output=True)
    for folder, model in models.items():
        expected = model(input_ids=torch.arange(6)[None], use_cache=False).logits
        assert torch.equal(load_file(f"{folder}/logits.safetensors")["logits"], expected)
        shutil.copy(f"{folder}/config.json", f"{folder}/out")
        with open(f"{folder}/out/model.safetensors.index.json") as file:
            assert len(set(json.load(file)["weight_map"].values())) > 1
        again = AutoModelForCausalLM.from_pretrained(f"{folder}/out", dtype=torch.float32).state_dict()
        assert again.keys() == model.state_dict().keys()
        assert all(torch.equal(again[name], weight) for name, weight in model.state_dict().items())


def filled(folder):
    with shards.without_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    shards.fill(model, shards.tensor_files(str(folder), "model"))
    return model


def test_what_does_not_fit_is_refused(tmp_path):
    llama(False).save_pretrained(tmp_path)
    assert torch.equal(filled(tmp_path).lm_head.weight, llama(False).lm_head.weight)
    weights = load_file(tmp_path / "model.safetensors")
    for change, told in (({"lm_head.weight": torch.zeros(36, 20)}, r"lm_head.weight has the shape \[36, 20\], not \[37, 20\]"),
                         ({"lm_head.weight": torch.full((37, 20), float("nan"))}, "lm_head.weight is not finite"),
                         ({"lm_head.weight": None, "model.norm.weight": None}, "2 weights are missing, lm_head.weight among them")):
        save_file({name: tensor for name, tensor in {**weights, **change}.items() if tensor is not None}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=told):
            filled(tmp_path)
    assert shards.tensor_files(str(tmp_path), "optimizer") == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_is_seen_and_a_large_sum_is_no_reason(dtype):
    inf, nan, large = float("inf"), float("nan"), torch.finfo(dtype).max
    for values, finite in (([], True), ([0, 1], True), ([large, large], True), ([-large] * 3, True),
                           ([1, nan], False), ([inf, 1], False), ([inf, -inf], False), ([large, large, -inf], False)):
        assert shards.all_finite(torch.tensor(values, dtype=dtype)) == finite, values
