"""Sophia against its formulas, on its authors' picture of two curvatures, and beside Adam where curvatures differ."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from diptych.core.errors import ConfigError
from diptych.optimizers.sophia import SophiaG, SophiaGConfig, SophiaH, SophiaHConfig


def test_a_step_is_the_papers() -> None:
    """Clipped above and below, not clipped, at zero curvature and at negative curvature."""
    p = nn.Parameter(torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64))
    g = torch.tensor([2.0, -2.0, 0.1, 0.5, -0.5, 0.0], dtype=torch.float64)
    h = torch.tensor([1.0, 1.0, 10.0, 0.0, -3.0, 0.0], dtype=torch.float64)
    optimizer = SophiaH([p], lr=0.1, betas=(0.5, 0.5), rho=0.2, eps=1e-12, weight_decay=0.3)
    optimizer.update_curvature({p: h})
    p.grad = g
    optimizer.step()
    moves = torch.tensor([1.0, -1.0, 0.05 / (0.2 * 5.0), 1.0, -1.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(p.detach(), 1 - 0.1 * 0.3 - 0.1 * moves, rtol=1e-12, atol=1e-14)
    assert optimizer.win_rate() == pytest.approx(1 / 5)  # the last coordinate was never reached
    assert optimizer.figures() == {"win_rate": optimizer.win_rate()}


def test_without_curvature_it_is_sign_momentum() -> None:
    p = nn.Parameter(torch.zeros(3))
    optimizer = SophiaG([p], lr=0.1, weight_decay=0.0, delay=10)
    assert optimizer.win_rate() == 0.0
    p.grad = torch.tensor([1e-3, -7.0, 0.0])
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.tensor([-0.1, 0.1, 0.0]))


def test_when_curvature_is_due() -> None:
    parameter = [nn.Parameter(torch.ones(1))]
    assert [step for step in range(25) if SophiaG(parameter).curvature_due(step)] == [0, 10, 20]
    assert [step for step in range(25) if SophiaH(parameter, every=8, delay=8).curvature_due(step)] == [8, 16, 24]


def saddle(at: Tensor) -> Tensor:
    """The paper's function of two variables: a steep double well in x, a flat bowl in y; 0 at (1, 4)."""
    x, y = at
    return 8 * (x - 1) ** 2 * (1.3 * x**2 + 2 * x + 1) + (y - 4) ** 2 / 2


@pytest.mark.parametrize("clip", [0.1, 0.3])
def test_it_passes_the_saddle_that_newton_falls_into(clip: float) -> None:
    at = nn.Parameter(torch.tensor([0.2, 0.0], dtype=torch.float64))
    optimizer = SophiaH([at], lr=clip, betas=(0.0, 0.0), rho=clip, weight_decay=0.0, every=1)  # clips m / h at `clip`
    newton = at.detach().clone()
    for _ in range(40):
        optimizer.update_curvature({at: torch.autograd.functional.hessian(saddle, at.detach()).diagonal()})
        (at.grad,) = torch.autograd.grad(saddle(at), at)
        optimizer.step()
        gradient = torch.autograd.functional.jacobian(saddle, newton)
        newton -= gradient / torch.autograd.functional.hessian(saddle, newton).diagonal()
    assert saddle(at).item() < 1e-6
    assert saddle(newton).item() == pytest.approx(8, abs=0.01)


def noisy_quadratic(make: type[torch.optim.Optimizer], lr: float, seed: int, **hyper: object) -> float:
    """The last loss over the first, with curvatures from 1e-3 to 1e3, gradient noise, and a cosine schedule over 150 steps."""
    a = torch.logspace(-3, 3, 50, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.float64}
    x = nn.Parameter(a**-0.5 * torch.randint(0, 2, (50,), **draw).mul(2).sub(1))
    optimizer = make([x], lr=lr, **hyper)
    first = (a * x.detach() ** 2).sum()
    for step in range(150):
        optimizer.param_groups[0]["lr"] = lr * (1 + torch.cos(torch.tensor(torch.pi * step / 150)).item()) / 2
        x.grad = a * x.detach() + 0.1 * a.sqrt() * torch.randn(50, **draw)
        if isinstance(optimizer, SophiaH) and optimizer.curvature_due(step):
            u = torch.randn(50, **draw)
            optimizer.update_curvature({x: u * a * u})
        optimizer.step()
    return ((a * x.detach() ** 2).sum() / first).item()


def test_it_beats_the_best_adam_where_curvatures_differ() -> None:
    seeds, clip = range(3), 10.0
    hyper = {"betas": (0.9, 0.9), "rho": clip, "weight_decay": 0.0, "every": 5}  # clips m / h at 10, at a rate of 0.1
    ours = sum(noisy_quadratic(SophiaH, 0.1 * clip, seed, **hyper) for seed in seeds)
    adam = min(sum(noisy_quadratic(torch.optim.Adam, lr, seed) for seed in seeds) for lr in (0.3, 1.0, 3.0))
    assert ours <= 0.5 * adam


def test_the_configurations_build_what_they_say() -> None:
    config = SophiaGConfig.parse({"method": "sophiag", "lr": 0.02, "rho": 0.5, "delay": 10})
    optimizer = config.build([{"params": [nn.Parameter(torch.ones(1))], "weight_decay": 0.0}])
    group = optimizer.param_groups[0]
    assert isinstance(optimizer, SophiaG)
    assert (group["lr"], group["rho"], group["betas"], group["weight_decay"]) == (0.02, 0.5, (0.965, 0.99), 0.0)
    assert (config.curvature, optimizer.curvature, optimizer.defaults["delay"]) == ("gauss-newton-bartlett",) * 2 + (10,)
    other = SophiaHConfig.parse({"method": "sophiah", "every": 3})
    built = other.build([{"params": [nn.Parameter(torch.ones(1))]}])
    assert isinstance(built, SophiaH)
    assert (other.curvature, built.curvature, built.probe, built.defaults["every"]) == ("hutchinson", "hutchinson", "gaussian", 3)
    with pytest.raises(ConfigError):
        SophiaGConfig.parse({"method": "sophiag", "every": 0})


def test_ascending_is_descending_on_the_opposite() -> None:
    """Hutchinson's estimate changes its sign with the function; the squares of sampled gradients do not."""
    ends = []
    for sign, maximize in ((1.0, False), (-1.0, True)):
        for kind, flips in ((SophiaH, True), (SophiaG, False)):
            p = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
            optimizer = kind([p], lr=0.1, rho=1.0, weight_decay=0.0, maximize=maximize)
            curvature = torch.tensor([3.0, 5.0], dtype=torch.float64)
            optimizer.update_curvature({p: sign * curvature if flips else curvature})
            p.grad = sign * torch.tensor([0.01, -0.02], dtype=torch.float64)
            optimizer.step()
            ends.append(p.detach().clone())
    assert torch.equal(ends[0], ends[2])
    assert torch.equal(ends[1], ends[3])
