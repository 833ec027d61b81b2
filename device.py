"""Device and precision of the arithmetic."""

import copy
import warnings

import torch
from torch import nn

from config import UserError
from layers import SomeModel


def choose_device(name: str) -> torch.device:
    """The device for the setting `device`. Raises UserError if torch doesn't find it."""
    is_available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, found in is_available.items() if found)
    if not is_available[name]:
        raise UserError(f"device={name}: torch finds none; use device=auto or device=cpu")
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32
    torch.backends.cudnn.deterministic = True  # bitwise repeatable
    return torch.device(name)


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of training for the setting `precision`: auto is bfloat16 where the device has instructions for it."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if device.type == "cuda":
        is_supported = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        features = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        is_supported = features.get("avx512_bf16", False) or features.get("amx_bf16", False)
    else:
        is_supported = False
    return torch.bfloat16 if is_supported else torch.float32


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """The context in which a model on this device computes in this precision."""
    # a cached copy of a weight would not be part of a CUDA graph
    return torch.autocast(device.type, precision, enabled=precision != torch.float32, cache_enabled=False)


def capture(module: nn.Module, inputs: tuple[torch.Tensor, ...], precision: torch.dtype) -> None:
    """Replace the module's forward and backward passes in training mode by CUDA graphs, for inputs of these shapes.

    A small model's step has hundreds of kernels of a few microseconds each; launching them one by one takes longer.
    Ng et al. 2021, "Accelerating PyTorch with CUDA Graphs". All outputs of the module will require a gradient.
    """
    device = inputs[0].device
    state, rng = copy.deepcopy(module.state_dict()), torch.cuda.get_rng_state(device)
    inputs = tuple(tensor.clone() for tensor in inputs)  # each later batch is written into them
    with autocast(device, precision), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The AccumulateGrad node")  # made by the warm-up, in a stream of its own
        torch.cuda.make_graphed_callables(module, inputs)
    module.load_state_dict(state)  # running statistics before the passes of the capture
    torch.cuda.set_rng_state(rng, device)


def move(model: SomeModel, device: torch.device) -> SomeModel:
    """The model on the device. Apple's GPUs have no float64: there, the buffers `mean` and `std` become float32."""
    return (model.float() if device.type == "mps" else model).to(device)
