"""What every optimizer refuses, in one place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from diptych.core.errors import ConfigError
from diptych.optimizers import checks


class Owner:
    """Some optimizer."""


@pytest.mark.parametrize(
    "values", [{"lr": -1e-9}, {"lr": float("nan")}, {"betas": (0.9, 1.0)}, {"rank": 0}, {"hessian_power": 1.5}, {"momentum": 1.0}], ids=str
)
def test_hyperparameters_out_of_range(values: dict[str, Any]) -> None:
    (name,) = values
    with pytest.raises(ConfigError, match=f"(?s)Owner cannot run.*{name}"):
        checks.refuse_hyperparameters(Owner(), values)


def test_what_is_in_range_absent_or_unknown_passes() -> None:
    checks.refuse_hyperparameters(Owner(), {"lr": 0.0, "betas": (0.0, 0.999), "rank": None, "hessian_power": 1.0, "foo": -3})


def test_gradients() -> None:
    weight = nn.Parameter(torch.zeros(3, 2))
    checks.refuse_gradient(weight, Owner())
    weight.grad = torch.ones(2, 3).T
    assert checks.dense_gradient(weight, Owner()).is_contiguous()
    weight.grad = torch.ones(3, 2).to_sparse()
    with pytest.raises(ConfigError, match="Owner needs dense real gradients"):
        checks.dense_gradient(weight, Owner())
    turned = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    turned.grad = torch.ones(2, dtype=torch.complex64)
    with pytest.raises(ConfigError, match="complex64"):
        checks.refuse_gradient(turned, Owner())
