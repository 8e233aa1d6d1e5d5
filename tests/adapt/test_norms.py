"""Running statistics are the cumulative average over the batches, blended with the old ones by the share."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diptych.adapt import norms
from diptych.core.errors import DataError


def network() -> nn.Sequential:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.9))
    model[0].running_mean.fill_(7.0)
    model[0].num_batches_tracked.fill_(4)
    return model


def test_the_mean_is_that_of_all_examples_whatever_the_batches() -> None:
    model, x = network(), torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    norms.recompute(model, x.split([20, 7, 23]))
    assert torch.allclose(model[0].running_mean, x.mean(0), atol=1e-6)
    expected = sum(len(part) * part.var(0) for part in x.split([20, 7, 23])) / 50
    assert torch.allclose(model[0].running_var, expected, atol=1e-6)
    assert int(model[0].num_batches_tracked) == 4
    assert model[0].momentum == 0.1
    assert model.training
    assert model[0].training


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_a_share_blends(share: float) -> None:
    model, x = network(), torch.randn(50, 3)
    norms.recompute(model, [x], share=share)
    assert torch.allclose(model[0].running_mean, (1 - share) * 7.0 + share * x.mean(0), atol=1e-6)


def test_without_pictures_it_is_an_error_and_nothing_changes() -> None:
    model = network()
    with pytest.raises(DataError, match="at least one batch"):
        norms.recompute(model, [])
    assert torch.equal(model[0].running_mean, torch.full((3,), 7.0))
    assert torch.equal(model[0].running_var, torch.ones(3))
    norms.recompute(nn.Linear(2, 2), [])  # nothing to recompute
