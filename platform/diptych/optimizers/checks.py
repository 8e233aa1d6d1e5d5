"""What every optimizer here refuses: hyperparameters out of range, gradients that its kernels do not take."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diptych.core.errors import ConfigError

RANGES: Mapping[str, tuple[float, float]] = {
    **dict.fromkeys(("lr", "eps", "weight_decay", "rho", "delta", "wd_ratio", "dampening"), (0.0, math.inf)),
    **dict.fromkeys(("betas", "momentum"), (0.0, 1.0)),
    **dict.fromkeys(("every", "rank", "update_proj_gap"), (1, math.inf)),
    "delay": (0, math.inf),
    "hessian_power": (0.0, 1.0 + 1e-12),
}
"""What hyperparameters may be: least value, first value beyond."""


def refuse_hyperparameters(owner: object, values: Mapping[str, Any]) -> None:
    """Raises ConfigError for a hyperparameter out of its range; None is none, and of a tuple every number counts."""
    for name in RANGES.keys() & values.keys():
        value, (least, beyond) = values[name], RANGES[name]
        several = value if isinstance(value, tuple | list) else () if value is None else (value,)
        if not all(least <= float(number) < beyond for number in several):
            raise ConfigError.at(f"{type(owner).__name__} cannot run", name, value, f"{least} <= {name} < {beyond}")


def refuse_gradient(parameter: Tensor, owner: object) -> None:
    """Raises ConfigError for a parameter whose gradient is sparse or not real floating."""
    grad = parameter.grad
    if grad is not None and (grad.layout != torch.strided or not grad.is_floating_point()):
        headline, got = f"{type(owner).__name__} needs dense real gradients", f"{grad.layout}, {grad.dtype}, shape {tuple(grad.shape)}"
        raise ConfigError.at(headline, "gradient", got, "torch.strided, floating", "use sparse=False")


def dense_gradient(parameter: Tensor, owner: object) -> Tensor:
    """A parameter's gradient, contiguous. Raises ConfigError as `refuse_gradient` does."""
    refuse_gradient(parameter, owner)
    assert parameter.grad is not None
    return parameter.grad.contiguous()
