"""Several processes that train one network: `torchrun --nproc_per_node=N train.py ...`.

torch.distributed does the work, gloo between CPUs and nccl between GPUs. Each process computes its share of every batch;
gradients, batch statistics and losses are brought together, so that all processes go through what one alone would go
through, but for rounding. In a process that was started alone, nothing here changes anything.
"""

import os
import sys
from datetime import timedelta

import torch
import torch.nn.functional as F
from torch import distributed, nn

from config import UserError

PATIENCE = timedelta(minutes=10)  # for the slowest of the processes


def start(device: torch.device) -> torch.device:
    """Join the processes that torchrun has started, if it has; the device of this one."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return device
    if device.type == "cuda":
        processes, there = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if processes > there:
            raise UserError(f"{processes} processes, but {there} GPU here; start fewer, or say device=cpu")
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not distributed.is_initialized():
        store, rank_here, world_size = next(distributed.rendezvous("env://"))
        # its keys may outlive a restart; then a process would look for another's predecessor
        store = distributed.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, timeout=PATIENCE, store=store, rank=rank_here, world_size=world_size)
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


def job() -> str:
    """What the processes have in common that torchrun starts, also after a restart, and no other processes have; empty for
    a process that was started alone."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return f"torchrun {os.getppid()}" if name == "none" else name  # none: what torchrun says unless --rdzv-id is given


def share(rows: torch.Tensor) -> torch.Tensor:
    """This process's rows: a view of every `count()`th."""
    return rows[rank() :: count()]


def gathered(x: torch.Tensor) -> torch.Tensor:
    """All processes' tensors, of one shape, `(count, ...)`. For few numbers faster than gloo's sum of them."""
    tensors = [torch.empty_like(x) for _ in range(count())]
    distributed.all_gather(tensors, x.contiguous())
    return torch.stack(tensors)


def whole(part: torch.Tensor, length: int) -> torch.Tensor:
    """All `length` rows, of which each process gives its share, on every process."""
    if count() == 1:
        return part
    padded = part.new_zeros(-(-length // count()), *part.shape[1:])  # shares may differ by a row
    padded[: len(part)] = part
    return gathered(padded).transpose(0, 1).flatten(0, 1)[:length]  # (processes, rows, ...) -> (rows * processes, ...)


def any_of(flag: int) -> int:
    """The greatest of the processes' flags."""
    return flag if count() == 1 else int(gathered(torch.tensor(flag)).max())


class _Normalise(torch.autograd.Function):
    """`(x - mean) / sqrt(variance + eps) * weight + bias` with mean and variance over all processes' x, which it also gives.

    The gradient is Ioffe & Szegedy's (2015, arXiv 1502.03167, section 3), its two means over all processes too. PyTorch's
    kernels do the work; they know one process only, and what they leave out is added.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> tuple[torch.Tensor, ...]:
        _, mean, scale = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
        places = torch.full_like(mean, x.numel() / len(mean))
        means, variances, places = gathered(torch.stack([mean, scale**-2 - eps, places])).unbind(1)  # (processes, C) each
        total = places.sum(0)
        mean = (places * means).sum(0) / total
        variance = (places * (variances + (means - mean).square())).sum(0) / total
        ctx.save_for_backward(x, weight, mean, variance, total)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, variance, total)
        return F.batch_norm(x, mean, variance, weight, bias, eps=eps), mean, variance, total

    @staticmethod
    def backward(ctx, gradient: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, mean, variance, total = ctx.saved_tensors
        scale = (variance + ctx.eps).rsqrt()
        of_x, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, x, weight, None, None, mean, scale, True, ctx.eps, [True, True, True]
        )
        here = torch.stack([of_weight, of_bias])
        of_scale, of_mean = (here / (x.numel() / len(mean)) - gathered(here).sum(0) / total) * scale * weight
        return of_x + F.batch_norm(x, mean, variance, of_scale, of_mean, eps=ctx.eps), of_weight, of_bias, None


class SharedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation by the statistics of the whole batch, of which each process has its share.

    PyTorch's own SyncBatchNorm needs a GPU.
    """

    momentum: float
    running_mean: torch.Tensor
    running_var: torch.Tensor
    num_batches_tracked: torch.Tensor

    def _check_input_dim(self, x: torch.Tensor) -> None:
        """Any will do: `(N, C)` as well as `(N, C, H, W)`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        x, mean, variance, places = _Normalise.apply(x, self.weight, self.bias, self.eps)
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * places / (places - 1), self.momentum)
            self.num_batches_tracked += 1
        return x


def with_shared_statistics(network: nn.Module) -> None:
    """Replace the batch normalisation layers of a network by such as see the whole batch, with the same parameters."""
    for parent in list(network.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
                shared = SharedBatchNorm(layer.num_features, layer.eps, layer.momentum)
                shared.load_state_dict(layer.state_dict())
                setattr(parent, name, shared.to(layer.weight.device))


def together(module: nn.Module, device: torch.device) -> nn.Module:
    """The module, with gradients that are the means of all processes' ones, and the first process's parameters."""
    if count() == 1:
        return module
    with_shared_statistics(module)
    return nn.parallel.DistributedDataParallel(module, device_ids=[device] if device.type == "cuda" else None)
