"""The gather: values, gradients of both orders, and what it refuses, on real processes."""

from __future__ import annotations

import pytest
import torch
from _ranks import run_ranks
from torch import Tensor

from diptych.core.errors import ConfigError
from diptych.objectives.gather import gather, rank, world_size

N, D = 3, 4
WORLD_SIZE = 3


def whole() -> Tensor:
    return torch.randn(WORLD_SIZE * N, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def loss_of(features: Tensor, of_rank: int) -> Tensor:
    """A different function of all features on every rank."""
    weights = torch.linspace(-1, 1, features.numel(), dtype=features.dtype).reshape(features.shape)
    return ((features + of_rank * weights) ** 3).sum()


def on_a_rank(of_rank: int, ranks: int) -> dict[str, object]:
    assert (of_rank, ranks) == (rank(), world_size())
    own = whole()[of_rank * N : (of_rank + 1) * N].requires_grad_()
    gathered = gather(own, with_grad=True)
    (grad,) = torch.autograd.grad(loss_of(gathered, of_rank), own, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), own)
    constant = gather(own, with_grad=False)
    try:
        gather(torch.zeros(N + of_rank, D), with_grad=False)
        refused = ""
    except ConfigError as error:
        refused = str(error)
    return {
        "gathered": gathered.detach(),
        "grad": grad.detach(),
        "second": second,
        "constant": constant,
        "requires_grad": constant.requires_grad,
        "refused": refused,
    }


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, object]]:
    return run_ranks(WORLD_SIZE, on_a_rank)


def test_every_rank_gets_all_rows_in_rank_order(ranks: list[dict[str, object]]) -> None:
    for result in ranks:
        assert torch.equal(result["gathered"], whole())
        assert torch.equal(result["constant"], whole())
        assert result["requires_grad"] is False


def test_the_backward_sums_what_all_ranks_send(ranks: list[dict[str, object]]) -> None:
    features = whole().requires_grad_()
    total = sum(loss_of(features, of_rank) for of_rank in range(WORLD_SIZE))
    (expected,) = torch.autograd.grad(total, features, create_graph=True)
    (second,) = torch.autograd.grad(expected.sum(), features)
    torch.testing.assert_close(torch.cat([result["grad"] for result in ranks]), expected.detach())
    torch.testing.assert_close(torch.cat([result["second"] for result in ranks]), second)


def test_unequal_batches_are_refused_on_every_rank(ranks: list[dict[str, object]]) -> None:
    for result in ranks:
        assert "batches of different sizes" in result["refused"]
        assert "[3, 4, 5]" in result["refused"]


def test_one_process_gets_its_own_features_back() -> None:
    features = torch.ones(2, 3, requires_grad=True)
    assert gather(features, with_grad=True) is features
    assert gather(features, with_grad=False) is features
    assert (rank(), world_size()) == (0, 1)
