"""SGD, Adam and AdamW, a thin class over PyTorch's own fused kernels, and the schedules of their learning rate.

The kernels are those of torch.optim, and so are the results, bit for bit. Its classes are not used because the first one
that is made imports PyTorch's compiler: two seconds, a fifth of the whole Task 1.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from config import Settings

PLATEAU = 4  # epochs without a lower validation loss after which schedule=plateau divides the learning rate by ten


def learning_rate(settings: Settings, progress: float, valid_losses: Sequence[float] = ()) -> float:
    """The learning rate at `progress`, the share of all steps done, in 0..1, after epochs with these validation losses."""
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
    falling = (progress - settings.warmup) / (1 - settings.warmup)
    return settings.lr * ((1 - falling) if settings.schedule == "one_cycle" else (1 + math.cos(math.pi * falling)) / 2)


class Optimizer:
    """Updates `parameters` from their gradients. `lr` may be set between steps.

    sgd: Nesterov momentum 0.9. adam, adamw: betas `beta1` and 0.999 (Kingma & Ba 2015, arXiv 1412.6980; Loshchilov &
    Hutter 2019, arXiv 1711.05101), weight decay added to the gradient or decoupled from it.
    """

    def __init__(
        self,
        name: str,
        parameters: Iterable[torch.Tensor],
        lr: float,
        weight_decay: float = 0.0,
        beta1: float = 0.9,
    ):
        self.name, self.lr, self.weight_decay, self.beta1 = name, lr, weight_decay, beta1
        self.parameters = list(parameters)
        self.momenta: list = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.squares = [] if name == "sgd" else [torch.zeros_like(parameter) for parameter in self.parameters]
        self.steps = [torch.zeros((), device=parameter.device) for parameter in self.parameters]

    @torch.no_grad()
    def step(self) -> None:
        gradients: list = [parameter.grad for parameter in self.parameters]
        shared: dict = {"lr": self.lr, "weight_decay": self.weight_decay, "maximize": False, "fused": True}
        if self.name == "sgd":
            # a first step from zero momentum is Nesterov's; torch's own first step also dampens nothing
            sgd(self.parameters, gradients, self.momenta, momentum=0.9, dampening=0.0, nesterov=True, **shared)
        else:
            adam(
                self.parameters,
                gradients,
                self.momenta,
                self.squares,
                [],
                self.steps,
                amsgrad=False,
                beta1=self.beta1,
                beta2=0.999,
                eps=1e-8,
                decoupled_weight_decay=self.name == "adamw",
                **shared,
            )

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def state_dict(self) -> dict[str, list[torch.Tensor]]:
        return {"momenta": self.momenta, "squares": self.squares, "steps": self.steps}

    def load_state_dict(self, state: dict[str, list[torch.Tensor]]) -> None:
        """Raises ValueError or RuntimeError if the state is another network's."""
        for name, tensors in self.state_dict().items():
            for tensor, saved in zip(tensors, state[name], strict=True):
                tensor.copy_(saved)
