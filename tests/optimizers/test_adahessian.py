"""AdaHessian against its formulas, its averages by shape, and its promise about badly scaled curvature."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from diptych.core.errors import ConfigError
from diptych.optimizers.adahessian import IMAGE, INSTRUCTION, TRANSFORMER, AdaHessian, Config, averaged


def by_definition(p: float, grads: list[float], diagonals: list[float | None], power: float) -> float:
    m, square, n, (b1, b2, lr, eps, decay) = 0.0, 0.0, 0, (0.8, 0.95, 0.1, 0.01, 0.3)
    for t, (g, d) in enumerate(zip(grads, diagonals, strict=True), start=1):
        m = b1 * m + (1 - b1) * g
        if d is not None:
            n, square = n + 1, b2 * square + (1 - b2) * d * d
        denominator = math.sqrt(square) ** power / math.sqrt(1 - b2**n) ** power + eps
        p -= lr * (m / (1 - b1**t) / denominator + decay * p)
    return p


@pytest.mark.parametrize("power", [1.0, 0.5])
@pytest.mark.parametrize("every", [1, 3])
def test_steps_are_the_papers(power: float, every: int) -> None:
    """With `every` the moment of the curvature, and its bias correction, count estimates."""
    grads = [1.0, -0.3, 4.0, 0.0, 0.0, -2.0, 0.7]
    diagonals = [0.5 * step - 1.2 if step % every == 0 else None for step in range(len(grads))]
    p = nn.Parameter(torch.tensor([0.7], dtype=torch.float64))
    optimizer = AdaHessian([p], 0.1, betas=(0.8, 0.95), eps=0.01, weight_decay=0.3, hessian_power=power, every=every)
    for step, (gradient, diagonal) in enumerate(zip(grads, diagonals, strict=True)):
        assert optimizer.curvature_due(step) == (diagonal is not None)
        if diagonal is not None:
            optimizer.update_curvature({p: torch.tensor([diagonal], dtype=torch.float64)})
        p.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
    assert p.item() == pytest.approx(by_definition(0.7, grads, diagonals, power), rel=1e-12)


def test_neighbourhoods() -> None:
    def means(shape: tuple[int, ...], block: int) -> Tensor:
        signs = torch.tensor([1.0, -1.0]).repeat(math.prod(shape))[: math.prod(shape)]
        return averaged(((torch.arange(math.prod(shape)) + 1) * signs).view(shape), block)

    assert means((4,), -1).tolist() == [1, -2, 3, -4]
    assert means((2, 2), 1).tolist() == [[1, -2], [3, -4]]
    assert means((2, 3), -1).tolist() == [[2], [5]]
    assert means((1, 2, 4), -1).tolist() == [[[2.5], [6.5]]]
    assert means((1, 2, 2, 2), -1).tolist() == [[[[2.5]], [[6.5]]]]
    assert means((1, 1, 2, 2, 2), -1).tolist() == [[[[[4.5]]]]]
    assert means((2, 3), 2).tolist() == [[1.5, 1.5, 3.5], [3.5, 5.5, 5.5]]
    assert averaged(torch.tensor(-2.0), -1).item() == -2


@pytest.mark.parametrize("blocks", [IMAGE, INSTRUCTION, (2, 4, 6, 8)])
def test_every_number_of_axes_is_stepped_by_its_neighbourhood(blocks: tuple[int, int, int, int]) -> None:
    shapes = [(), (4,), (2, 6), (1, 2, 6), (2, 2, 2, 2), (2, 1, 2, 2, 2)]
    parameters = [nn.Parameter(torch.ones(shape, dtype=torch.float64)) for shape in shapes]
    estimates = {p: torch.randn(p.shape, dtype=torch.float64) for p in parameters}
    optimizer = AdaHessian(parameters, lr=0.1, eps=1e-9, block_sizes=blocks)
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.update_curvature(estimates)
    optimizer.step()
    for p, estimate in estimates.items():
        block = blocks[min(p.ndim, 4) - 1] if p.ndim else 1
        torch.testing.assert_close(p.detach(), 1 - 0.1 / (averaged(estimate, block).abs().expand_as(p) + 1e-9))


def test_blocks_must_divide() -> None:
    with pytest.raises(ConfigError, match="do not divide"):
        AdaHessian([nn.Parameter(torch.ones(3, 5))], block_sizes=TRANSFORMER)
    with pytest.raises(ConfigError):
        Config.parse({"method": "adahessian", "block_sizes": [1, 0, -1, -1]})


def test_a_step_without_curvature_is_refused() -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = AdaHessian([p])
    p.grad = torch.ones(2)
    with pytest.raises(ConfigError, match="without curvature"):
        optimizer.step()
    assert torch.equal(p, torch.ones(2))
    assert not optimizer.state


def noisy_quadratic(make: type[torch.optim.Optimizer], lr: float, seed: int, **hyper: object) -> float:
    """The last loss over the first, with curvatures from 1e-3 to 1e3, gradient noise, and a cosine schedule over 150 steps."""
    a = torch.logspace(-3, 3, 50, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.float64}
    x = nn.Parameter(a**-0.5 * torch.randint(0, 2, (50,), **draw).mul(2).sub(1))
    optimizer = make([x], lr=lr, **hyper)
    first = (a * x.detach() ** 2).sum()
    for step in range(150):
        optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / 150)) / 2
        x.grad = a * x.detach() + 0.1 * a.sqrt() * torch.randn(50, **draw)
        if isinstance(optimizer, AdaHessian):
            z = torch.randint(0, 2, (50,), **draw).mul(2).sub(1)
            optimizer.update_curvature({x: z * a * z})
        optimizer.step()
    return ((a * x.detach() ** 2).sum() / first).item()


def test_the_rate_matters_less_than_adams_where_curvatures_differ() -> None:
    seeds = range(2)
    ours = [sum(noisy_quadratic(AdaHessian, lr, seed, eps=1e-12) for seed in seeds) for lr in (0.05, 0.15, 0.5)]
    adam = [sum(noisy_quadratic(torch.optim.Adam, lr, seed) for seed in seeds) for lr in (0.1, 0.3, 1.0)]
    assert min(ours) <= 0.5 * min(adam)
    assert max(ours) <= 5 * min(ours)
    assert max(adam) >= 20 * min(adam)


def test_the_configuration_builds_what_it_says() -> None:
    config = Config.parse({"method": "adahessian", "lr": 0.02, "block_sizes": [1, 2, -1, -1], "every": 4})
    optimizer = config.build([{"params": [nn.Parameter(torch.ones(2, 2))], "weight_decay": 0.5}])
    group = optimizer.param_groups[0]
    assert (group["lr"], group["block_sizes"], group["weight_decay"], optimizer.defaults["every"]) == (0.02, (1, 2, -1, -1), 0.5, 4)
    assert (config.curvature, optimizer.curvature, optimizer.probe) == ("hutchinson", "hutchinson", "rademacher")
