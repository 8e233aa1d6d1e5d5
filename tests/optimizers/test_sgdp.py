"""SGDP's configuration builds the optimizer that it describes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diptych.core.errors import ConfigError
from diptych.optimizers.adamp import SGDP
from diptych.optimizers.sgdp import Config


def test_the_configuration_builds_what_it_says() -> None:
    config = Config.parse({"method": "sgdp", "lr": 0.02, "momentum": 0.8, "nesterov": False, "weight_decay": 0.1})
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = config.build([{"params": [weight]}])
    assert isinstance(optimizer, SGDP)
    expected = {"lr": 0.02, "momentum": 0.8, "nesterov": False, "weight_decay": 0.1, "delta": 0.1, "wd_ratio": 0.1, "alias_buffer": False}
    assert expected.items() <= optimizer.param_groups[0].items()
    weight.grad = torch.ones(2, 2)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((2, 2), 1 - 0.02 * 0.1 / 0.2 - 0.02))
    assert config.curvature == "none"


@pytest.mark.parametrize("wrong", [{"momentum": 1.0}, {"wd_ratio": 2.0}, {"betas": [0.9, 0.99]}])
def test_wrong_values_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        Config.parse({"method": "sgdp", **wrong})
