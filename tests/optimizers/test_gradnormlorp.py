"""GradNormLoRP against formulas written one tensor at a time, at its edges, and saved and loaded."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diptych.core.errors import ConfigError, DataError
from diptych.optimizers.gradnormlorp import Config, DoraAdamW, WeightNormAdamW
from diptych.optimizers.low_rank import Basis, LowRankAdamW, leading

Make = Callable[[list[Any]], torch.optim.Optimizer]
MAKERS: dict[str, Make] = {
    "weight-norm": lambda params: WeightNormAdamW(params, lr=0.05, rank=2, update_proj_gap=3, weight_decay=0.1),
    "galore": lambda params: LowRankAdamW(params, lr=0.05, rank=2, update_proj_gap=3, weight_decay=0.1),
    "dora": lambda params: DoraAdamW(params, lr=0.05, rank=2, lora_rank=3, update_proj_gap=3, weight_decay=0.1),
}


@pytest.fixture(params=MAKERS)
def make(request: pytest.FixtureRequest) -> Make:
    return MAKERS[request.param]


def weights(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in ((6, 4), (3, 7))]


def run(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        optimizer.step()


def test_saved_and_loaded_goes_on_to_the_bit(make: Make) -> None:
    parameters = weights(torch.float32)
    optimizer = make(parameters)
    run(optimizer, parameters, range(4))
    others = [nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    resumed = make(others)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    run(optimizer, parameters, range(4, 8))  # a new basis falls into these
    run(resumed, others, range(4, 8))
    assert all(torch.equal(one, other) for one, other in zip(parameters, others, strict=True))


def test_full_rank_is_no_projection() -> None:
    """With a square basis up(down(G)) is G, and Adam's first step of it is Adam's of a rotated gradient: of one step with one row, the same."""
    grad = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for projection in ("std", "reverse_std", "left", "right", "full"):
        basis = leading(grad, 5, projection)
        back = torch.zeros_like(grad)
        basis.add_up_(back, basis.down(grad), 1.0)
        torch.testing.assert_close(back, grad, rtol=1e-5, atol=1e-5)
    low = leading(grad, 1, "std").down(grad)
    assert low.shape == (5, 1)
    torch.testing.assert_close(low.norm(), torch.linalg.svdvals(grad)[0], rtol=1e-5, atol=0)


def test_weight_norm_is_the_authors_recursion() -> None:
    """Against v and g kept apart, as they are in the paper's code, at full rank."""
    [weight, _] = weights()
    v, w0 = weight.detach().clone(), weight.detach().clone()
    optimizer = WeightNormAdamW([weight], lr=0.05, weight_decay=0.1)
    moments = [torch.zeros(6, 4, dtype=torch.float64)] * 2, [torch.zeros(6, 1, dtype=torch.float64)] * 2
    for t in range(1, 6):
        grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(t - 1), dtype=torch.float64)
        run(optimizer, [weight], range(t - 1, t))
        n = v.norm(dim=1, keepdim=True)
        moved = []
        for place, g in enumerate((grad, (grad * v).sum(1, keepdim=True) / n)):
            m, s = moments[place]
            moments[place][:] = 0.9 * m + 0.1 * g, 0.999 * s + 0.001 * g * g  # type: ignore[index]
            size = 0.05 * (1 - 0.999**t) ** 0.5 / (1 - 0.9**t)
            moved.append(size * moments[place][0] / (moments[place][1].sqrt() + 1e-6))
        v, g = (v - moved[0]) * (1 - 0.005), (n - moved[1]) * (1 - 0.005)
        torch.testing.assert_close(weight.detach(), g * v / v.norm(dim=1, keepdim=True), rtol=1e-10, atol=1e-12)
    assert not torch.allclose(weight, w0)


def test_a_row_of_zeros_trains_and_stays_finite() -> None:
    for shape in ((3, 4), (4,)):
        weight = nn.Parameter(torch.zeros(shape))
        optimizer = WeightNormAdamW([weight], lr=0.1)
        for step in range(4):
            weight.grad = torch.ones(shape)
            optimizer.step()
            assert torch.isfinite(weight).all(), step
        assert (weight < -0.05).all()


def test_shapes_that_cannot_be_normalised_need_a_plain_group() -> None:
    kernel, scalar = nn.Parameter(torch.ones(2, 3, 2, 2)), nn.Parameter(torch.ones(()))
    with pytest.raises(ConfigError, match="normalize=False"):
        WeightNormAdamW([kernel])
    optimizer = WeightNormAdamW([{"params": [kernel, scalar], "normalize": False}], lr=0.1)
    run(optimizer, [kernel, scalar], range(2))
    assert scalar.item() != 1
    channels_last = nn.Parameter(torch.ones(2, 3, 2, 2).to(memory_format=torch.channels_last))
    run(WeightNormAdamW([{"params": [channels_last, nn.Parameter(torch.ones(()))], "normalize": False}], lr=0.1), [channels_last], range(2))
    torch.testing.assert_close(channels_last, kernel)


# ---------------------------------------------------------------- DoRA


def dora(W0: Tensor, A: Tensor, B: Tensor, m: Tensor, scale: float) -> Tensor:
    V = W0 + scale * B @ A
    return m.unsqueeze(1) * V / V.norm(dim=1, keepdim=True).detach()


def test_dora_starts_at_the_weight_and_its_gradients_are_autograds() -> None:
    [weight, _] = weights()
    W0 = weight.detach().clone()
    optimizer = DoraAdamW([weight], lora_rank=3, lora_alpha=6.0)
    assert torch.equal(weight, W0)
    [(A, B, m)] = optimizer.adapter(weight)
    generator = torch.Generator().manual_seed(5)
    leaves = [torch.randn(each.shape, generator=generator, dtype=torch.float64).requires_grad_() for each in (A, B, m)]
    optimizer.load_adapter(weight, [tuple(leaf.detach() for leaf in leaves)])  # type: ignore[list-item]
    expected = dora(W0, *leaves, 2.0)
    torch.testing.assert_close(weight.detach(), expected.detach(), rtol=1e-12, atol=1e-12)
    weight.square().sum().backward()
    expected.square().sum().backward()
    [found] = optimizer.gradients(weight)
    for name, leaf in zip("ABm", leaves, strict=True):
        torch.testing.assert_close(found[name], leaf.grad, rtol=1e-10, atol=1e-12)


def test_dora_learns_a_planted_shift_of_low_rank() -> None:
    generator = torch.Generator().manual_seed(2)
    W0, x = torch.randn(12, 12, generator=generator), torch.randn(256, 12, generator=generator)
    shift = torch.randn(12, 3, generator=generator) @ torch.randn(3, 12, generator=generator) * 0.3
    weight = nn.Parameter(W0.clone())
    optimizer = DoraAdamW([weight], lr=0.02, rank=3, lora_rank=4, update_proj_gap=50)
    losses = []
    for _ in range(300):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(x @ weight.T, x @ (W0 + shift).T)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.02 * losses[0]
    [(A, B, m)] = optimizer.adapter(weight)
    torch.testing.assert_close(weight.detach(), dora(W0, A, B, m, 4.0), rtol=1e-5, atol=1e-5)


def test_dora_adapts_matrices_only() -> None:
    with pytest.raises(ConfigError, match="adapt=False"):
        DoraAdamW([nn.Parameter(torch.ones(3))])
    with pytest.raises(ConfigError, match="lora_rank"):
        DoraAdamW([nn.Parameter(torch.ones(3, 9))], lora_rank=4)


# ---------------------------------------------------------------- refusals and configuration


def test_refusals(make: Make) -> None:
    parameters = weights()
    optimizer = make(parameters)
    before = [parameter.detach().clone() for parameter in parameters]
    parameters[0].grad, parameters[1].grad = torch.ones(6, 4, dtype=torch.float64), torch.ones(3, 7, dtype=torch.float64).to_sparse()
    with pytest.raises(ConfigError, match="dense"):
        optimizer.step()
    assert all(torch.equal(one, other) for one, other in zip(parameters, before, strict=True))
    with pytest.raises(ConfigError):
        LowRankAdamW(parameters, lr=-1.0)
    with pytest.raises(ConfigError):
        LowRankAdamW([{"params": parameters, "rank": 0}])
    with pytest.raises(DataError, match="finite"):
        leading(torch.full((2, 2), torch.nan), 1, "std")


def test_a_basis_can_be_given() -> None:
    class Fixed(LowRankAdamW):
        def find_basis(self, parameter: Tensor, role: str, grad_MN: Tensor, group: dict[str, Any]) -> Basis:
            return Basis(None, torch.eye(grad_MN.shape[1], dtype=grad_MN.dtype)[:1])

    [weight, _] = weights()
    before = weight.detach().clone()
    run(Fixed([weight], lr=0.1, rank=1), [weight], range(3))
    assert torch.equal(weight[:, 1:], before[:, 1:])
    assert not torch.equal(weight[:, 0], before[:, 0])


def test_the_configuration_builds_what_it_says() -> None:
    config = Config.parse({"method": "gradnormlorp", "variant": "dora", "rank": 2, "lora_rank": 3, "lr": 0.02})
    optimizer = config.build([{"params": [nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4))], "weight_decay": 0.5}])
    assert isinstance(optimizer, DoraAdamW)
    assert [group["adapt"] for group in optimizer.param_groups] == [True, False]
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.5}
    assert optimizer.defaults["lr"] == 0.02
    assert config.curvature == "none"
    assert isinstance(Config().build([{"params": [nn.Parameter(torch.ones(4, 4))]}]), WeightNormAdamW)
