"""AdamW's configuration: what it builds, and that the fused kernel takes the same path as the plain one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diptych.core.errors import ConfigError
from diptych.optimizers.adamw import Config
from diptych.optimizers.groups import decay_groups


def descend(config: Config) -> torch.Tensor:
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    x = torch.randn(8, 4, dtype=torch.float64)
    optimizer = config.build(decay_groups(model.named_parameters(), config.weight_decay))
    for _ in range(5):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model.weight.detach()


def test_fused_and_plain_agree() -> None:
    torch.testing.assert_close(descend(Config()), descend(Config(fused=False)), rtol=1e-12, atol=1e-14)


def test_groups_keep_their_own_decay() -> None:
    config = Config.parse({"method": "adamw", "lr": 5e-4, "betas": [0.9, 0.95], "weight_decay": 0.3})
    optimizer = config.build(decay_groups(nn.Linear(2, 2).named_parameters(), config.weight_decay))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    assert all(
        (group["lr"], group["betas"], group["eps"], group["fused"]) == (5e-4, (0.9, 0.95), 1e-6, True) for group in optimizer.param_groups
    )
    assert config.curvature == "none"


@pytest.mark.parametrize("wrong", [{"lr": 0}, {"betas": [0.9, 1.0]}, {"betas": [0.9]}, {"weight_decay": -1}, {"learning_rate": 1e-3}])
def test_wrong_values_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        Config.parse({"method": "adamw", **wrong})
