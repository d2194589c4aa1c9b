"""Model folders: check, load, save a round, carry the optimizer's moments on.

Whatever a hostile, damaged or half-copied folder makes a library raise is bad input here: one line
on stderr, exit 2. Weights come from safetensors files alone; other formats can run code.
"""
import contextlib
import json
import os
import re
import shutil

import tokenizers
import torch
import transformers

from data.files import fail
from data.shards import all_finite, read_shard, tensor_files, write

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, of each weight
# Beginnings of the names of what only train.py reads in the folder of a round.
OF_TRAINING = ("optimizer", "trainer_state.json", "metrics.jsonl")


# ---- Checking and loading ------------------------------------------------------------------------
def check_model(name, trust_remote_code=False):
    """Refuse what can be seen to be no model before anything is loaded.

    name: a folder, or a Hub id. Returns the options of every from_pretrained; of a Hub id they hold
    the `revision`, so that whatever is loaded is of one commit.
    """
    folder = os.path.isdir(name)
    if folder:
        if not os.path.exists(os.path.join(name, "config.json")):
            fail(f"{name}: no config.json in this folder: not a Hugging Face model")
        if not any(file.endswith(".safetensors") for file in os.listdir(name)):
            fail(f"{name}: no *.safetensors in this folder; "
                 f"other weight formats can run code and are refused")
    elif not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) or os.path.isdir(os.path.dirname(name)):
        fail(f"{name}: no such model folder (a Hub id is written owner/name)")
    options = {"trust_remote_code": trust_remote_code, "local_files_only": folder}
    return options if folder else {**options, "revision": commit_of(name)}


def commit_of(name):
    """The commit of a Hub id: the newest, or without a network the one in the local cache."""
    try:
        path = transformers.utils.cached_file(name, "config.json")
    except Exception as error:
        fail(f"{name}: cannot be loaded: {type(error).__name__}: {error}")
    return os.path.basename(os.path.dirname(path))  # .../snapshots/COMMIT/config.json


def source_of(name, options):
    """What `describe` calls a model: its folder, or OWNER/NAME@COMMIT. options: check_model's."""
    return f"{name}@{options['revision']}" if "revision" in options else name


def device_and_dtype(args):
    """What --device and --dtype mean on this machine and rank: a device's name, a torch dtype.

    auto: CUDA where there is one, and there bfloat16; float32 on a CPU.
    """
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: no CUDA device here; use --device cpu")
    if args.device == "cpu" or not torch.cuda.is_available():
        device, dtype = "cpu", torch.float32
    else:
        device, dtype = f"cuda:{os.environ.get('LOCAL_RANK', 0)}", torch.bfloat16
    return device, dtype if args.dtype == "auto" else getattr(torch, args.dtype)


def autocast(device, dtype):
    """The context of a forward pass in `dtype` over fp32 weights."""
    return torch.autocast(device.split(":")[0], torch.bfloat16, enabled=dtype == torch.bfloat16)


def positions_of(config):
    """The most tokens of a sequence; None where the model's config does not limit them.

    config: of the text model. Under longrope it is the length up to which frequencies are short:
    past it, those of all tokens change, also of keys that are cached already."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        return rope["original_max_position_embeddings"]
    return getattr(config, "max_position_embeddings", None)


def load(kind, name, options, **more):
    """kind.from_pretrained(name) from a folder or a Hub id."""
    with loading_told(name):
        return kind.from_pretrained(name, **options, **more)


@contextlib.contextmanager
def loading_told(name):
    """Whatever a damaged folder makes a library raise in here is told in one line."""
    try:
        yield
    except Exception as error:
        fail(f"{name}: cannot be loaded: {type(error).__name__}: {error}")


def load_tokenizer(name, options):
    tokenizer = load(transformers.AutoTokenizer, name, options)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        fail(f"{name}: a tokenizer without a vocabulary: are its files missing?")
    return tokenizer


def reference_tokenizer(name, options):
    """tokenizer.json as it is, a tokenizers.Tokenizer; None where the model has none.

    transformers loads it into a class that tokenizer_config.json or the architecture names, which
    may replace how texts are split.
    """
    options = {key: options[key] for key in ("revision", "local_files_only") if key in options}
    try:
        path = transformers.utils.cached_file(name, "tokenizer.json", **options)
    except OSError:
        return None
    tokenizer = tokenizers.Tokenizer.from_file(path)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def load_model(name, dtype, device, options):
    """A causal language model in eval mode; every weight must be there and finite."""
    model, info = load(transformers.AutoModelForCausalLM, name, options, dtype=dtype,
                       use_safetensors=True, output_loading_info=True)
    missing = info["missing_keys"]
    if missing:
        fail(f"{name}: {len(missing)} weights are missing, {min(missing)} among them")
    for key, weight in model.state_dict().items():
        if not all_finite(weight):
            fail(f"{name}: weight {key} is not finite")
    return model.to(device).eval()


# ---- A round of training -------------------------------------------------------------------------
def save_round(out, policy, tokenizer, optimizer, state, lines, source):
    """Fill the folder `out` with a round: an ordinary model folder and what the next round needs.

    policy: holds the `model`; state: of trainer_state.json; lines: of metrics.jsonl; source: the
    folder or Hub id that the round started from, whose generation_config.json is copied.
    Under FSDP2 every rank takes part in gathering the shards, a tensor at a time; rank 0 writes.
    """
    rank, model = int(os.environ.get("RANK", 0)), policy.model
    moments = {f"{name}.{key}": optimizer.state[weight][key]
               for name, weight in model.named_parameters() for key in MOMENTS}
    weights = untied(model) if policy.by_rows else gathered(model, rank)
    try:
        if rank == 0:
            # A model's own generation config may fail the library's checks: it is copied below.
            model.generation_config = transformers.GenerationConfig()
            model.save_pretrained(out, state_dict={} if policy.by_rows else weights)
            tokenizer.save_pretrained(out)
        if policy.by_rows:
            write(out, "model", weights, {"format": "pt"})
        write(out, "optimizer", moments)
    except Exception as error:  # a full disk: where Rust writes, it is no OSError
        fail(f"{out}: cannot be written: {type(error).__name__}: {error}")
    if rank:
        return
    os.remove(f"{out}/generation_config.json")
    try:  # what loading has left in the cache of a Hub id: no network now
        original = transformers.utils.cached_file(source, "generation_config.json",
                                                  local_files_only=True)
    except OSError:
        original = None  # it has none
    if original:
        shutil.copyfile(original, f"{out}/generation_config.json")
    with open(f"{out}/trainer_state.json", "w", encoding="utf-8") as file:
        json.dump(state, file, indent=1)
    with open(f"{out}/metrics.jsonl", "w", encoding="utf-8") as file:
        file.writelines(lines)


def untied(model):
    """{name: weight} of the state dict, tied weights under the first of their names alone."""
    first = {}
    for name, weight in model.state_dict(keep_vars=True).items():
        first.setdefault(id(weight), (name, weight))
    return dict(first.values())


def gathered(model, rank):
    """{name: whole tensor} on rank 0, where save_pretrained needs all; tied ones are one."""
    kept = {}

    def whole(tensor):
        if id(tensor) not in kept:
            full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            kept[id(tensor)] = None if rank else full.detach().cpu().contiguous()
        return kept[id(tensor)]

    return {name: whole(weight) for name, weight in model.state_dict(keep_vars=True).items()}


def steps_done(folder):
    """(updates in the life of an earlier round's model, those since its moments began); (0, 0)
    where `folder` is no round."""
    if not os.path.exists(f"{folder}/trainer_state.json"):
        return 0, 0
    try:
        with open(f"{folder}/trainer_state.json", encoding="utf-8") as file:
            state = json.load(file)
        steps = state["step"], state.get("optimizer_step", state["step"])
        if not all(type(step) is int and step >= 0 for step in steps):
            raise ValueError(f"steps {steps}")
    except Exception as error:
        fail(f"{folder}/trainer_state.json: not a valid state ({type(error).__name__}: {error})")
    return steps


def load_optimizer(optimizer, policy, folder, step):
    """Put the moments of an earlier round, of `step` optimizer steps, into `optimizer`.

    Nothing is loaded where `folder` is no round.
    """
    if not os.path.exists(f"{folder}/trainer_state.json"):
        return
    try:
        files = tensor_files(folder, "optimizer")
        for name, weight in policy.model.named_parameters():
            state = {}
            for key in MOMENTS:
                moment = read_shard(weight, files[f"{name}.{key}"], f"{name}.{key}")
                state[key] = moment.to(weight.device)
            # The fused optimizer of a GPU counts its steps there.
            where = weight.device if weight.device.type == "cuda" else "cpu"
            optimizer.state[weight] = {"step": torch.tensor(float(step), device=where), **state}
    except Exception as error:
        fail(f"{folder}: the optimizer cannot be carried on ({type(error).__name__}: {error}); "
             f"mend it or give --reset-optimizer")


def earlier_metrics(folder):
    """The lines of metrics.jsonl of an earlier round; [] where `folder` is none."""
    if not os.path.exists(f"{folder}/metrics.jsonl"):
        return []
    with open(f"{folder}/metrics.jsonl", encoding="utf-8", errors="replace") as file:
        return file.readlines()
