from __future__ import annotations

import itertools

import pytest
import torch

from diptych.models import convnet
from diptych.prune.matching_loss import balance_factor, chunks, match_steps, matched, perturbed

SHAPE = convnet.NetShape(channels=1, classes=2, width=3, depth=1, size=8)
LABEL = torch.tensor([0, 1])


def net() -> convnet.ConvNet:
    return convnet.create(SHAPE, 0).double()


def picture() -> torch.Tensor:
    return torch.randn(2, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_the_balance_jumps_at_the_middle() -> None:
    assert balance_factor(9, 20) == pytest.approx(0.732, abs=1e-3)
    assert balance_factor(10, 20) == pytest.approx(1.292, abs=1e-3)


@pytest.mark.parametrize(("steps", "epochs", "expected"), [(7, 3, [2, 4, 7]), (4, 1, [4]), (3, 3, [1, 2, 3])])
def test_targets_between_lie_at_floored_steps(steps: int, epochs: int, expected: list[int]) -> None:
    assert match_steps(steps, epochs, "equal") == expected
    assert match_steps(steps, epochs, "none") == [steps]


def test_batches_come_from_the_end_of_each_order() -> None:
    cut = chunks(iter([torch.tensor([4, 2, 0, 1, 3]), torch.tensor([0, 1, 2, 3, 4])]), 2)
    assert [rows.tolist() for rows in itertools.islice(cut, 4)] == [[3], [0, 1], [4, 2], [4]]


def test_only_convolutions_are_perturbed() -> None:
    flat = convnet.flatten(net())
    moved = convnet.named(net(), perturbed(net(), flat, torch.ones_like(flat), alpha=2.0))
    for name, before in convnet.named(net(), flat).items():
        scale = 1 + 2 / before.numel() ** 0.5 if before.ndim == 4 else 1.0
        torch.testing.assert_close(moved[name], scale * before)


def test_a_student_that_reaches_its_target_costs_nothing() -> None:
    rows, start = [torch.arange(2)] * 3, convnet.flatten(net())
    lr = torch.tensor(0.1, dtype=torch.float64)
    reached = matched(net(), picture(), LABEL, lr, start, torch.ones(1, len(start)), rows).final_P.detach()
    found = matched(net(), picture(), LABEL, lr, start, reached[None], rows)
    assert found.loss.item() == pytest.approx(0.0, abs=1e-20)
    still = matched(net(), picture(), LABEL, 0 * lr, start, reached[None], rows)
    assert still.loss.item() == pytest.approx(1.0), "one that does not move is as far as the start"


def test_gradients_in_pixels_and_rate_are_those_of_small_differences() -> None:
    start = convnet.flatten(net())
    target = torch.stack([start + 0.1, start - 0.1])
    rows = [torch.tensor([0, 1]), torch.tensor([1]), torch.tensor([0, 1])]

    def loss(image: torch.Tensor, lr: torch.Tensor) -> torch.Tensor:
        return matched(net(), image, LABEL, lr, start, target, rows, factor=0.7, middle="rising").loss

    assert torch.autograd.gradcheck(
        loss, (picture().requires_grad_(True), torch.tensor(0.05, dtype=torch.float64, requires_grad=True)), fast_mode=True
    )


def test_targets_between_are_weighted() -> None:
    start = convnet.flatten(net())
    arguments = (
        net(),
        picture(),
        LABEL,
        torch.tensor(0.05, dtype=torch.float64),
        start,
        torch.stack([start + 0.1, start + 0.2]),
        [torch.arange(2)] * 4,
    )
    none, equal, rising = (matched(*arguments, middle=middle) for middle in ("none", "equal", "rising"))  # type: ignore[arg-type]
    assert none.middle == ()
    torch.testing.assert_close(equal.loss, none.loss + equal.middle[0])
    torch.testing.assert_close(rising.loss, none.loss + equal.middle[0] / 2)
