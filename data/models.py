"""Model folders: check, load, save a round, carry the optimizer's moments on.

Whatever a hostile, damaged or half-copied folder makes a library raise is bad input here: one line
on stderr, exit 2. Weights come from safetensors files alone; other formats can run code.

Under `train.py --shard` no rank holds a whole model: `empty_model` takes no memory, fully_shard
gives each rank rows of every weight, `fill` reads them, `save_round` writes them.
"""
import contextlib
import json
import os
import re
import shutil
import sys
import unittest.mock
import warnings

import huggingface_hub
import tokenizers
import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from data.files import LFS_POINTER, fail, files_of, rank_and_world

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, of each weight
# Beginnings of the names of what only train.py reads in the folder of a round.
OF_TRAINING = ("optimizer", "trainer_state.json", "metrics.jsonl")
# Files that a round copies from the model that it started from: its tokenizer, its code.
COPIED = re.compile(r"generation_config\.json|(tokenizer|special_tokens|added_tokens|vocab|merges|"
                    r"chat_template).*|.*\.(model|tiktoken|jinja|py)")
ADAPTER = re.compile(r"(^|[._])(lora|adapter|ia3|prompt_encoder|modules_to_save)", re.I)
LARGEST_FILE = 2 * 10**9  # bytes; more than this is written as several files with an index


# ---- Checking ------------------------------------------------------------------------------------
def check_model(name, trust_remote_code=False):
    """Refuse what can be seen to be no model before anything is loaded.

    name: a folder, or a Hub id. Returns the options of every from_pretrained; of a Hub id they hold
    the `revision`, so that whatever is loaded is of one commit: the newest, or without a network
    the one in the local cache.
    """
    options = {"trust_remote_code": trust_remote_code, "local_files_only": os.path.isdir(name)}
    if os.path.isdir(name):
        check_folder(name)
        return options
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) or os.path.isdir(os.path.dirname(name)):
        fail(f"{name}: no such model folder (a Hub id is written owner/name)")
    with load_errors(name):
        return {**options, "revision": os.path.basename(folder_of(name, {}))}


def check_folder(folder):
    """Refuse adapters, git-lfs pointers and torn weights, each by the name of its file."""
    if os.path.exists(f"{folder}/adapter_config.json"):
        fail(f"{folder}: an adapter (adapter_config.json); merge it into its model first")
    if not os.path.exists(f"{folder}/config.json"):
        fail(f"{folder}: no config.json in this folder: not a Hugging Face model")
    if not any(file.endswith(".safetensors") for file in os.listdir(folder)):
        fail(f"{folder}: no *.safetensors in this folder; "
             f"other weight formats can run code and are refused")
    read = (".safetensors", ".json", ".model", ".txt")
    for path in [path for _, path in files_of(folder) if path.endswith(read)]:
        with open(path, "rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                fail(f"{path}: a git-lfs pointer, not the file itself; run `git lfs pull`")
    with load_errors(folder):
        weights = weight_files(folder, "model")
    for path in weights:
        with load_errors(path), safe_open(path, "pt"):
            pass


def source_of(name, options):
    """What `describe` calls a model: its folder, or OWNER/NAME@COMMIT. options: check_model's."""
    return f"{name}@{options['revision']}" if "revision" in options else name


def folder_of(name, options):
    """The folder of a model: its own, or of a Hub id that of its commit in the local cache."""
    if os.path.isdir(name):
        return name
    return os.path.dirname(transformers.utils.cached_file(  # .../snapshots/COMMIT/config.json
        name, "config.json", revision=options.get("revision")))


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


# ---- Loading -------------------------------------------------------------------------------------
def load(kind, name, options, **more):
    """kind.from_pretrained(name) from a folder or a Hub id."""
    with load_errors(name):
        return kind.from_pretrained(name, **options, **more)


@contextlib.contextmanager
def load_errors(name):
    """End the stage with one line, whatever a damaged folder makes a library raise in here."""
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
    try:
        path = transformers.utils.cached_file(name, "tokenizer.json",
                                              revision=options.get("revision"))
    except OSError:
        return None
    tokenizer = tokenizers.Tokenizer.from_file(path)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def special_tokens(tokenizer):
    """{text: id} of the tokens that the tokenizer's files call special."""
    added = tokenizer.added_tokens_decoder.items()
    return {token.content: index for index, token in added if token.special}


def example_chat(tokenizer):
    """The text of a chat whose last turn is the assistant's, "answer"; "" without a template."""
    turns = [{"role": "system", "content": "system"}, {"role": "user", "content": "question"},
             {"role": "assistant", "content": "answer"}]
    for chat in (turns, turns[1:]):  # some templates know no system turn
        with contextlib.suppress(Exception):
            return tokenizer.apply_chat_template(chat, tokenize=False)
    return ""


def hidden_ids(tokenizer, ends=()):
    """The tokens that a completion's text leaves out: those that end, pad or begin a text and those
    that separate turns, but no tags such as <answer> and </answer>. ends: ids that end one."""
    special, chat = special_tokens(tokenizer), example_chat(tokenizer)
    names = {token: token.strip("</>") for token in special if re.fullmatch("<[^<|>]+>", token)}
    tags = {special[token] for token, name in names.items()
            if {f"<{name}>", f"</{name}>"} <= names.keys()
            or len(name) > 1 and name.isalpha() and token not in chat}
    separators = {special[token] for token in special if not chat or token in chat}
    return ({*ends, *separators} - tags) | {
        tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id,
        tokenizer.unk_token_id}


def load_model(name, dtype, device, options):
    """A causal language model in eval mode; every weight must be there, fit and be finite."""
    model, info = load(transformers.AutoModelForCausalLM, name, options, dtype=dtype,
                       use_safetensors=True, output_loading_info=True,
                       ignore_mismatched_sizes=True)
    for key, found, expected in sorted(info["mismatched_keys"]):
        fail(f"{name}: weight {key} has the shape {list(found)} in its file and {list(expected)} "
             f"by config.json")
    missing = info["missing_keys"]
    if missing:
        fail(f"{name}: {len(missing)} weights are missing, {min(missing)} among them")
    report_unused(name, info["unexpected_keys"])
    for key, weight in model.state_dict().items():
        if not all_finite(weight):
            fail(f"{name}: weight {key} is not finite")
    return model.to(device).eval()


def report_unused(name, keys):
    """Say which tensors of a model's files no module takes; refuse those of an adapter."""
    adapters = sorted(filter(ADAPTER.search, keys))
    if adapters:
        fail(f"{name}: holds an adapter ({adapters[0]}); merge it into the weights first")
    if keys and not rank_and_world()[0]:
        print(f"{name}: {len(keys)} tensors of its files are not used, as config.json has no place "
              f"for them, {min(keys)} among them", file=sys.stderr)


def all_finite(weight):
    """Is every value finite? One that is not makes the sum so, which is far quicker to see; a sum
    that overflows is looked at again."""
    return bool(torch.isfinite(weight.sum())) or bool(torch.isfinite(weight).all())


# ---- Files of tensors ----------------------------------------------------------------------------
@contextlib.contextmanager
def distributed_checkpoint():
    """torch.distributed.checkpoint, whose import takes a while. Its error, which all ranks get and
    which is no Exception, becomes that of the first rank; rank 0 alone goes on to report it."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException
    try:
        yield dcp
    except CheckpointException as error:
        if rank_and_world()[0]:
            sys.exit(2)
        while isinstance(error, CheckpointException):
            error = next(iter(error.failures.values()))[0]
        raise error


def weight_files(folder, stem):
    """The paths of STEM.safetensors, or of the files in its index; [] of neither."""
    single = os.path.join(folder, f"{stem}.safetensors")
    if os.path.exists(single):
        return [single]
    if not os.path.exists(f"{single}.index.json"):
        return []
    with open(f"{single}.index.json", encoding="utf-8") as file:
        names = json.load(file)["weight_map"].values()
    return sorted({os.path.join(folder, os.path.basename(name)) for name in names})


def tensor_files(folder, stem):
    """{tensor: the path of its file} of all tensors in these files."""
    found = {}
    for path in weight_files(folder, stem):
        with safe_open(path, "pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


def read_tensors(files, tensors):
    """Fill `tensors`, {name: tensor or DTensor}, from safetensors files; of a DTensor a rank reads
    its own rows. files: {name: path}.

    An Exception if one is missing, has another shape or is not finite."""
    with distributed_checkpoint() as dcp, warnings.catch_warnings(action="ignore"):
        reader = dcp.HuggingFaceStorageReader("")
        reader.fs.ls = lambda _: sorted(set(files.values()))  # not all files of a folder
        dcp.load(tensors, storage_reader=reader)  # warns that there is one process
    for name, tensor in tensors.items():
        if not all_finite(tensor.to_local() if isinstance(tensor, DTensor) else tensor):
            raise ValueError(f"{name} is not finite")


def write_tensors(folder, stem, tensors):
    """Write STEM.safetensors; above LARGEST_FILE, STEM-00001-of-0000N.safetensors and an index.

    tensors: {name: tensor, or on all ranks DTensor}. Of DTensors every rank writes its rows, a file
    at a time, which rank 0 joins; of others rank 0 writes all."""
    rank = rank_and_world()[0]
    split = huggingface_hub.split_torch_state_dict_into_shards(
        {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
         for name, tensor in sorted(tensors.items())},
        filename_pattern=f"{stem}{{suffix}}.safetensors", max_shard_size=LARGEST_FILE)
    for file, names in split.filename_to_tensors.items():
        path, part = f"{folder}/{file}", {name: tensors[name].detach() for name in names}
        if any(isinstance(tensor, DTensor) for tensor in part.values()):
            with distributed_checkpoint() as dcp:
                dcp.save(part, storage_writer=dcp.HuggingFaceStorageWriter(
                    f"{path}.parts", save_distributed=True, enable_consolidation=True))
            if rank == 0:
                os.replace(f"{path}.parts/model-00001-of-00001.safetensors", path)
                shutil.rmtree(f"{path}.parts")
        elif rank == 0:
            save_file({name: tensor.cpu().contiguous() for name, tensor in part.items()}, path)
    if split.is_sharded and rank == 0:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        with open(f"{folder}/{stem}.safetensors.index.json", "w", encoding="utf-8") as file:
            json.dump(index, file, indent=1)


# ---- Models that no rank could hold --------------------------------------------------------------
def empty_model(name, options, dtype=torch.float32):
    """(a causal language model whose parameters take no memory, {weight: path of its file}).

    The second is {} where from_pretrained alone loads the files right: they spell the weights
    otherwise, hold two weights that config.json ties, or quantised ones."""
    register = torch.nn.Module.register_parameter

    def on_meta(module, name, parameter):  # buffers, which no file holds, are real
        if parameter is not None and not parameter.is_meta:
            parameter = torch.nn.Parameter(parameter.data.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    config = transformers.AutoConfig.from_pretrained(name, **options)
    with unittest.mock.patch.object(torch.nn.Module, "register_parameter", on_meta):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=options["trust_remote_code"]).eval()
    if not os.path.isdir(name):
        huggingface_hub.snapshot_download(
            name, revision=options["revision"], allow_patterns=["*.safetensors", "*.json"])
    files, names = tensor_files(folder_of(name, options), "model"), {}
    for key, weight in model.state_dict(keep_vars=True).items():
        names.setdefault(weight, []).extend([key] if key in files else [])  # tied: several

    def tensor(key):
        with safe_open(files[key], "pt") as file:
            return file.get_tensor(key)

    if hasattr(config, "quantization_config") or not all(
            found and weight.dim()  # torch would write a scalar as 0
            and all(torch.equal(tensor(found[0]), tensor(key)) for key in found[1:])
            for weight, found in names.items()):
        return model, {}
    ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq"]
    report_unused(name, [key for key in files.keys() - set(sum(names.values(), []))
                         if not any(re.search(pattern, key) for pattern in ignored)])
    return model, files


def fill(model, files):
    """Give the parameters of an empty model this rank's rows from `files`, {name: path}."""
    weights, filled = model.state_dict(keep_vars=True), {}
    for name, weight in weights.items():
        if name in files and weight not in filled:  # tied ones are one, under either name
            device = weight.device_mesh.device_type if isinstance(weight, DTensor) else "cpu"
            filled[weight] = name, torch.empty_like(weight, device=device, requires_grad=False)
    read_tensors(files, dict(filled.values()))
    filled = {weight: torch.nn.Parameter(tensor, weight.requires_grad)
              if isinstance(weight, torch.nn.Parameter) else tensor
              for weight, (_, tensor) in filled.items()}
    model.load_state_dict({name: filled[weight] for name, weight in weights.items()}, assign=True)


# ---- A round of training -------------------------------------------------------------------------
def save_round(out, policy, optimizer, state, lines, source):
    """Fill the folder `out` with a round: an ordinary model folder and what the next round needs.

    policy: holds the `model`; state: of trainer_state.json; lines: of metrics.jsonl; source: the
    folder that the round started from, whose config and tokenizer it takes over as they came.
    Under FSDP2 all ranks take part.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    rank, model = rank_and_world()[0], policy.model
    moments = {f"{name}.{key}": optimizer.state[weight][key]
               for name, weight in model.named_parameters() for key in MOMENTS}
    try:
        if policy.by_rows:
            tied = reversed(model.state_dict(keep_vars=True).items())  # under several names
            first = {weight: name for name, weight in tied}
            write_tensors(out, "model", {name: weight for weight, name in first.items()})
        else:
            whole = get_model_state_dict(model, options=StateDictOptions(
                full_state_dict=True, cpu_offload=True))  # on rank 0
            if rank == 0:
                # A model's own generation config may fail the library's checks: it is copied.
                model.generation_config = transformers.GenerationConfig()
                model.save_pretrained(out, state_dict=whole)
                os.remove(f"{out}/generation_config.json")
        write_tensors(out, "optimizer", moments)
    except (OSError, SafetensorError) as error:
        fail(f"{out}: cannot be written: {type(error).__name__}: {error}")
    if rank:
        return
    for name, path in files_of(source):
        if COPIED.fullmatch(name):
            shutil.copyfile(path, f"{out}/{name}")
    texts = {"config.json": json.dumps(config_of(source, model), indent=2) + "\n",
             "trainer_state.json": json.dumps(state, indent=1), "metrics.jsonl": "".join(lines)}
    for name, text in texts.items():
        with open(f"{out}/{name}", "w", encoding="utf-8") as file:
            file.write(text)
    for _, path in files_of(out):  # safetensors writes for its owner's eyes alone
        os.chmod(path, os.stat(f"{out}/config.json").st_mode)


def config_of(source, model):
    """The config.json of a round: its source's, in fp32, with what other readers look for.

    Weights that the files did not tie are not tied. transformers 4 reads rope_theta and
    rope_scaling, where 5 writes rope_parameters and reads both."""
    with open(f"{source}/config.json", encoding="utf-8") as file:
        config = json.load(file)
    config |= dict.fromkeys({"dtype", *config.keys() & {"torch_dtype"}}, "float32")
    if (model.get_output_embeddings().weight is not model.get_input_embeddings().weight
            and model.config.get_text_config().tie_word_embeddings):
        config["tie_word_embeddings"] = False
    rope = dict(config.get("rope_parameters") or {})
    if "rope_theta" in rope:
        config.setdefault("rope_theta", rope.pop("rope_theta"))
        if rope.get("rope_type", "default") != "default":
            config.setdefault("rope_scaling", rope)
    return config


def earlier_round(folder):
    """(updates in the life of an earlier round's model, those since its moments began, its lines of
    metrics.jsonl); (0, 0, []) where `folder` is no round."""
    path = f"{folder}/trainer_state.json"
    if not os.path.exists(path):
        return 0, 0, []
    try:
        with open(path, encoding="utf-8") as file:
            state = json.load(file)
        steps = state["step"], state.get("optimizer_step", state["step"])
        if not all(type(step) is int and step >= 0 for step in steps):
            raise ValueError(f"steps {steps}")
    except Exception as error:
        fail(f"{path}: not a valid state ({type(error).__name__}: {error})")
    if not os.path.exists(f"{folder}/metrics.jsonl"):
        return *steps, []
    with open(f"{folder}/metrics.jsonl", encoding="utf-8", errors="replace") as file:
        return *steps, file.readlines()


def load_optimizer(optimizer, policy, folder, step):
    """Put the moments of an earlier round, of `step` optimizer steps, into `optimizer`."""
    weights = dict(policy.model.named_parameters())
    try:
        moments = {f"{name}.{key}": torch.empty_like(weight, requires_grad=False)
                   for name, weight in weights.items() for key in MOMENTS}
        read_tensors(tensor_files(folder, "optimizer"), moments)
    except Exception as error:
        fail(f"{folder}: the optimizer cannot be carried on ({type(error).__name__}: {error}); "
             f"mend it or give --reset-optimizer")
    for name, weight in weights.items():
        # The fused optimizer of a GPU counts its steps there.
        where = weight.device if weight.device.type == "cuda" else "cpu"
        optimizer.state[weight] = {"step": torch.tensor(float(step), device=where),
                                   **{key: moments[f"{name}.{key}"] for key in MOMENTS}}
