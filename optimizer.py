"""Optimizers by name and learning-rate schedules.

SGD, Adam and AdamW call the fused kernels of torch.optim, with bitwise identical results. torch.optim's classes are not used
for them because constructing the first one imports PyTorch's compiler: two seconds, a fifth of Task 1.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from config import OptimizationSettings, UserError

PLATEAU = 4  # epochs without a lower validation loss after which schedule=plateau divides the learning rate by ten


def learning_rate(settings: OptimizationSettings, progress: float, valid_losses: Sequence[float] = ()) -> float:
    """The learning rate at `progress`, the fraction of all steps done, in 0..1, after epochs with these validation losses."""
    if settings.schedule == "none":
        return settings.lr
    if settings.schedule == "plateau":
        lowest, stalled, lr = math.inf, 0, settings.lr
        for loss in valid_losses:
            lowest, stalled = (loss, 0) if loss < lowest else (lowest, stalled + 1)
            if stalled == PLATEAU:
                stalled, lr = 0, lr / 10
        return lr
    if progress < settings.warmup:
        return settings.lr * max(progress / settings.warmup, 0.02)  # not 0: the first step should move
    decay = (progress - settings.warmup) / (1 - settings.warmup)
    return settings.lr * ((1 - decay) if settings.schedule == "linear" else (1 + math.cos(math.pi * decay)) / 2)


class FusedOptimizer:
    """SGD, Adam or AdamW with the interface of torch.optim's: `param_groups`, `step`, `zero_grad`, `state_dict`.

    sgd: Nesterov momentum 0.9. adam, adamw: betas `beta1` and 0.999 (Kingma & Ba 2015, arXiv 1412.6980; Loshchilov &
    Hutter 2019, arXiv 1711.05101), weight decay added to the gradient or decoupled from it.
    """

    def __init__(self, name: str, parameters: Iterable[torch.Tensor], lr: float, weight_decay: float = 0.0, beta1: float = 0.9):
        self.name, self.weight_decay, self.beta1 = name, weight_decay, beta1
        self.parameters = list(parameters)
        self.param_groups = [{"params": self.parameters, "lr": lr}]
        self.momenta: list = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.squares = [] if name == "sgd" else [torch.zeros_like(parameter) for parameter in self.parameters]
        self.steps = [torch.zeros((), device=parameter.device) for parameter in self.parameters]

    @torch.no_grad()
    def step(self) -> None:
        gradients: list = [parameter.grad for parameter in self.parameters]
        options: dict = {"weight_decay": self.weight_decay, "maximize": False, "fused": True, "lr": self.param_groups[0]["lr"]}
        if self.name == "sgd":
            # a first step from zero momentum is Nesterov's; torch's own first step also dampens nothing
            sgd(self.parameters, gradients, self.momenta, momentum=0.9, dampening=0.0, nesterov=True, **options)
        else:
            options |= {"beta1": self.beta1, "beta2": 0.999, "eps": 1e-8, "amsgrad": False}
            options["decoupled_weight_decay"] = self.name == "adamw"
            adam(self.parameters, gradients, self.momenta, self.squares, [], self.steps, **options)

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def state_dict(self) -> dict[str, list[torch.Tensor]]:
        return {"momenta": self.momenta, "squares": self.squares, "steps": self.steps}

    def load_state_dict(self, state: dict[str, list[torch.Tensor]]) -> None:
        """Raises ValueError or RuntimeError if the state is another model's."""
        for name, tensors in self.state_dict().items():
            for tensor, saved in zip(tensors, state[name], strict=True):
                tensor.copy_(saved)


def build_optimizer(settings: OptimizationSettings, parameters: Iterable[torch.Tensor], beta1: float = 0.9):
    """The optimizer that `settings` name; `beta1` is for adam and adamw alone. Raises UserError if torch.optim's takes no lr
    or no weight_decay."""
    name = settings.optimizer
    if name in ("sgd", "adam", "adamw"):
        return FusedOptimizer(name, parameters, settings.lr, settings.weight_decay, beta1)
    try:
        return getattr(torch.optim, name)(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
    except (AttributeError, TypeError, ValueError) as error:
        message = f"optimizer={name}: torch.optim can't make one for this model ({error}); try sgd, adam or adamw"
        raise UserError(message) from None


def set_lr(optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
