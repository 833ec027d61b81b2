"""What is done with a network: build it by name, describe, freeze, infer, evaluate, train it for an epoch."""

import copy
import ctypes
import sys
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from tqdm import tqdm

import parallel
from augmentation import augment
from config import Settings, UserError
from data_preprocessing import normalise
from networks import NETWORKS, Network

# ---- building ---------------------------------------------------------------------------------------------------------

ACTIVATIONS = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}
INITS = {  # of convolutions' and linear layers' weights; their biases then start from 0
    "he": lambda weight: nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu"),
    "xavier": nn.init.xavier_uniform_,
    "orthogonal": nn.init.orthogonal_,
}


def build(
    architecture: str, output_dim: int, *, dropout: float = -1.0, activation: str = "relu", init: str = "default"
) -> Network:
    """A network with fresh parameters, channels last. Raises UserError for a name that NETWORKS lacks.

    `dropout` is the probability in all its dropout layers, -1 leaves the network's own; `init="default"` is PyTorch's.
    """
    if architecture not in NETWORKS:
        raise UserError(f"architecture={architecture}: there is no such network; known: {', '.join(NETWORKS)}")
    network = NETWORKS[architecture](output_dim)
    for parent in list(network.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, nn.ReLU):
                setattr(parent, name, ACTIVATIONS[activation]())
            elif isinstance(layer, nn.Dropout) and dropout >= 0:
                layer.p = dropout
            elif isinstance(layer, nn.Conv2d | nn.Linear) and init != "default":
                INITS[init](layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
    return network.to(memory_format=torch.channels_last)


def load_imagenet(network: Network) -> None:
    """Give a `resnet18` or `resnet18_56` network ImageNet's features. The first filters are summed over colour: what they
    then say of a grey image is what they would say of it in RGB. Raises UserError if the weights can't be fetched."""
    from torchvision.models import ResNet18_Weights, resnet18

    theirs = resnet18()
    try:
        theirs.load_state_dict(ResNet18_Weights.DEFAULT.get_state_dict(progress=False, check_hash=True))
    except Exception as error:  # whatever a downloader raises
        raise UserError(
            f"pretrained=true: torchvision can't fetch its ImageNet weights ({error}); use pretrained=false"
        ) from None
    theirs.conv1.weight = nn.Parameter(theirs.conv1.weight.sum(1, keepdim=True))  # (64, 3, 7, 7) -> (64, 1, 7, 7)
    mine = [layer for layer in network.features if not isinstance(layer, nn.Upsample)]
    for layer, pretrained in zip(mine, list(theirs.children())[:-1]):
        layer.load_state_dict(pretrained.state_dict())


@torch.no_grad()
def whiten(network: Network, x: torch.Tensor) -> None:
    """Set the first convolution to the principal patterns of the patches of normalised images `x` `(N, 1, 28, 28)`, each
    scaled to unit variance and taken with both signs, and freeze it. Jordan 2024, arXiv 2404.00498, section 3.2.

    Its filters beyond twice the number of a patch's pixels stay as they are. Raises UserError if the first layer is none.
    """
    first = network.features[0]
    if not isinstance(first, nn.Conv2d):
        raise UserError("whiten=true: this architecture doesn't begin with a convolution; use whiten=false")
    size = first.kernel_size[0]
    patches = F.unfold(x, size).mT.reshape(-1, size * size)  # (N, k*k, places) -> (N*places, k*k)
    variances, patterns = torch.linalg.eigh(patches.T @ patches / len(patches))  # ascending; patterns are columns
    filters = (patterns / (variances + 0.01).sqrt()).T.flip(0)[: len(first.weight) // 2].view(-1, 1, size, size)
    first.weight[: 2 * len(filters)] = torch.cat([filters, -filters])
    first.requires_grad_(False)


class WithBatchNorm(nn.Sequential):
    """A convolution or a linear layer, and the batch normalisation of what it gives."""


def with_batch_norm(network: Network) -> None:
    """Put batch normalisation after every convolution and hidden linear layer. Ioffe & Szegedy 2015, arXiv 1502.03167.

    Raises UserError if the network has some already.
    """
    if any(isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d) for layer in network.modules()):
        raise UserError("batch_norm=true: this architecture has batch normalisation of its own; leave it out")
    for name, layer in list(network.features.named_children()):
        if isinstance(layer, nn.Conv2d):
            setattr(network.features, name, WithBatchNorm(layer, nn.BatchNorm2d(layer.out_channels)))
        elif isinstance(layer, nn.Linear):
            setattr(network.features, name, WithBatchNorm(layer, nn.BatchNorm1d(layer.out_features)))


def folded(network: Network) -> Network:
    """A copy in evaluation mode, in which what `with_batch_norm` put in has become part of the weights before it: the same
    logits from the network as `build` makes it. Ding et al. 2021, arXiv 2101.03697, section 3.3."""
    network = copy.deepcopy(network).eval()
    for name, layer in list(network.features.named_children()):
        if isinstance(layer, WithBatchNorm):
            fuse: Callable = fuse_conv_bn_eval if isinstance(layer[0], nn.Conv2d) else fuse_linear_bn_eval
            setattr(network.features, name, fuse(layer[0], layer[1]))
    return network


def count_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


class Layer(NamedTuple):
    name: str
    kind: str
    output_shape: tuple[int, ...]  # without the batch dimension
    parameters: int
    multiply_adds: int  # of an image, convolutions and linear layers only


@torch.inference_mode()
def layers(network: nn.Module) -> list[Layer]:
    """The network's layers in the order in which an image passes them."""
    passed, hooks = [], []
    for name, module in network.named_modules():
        if not list(module.children()):

            def note(module, _, output, name=name):
                shape = tuple(output.shape[1:])
                weights = module.weight.numel() if isinstance(module, nn.Conv2d | nn.Linear) else 0
                positions = output[0, 0].numel() if isinstance(module, nn.Conv2d) else 1  # where the weights are applied
                passed.append(Layer(name, type(module).__name__, shape, count_parameters(module), weights * positions))

            hooks.append(module.register_forward_hook(note))
    was_training = network.training
    network.eval()(torch.zeros(1, 1, 28, 28, device=next(network.parameters()).device))
    network.train(was_training)
    for hook in hooks:
        hook.remove()
    return passed


def freeze(part: nn.Module) -> nn.Module:
    """No gradients, and evaluation mode, so that statistics of normalisation layers stand still too."""
    return part.requires_grad_(False).eval()


# ---- device and precision --------------------------------------------------------------------------------------------


def choose_device(wanted: str) -> torch.device:
    """The device for the setting `device`. Raises UserError if that device is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        wanted = next(name for name, is_there in there.items() if is_there)
    if not there[wanted]:
        raise UserError(f"device={wanted}: torch finds none; use device=auto or device=cpu")
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32
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


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """The context in which a network on this device computes in this precision."""
    return torch.autocast(device.type, precision, enabled=precision != torch.float32)


def zero_sums(count: int, device: torch.device) -> torch.Tensor:
    """`(count,)` zeros to add to: float64, but float32 on Apple's GPUs, which have no other."""
    return torch.zeros(count, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)


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
    """Logits, float32 `(N, output_dim)` on the CPU, of uint8 images `(N, 1, 28, 28)` on any device.

    A terminal sees a progress bar if it takes longer than a second.
    """
    network.eval()
    device = next(network.parameters()).device
    logits = []
    batches = images.split(500)  # whose activations fit into the cache
    for batch in tqdm(batches, "inference", delay=1, disable=None, leave=False):
        x = normalise(batch.to(device), mean, std)
        with autocast(device, precision):
            logits.append(network(x).float().cpu())
    return torch.cat(logits)


def evaluate(logits: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """Mean cross-entropy, in nats, and accuracy, in 0..1, of logits `(N, C)` against labels `(N,)`."""
    return F.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).double().mean().item()


# ---- training --------------------------------------------------------------------------------------------------------


class Heads(nn.Module):
    """What is trained: a network and, on its features, an auxiliary head that maps them to the ten garments, if any.

    Normalised images `(N, 1, 28, 28)` -> logits `(N, output_dim)` and the garments' logits `(N, 10)`, or None.
    """

    def __init__(self, network: Network, auxiliary: nn.Module | None):
        super().__init__()
        self.network, self.auxiliary = network, auxiliary

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        features = self.network.features(x)
        return self.network.classifier(features), self.auxiliary(features) if self.auxiliary is not None else None


def train_one_epoch(
    heads: nn.Module,
    batches: Iterable[torch.Tensor],
    images: torch.Tensor,
    labels: torch.Tensor,
    garments: torch.Tensor,
    settings: Settings,
    *,
    mean: float,
    std: float,
    precision: torch.dtype,
    generator: torch.Generator,
    image_losses: torch.Tensor,
    teach: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    sums: torch.Tensor,
    step: Callable[[], None],
) -> None:
    """Train on `batches` of indices into `images`; add to `sums` `(3,)`: images, their cross-entropies, in nats,
    and how many were classified correctly.

    `heads` is a Heads, perhaps one that several processes train together: each computes its share of every batch, and all
    get the same sums and losses. `images` uint8 `(N, 1, 28, 28)`, `labels` and `garments` int64 `(N,)` are on its device.
    `teach`, if any, maps a batch of augmented images and their indices to a teacher's logits, which the network's should
    resemble (Hinton et al. 2015, arXiv 1503.02531, section 2). Each image's latest cross-entropy is written to
    `image_losses` `(N,)`.
    `step`, called when the gradients are there, moves the parameters and removes the gradients.
    Raises UserError, before the parameters change, on a loss that is not finite, on one image that can't be normalised or
    on fewer images than processes.
    """
    heads.train()
    device = images.device
    for number, indices in enumerate(batches, 1):
        if len(indices) < parallel.count():
            raise UserError(
                f"{parallel.count()} processes can't share a batch of {len(indices)}; use a larger batch_size or limit"
            )
        # augmented before it is shared out, so that the random numbers are the same for any number of processes
        batch = parallel.share(augment(images[indices], settings.augment, generator))
        mine = parallel.share(indices)
        x = normalise(batch, mean, std)
        target = labels[mine]
        with autocast(device, precision):
            try:
                logits, garment_logits = heads(x)
            except ValueError:  # of batch normalisation, where one image gives it a single value
                if len(indices) > 1:
                    raise
                raise UserError("a batch of one image can't be normalised; use a larger batch_size") from None
            each = F.cross_entropy(logits, target, reduction="none")
            loss = each.mean()
            if settings.label_smoothing:
                loss = F.cross_entropy(logits, target, label_smoothing=settings.label_smoothing)
            if teach is not None:
                wanted = (teach(batch, mine) / settings.temperature).softmax(1)
                likeness = F.cross_entropy(logits / settings.temperature, wanted) * settings.temperature**2
                loss = settings.teacher_share * likeness + (1 - settings.teacher_share) * loss
            if garment_logits is not None:
                loss = loss + settings.auxiliary * F.cross_entropy(garment_logits, garments[mine])
        if not torch.isfinite(loss):
            raise UserError(f"the loss is {loss.item()} in batch {number}; a smaller lr may help")
        # the mean of the processes' gradients is that of the whole batch also if their shares differ by an image
        (loss * (parallel.count() * len(mine) / len(indices))).backward()
        told = torch.stack([each.detach().float(), logits.argmax(1) == target], 1)  # (N, 2)
        each, correct = parallel.whole(told, len(indices)).unbind(1)
        image_losses[indices] = each
        sums[0] += len(indices)
        sums[1] += each.sum()
        sums[2] += correct.sum()
        step()


@torch.no_grad()
def average_into(averaged: nn.Module, network: nn.Module, decay: float, steps: int) -> None:
    """Move the averaged network's parameters and statistics towards the network's: an exponential moving average, whose decay
    is smaller after few `steps`, because the start is random (as TensorFlow's ExponentialMovingAverage has it)."""
    decay = min(decay, (1 + steps) / (10 + steps))
    for mean, latest in zip(averaged.state_dict().values(), network.state_dict().values()):
        if mean.is_floating_point():
            mean.lerp_(latest, 1 - decay)
