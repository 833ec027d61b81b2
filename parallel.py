"""Several processes that train one network: `torchrun --nproc_per_node=N train.py ...`.

torch.distributed does the work, gloo between CPUs and nccl between GPUs. Each process computes its share of every batch;
gradients, batch statistics and losses are brought together, so that all processes go through what one alone would go
through, but for rounding. In a process that was started alone, nothing here changes anything.
"""

import os
import sys
from datetime import timedelta

import torch
from torch import distributed, nn

PATIENCE = timedelta(minutes=10)  # for the slowest of the processes


def start(device: torch.device) -> torch.device:
    """Join the processes that torchrun has started, if it has; the device of this one."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not distributed.is_initialized():
        store, rank_here, processes = next(distributed.rendezvous("env://"))
        # its keys may outlive a restart; then a process would look for another's predecessor
        store = distributed.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, timeout=PATIENCE, store=store, rank=rank_here, world_size=processes)
    if rank():
        sys.stdout = open(os.devnull, "w")  # the first process speaks for all
    return device


def count() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def has_restarted() -> bool:
    """Whether torchrun has started the processes again, because one of them had died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def share(rows: torch.Tensor) -> torch.Tensor:
    """This process's rows: a view of every `count()`th."""
    return rows[rank() :: count()]


def whole(part: torch.Tensor, length: int) -> torch.Tensor:
    """All `length` rows, of which each process gives its share, on every process."""
    if count() == 1:
        return part
    rows = part.new_zeros(length, *part.shape[1:])
    share(rows).copy_(part)
    distributed.all_reduce(rows)  # x + 0 is x
    return rows


def any_of(flag: int) -> int:
    """The greatest of the processes' flags."""
    if count() == 1:
        return flag
    flags = torch.tensor(flag)
    distributed.all_reduce(flags, distributed.ReduceOp.MAX)
    return int(flags)


class _Sum(torch.autograd.Function):
    """The sum of all processes' tensors, on each; what that adds to the loss of any of them comes back to all."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        distributed.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return _Sum.forward(ctx, gradient)


class SharedBatchNorm(nn.BatchNorm2d):
    """Batch normalisation by the statistics of the whole batch, of which each process has its share.

    PyTorch's own SyncBatchNorm needs a GPU.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        x = x.float()
        total = _Sum.apply(torch.cat([x.sum((0, 2, 3)), x.new_tensor([x.numel() / x.shape[1]])]))  # (C + 1,)
        places = total[-1].detach()
        mean = total[:-1] / places
        centred = x - mean.view(1, -1, 1, 1)
        variance = _Sum.apply(centred.square().sum((0, 2, 3))) / places
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * places / (places - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = (variance + self.eps).rsqrt() * self.weight
        return centred * scale.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


def with_shared_statistics(network: nn.Module) -> None:
    """Replace the batch normalisation layers of a network by such as see the whole batch, with the same parameters."""
    for parent in list(network.modules()):
        for name, layer in parent.named_children():
            if type(layer) is nn.BatchNorm2d:
                shared = SharedBatchNorm(layer.num_features, layer.eps, layer.momentum)
                shared.load_state_dict(layer.state_dict())
                setattr(parent, name, shared.to(layer.weight.device))


def together(module: nn.Module, device: torch.device) -> nn.Module:
    """The module, with gradients that are the means of all processes' ones, and the first process's parameters."""
    if count() == 1:
        return module
    with_shared_statistics(module)
    return nn.parallel.DistributedDataParallel(module, device_ids=[device] if device.type == "cuda" else None)
