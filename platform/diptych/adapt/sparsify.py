"""The repair of a failed interpolation: a random share of the straggler layers' weights is taken out of the fine-tuned model.

Source: Abdollahpoorrostam, In Search of the Successful Interpolation (AdvML-Frontiers workshop at NeurIPS 2024). The paper's code is not
published: `difference`, which zeroes the change from zero-shot and so keeps a working network, is our reading; `weights` is the literal one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from diptych.adapt import states
from diptych.adapt.states import State
from diptych.core.chance import generator
from diptych.core.errors import ConfigError

Target = Literal["difference", "weights"]


def sparsify(
    theta0: State, theta1: State, names: Iterable[str], ratio: float, seed: int, target: Target = "difference"
) -> dict[str, Tensor]:
    """The fine-tuned weights with a random share of some tensors zeroed; `round(ratio * size)` of each.

    Args:
        theta0, theta1: zero-shot and fine-tuned weights.
        names: floating-point tensors to thin out.
        ratio: in [0, 1].
        seed: with the tensor's name it names the draw, so that no other tensor changes it.
        target: `difference` puts weights back to theta0, which keeps a working network; `weights` puts them to zero.

    Raises DataError for names or shapes that differ, ConfigError for a ratio out of range.
    """
    chosen = list(names)
    states.require_alike(theta0, theta1, "the fine-tuned model", chosen)
    if not 0 <= ratio <= 1:
        raise ConfigError.at("No share", "ratio", ratio, "a number in [0, 1]")
    sparse = dict(theta1)
    for name in chosen:
        tensor = theta1[name]
        mask = torch.zeros(tensor.numel(), dtype=torch.bool)
        drawn = generator(seed, "sparsify", name).permutation(tensor.numel())[: round(ratio * tensor.numel())]
        mask[torch.from_numpy(drawn)] = True
        to = theta0[name].to(tensor) if target == "difference" else torch.zeros_like(tensor)
        sparse[name] = torch.where(mask.view(tensor.shape).to(tensor.device), to, tensor)
    return sparse
