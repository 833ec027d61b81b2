"""The networks, and what is done with one: freeze, infer, evaluate, train for an epoch.

CNN (Task 1), input `(N, 1, 28, 28)` normalised float32:

    layer        output            parameters
    conv1 5x5    (N, 16, 28, 28)          416   padding 2
    pool, ReLU   (N, 16, 14, 14)            0
    conv2 5x5    (N, 32, 14, 14)       12,832   padding 2
    pool, ReLU   (N, 32, 7, 7)              0
    classifier   (N, 2)                 3,138   32 * 7 * 7 = 1,568 features
                                       16,386
"""

import ctypes
import sys
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import nn

from config import UserError
from data_preprocessing import augment, normalise
from optimizer import Optimizer

# ---- networks --------------------------------------------------------------------------------------------------------


class CNN(nn.Module):
    """Two 5x5 convolutions and one fully connected layer. `features` is the part that Task 2 freezes."""

    def __init__(self, output_dim: int):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 5, padding=2),
            nn.MaxPool2d(2),  # 28 -> 14; before the ReLU, which then has a quarter of the work and the same result
            nn.ReLU(),
            nn.Conv2d(16, 32, 5, padding=2),
            nn.MaxPool2d(2),  # 14 -> 7
            nn.ReLU(),
            nn.Flatten(),  # (N, 32, 7, 7) -> (N, 1568)
        )
        self.classifier = nn.Linear(32 * 7 * 7, output_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x))


NETWORKS: dict[str, Callable[[int], nn.Module]] = {"cnn": CNN}


def build(architecture: str, output_dim: int) -> nn.Module:
    """A network with fresh parameters, channels last. Raises UserError for a name that NETWORKS lacks."""
    if architecture not in NETWORKS:
        raise UserError(f"architecture={architecture}: there is no such network; known: {', '.join(NETWORKS)}")
    return NETWORKS[architecture](output_dim).to(memory_format=torch.channels_last)


def freeze(part: nn.Module) -> nn.Module:
    """No gradients, and evaluation mode, so that statistics of normalisation layers stand still too."""
    return part.requires_grad_(False).eval()


def count_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


# ---- device and precision --------------------------------------------------------------------------------------------


def choose_device(wanted: str) -> torch.device:
    """The device for the setting `device`. Raises UserError if that device is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        wanted = next(name for name, is_there in there.items() if is_there)
    if not there[wanted]:
        raise UserError(f"device={wanted}: torch finds none; use device=auto or device=cpu")
    return torch.device(wanted)


def choose_precision(wanted: str, device: torch.device) -> torch.dtype:
    """The arithmetic of training for the setting `precision`: bfloat16 where the device has units for it."""
    if wanted != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[wanted]
    if device.type == "cuda":
        has_units = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        units = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        has_units = units.get("avx512_bf16", False) or units.get("amx_bf16", False)
    else:
        has_units = False
    return torch.bfloat16 if has_units else torch.float32


def keep_freed_memory() -> None:
    """Tell glibc to keep what is freed for the next allocation of that size, instead of giving it back to the system.

    Every step allocates the same activations again; each time, the system would hand them out page by page, zeroed.
    That took half of the training time. Does nothing where there is no glibc.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt:
            mallopt(-3, 2**30)  # M_MMAP_THRESHOLD, bytes: below it, memory comes from the heap
            mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, bytes: a shorter free end of the heap is kept


# ---- inference and evaluation ----------------------------------------------------------------------------------------


@torch.inference_mode()
def infer(
    network: nn.Module, images: torch.Tensor, mean: float, std: float, precision: torch.dtype = torch.float32
) -> torch.Tensor:
    """Logits, float32 `(N, output_dim)` on the CPU, of uint8 images `(N, 1, 28, 28)` on any device."""
    network.eval()
    device = next(network.parameters()).device
    logits = []
    for batch in images.split(500):  # the activations of 500 images fit into the cache
        x = normalise(batch.to(device), mean, std)
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            logits.append(network(x).float().cpu())
    return torch.cat(logits)


def evaluate(logits: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """Mean cross-entropy, in nats, and accuracy, in 0..1, of logits `(N, C)` against labels `(N,)`."""
    return F.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).double().mean().item()


# ---- training --------------------------------------------------------------------------------------------------------


def train_one_epoch(
    network: nn.Module,
    auxiliary: nn.Module | None,
    optimizer: Optimizer,
    batches: Iterable[torch.Tensor],
    images: torch.Tensor,
    labels: torch.Tensor,
    garments: torch.Tensor,
    *,
    mean: float,
    std: float,
    augmentations: str,
    auxiliary_weight: float,
    precision: torch.dtype,
    generator: torch.Generator,
    image_losses: torch.Tensor,
    before_step: Callable[[int, torch.Tensor, torch.Tensor], None],
) -> tuple[float, float]:
    """Train on `batches` of indices into `images`; mean loss, in nats, and accuracy, in 0..1, over the epoch.

    `images` uint8 `(N, 1, 28, 28)`, `labels` and `garments` int64 `(N,)` are on the network's device. The auxiliary
    head, if any, maps the network's features to the ten garments. Each image's latest loss, without the auxiliary
    part, is written to `image_losses` `(N,)`. `before_step` is called before each step with the images trained on so
    far, the sum of their losses and the number classified correctly (to set the learning rate and to show progress).
    Raises UserError, before the parameters change, on a loss that is not finite.
    """
    network.train()
    device = images.device
    losses = torch.zeros((), dtype=torch.float64, device=device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    seen = 0
    for number, indices in enumerate(batches, 1):
        before_step(seen, losses, correct)
        x = normalise(augment(images[indices], augmentations, generator), mean, std)
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            features = network.features(x)
            logits = network.classifier(features)
            each = F.cross_entropy(logits, labels[indices], reduction="none")
            loss = each.mean()
            if auxiliary is not None:
                loss = loss + auxiliary_weight * F.cross_entropy(auxiliary(features), garments[indices])
        if not torch.isfinite(loss):
            raise UserError(f"the loss is {loss.item()} in batch {number}; a smaller lr may help")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        each = each.detach().float()
        image_losses[indices] = each
        losses += each.sum()
        correct += (logits.argmax(1) == labels[indices]).sum()
        seen += len(indices)
    return losses.item() / seen, correct.item() / seen
