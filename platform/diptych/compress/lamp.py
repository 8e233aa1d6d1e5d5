"""LAMP: how much of a layer, as it stands when a weight is the next to go, that weight is. Scores of different layers compare.

Source: Lee, Park, Mo, Ahn, Shin, Layer-adaptive Sparsity for the Magnitude-based Pruning (ICLR 2021), section 3.2.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def scores(weight: Tensor) -> Tensor:
    """The square of each weight over the sum of the squares that are not smaller, float64, in the weight's shape, in [0, 1].

    The largest weight has 1, a zero has 0; a constant factor on the layer changes nothing. Of equal weights the earlier is the smaller. Sums
    go from the largest down, for the total minus a running sum loses the largest weights of big layers.
    """
    square = weight.detach().double().flatten().square()
    ordered, order = square.sort(stable=True)
    standing = ordered.flip(0).cumsum(0).flip(0)
    score = torch.where(ordered > 0, ordered / standing.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    return torch.empty_like(square).scatter_(0, order, score).view(weight.shape)


def threshold(scored: Mapping[str, Tensor], count: int) -> float:
    """The `count`-th smallest of all scores: what is not above it goes. Minus infinity for a count of 0."""
    if not count:
        return -torch.inf
    return float(torch.cat([score.flatten() for score in scored.values()]).kthvalue(count).values)
