"""AdAdaGrad: what the tests ask for, how batches are cut, and AdaGrad in its forms."""

from __future__ import annotations

import io
import math

import pytest
import torch
from torch import Tensor, nn

from diptych.core.errors import ConfigError
from diptych.optimizers import adadagrad
from diptych.optimizers.adadagrad import (
    AdaGradConfig,
    AdaGradNorm,
    AdaGradNormConfig,
    AdaptiveBatchSize,
    Config,
    Division,
    Noise,
    RowAdaGrad,
)


def samples(b: int = 12) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(b, *shape, generator=generator, dtype=torch.float64) + 0.5 for shape in ((4, 3), (5,))]


def test_pooling_is_exact_where_the_authors_overestimate() -> None:
    grads = samples()
    whole = adadagrad.norm_noise(grads)
    parts = list(zip(*(grad.chunk(4) for grad in grads), strict=True))
    assert adadagrad.pooled_noise(parts).variance == pytest.approx(whole.variance, rel=1e-12)
    assert adadagrad.pooled_noise(parts, official=True).variance > 1.05 * whole.variance


def test_micro_batches_estimate_the_noise_of_samples() -> None:
    grads = samples(8192)
    size = 16
    micro = [grad.unflatten(0, (-1, size)).mean(dim=1) for grad in grads]
    squares = sum(part.flatten(1).square().sum(dim=1) for part in micro)
    assert isinstance(squares, Tensor)
    found = adadagrad.of_micro_batches(squares.tolist(), adadagrad.norm_noise(grads).square_norm, size)
    assert found.variance == pytest.approx(adadagrad.norm_noise(grads).variance, rel=0.1)
    exact = adadagrad.norm_noise(micro)
    assert found.variance == pytest.approx(exact.variance * size, rel=1e-9)


def test_whole_and_by_tensor_agree_on_one_tensor_and_differ_on_two() -> None:
    grads = samples()
    for noise in (adadagrad.inner_product_noise, adadagrad.orthogonality_noise):
        assert noise(grads[:1]).variance == pytest.approx(noise(grads[:1], by_tensor=True).variance)
        assert noise(grads).variance != pytest.approx(noise(grads, by_tensor=True).variance, rel=1e-3)
    flat = [torch.cat([grad.flatten(1) for grad in grads], dim=1)]
    assert adadagrad.inner_product_noise(grads).variance == pytest.approx(adadagrad.inner_product_noise(flat).variance)
    assert adadagrad.orthogonality_noise(grads).variance == pytest.approx(adadagrad.orthogonality_noise(flat).variance)


def test_requests_at_the_edges() -> None:
    still = [torch.ones(4, 3)]
    assert adadagrad.norm_test(adadagrad.norm_noise(still), 0.5) == 0
    assert adadagrad.coordinate_request(still, 0.5) == 0
    flips = [torch.tensor([[1.0], [-1.0]])]
    assert adadagrad.norm_test(adadagrad.norm_noise(flips), 0.5) == math.inf
    assert adadagrad.coordinate_request(flips, 0.5) == math.inf
    assert adadagrad.grown(8, math.inf, 100) == 100
    with pytest.raises(ConfigError, match="without bound"):
        adadagrad.grown(8, math.inf)
    one = [torch.tensor([[1.0], [3.0]])]
    assert adadagrad.coordinate_request(one, 0.5) == pytest.approx(2 / (0.25 * 4))
    assert adadagrad.coordinate_request(one, 0.5) == pytest.approx(adadagrad.norm_test(adadagrad.norm_noise(one), 0.5))


def test_the_controller_grows_when_asked_and_never_shrinks() -> None:
    controller = AdaptiveBatchSize(eta=0.5, max_batch_size=64, interval=2, lr_scaling="sqrt")
    noisy = {"variance": 10.0, "square_norm": 1.0}
    assert controller.next({"batch_size": 8, "updates": 1, **noisy}) == 40
    assert controller.next({"batch_size": 8, "updates": 0, **noisy}) == 8
    assert controller.next({"batch_size": 48, "updates": 1, **noisy}) == 48
    assert controller.next({"batch_size": 8, "updates": 1, "square_norm": 1.0}) == 8
    assert controller.next({"batch_size": 8, "updates": 1, "variance": 1e9, "square_norm": 1.0}) == 64
    assert controller.next({"batch_size": 70, "updates": 1, "variance": 1e9, "square_norm": 1.0}) == 70
    assert controller.lr_factor(32, 8) == 2.0
    assert AdaptiveBatchSize(0.5, 64).lr_factor(32, 8) == 1.0
    assert AdaptiveBatchSize(0.5, 64, lr_scaling="linear").lr_factor(32, 8) == 4.0


def test_divisions_hold_what_they_say() -> None:
    last = Division(16, 16, 1)
    for request in range(16, 2000, 37):
        now = adadagrad.divide(request, last, world=2, max_global=1500, max_micro=64)
        assert now.global_batch == now.micro * now.accumulation * 2
        assert now.micro <= 64 or request <= last.global_batch
        assert now.global_batch >= min(request, 1500)


def test_logistic_regression_grows_its_batch_and_wins_by_iterations() -> None:
    """The card's setting, cut short: the inequality of the test is what is checked, and that a laxer eta grows slower."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, 10, generator=generator, dtype=torch.float64)
    y = ((x @ torch.randn(10, generator=generator, dtype=torch.float64) + torch.randn(1000, generator=generator)) > 0).double()

    def run(eta: float | None) -> tuple[list[int], float]:
        w = nn.Parameter(torch.zeros(10, dtype=torch.float64))
        optimizer, b, at, sizes = AdaGradNorm([w], lr=1.0), 8, 0, []
        for _ in range(60):
            index = torch.arange(at, at + b) % 1000
            at += b
            sizes.append(b)
            residual = torch.sigmoid(x[index] @ w.detach()) - y[index]
            grads = [x[index] * residual.unsqueeze(1)]
            w.grad = grads[0].mean(dim=0)
            optimizer.step()
            if eta is not None:
                noise = adadagrad.norm_noise(grads)
                asked = AdaptiveBatchSize(eta, 1000).next({"batch_size": b, "variance": noise.variance, "square_norm": noise.square_norm})
                assert asked == 1000 or noise.variance / asked <= eta**2 * noise.square_norm
                b = asked
        gradient = (x * (torch.sigmoid(x @ w.detach()) - y).unsqueeze(1)).mean(dim=0)
        return sizes, float(gradient.square().sum())

    (adaptive, end), (lax, _), (_, constant) = run(0.5), run(0.9), run(None)
    assert adaptive == sorted(adaptive)
    assert adaptive[-1] > 10 * adaptive[0]
    assert lax[10] < adaptive[10]
    assert end < 0.1 * constant


# ---------------------------------------------------------------- AdaGrad


@pytest.mark.parametrize("make", [lambda w: AdaGradNorm(w, lr=0.1), lambda w: RowAdaGrad(w, lr=0.1, momentum=0.9, lr_decay=0.1)])
def test_saved_and_loaded_goes_on_to_the_bit(make: object) -> None:
    assert callable(make)
    weights = [nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3))]

    def run(optimizer: torch.optim.Optimizer, weights: list[nn.Parameter], steps: range) -> None:
        for step in steps:
            for weight in weights:
                weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step))
            optimizer.step()

    optimizer = make(weights)
    run(optimizer, weights, range(3))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    others = [nn.Parameter(weight.detach().clone()) for weight in weights]
    resumed = make(others)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    run(optimizer, weights, range(3, 6))
    run(resumed, others, range(3, 6))
    assert all(torch.equal(one, other) for one, other in zip(weights, others, strict=True))


def test_rows_keep_to_themselves_unless_told_to_leak() -> None:
    def bias_after(leaks: bool) -> Tensor:
        weight, bias = nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.zeros(3))
        weight.grad, bias.grad = torch.ones(3, 2), torch.ones(3)
        RowAdaGrad([weight, bias], lr=1.0, start=0.0, leaks=leaks).step()
        torch.testing.assert_close(weight.detach(), torch.full((3, 2), -(0.5**0.5)))
        return bias.detach()

    torch.testing.assert_close(bias_after(False), torch.full((3,), -1.0))
    torch.testing.assert_close(bias_after(True), torch.full((3,), -(3**-0.5)))


def test_refusals_and_configurations() -> None:
    with pytest.raises(ConfigError):
        AdaGradNorm([nn.Parameter(torch.ones(1))], start=0.0)
    groups = [{"params": [nn.Parameter(torch.ones(2, 2))]}]
    assert isinstance(AdaGradNormConfig().build(groups), AdaGradNorm)
    assert isinstance(AdaGradNormConfig(per="row").build(groups), RowAdaGrad)
    assert AdaGradConfig(lr=0.3).build(groups).defaults["lr"] == 0.3
    controller = Config(eta=0.3, max_batch_size=99, interval=3).build()
    assert (controller.eta, controller.max_batch_size, controller.interval, controller.lr_scaling) == (0.3, 99, 3, "none")
    sparse = nn.Parameter(torch.ones(2, 2))
    sparse.grad = torch.ones(2, 2).to_sparse()
    with pytest.raises(ConfigError, match="dense"):
        AdaGradNorm([sparse]).step()
    assert Noise(1.0, 2.0).square_norm == 2.0
