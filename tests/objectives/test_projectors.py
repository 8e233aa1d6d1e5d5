"""Heads of training: the batch norm over all ranks beside torch's own."""

from __future__ import annotations

import pytest
import torch
from _ranks import run_ranks
from torch import nn

from diptych.objectives.projectors import GlobalBatchNorm, cosine_regression, follow, mlp


def rows() -> torch.Tensor:
    return 3 + torch.randn(8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def normed(rank: int, world: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    norm = GlobalBatchNorm(5).double()
    whole = rows().requires_grad_()
    result = norm(whole.chunk(world)[rank])
    (result * torch.arange(40.0).view(8, 5).sin().chunk(world)[rank]).square().sum().backward()
    assert whole.grad is not None
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return result.detach(), whole.grad, norm.running_mean, norm.running_var


def test_it_is_torchs_batch_norm_over_the_rows_of_all_ranks() -> None:
    norm, whole = nn.BatchNorm1d(5).double(), rows().requires_grad_()
    expected = norm(whole)
    (expected * torch.arange(40.0).view(8, 5).sin()).square().sum().backward()
    for world in (1, 2):
        found = run_ranks(2, normed) if world == 2 else [normed(0, 1)]
        torch.testing.assert_close(torch.cat([each[0] for each in found]), expected.detach())
        torch.testing.assert_close(torch.stack([each[1] for each in found]).sum(dim=0), whole.grad)
        for each in found:
            torch.testing.assert_close(each[2], norm.running_mean)
            torch.testing.assert_close(each[3], norm.running_var)


def test_in_evaluation_it_uses_what_it_remembers() -> None:
    norm = GlobalBatchNorm(5, affine=False).double()
    norm(rows())
    kept = norm.running_mean.clone()  # type: ignore[union-attr]
    norm.eval()
    assert norm(rows()[:1]).abs().max() > 0.1
    assert torch.equal(kept, norm.running_mean)  # type: ignore[arg-type]


def test_layers_and_norms_are_where_they_belong() -> None:
    assert [type(layer).__name__ for layer in mlp([4, 6, 3])] == ["Linear", "GlobalBatchNorm", "ReLU", "Linear"]
    assert [type(layer).__name__ for layer in mlp([4, 3], last_norm=True)] == ["Linear", "GlobalBatchNorm"]
    assert len(list(mlp([4, 3], last_norm=True, last_affine=False)[1].parameters())) == 0


def test_targets_get_no_gradient_and_the_average_follows() -> None:
    predicted, target = (rows()[i::2].requires_grad_() for i in range(2))
    loss = cosine_regression(predicted, target)
    loss.backward()
    assert target.grad is None
    assert predicted.grad is not None
    assert float(cosine_regression(rows(), 2 * rows())) == pytest.approx(0)
    assert float(cosine_regression(rows(), -rows())) == pytest.approx(4)
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    expected = 0.9 * one.weight.detach() + 0.1 * other.weight.detach()
    follow(one, other, 0.9)
    torch.testing.assert_close(one.weight.detach(), expected)
