"""SGD, Adam and AdamW: a thin class over PyTorch's own fused kernels.

The kernels are those of torch.optim, and so are the results, bit for bit. Its classes are not used because the first one
that is made imports PyTorch's compiler: two seconds, a fifth of the whole Task 1.
"""

from collections.abc import Iterable

import torch
from torch.optim.adam import adam
from torch.optim.sgd import sgd


class Optimizer:
    """Updates `parameters` from their gradients. `lr` may be set between steps.

    sgd: Nesterov momentum 0.9. adam, adamw: betas 0.9 and 0.999 (Kingma & Ba 2015, arXiv 1412.6980; Loshchilov &
    Hutter 2019, arXiv 1711.05101), weight decay added to the gradient or decoupled from it.
    """

    def __init__(self, name: str, parameters: Iterable[torch.nn.Parameter], lr: float, weight_decay: float = 0.0):
        self.name, self.lr, self.weight_decay = name, lr, weight_decay
        self.parameters = list(parameters)
        self.momenta = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.squares = [] if name == "sgd" else [torch.zeros_like(parameter) for parameter in self.parameters]
        self.steps = [torch.zeros((), device=parameter.device) for parameter in self.parameters]

    @torch.no_grad()
    def step(self) -> None:
        gradients = [parameter.grad for parameter in self.parameters]
        shared = {"lr": self.lr, "weight_decay": self.weight_decay, "maximize": False, "fused": True}
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
                beta1=0.9,
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
