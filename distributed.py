"""Data-parallel training in several processes: `torchrun --nproc_per_node=N train.py ...`.

torch.distributed does the work, gloo between CPUs and nccl between GPUs. Each process computes its shard of every batch;
gradients and losses are averaged over all of them. In a process that was started alone, nothing here changes anything.
"""

import os
import sys
import warnings
from datetime import timedelta

import torch
from torch import distributed, nn

from config import UserError

TIMEOUT = timedelta(minutes=10)  # for the slowest process


def init(device: torch.device) -> torch.device:
    """Join the process group that torchrun has started, if any; the device of this process."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return device
    if device.type == "cuda":
        processes, found = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if processes > found:
            raise UserError(f"{processes} processes, but {found} GPU here; start fewer, or use device=cpu")
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not distributed.is_initialized():
        store, rank_here, size = next(distributed.rendezvous("env://"))
        # its keys may outlive a restart; then a process would wait for a dead one
        store = distributed.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, timeout=TIMEOUT, store=store, rank=rank_here, world_size=size)
    if rank():
        sys.stdout = open(os.devnull, "w", errors="backslashreplace")  # the first process prints for all
    return device


def world_size() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def job_id() -> str:
    """A name that this torchrun's processes share, also after a restart; empty without torchrun."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return f"torchrun {os.getppid()}" if name == "none" else name  # none: torchrun's default for --rdzv-id


def shard(rows: torch.Tensor) -> torch.Tensor:
    """This process's rows: a view of every `world_size()`th."""
    return rows[rank() :: world_size()]


def all_gather(x: torch.Tensor) -> torch.Tensor:
    """All processes' tensors, of one shape, `(world_size, ...)`. For few numbers faster than gloo's all_reduce."""
    tensors = [torch.empty_like(x) for _ in range(world_size())]
    distributed.all_gather(tensors, x.contiguous())
    return torch.stack(tensors)


def gather_rows(rows: torch.Tensor, length: int) -> torch.Tensor:
    """All `length` rows, of which each process has its shard, on every process."""
    if world_size() == 1:
        return rows
    padded = rows.new_zeros(-(-length // world_size()), *rows.shape[1:])  # shards may differ by a row
    padded[: len(rows)] = rows
    return all_gather(padded).transpose(0, 1).flatten(0, 1)[:length]  # (processes, rows, ...) -> (rows * processes, ...)


def all_reduce_max(value: int) -> int:
    return value if world_size() == 1 else int(all_gather(torch.tensor(value)).max())


def broadcast_buffers(module: nn.Module) -> None:
    """Give every process the first one's buffers: running statistics of batch normalisation differ between CPU shards."""
    if world_size() > 1:
        for buffer in module.buffers():
            distributed.broadcast(buffer, 0)


def wrap_ddp(module: nn.Module, device: torch.device) -> nn.Module:
    """The module in DistributedDataParallel, which averages its gradients over the processes.

    On GPUs, batch normalisation uses the statistics of the whole batch (torch.nn.SyncBatchNorm); on CPUs, of its shard.
    """
    if world_size() == 1:
        return module
    if device.type == "cuda":
        module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    device_ids = [device] if device.type == "cuda" else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.14's, of another name for broadcast_buffers, which 2.7 lacks
        return nn.parallel.DistributedDataParallel(module, device_ids=device_ids, broadcast_buffers=False)
