"""FLAP's pieces: moments of features, scores, the choice of heads and neurons, and the bias that makes up for them.

Source: An et al., Fluctuation-based Adaptive Structured Pruning for Large Language Models (AAAI 2024), sections 3.2 to 3.4.

Shape legend: N samples, L tokens, I features that can be removed (heads side by side, or neurons), O outputs of the layer that reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Metric = Literal["ifv", "wifv", "wifn"]


@dataclass(frozen=True)
class Kept:
    """What stays of a block: bool `[heads]` and bool `[neurons]`."""

    heads: Tensor
    neurons: Tensor


class Moments:
    """Running moments of features over samples, float64 `[I]`; each sample counts alike, whatever its length.

    `mean` is the mean over samples of the mean over tokens. `fluctuation` is the sum over samples but the first of squared distances to the mean
    so far, the sample included, weighted k / (k + 1) for the sample number k from 0, over their number: the published code's update, solved.
    `square` is the mean over samples of the sum of squares over tokens.
    """

    def __init__(self, features: int) -> None:
        self.samples = 0
        self._mean_sum, self._distance_sum, self._square_sum = (torch.zeros(features, dtype=torch.float64) for _ in range(3))

    def add(self, x_NLI: Tensor, valid_NL: Tensor | None = None) -> None:
        """Takes in samples, in order; tokens that are not valid are left out. Every sample has at least one that is."""
        x_NLI = x_NLI.detach().double().to("cpu")
        valid_NL1 = torch.ones(*x_NLI.shape[:2], 1, dtype=torch.float64) if valid_NL is None else valid_NL.to("cpu").double()[..., None]
        x_NLI = x_NLI * valid_NL1
        tokens_N1, sum_NI, square_NI = valid_NL1.sum(dim=1), x_NLI.sum(dim=1), x_NLI.square().sum(dim=1)
        number_N1 = torch.arange(self.samples, self.samples + len(x_NLI), dtype=torch.float64)[:, None]
        mean_sum_NI = self._mean_sum + (sum_NI / tokens_N1).cumsum(dim=0)
        mean_NI = mean_sum_NI / (number_N1 + 1)
        distance_NI = square_NI - 2 * mean_NI * sum_NI + tokens_N1 * mean_NI.square()
        self._distance_sum += (number_N1 / (number_N1 + 1) * distance_NI).sum(dim=0)
        self._square_sum += square_NI.sum(dim=0)
        self._mean_sum = mean_sum_NI[-1]
        self.samples += len(x_NLI)

    @property
    def mean(self) -> Tensor:
        """Float32 `[I]`."""
        return (self._mean_sum / max(1, self.samples)).float()

    @property
    def fluctuation(self) -> Tensor:
        """Float32 `[I]`, >= 0; zero after one sample."""
        return (self._distance_sum / max(1, self.samples - 1)).clamp(min=0).float()

    @property
    def square(self) -> Tensor:
        """Float32 `[I]`, >= 0."""
        return (self._square_sum / max(1, self.samples)).float()


def feature_scores(metric: Metric, weight_OI: Tensor, moments: Moments) -> Tensor:
    """The score of each feature, float32 `[I]`, on the CPU: its fluctuation, that times the squared norm of its column, or Wanda's mean score."""
    weight_OI = weight_OI.detach().float().to("cpu")
    if metric == "ifv":
        return moments.fluctuation
    if metric == "wifv":
        return moments.fluctuation * weight_OI.square().sum(dim=0)
    return weight_OI.abs().mean(dim=0) * moments.square.sqrt()


def standardised(score_I: Tensor) -> Tensor:
    """Zero mean and unit variance (unbiased) within a layer; zeros where all scores are equal."""
    if len(score_I) < 2:
        return torch.zeros_like(score_I)
    spread = score_I.std()
    return (score_I - score_I.mean()) / spread if spread > 0 else torch.zeros_like(score_I)


def pooled(score_I: Tensor, head_width: int, how: Literal["mean", "sum"]) -> Tensor:
    """The score of each head, `[heads]`."""
    by_head = score_I.view(-1, head_width)
    return by_head.mean(dim=1) if how == "mean" else by_head.sum(dim=1)


def adaptive(heads: Sequence[Tensor], neurons: Sequence[Tensor], costs: Sequence[tuple[float, float]], ratio: float) -> list[Kept]:
    """AL-AM: the units of all layers in one order, cut where the cost of what stays comes closest to `1 - ratio` of all.

    Args:
        heads, neurons: scores, one tensor a layer; a layer may have none of either.
        costs: of a head and of a neuron of each layer, in any one unit.
        ratio: in (0, 1).

    The unit at the cut goes, and all that are equal to it.
    """
    score = torch.cat([*heads, *neurons])
    cost = torch.cat(
        [torch.full((len(each),), float(head), dtype=torch.float64) for each, (head, _) in zip(heads, costs, strict=True)]
        + [torch.full((len(each),), float(neuron), dtype=torch.float64) for each, (_, neuron) in zip(neurons, costs, strict=True)]
    )
    if not len(score):
        return [Kept(one > 0, other > 0) for one, other in zip(heads, neurons, strict=True)]
    ordered, order = score.sort(descending=True)
    spent = cost[order].cumsum(dim=0)
    threshold = ordered[(spent - (1 - ratio) * cost.sum()).abs().argmin()]
    return [Kept(one > threshold, other > threshold) for one, other in zip(heads, neurons, strict=True)]


def thresholded(
    scores: Sequence[tuple[Tensor, Tensor]], head_widths: Sequence[int], removed: int, ratio: float, matrices: int, width: int
) -> list[Kept]:
    """AL-MM: `removed` heads go of all layers together, and as many neurons as the ratio leaves to them; standardised within layers.

    Args:
        scores: of attention features and of neurons, a layer each.
        head_widths: features a head, a layer each.
        removed: heads to remove in all.
        ratio: share of the weights that goes.
        matrices: of the MLP, 2 or 3.
        width: of the model.
    """
    heads = [pooled(standardised(attention), each, "mean") for (attention, _), each in zip(scores, head_widths, strict=True)]
    neurons = [standardised(mlp) for _, mlp in scores]
    weights = sum(matrices * width * len(mlp) + 4 * width * len(attention) for attention, mlp in scores)
    # In the published code's order: where the quotient is whole, the rounding of its factors decides whether one neuron more goes.
    count = int((len(scores) * ratio * (weights / len(scores)) - 4 * width * removed * head_widths[0]) / (matrices * width))
    head_bound, neuron_bound = _bound(torch.cat(heads), removed), _bound(torch.cat(neurons), count)
    return [Kept(one > head_bound, other > neuron_bound) for one, other in zip(heads, neurons, strict=True)]


def _bound(score: Tensor, count: int) -> Tensor:
    """The score at place `count` from the bottom, which goes with all below it; none go at 0 or less."""
    if count <= 0:
        return torch.tensor(-torch.inf)
    return score.sort(descending=True).values[-min(count, len(score))]


def uniform(
    scores: Sequence[tuple[Tensor, Tensor]], head_widths: Sequence[int], removed: int | None, ratio: float, matrices: int, width: int
) -> list[Kept]:
    """UL-MM and UL-UM: every layer loses the same; scores as they are, a head's the sum over its features.

    Args:
        scores: of attention features and of neurons, a layer each.
        head_widths: features a head, a layer each.
        removed: UL-MM: heads to remove in all, `removed // layers` of each, and as many neurons as the ratio leaves; None: UL-UM, the ratio of both.
        ratio: share of the weights that goes.
        matrices: of the MLP, 2 or 3.
        width: of the model.
    """
    kept = []
    for (attention, mlp), head_width in zip(scores, head_widths, strict=True):
        heads = pooled(attention, head_width, "sum")
        if removed is None:
            gone_heads, gone_neurons = int(ratio * len(heads)), int(ratio * len(mlp))
        else:
            gone_heads = removed // len(scores)
            weights = matrices * width * len(mlp) + 4 * width * len(attention)
            gone_neurons = int((ratio * weights - 4 * width * gone_heads * head_width) / (matrices * width))
        kept.append(Kept(_all_but(heads, gone_heads), _all_but(mlp, gone_neurons)))
    return kept


def _all_but(score: Tensor, count: int) -> Tensor:
    """All that reach the score at place `count` of the sorted ones: equal ones stay together."""
    if count >= len(score):
        return torch.zeros(len(score), dtype=torch.bool)
    return score >= score.sort().values[max(0, count)]


def compensation(weight_OI: Tensor, mean_I: Tensor, gone_I: Tensor) -> Tensor:
    """The mean contribution of the features that go, `[O]` in the weight's dtype."""
    bias: Tensor = weight_OI.detach() @ (mean_I * gone_I).to(weight_OI)
    return bias
