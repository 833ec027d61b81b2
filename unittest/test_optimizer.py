"""Optimizers and learning-rate schedules: PyTorch's, where it has them."""

import pytest
import torch

from config import OptimizationSettings, UserError
from optimizer import FusedOptimizer, build_optimizer, learning_rate, set_lr


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_optimizers_are_bitwise_torchs(name):
    torch.manual_seed(0)
    ours, reference = torch.nn.Linear(30, 20), torch.nn.Linear(30, 20)
    reference.load_state_dict(ours.state_dict())
    reference_optimizer = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01, fused=True),
        "adam": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.01, fused=True),
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.01, fused=True),
    }[name](reference.parameters())
    optimizer = FusedOptimizer(name, ours.parameters(), lr=0.1, weight_decay=0.01)
    for step in range(5):
        x = torch.randn(7, 30)
        for model, stepper in ((ours, optimizer), (reference, reference_optimizer)):
            stepper.zero_grad()
            model(x).square().sum().backward()
            set_lr(stepper, 0.1 / (1 + step))
            stepper.step()
    assert ours.weight.equal(reference.weight) and ours.bias.equal(reference.bias)


@pytest.mark.parametrize("name", ["RMSprop", "Adagrad"])
def test_a_class_of_torch_optim_can_be_named(name):
    optimizer = build_optimizer(OptimizationSettings(optimizer=name, lr=0.5, weight_decay=0.1), [torch.zeros(2)])
    assert type(optimizer) is getattr(torch.optim, name)
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]) == (0.5, 0.1)


@pytest.mark.parametrize("name", ["LBFGS", "Adm", "Optimizer"])
def test_a_class_that_does_not_fit_or_exist_is_refused_in_one_line(name):
    with pytest.raises(UserError, match=rf"optimizer={name}: .* try sgd, adam or adamw") as refused:
        build_optimizer(OptimizationSettings(optimizer=name), [torch.zeros(2)])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_schedules_rise_during_the_warmup_and_end_at_zero(schedule):
    settings = OptimizationSettings(schedule=schedule, lr=2.0, warmup=0.25)
    assert learning_rate(settings, 0) < 0.1
    assert learning_rate(settings, 0.125) == pytest.approx(1.0)
    assert learning_rate(settings, 0.25) == 2.0
    assert learning_rate(settings, 0.625) == pytest.approx(1.0)
    assert learning_rate(settings, 1) == pytest.approx(0)


def test_no_schedule_is_a_constant_learning_rate():
    settings = OptimizationSettings(lr=0.3)
    assert {learning_rate(settings, progress) for progress in (0, 0.1, 0.5, 1)} == {0.3}


def test_plateau_is_torchs():
    losses = [1.0, 0.5, 0.6, 0.6, 0.6, 0.6, 0.6, 0.4, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=0.1, patience=3, threshold=0
    )  # acts after patience + 1
    settings = OptimizationSettings(schedule="plateau", lr=1.0)
    for epoch, loss in enumerate(losses, 1):
        plateau.step(loss)
        assert learning_rate(settings, 0, losses[:epoch]) == pytest.approx(optimizer.param_groups[0]["lr"])
