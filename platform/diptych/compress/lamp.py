"""LAMP: how much of a layer, as it stands when a weight is the next to go, that weight is. Scores of different layers compare.

Source: Lee, Park, Mo, Ahn, Shin, Layer-adaptive Sparsity for the Magnitude-based Pruning (ICLR 2021), section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

SHIFT, BINS = 44, 1 << 19
"""Of a float64's 63 bits below its sign, the 19 leading ones are counted."""


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
    """The `count`-th smallest of all scores (none below 0): what is not above it goes. Minus infinity for a count of 0."""
    return threshold_of(scored.__getitem__, list(scored), count)


def threshold_of(score: Callable[[str], Tensor], names: Sequence[str], count: int) -> float:
    """As `threshold`, of scores that are made when they are needed, twice a layer: those of all layers need not fit into memory.

    Floats that are not negative are ordered as their bits are: the first pass counts by their leading bits, the second looks at those alone
    that begin as the one in question does.
    """
    if not count:
        return -torch.inf
    tally_B = torch.zeros(BINS, dtype=torch.int64)
    for name in names:
        tally_B += torch.bincount(_leading(score(name)), minlength=BINS).cpu()
    up_to_B = tally_B.cumsum(0)
    place = int(torch.searchsorted(up_to_B, count))
    inside = [values[_leading(values) == place].cpu() for values in (score(name).double().flatten() for name in names)]
    return float(torch.cat(inside).kthvalue(count - int(up_to_B[place] - tally_B[place])).values)


def _leading(values: Tensor) -> Tensor:
    """The exponent and the first eight bits of the fraction of float64 numbers that are not negative, flat."""
    return values.double().flatten().view(torch.int64) >> SHIFT
