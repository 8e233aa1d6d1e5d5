"""diffGrad against its formulas, and what its friction does."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from diptych.core.errors import ConfigError
from diptych.optimizers.diffgrad import Config, DiffGrad


def by_definition(p: float, grads: list[float], lr: float, betas: tuple[float, float], eps: float, decay: float) -> float:
    m = v = previous = 0.0
    for t, gradient in enumerate(grads, start=1):
        g = gradient + decay * p
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
        friction = 1 / (1 + math.exp(-abs(previous - g)))
        p -= lr * math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t) * m * friction / (math.sqrt(v) + eps)
        previous = g
    return p


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_steps_are_the_papers(decay: float) -> None:
    grads = [1.0, -0.3, 4.0, 0.0, 0.0, -2.0]
    parameter = nn.Parameter(torch.tensor([0.7], dtype=torch.float64))
    optimizer = DiffGrad([parameter], lr=0.1, betas=(0.8, 0.95), eps=0.01, weight_decay=decay)
    for gradient in grads:
        parameter.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        assert parameter.grad.item() == gradient, "the caller's gradient is left alone"
    assert parameter.item() == pytest.approx(by_definition(0.7, grads, 0.1, (0.8, 0.95), 0.01, decay), rel=1e-12)


def test_a_gradient_zeroed_in_place_is_remembered() -> None:
    """What the first official implementation got wrong."""
    kept, zeroed = (nn.Parameter(torch.ones(1, dtype=torch.float64)) for _ in range(2))
    optimizers = [DiffGrad([kept]), DiffGrad([zeroed])]
    zeroed.grad = torch.zeros(1, dtype=torch.float64)
    for gradient in (3.0, -3.0, 3.0):
        kept.grad = torch.full((1,), gradient, dtype=torch.float64)
        zeroed.grad.zero_().add_(gradient)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(kept, zeroed)


def test_a_constant_gradient_makes_adam_at_half_its_rate() -> None:
    halved, adam = (nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2))
    optimizers = [DiffGrad([halved], lr=0.01, corrected_eps=True), torch.optim.Adam([adam], lr=0.01)]
    moves = []
    for _ in range(4):
        before = halved.item(), adam.item()
        for parameter in (halved, adam):
            parameter.grad = torch.full((1,), 2.0, dtype=torch.float64)
        for optimizer in optimizers:
            optimizer.step()
        moves.append((halved.item() - before[0]) / (adam.item() - before[1]))
    assert moves == pytest.approx([1 / (1 + math.exp(-2)), 0.5, 0.5, 0.5], rel=1e-9)


def test_the_epsilon_stands_before_or_behind_the_correction() -> None:
    moves = []
    for corrected in (False, True):
        parameter = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = DiffGrad([parameter], lr=1.0, eps=0.5, betas=(0.9, 0.99), corrected_eps=corrected)
        parameter.grad = torch.ones(1, dtype=torch.float64)
        optimizer.step()
        moves.append(-parameter.item() * (1 + math.exp(-1)))
    assert moves == pytest.approx([0.1 / (0.1 + 0.5), 1 / (1 + 0.5)], rel=1e-12)


def test_the_configuration_builds_what_it_says() -> None:
    config = Config.parse({"method": "diffgrad", "lr": 0.02, "betas": [0.8, 0.9], "corrected_eps": True})
    group = config.build([{"params": [nn.Parameter(torch.ones(1))], "weight_decay": 0.5}]).param_groups[0]
    assert (group["lr"], group["betas"], group["corrected_eps"], group["weight_decay"]) == (0.02, (0.8, 0.9), True, 0.5)
    assert config.curvature == "none"
    with pytest.raises(ConfigError):
        Config.parse({"method": "diffgrad", "lr": 0})
