"""The folder OUT.partial of work that is cut into chunks: each finished chunk is a file there.

Chunks are cut the same way whenever the same command is started, so that a restart does only those
that are missing, and several processes share the work by dealing out their numbers, with nothing
between them but the file system. A chunk is a list of items (problem, sample); its file has one
JSONL line an item, with the fields that the stage adds to the problem's row.
"""
import contextlib
import json
import os
import shutil
import time

import msgspec

from data.files import claim, fail


def chunk_path(folder, number):
    return f"{folder}/{number:06d}.jsonl"


def write_synced(path, lines, rank=0):
    """Write lines (str) to disk under a name of this rank, then rename: never half a file."""
    with open(f"{path}.{rank}", "w", encoding="utf-8") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.{rank}", path)


def begin(out, meta, ignore, rank):
    """The folder of this command's chunks, `out`.partial; None if `out` is complete.

    ignore: as `claim` takes it. command.json says which command the folder belongs to. Rank 0
    checks, locks and complains; the others wait for it.
    """
    folder = out + ".partial"
    command = [meta["flags"] | dict.fromkeys(ignore), list(meta["inputs"].values()), meta["dtype"]]

    def begun():
        with contextlib.suppress(OSError, ValueError):
            with open(f"{folder}/command.json", encoding="utf-8") as file:
                return json.load(file)

    while rank and begun() != command:
        if os.path.exists(out):
            return None
        time.sleep(0.1)
    if rank:
        return folder
    if claim(out, meta, ignore=ignore, folder=True) is None:
        shutil.rmtree(folder, ignore_errors=True)
        return None
    if begun() is None:
        for name in os.listdir(folder):
            os.remove(f"{folder}/{name}")
        write_synced(f"{folder}/command.json", [json.dumps(command)])
    elif begun() != command:
        fail(f"{folder}: begun with other flags or inputs; delete that folder or choose another "
             f"--out")
    return folder


def wait_for_chunks(folder, count, timeout):
    """Return when all chunks are there; end the stage if none comes in `timeout` seconds."""
    missing, since = count + 1, time.monotonic()
    while missing:
        before = missing
        missing = sum(not os.path.exists(chunk_path(folder, number)) for number in range(count))
        if missing < before:
            since = time.monotonic()
        if time.monotonic() - since > timeout:
            fail(f"{missing} of {count} chunks did not come from the other ranks in {timeout:.0f} "
                 f"s; the same command carries on from here")
        time.sleep(0.2 if missing else 0)


def merge(rows, folder, chunks, fields, out):
    """Write the finished chunks to `out`, in the order of the problems.

    rows: the line (bytes) of each problem, in order; its own fields stand in `out` as they stand
    there, without `fields`, those that the chunks bring.
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
    with open(out, "wb") as target:
        for problem, line in enumerate(rows):
            head = without(line, fields) + b", "
            for number, offset, lines in where[problem]:
                with open(chunk_path(folder, number), "rb") as file:
                    file.seek(offset)
                    for _ in range(lines):
                        target.write(head + file.readline()[1:])


def without(line, fields):
    """A row (bytes) up to its closing brace, without some of its fields."""
    row = msgspec.json.decode(line, type=dict[str, msgspec.Raw])
    if not row.keys() & set(fields):
        return line[:-1]
    return b"{" + b", ".join(msgspec.json.encode(key) + b": " + bytes(value)
                             for key, value in row.items() if key not in fields)
