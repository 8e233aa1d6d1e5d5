"""What diffGrad, Sophia and AdaHessian owe their users, and the lots in which they step."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from diptych.core.errors import ConfigError
from diptych.optimizers import elementwise
from diptych.optimizers.adahessian import AdaHessian
from diptych.optimizers.diffgrad import DiffGrad
from diptych.optimizers.elementwise import Curved, Elementwise, lots
from diptych.optimizers.sophia import SophiaG, SophiaH

SHAPES: tuple[tuple[int, ...], ...] = ((), (5,), (4, 6), (1, 9), (3, 2, 2, 2), (1, 4, 3), (0, 4))
Make = Callable[..., Elementwise]
MAKERS: dict[str, Make] = {
    "diffgrad": lambda params, **more: DiffGrad(params, lr=0.01, weight_decay=0.1, **more),
    "sophiag": lambda params, **more: SophiaG(params, lr=0.01, every=2, **more),
    "sophiah": lambda params, **more: SophiaH(params, lr=0.01, every=2, **more),
    "adahessian": lambda params, **more: AdaHessian(params, lr=0.01, weight_decay=0.1, **more),
}


@pytest.fixture(params=MAKERS)
def make(request: pytest.FixtureRequest) -> Make:
    return MAKERS[request.param]


def initial(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in SHAPES]


def run(optimizer: Elementwise, parameters: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        draws = [[torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) for p in parameters] for _ in range(2)]
        for p, grad in zip(parameters, draws[0], strict=True):
            p.grad = grad
        if isinstance(optimizer, Curved) and optimizer.curvature_due(step):
            optimizer.update_curvature({p: estimate.abs() for p, estimate in zip(parameters, draws[1], strict=True)})
        optimizer.step()


@pytest.mark.parametrize("elements", [1, 7, 12])
def test_lots_change_no_bit(make: Make, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = []
    for size in (elements, 1 << 16):
        monkeypatch.setattr(elementwise, "LOT_ELEMENTS", size)
        parameters = initial()
        run(make(parameters), parameters, range(4))
        ended.append(parameters)
    for cut, whole, start in zip(*ended, initial(), strict=True):
        assert torch.equal(cut, whole)
        assert not torch.equal(whole, start) or not start.numel()


def test_lots_are_small_aligned_and_of_one_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elementwise, "LOT_ELEMENTS", 8)
    tensors = [torch.arange(20.0).view(10, 2), torch.zeros(3), torch.zeros(4), torch.zeros(2, dtype=torch.float64), torch.tensor(1.0)]
    rows = [torch.arange(10.0).view(10, 1), *tensors[1:]]
    found = list(lots([tensors, rows, ["a", "b", "c", "d", "e"]]))
    assert [[tuple(part.shape) for part in lot[0]] for lot in found] == [[(4, 2)], [(4, 2)], [(2, 2), (3,)], [(4,), ()], [(2,)]]
    assert [lot[2] for lot in found] == [["a"], ["a"], ["a", "b"], ["c", "e"], ["d"]]
    assert torch.equal(torch.cat([found[0][1][0], found[1][1][0], found[2][1][0]]), rows[0])
    assert found[0][0][0].data_ptr() == tensors[0].data_ptr()


def test_saved_and_loaded_goes_on_to_the_bit(make: Make) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        parameters = initial(dtype)
        optimizer = make(parameters)
        run(optimizer, parameters, range(3))
        others = [nn.Parameter(p.detach().clone()) for p in parameters]
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        resumed = make(others)
        resumed.load_state_dict(torch.load(file, weights_only=True))
        run(optimizer, parameters, range(3, 7))
        run(resumed, others, range(3, 7))
        assert all(torch.equal(p, other) for p, other in zip(parameters, others, strict=True))


def test_parameters_without_gradient_stay(make: Make) -> None:
    trained, frozen = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer = make([trained, frozen])
    trained.grad = torch.ones(2, 2)
    if isinstance(optimizer, Curved):
        optimizer.update_curvature({trained: torch.ones(2, 2)})
    optimizer.step()
    assert torch.equal(frozen, torch.ones(2, 2))
    assert frozen not in optimizer.state
    assert not torch.equal(trained, torch.ones(2, 2))


def test_counts_are_a_parameters_own(make: Make) -> None:
    """One that joins three steps late moves as one that starts alone."""
    early, late, alone = (nn.Parameter(torch.ones(3)) for _ in range(3))
    optimizer, other = make([early, late]), make([alone])
    for step in range(6):
        joined = {early: step, **({late: step} if step >= 4 else {})}
        for p in joined:
            p.grad = torch.tensor([0.3, -1.0, 2.0]) * (step + 1)
        alone.grad = early.grad.clone() if step >= 4 else None  # type: ignore[union-attr]
        if isinstance(optimizer, Curved) and isinstance(other, Curved) and optimizer.curvature_due(step):
            optimizer.update_curvature({p: torch.full((3,), 0.5 + step) for p in joined})
            other.update_curvature({alone: torch.full((3,), 0.5 + step)} if step >= 4 else {})
        optimizer.step()
        other.step()
    assert torch.equal(late, alone)
    assert not torch.equal(late, torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_layouts_do_not_matter(make: Make, dtype: torch.dtype) -> None:
    weight = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=dtype)
    layouts = [weight.clone(), weight.to(memory_format=torch.channels_last), torch.stack([weight, weight], -1)[..., 0]]
    ended = []
    for layout in layouts:
        parameter = nn.Parameter(layout)
        run(make([parameter]), [parameter], range(3))
        ended.append(parameter.detach())
    torch.testing.assert_close(ended[1], ended[0])
    torch.testing.assert_close(ended[2], ended[0])


def test_half_precision_follows_single(make: Make) -> None:
    single, half = initial(torch.float32), initial(torch.bfloat16)
    run(make(single), single, range(3))
    run(make(half), half, range(3))
    for a, b, start in zip(single, half, initial(torch.bfloat16), strict=True):
        torch.testing.assert_close(b.float(), a, rtol=0.04, atol=0.01)
        assert not torch.equal(b, start) or not start.numel()


def test_groups_have_their_own_values(make: Make) -> None:
    fast, still = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer = make([{"params": [fast], "weight_decay": 0.0}, {"params": [still], "lr": 0.0}])
    fast.grad, still.grad = torch.ones(2, 2), torch.ones(2, 2)
    if isinstance(optimizer, Curved):
        optimizer.update_curvature({fast: torch.ones(2, 2), still: torch.ones(2, 2)})
    assert optimizer.step(lambda: 3.0) == 3.0
    assert torch.equal(still, torch.ones(2, 2))
    assert (fast < 1).all()


@pytest.mark.parametrize("wrong", [torch.ones(2, 2).to_sparse(), torch.ones(2, 2, dtype=torch.complex64)])
def test_sparse_and_complex_gradients_are_refused_before_anything_moves(make: Make, wrong: Tensor) -> None:
    dense, other = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2, dtype=wrong.dtype))
    optimizer = make([dense, other])
    dense.grad, other.grad = torch.ones(2, 2), wrong
    with pytest.raises(ConfigError, match="dense real"):
        optimizer.step()
    assert torch.equal(dense, torch.ones(2, 2))


@pytest.mark.parametrize("wrong", [{"lr": -1.0}, {"betas": (0.9, 1.0)}, {"eps": float("nan")}])
def test_impossible_values_are_refused(wrong: dict[str, object]) -> None:
    for kind in (DiffGrad, SophiaG, SophiaH, AdaHessian):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            kind([nn.Parameter(torch.ones(1))], **wrong)


@pytest.mark.parametrize("kind", [SophiaG, SophiaH, AdaHessian])
def test_curvature_that_does_not_fit_is_refused(kind: type[Curved]) -> None:
    parameter = nn.Parameter(torch.ones(2, 2))
    optimizer = kind([parameter])
    with pytest.raises(ConfigError, match="shape"):
        optimizer.update_curvature({parameter: torch.ones(2)})
    with pytest.raises(ConfigError, match="unknown parameters"):
        optimizer.update_curvature({torch.ones(2, 2): torch.ones(2, 2)})
    assert not optimizer.state


def test_the_step_can_be_traced(make: Make) -> None:
    """`torch.compile` with a backend that only traces: same steps, counts not frozen."""
    torch._dynamo.reset()
    plain, traced = initial(), initial()
    optimizer, other = make(plain), make(traced)
    run(optimizer, plain, range(3))
    other.step = torch.compile(other.step, backend="eager")  # type: ignore[method-assign]
    run(other, traced, range(3))
    for a, b in zip(plain, traced, strict=True):
        torch.testing.assert_close(b, a)
