"""The folder OUT.partial of work that is cut into chunks: each finished chunk is a file there.

The same command always cuts the same chunks: a restart makes only those that are missing, and
several ranks take turns over the chunks' numbers and share nothing but the file system. A chunk is
a list of items (problem, sample); its file has one JSONL line an item, with the fields that the
stage adds to the problem's row.
"""
import contextlib
import hashlib
import json
import os
import shutil
import sys
import time

import msgspec
import numpy as np
from tqdm import tqdm

from data.files import claim, digest, fail, publish, rank_and_world, stamp, write_synced
from data.models import OF_TRAINING

# Flags that change no byte of the output, and those that name inputs, whose digests are compared.
FREE_FLAGS = ("out", "prompts", "model", "rank_timeout")


def chunks_of(lengths, n, max_new_tokens, budget):
    """Cut all items (problem, sample), shortest prompts first, into chunks.

    lengths: tokens of each prompt; 0: it is left out. In every chunk of more than one row
    rows x (longest prompt + new tokens) <= budget.
    """
    order = [problem for problem in np.argsort(lengths, kind="stable").tolist() if lengths[problem]]
    items = [(problem, sample) for problem in order for sample in range(n)]
    chunks, start = [], 0
    for end in range(1, len(items) + 1):
        rows = end + 1 - start  # with the next item, the longest one
        if end == len(items) or rows * (lengths[items[end][0]] + max_new_tokens) > budget:
            chunks.append(items[start:end])
            start = end
    return chunks


def digest_of(work):
    """sha256 of the prompts' ids and of how they were cut: what flags and inputs came to.

    work: generate.py's `plan`. A chat template may render a date.
    """
    total = hashlib.sha256()
    for numbers in [*work.encoded, *work.chunks]:
        total.update(np.array([len(numbers), *np.ravel(numbers)], dtype=np.int64).tobytes())
    return total.hexdigest()


def chunk_path(folder, number):
    return f"{folder}/{number:06d}.jsonl"


def command_of(folder):
    """The command in command.json, to which the folder's chunks belong; None if there is none."""
    with contextlib.suppress(OSError, ValueError):
        with open(f"{folder}/command.json", encoding="utf-8") as file:
            return json.load(file)


def begin(out, meta, work):
    """Rank 0: lock and return the folder of this command's chunks; None if `out` is complete.

    Rank 0 reports what is wrong for all ranks. meta: as `describe` makes it; work: generate.py's
    `plan`. command.json holds the command that the folder belongs to, and the stamps of its inputs,
    by which the other ranks see that theirs are the same.
    """
    folder = out + ".partial"
    command = {"flags": meta["flags"] | dict.fromkeys(FREE_FLAGS), "dtype": meta["dtype"],
               "inputs": list(meta["inputs"].values())}
    if claim(out, meta, ignore=FREE_FLAGS, folder=True) is None:
        shutil.rmtree(folder, ignore_errors=True)
        return None
    begun = command_of(folder)
    if begun is None:
        for name in os.listdir(folder):
            os.remove(f"{folder}/{name}")
    elif not isinstance(begun, dict) or any(begun.get(key) != command[key] for key in command):
        fail(f"{folder}: begun with other flags or inputs; delete that folder or choose another "
             f"--out")
    else:
        check_work(folder, begun, work)
    command |= {"work": digest_of(work),
                "stamps": [stamp(path, OF_TRAINING) for path in meta["inputs"]]}
    write_synced(f"{folder}/command.json", json.dumps(command))
    return folder


def check_work(folder, begun, work):
    """Refuse a folder whose command came to other token ids. begun: `command_of` it."""
    if begun.get("work") != digest_of(work):
        fail(f"{folder}: begun with other token ids of the same prompts, so that its chunks are of "
             f"other rows (does the chat template render a date, or was a library updated?); "
             f"delete that folder or choose another --out")


def wait_for_folder(args, dtype, work):
    """Another rank: that folder, once rank 0 has begun it; None if `out` is complete.

    A folder that a killed run left does not count: flags and inputs must be the same. Inputs are
    hashed only where their stamps differ, as those of another machine's copies do.
    """
    folder, began, digests = args.out + ".partial", time.monotonic(), None
    flags, inputs = vars(args) | dict.fromkeys(FREE_FLAGS), [args.prompts, work.source]
    stamps = [stamp(path, OF_TRAINING) for path in inputs]
    while True:
        begun = command_of(folder)
        if isinstance(begun, dict) and (begun.get("flags"), begun.get("dtype")) == (flags, dtype):
            if begun["stamps"] != stamps:
                digests = digests or [digest(path, OF_TRAINING) for path in inputs]
            if begun["stamps"] == stamps or begun["inputs"] == digests:
                check_work(folder, begun, work)
                return folder
        if os.path.exists(args.out):
            return None
        if time.monotonic() - began > args.rank_timeout:
            fail(f"rank {rank_and_world()[0]}: rank 0 did not begin {folder} in "
                 f"{args.rank_timeout:.0f} s: no shared file system?", 4)
        time.sleep(0.1)


def run_chunks(sample_chunk, chunks, out):
    """Write this rank's chunks that are not there yet; print the tokens a second.

    sample_chunk: from a chunk to its JSONL lines (str).
    """
    tokens, seconds, (rank, world) = 0, 0.0, rank_and_world()
    for number in tqdm(range(rank, len(chunks), world), "chunks", disable=rank > 0 or None):
        path = chunk_path(out + ".partial", number)
        if os.path.exists(path) or os.path.exists(out):  # rank 0 may even have merged it
            continue
        start = time.monotonic()
        lines = sample_chunk(chunks[number])
        write_synced(path, "".join(lines), rank)  # under a name of this rank until it is whole
        seconds += time.monotonic() - start
        tokens += sum(line.count(",", line.index('"completion_ids"'), line.index('"logprobs"'))
                      for line in lines)
    if seconds and rank == 0:
        print(f"{out}: {sum(map(len, chunks))} rows; {tokens / seconds:.0f} tokens/s on rank 0",
              file=sys.stderr)


def wait_for_chunks(folder, count, timeout):
    """Return when all chunks are there; end the stage if none comes in `timeout` seconds."""
    missing, since = count + 1, time.monotonic()
    while missing:
        before = missing
        missing = sum(not os.path.exists(chunk_path(folder, number)) for number in range(count))
        if missing < before:
            since = time.monotonic()
        if missing and time.monotonic() - since > timeout:
            fail(f"{missing} of {count} chunks did not come from the other ranks in {timeout:.0f} "
                 f"s; the same command carries on from here")
        time.sleep(0.2 if missing else 0)


def merge(rows, folder, chunks, fields):
    """Write the finished chunks to one file in `folder`, in the order of the problems.

    rows: the line (bytes) of each problem, in order. Its fields are copied byte for byte, except
    `fields`, which the chunks bring.
    """
    # 1. Where are a problem's lines? problem -> [[chunk, offset of its first line there, lines]].
    where = {}
    for number, chunk in enumerate(chunks):
        with open(chunk_path(folder, number), "rb") as file:
            for problem, _ in chunk:
                offset = file.tell()
                file.readline()
                if problem in where and where[problem][-1][0] == number:
                    where[problem][-1][2] += 1
                else:
                    where.setdefault(problem, []).append([number, offset, 1])
    # 2. Each problem's own fields, spliced with its lines.
    with open(f"{folder}/merged.jsonl", "wb") as target:
        for problem, line in enumerate(rows):
            head = drop_fields(line, fields) + b", "
            for number, offset, lines in where.get(problem, ()):  # none of a skipped one
                with open(chunk_path(folder, number), "rb") as file:
                    file.seek(offset)
                    for _ in range(lines):
                        target.write(head + file.readline()[1:])


def publish_merged(out, meta):
    """Give the merged file its name, and remove the folder."""
    publish(out, meta, f"{out}.partial/merged.jsonl")
    shutil.rmtree(out + ".partial", ignore_errors=True)


def drop_fields(line, fields):
    """A row (bytes) without some of its fields and without its closing brace."""
    row = msgspec.json.decode(line, type=dict[str, msgspec.Raw])
    if not row.keys() & set(fields):
        return line[:-1]
    return b"{" + b", ".join(msgspec.json.encode(key) + b": " + bytes(value)
                             for key, value in row.items() if key not in fields)
