"""Model folders: check, load, save a round, the optimizer's moments."""
import json
import os
import re
import shutil

import torch
import transformers
from safetensors.torch import load_file, save_file

from data.files import fail

def check_model(name, trust_remote_code=False):
    """Refuse what can be seen to be no model before anything is loaded; return the options of every from_pretrained."""
    if os.path.isdir(name):
        if not os.path.exists(os.path.join(name, "config.json")):
            fail(f"{name}: no config.json in this folder: not a Hugging Face model")
        if not any(file.endswith(".safetensors") for file in os.listdir(name)):
            fail(f"{name}: no *.safetensors in this folder; other weight formats can run code and are refused")
    elif not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) or os.path.isdir(os.path.dirname(name)):
        fail(f"{name}: no such model folder (a Hub id is written owner/name)")
    return {"trust_remote_code": trust_remote_code, "local_files_only": os.path.isdir(name)}


def load(kind, name, options, **more):
    """kind.from_pretrained(name) from a folder or a Hub id; whatever a hostile or half-copied folder makes it raise is bad input."""
    try:
        return kind.from_pretrained(name, **options, **more)
    except Exception as error:
        fail(f"{name}: cannot be loaded: {type(error).__name__}: {error}")


def load_tokenizer(name, options):
    tokenizer = load(transformers.AutoTokenizer, name, options)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        fail(f"{name}: a tokenizer without a vocabulary: are its files missing?")
    return tokenizer


def load_model(name, dtype, device, options):
    """A causal language model in eval mode; safetensors only; every weight must be there and finite."""
    model, info = load(transformers.AutoModelForCausalLM, name, options, dtype=dtype, use_safetensors=True, output_loading_info=True)
    if info["missing_keys"]:
        fail(f"{name}: {len(info['missing_keys'])} weights are missing, {min(info['missing_keys'])} among them")
    for key, weight in model.state_dict().items():
        if not torch.isfinite(weight).all():
            fail(f"{name}: weight {key} is not finite")
    return model.to(device).eval()


def save_round(out, policy, tokenizer, optimizer, state, lines, source):
    """Fill the folder `out`: model, tokenizer, the original generation_config.json, optimizer moments, state and metrics.
    Under FSDP2 every rank takes part in gathering the shards; rank 0 keeps and writes them."""
    rank, kept = int(os.environ.get("RANK", 0)), {}

    def whole(tensor):
        if id(tensor) not in kept:  # tied weights stay one tensor, which save_pretrained writes once
            full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            kept[id(tensor)] = None if rank else full.detach().cpu().contiguous()
        return kept[id(tensor)]

    weights = {name: whole(weight) for name, weight in policy.model.state_dict(keep_vars=True).items()}
    moments = {f"{name}.{key}": whole(optimizer.state[weight][key]) for name, weight in policy.model.named_parameters()
               for key in ("exp_avg", "exp_avg_sq")}
    if rank:
        return
    policy.model.generation_config = transformers.GenerationConfig()  # a model's own may fail its library's checks: copied below
    try:
        policy.model.save_pretrained(out, state_dict=weights)
        tokenizer.save_pretrained(out)
        save_file(moments, f"{out}/optimizer.safetensors")
    except Exception as error:  # a full disk: where Rust writes, it is no OSError
        fail(f"{out}: cannot be written: {type(error).__name__}: {error}")
    original = transformers.utils.cached_file(source, "generation_config.json", _raise_exceptions_for_missing_entries=False)
    if original:
        shutil.copyfile(original, f"{out}/generation_config.json")
    else:
        os.remove(f"{out}/generation_config.json")
    with open(f"{out}/trainer_state.json", "w", encoding="utf-8") as file:
        json.dump(state, file, indent=1)
    with open(f"{out}/metrics.jsonl", "w", encoding="utf-8") as file:
        file.writelines(lines)


def load_optimizer(optimizer, policy, folder):
    """Put the moments of an earlier round into `optimizer`; the number of steps done, 0 if the folder is no round."""
    if not os.path.exists(f"{folder}/trainer_state.json"):
        return 0
    try:
        with open(f"{folder}/trainer_state.json", encoding="utf-8") as file:
            step = json.load(file)["step"]
        if type(step) is not int or step < 0:
            raise ValueError(f"step {step}")
        moments = load_file(f"{folder}/optimizer.safetensors")
        for name, weight in policy.model.named_parameters():
            optimizer.state[weight] = {"step": torch.tensor(float(step))}
            for key in ("exp_avg", "exp_avg_sq"):
                moment = moments[f"{name}.{key}"].to(weight.device)
                if moment.shape != weight.shape or not torch.isfinite(moment).all():
                    raise ValueError(f"{name}.{key} does not fit the model, or is not finite")
                if hasattr(weight, "device_mesh"):
                    moment = torch.distributed.tensor.distribute_tensor(moment, weight.device_mesh, weight.placements)
                optimizer.state[weight][key] = moment
    except Exception as error:  # a half-copied or damaged folder is bad input, whatever the libraries raise
        fail(f"{folder}: the optimizer cannot be carried on ({type(error).__name__}: {error}); mend it or give --reset-optimizer")
    if weight.device.type == "cuda":  # the fused optimizer counts on the device
        for moment in optimizer.state.values():
            moment["step"] = moment["step"].to(weight.device)
    return step
