"""Several processes that share the updates of a round, under torchrun.

Rank 0 checks the input, claims the output, complains and writes; the others wait for its claim.
"""
import contextlib
import datetime
import os
import re
import shutil
import signal
import sys
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from data.files import claim, fail
from data.rollouts import write_rollouts


def rank_and_world():
    """As torchrun tells them: (0, 1) where it does not."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def wait_for_rank_0(out, timeout):
    """Return when rank 0 has claimed `out`, after `timeout` seconds at most; False if `out` is
    complete."""
    began = time.monotonic()
    while not os.path.isdir(out + ".partial"):
        if os.path.exists(out):
            return False
        if time.monotonic() - began > timeout:
            fail(f"rank {os.environ['RANK']}: rank 0 did not start to write {out} in "
                 f"{timeout:.0f} s: no shared file system?", 4)
        time.sleep(0.1)
    return True


def claim_empty(out, meta, ignore):
    """Claim the folder `out`, without what a killed run left: a round starts from its input files
    alone. False if `out` is complete."""
    partial = claim(out, meta, ignore=ignore, folder=True)
    for name in os.listdir(partial) if partial else ():
        path = f"{partial}/{name}"
        shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
    return partial is not None


def start_ranks(device, world, timeout):
    """The processes meet, if they are several. timeout: seconds that one waits for another."""
    if world > 1:
        if device != "cpu":
            torch.cuda.set_device(device)
        dist.init_process_group("gloo" if device == "cpu" else "nccl",
                                timeout=datetime.timedelta(seconds=timeout))


def end_ranks():
    """Wait for the other processes and part from them. What it returns must be held until nothing
    of the caller, least of all DDP's model, is left.

    Were gloo's own thread the last to let go of the barrier, it would ask for the GIL, which this
    thread keeps while the destructor of the group, which DDP's model holds, waits for that thread:
    for ever."""
    barrier = dist.barrier(async_op=True)
    barrier.wait()
    dist.destroy_process_group()
    return barrier


def over_ranks(policy, device, world, shard):
    """(the module to call, a context for the backward passes before an update's last).

    DDP: a copy of the policy on every rank, whose gradients are summed in the last pass. shard:
    FSDP2, every decoder layer, then the rest, in shards over all ranks; gradients are summed in
    every pass, as to wait would keep all of them on every rank.
    """
    if world == 1:
        return policy, contextlib.nullcontext
    if not shard:
        copies = DistributedDataParallel(policy, gradient_as_bucket_view=True)
        return copies, copies.no_sync
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    layers = getattr(policy.model.get_decoder(), "layers", None)
    if layers is None:
        fail("--shard: unsupported architecture: its decoder has no `layers`")
    mesh = init_device_mesh(device.split(":")[0], (world,))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(policy, mesh=mesh)
    register_fsdp_forward_method(policy, "check")  # it calls parts of the model by themselves
    return policy, contextlib.nullcontext


def refuse(job, members, what):
    """End all ranks with exit 3; the update's rows are kept in OUT.refused.jsonl."""
    path = f"{job.args.out}.refused.jsonl"
    if job.rank == 0:
        write_rollouts(path, [job.rows[i] for i in members])
    if dist.is_initialized():
        dist.barrier()
    if job.rank == 0:
        fail(f"{what}: the update is refused, nothing was changed; its rows are kept in {path}", 3)
    sys.exit(3)


@contextlib.contextmanager
def lost_ranks_told(timeout):
    """Where another rank ends or hangs, this one says so in one line."""
    try:
        yield
    except RuntimeError as error:  # gloo's errors have no class of their own
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, in the middle of the exit
        what = re.sub(r"^\[\S*\] | This is typically.*", "", str(error))
        fail(f"rank {os.environ['RANK']}: another rank ended, or did not answer in {timeout:.0f} s "
             f"({what}); the same command does this round again", 4)
