"""Models that no single rank could hold: built empty, sharded, filled by rows, saved by tensors.

`train.py --shard` calls these in this order, on every rank:

    model, files = model_without_weights(name, options)    # parameters take no memory
    fully_shard(...)                                       # FSDP2: a rank owns rows of each
    fill(model, files)                                     # a rank reads its rows from the files
    ...
    write(folder, "model", weights)                        # a gathered tensor at a time

so that a rank's memory is its shard and the largest single tensor, never the whole model. Optimizer
moments likewise, in optimizer*.safetensors under the names WEIGHT.exp_avg and WEIGHT.exp_avg_sq.
"""
import contextlib
import json
import math
import os

import huggingface_hub
import torch
import torch.distributed as dist
import transformers
from safetensors import safe_open
from torch.distributed.tensor import DTensor

LARGEST_FILE = 2 * 10**9  # bytes; more than this is written as several files with an index
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
          torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}


@contextlib.contextmanager
def without_weights():
    """Modules made in here have parameters on the meta device; buffers, which no file holds, are
    real."""
    register = torch.nn.Module.register_parameter

    def on_meta(module, name, parameter):
        if parameter is not None and not parameter.is_meta:
            parameter = torch.nn.Parameter(parameter.data.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    torch.nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register


def model_without_weights(name, options, dtype=torch.float32):
    """(a causal language model without weights, {weight: path of its file}).

    The second is {} where the files spell the weights otherwise than the model does, which only
    from_pretrained knows to translate. options: as data/models.py's check_model returns them."""
    config = transformers.AutoConfig.from_pretrained(name, **options)
    with without_weights():
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=options["trust_remote_code"])
    if not os.path.isdir(name):
        name = huggingface_hub.snapshot_download(
            name, revision=options.get("revision"), allow_patterns=["*.safetensors", "*.json"])
    files, weights = tensor_files(name, "model"), model.state_dict(keep_vars=True)
    there = {id(weight) for key, weight in weights.items() if key in files}
    if any(id(weight) not in there for weight in weights.values()):
        files = {}
    return model.eval(), files


def tensor_files(folder, stem):
    """{tensor: path of its file}, of STEM.safetensors or of the files in its index; {} of
    neither."""
    single = os.path.join(folder, f"{stem}.safetensors")
    index = f"{single}.index.json"
    if os.path.exists(single):
        with safe_open(single, "pt") as file:
            return dict.fromkeys(file.keys(), single)
    if not os.path.exists(index):
        return {}
    with open(index, encoding="utf-8") as file:
        return {name: os.path.join(folder, os.path.basename(path))
                for name, path in json.load(file)["weight_map"].items()}


def all_finite(weight):
    """Is every value finite? One that is not makes the sum so, which is far quicker to see; a sum
    that overflows is looked at again."""
    return bool(torch.isfinite(weight.sum())) or bool(torch.isfinite(weight).all())


def read_shard(like, path, name):
    """The tensor `name` of a safetensors file, or this rank's rows of it where `like` is sharded.

    like: DTensor, sharded by rows (dimension 0) over one mesh, or an ordinary tensor.
    ValueError if the file's tensor has another shape, or holds what is not finite."""
    with safe_open(path, "pt") as file:  # opened for one tensor: what was read does not stay mapped
        part = file.get_slice(name)
        if tuple(part.get_shape()) != tuple(like.shape):
            raise ValueError(f"{name} has the shape {part.get_shape()}, not {list(like.shape)}")
        if not isinstance(like, DTensor):
            own = torch.empty(like.shape, dtype=like.dtype).copy_(file.get_tensor(name))
        else:  # rows are dealt as torch.chunk deals them: the last ranks may get fewer, or none
            mesh, rows = like.device_mesh, like.shape[0]
            most = math.ceil(rows / mesh.size())
            start = min(mesh.get_local_rank() * most, rows)
            end = min(start + most, rows)
            own = torch.empty(end - start, *like.shape[1:], dtype=like.dtype)
            own.copy_(part[start:end] if end > start else own)
    if not all_finite(own):
        raise ValueError(f"{name} is not finite")
    if not isinstance(like, DTensor):
        return own
    return DTensor.from_local(own.to(mesh.device_type), mesh, like.placements, run_check=False,
                              shape=like.shape, stride=like.stride())


def fill(model, files):
    """Give every parameter of a model without weights this rank's rows from `files`, {name: path}.

    ValueError if a weight is missing or does not fit."""
    weights, filled = model.state_dict(keep_vars=True), {}
    for name, weight in weights.items():
        if id(weight) not in filled and name in files:
            own = read_shard(weight, files[name], name)
            if isinstance(weight, torch.nn.Parameter):
                own = torch.nn.Parameter(own, weight.requires_grad)
            filled[id(weight)] = own  # tied weights are one, whichever name the files hold
    missing = sorted(name for name, weight in weights.items() if id(weight) not in filled)
    if missing:
        raise ValueError(f"{len(missing)} weights are missing, {missing[0]} among them")
    filled = {name: filled[id(weight)] for name, weight in weights.items()}
    model.load_state_dict(filled, assign=True)


def write(folder, stem, tensors, metadata=None):
    """Write STEM.safetensors; above LARGEST_FILE, STEM-00001-of-0000N.safetensors and an index.

    tensors: {name: tensor or DTensor}, the same names on every rank; all ranks take part, rank 0
    writes. The bytes are those of safetensors' save_file, which would need all tensors at once."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    files, size = [[]], 0
    for name in sorted(tensors):
        own = tensors[name].numel() * tensors[name].element_size()
        if files[-1] and size + own > LARGEST_FILE:
            files.append([])
            size = 0
        files[-1].append(name)
        size += own
    names = [f"{stem}.safetensors"]
    if len(files) > 1:
        names = [f"{stem}-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
        if rank == 0:
            total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
            where = {name: path for path, group in zip(names, files) for name in group}
            with open(f"{folder}/{stem}.safetensors.index.json", "w", encoding="utf-8") as file:
                json.dump({"metadata": {"total_size": total}, "weight_map": where}, file, indent=1)
    for path, group in zip(names, files):
        with open(f"{folder}/{path}", "wb") if rank == 0 else contextlib.nullcontext() as file:
            write_file(file, {name: tensors[name] for name in group}, metadata)


def write_file(file, tensors, metadata):
    """One safetensors file: the header's length in 8 bytes, the header as JSON, the tensors' bytes.

    file: None on ranks that only take part in gathering."""
    header, end = {"__metadata__": metadata} if metadata else {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [start, end]}
    header = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    if file:
        file.write(len(header).to_bytes(8, "little") + header)
    for tensor in tensors.values():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if file:
            file.write(whole.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
