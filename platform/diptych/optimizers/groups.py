"""Parameter groups for optimizers that are used without the training loop, which makes its own by the same rule."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from diptych.core.errors import ConfigError
from diptych.models.decay import NO_DECAY_NAMES, decays

__all__ = ["NO_DECAY_NAMES", "decay_groups", "decays"]


def decay_groups(named_parameters: Iterable[tuple[str, Tensor]], weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups for a torch optimizer: those that decay, then those that do not; each in the given order.

    Every parameter is in exactly one group, frozen ones too: without a gradient an optimizer leaves them alone, and they can be
    thawed later. A group may be empty, so that saved states of one model always have the same groups.

    Args:
        named_parameters: as `model.named_parameters()` gives them.
        weight_decay: per unit of learning rate, >= 0.

    Raises:
        ConfigError: no parameters, a negative decay, or one tensor under two names with different rules or twice.
    """
    if weight_decay < 0:
        raise ConfigError.at("Weight decay is negative", "weight_decay", weight_decay, "a number >= 0")
    groups: list[dict[str, Any]] = [{"params": [], "weight_decay": weight_decay}, {"params": [], "weight_decay": 0.0}]
    seen: dict[int, str] = {}
    for name, parameter in named_parameters:
        if (other := seen.setdefault(id(parameter), name)) != name:
            fix = "list shared tensors once, as model.named_parameters() does"
            raise ConfigError.at("A parameter is listed twice", "named_parameters", f"{other!r} and {name!r}", "every tensor once", fix)
        groups[0 if decays(name, parameter) else 1]["params"].append(parameter)
    if not seen:
        raise ConfigError.at("There is nothing to train", "named_parameters", "no parameters", "at least one parameter")
    return groups
