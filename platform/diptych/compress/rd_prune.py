"""Rate-distortion pruning: each layer gets the sparsity at which the model's output changes least, all layers together, under one budget.

Source: Xu, Wang, Geng, Wu, Li, Lin, Efficient Joint Optimization of Layer-Adaptive Weight Pruning in Deep Neural Networks (ICCV 2023),
sections 3 and 4. For small, independent changes of the weights the output's distortion is about the sum of those that single layers cause.
So one curve a layer is measured, at K + 1 amounts, and the combination of least sum within the budget is found by dynamic programming.

For a dual encoder, where the source is silent: the output are the unit-norm features of both towers side by side; layers are the matrices
inside the blocks of both towers, under one budget; within a layer the smallest weights go.

Shape legend: N calibration pairs, D feature width, P layers, K + 1 amounts k / K.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from diptych.compress import lamp, masks
from diptych.compress.blocks import Batch, Matrix, Tower, evaluating, first_inputs, towers
from diptych.compress.calibration import Calibrated, required
from diptych.compress.magnitude import largest, sparsity
from diptych.core.errors import ConfigError

Rule = Literal["distortion", "lamp", "erk", "uniform", "uniform-plus", "global"]
Counts = NDArray[np.int64]
Curves = NDArray[np.float64]


class Config(Calibrated):
    """Rate-distortion pruning, or a baseline that shares the budget out by a rule."""

    method: Literal["rd-prune"] = "rd-prune"
    sparsity: float = Field(
        0.5, ge=0, lt=1, description="least share of the blocks' weights that is zero afterwards, earlier zeros included"
    )
    rule: Rule = Field("distortion", description="how the budget is shared out; the others are baselines that look at no data")
    levels: int = Field(
        20, ge=1, le=1000, description="K: a layer's amounts are 0, 1/K, …, 1; every one costs a pass over the calibration pairs"
    )
    worst: bool = Field(False, description="distortion of the worst calibration pair instead of the mean")
    units: int = Field(
        1 << 16, ge=100, description="steps of the budget in the dynamic program; a layer's kept weights are rounded up to them"
    )
    calibration_pairs: int = Field(96, ge=1, description="training pairs it looks at, the first by key hash")

    def build(self) -> RDPrune:
        """The compressor."""
        return RDPrune(self)


@dataclass(frozen=True)
class Allocation:
    """How many weights of each layer go, int64 `[P]`, and the sum of the layers' distortions there (NaN for rules that know none)."""

    removed: Counts
    distortion: float


class RDPrune:
    """The compressor. After `compress`, `report` has the measured distortion, and the predicted one where the rule knows any."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._figures: dict[str, Any] = {}

    @torch.no_grad()
    def compress(self, model: nn.Module, calibration: Iterable[Batch]) -> nn.Module:
        """Zeroes weights in place, keeps the masks with the model and gives it back. What is zero already stays so and counts.

        Raises ConfigError for a tower without blocks, DataError without pairs.
        """
        config = self.config
        batches = required(calibration, "rd-prune")
        with evaluating(model):
            chosen = towers(model, config.towers)
            layers = [matrix for tower in chosen for matrix in tower.matrices()]
            weights = [matrix.weight.detach() for matrix in layers]
            before = _features(model, chosen, batches)
            curves = self._curves(model, chosen, batches, before) if config.rule == "distortion" else None
            found = share_out(weights, config.sparsity, config.rule, curves, config.units)
            for matrix, removed in zip(layers, found.removed.tolist(), strict=True):
                masks.put(matrix, smallest_gone(matrix.weight, removed))
            measured = distortion(before, _features(model, chosen, batches), worst=config.worst)
        shares = {matrix.name: removed / matrix.weight.numel() for matrix, removed in zip(layers, found.removed.tolist(), strict=True)}
        predicted = {} if math.isnan(found.distortion) else {"predicted": found.distortion}
        self._figures = {"amounts": shares, "distortion": {"measured": measured, **predicted}}
        return model

    def report(self, model: nn.Module) -> dict[str, Any]:
        """What each layer lost, the distortion, and the share of zeros in each matrix of the model and in all of them."""
        return {**self._figures, **sparsity(model, self.config.towers)}

    def _curves(self, model: nn.Module, chosen: Sequence[Tower], batches: Sequence[Batch], before: Mapping[str, Tensor]) -> Curves:
        """A curve a layer `[P, K + 1]`; a tower runs from the block that holds the layer on, the other one not at all."""
        share = 1 / len(chosen)  # what the untouched tower's features add to the mean is 0
        found = []
        for tower in chosen:
            for block_matrices, outputs in from_each_block(model, tower, batches):
                for matrix in block_matrices:
                    counts = amounts(matrix.weight.numel(), self.config.levels)
                    measured = curve(outputs, matrix.weight, before[tower.kind], counts, worst=self.config.worst)
                    found.append(share * measured)
        return np.stack(found)


def distortion(before: Mapping[str, Tensor], after: Mapping[str, Tensor], *, worst: bool = False) -> float:
    """The mean over pairs, or the largest, of the mean squared difference of what the towers gave side by side."""
    square_ND = torch.cat([(before[kind].double() - after[kind].double()).square() for kind in before], dim=1)
    square_N = square_ND.mean(dim=1)
    return float(square_N.max() if worst else square_N.mean())


def smallest_gone(weight: Tensor, removed: int) -> Tensor:
    """The mask without the `removed` smallest weights; zeros count as smallest, of equal ones the earlier go first."""
    return largest(weight.abs(), removed / weight.numel())


def amounts(size: int, levels: int) -> list[int]:
    """How many of a layer's weights go at amount k, for k = 0, …, K; in whole numbers, for `int(0.7 * 10)` may be 6."""
    return [size * level // levels for level in range(levels + 1)]


@torch.no_grad()
def curve(outputs: Callable[[], Tensor], weight: Tensor, before_ND: Tensor, counts: Sequence[int], *, worst: bool = False) -> Curves:
    """The distortion of the output at every amount of one layer, float64 `[K + 1]`; the weight is put back exactly.

    Args:
        outputs: what the model gives for the calibration pairs, `[N, D]`, with the weight as it then is.
        weight: of the layer.
        before_ND: the outputs with the weight untouched.
        counts: how many of its smallest entries go at each amount.
        worst: of the worst pair instead of the mean.
    """
    kept, found = weight.detach().clone(), np.zeros(len(counts))
    try:
        for level, removed in enumerate(counts):
            if removed:
                weight.copy_(kept * smallest_gone(kept, removed))
                found[level] = distortion({"": before_ND}, {"": outputs()}, worst=worst)
    finally:
        weight.copy_(kept)
    return found


def share_out(
    weights: Sequence[Tensor], sparsity: float, rule: Rule, curves: Curves | None = None, units: int = 1 << 16, min_last: float = 0.2
) -> Allocation:
    """How much of the budget each layer gets.

    Args:
        weights: of the layers in order; their exact zeros are gone already.
        sparsity: share of all weights that goes, at least.
        rule: `distortion` by `curves`; `lamp` and `global` by one threshold over all layers; `erk` by density proportional to the sum over the
            product of a layer's sizes; `uniform`; `uniform-plus`, whose first layer stays dense and whose last keeps `min_last`.
        curves: `[P, K + 1]`.
        units: see `allocate`.
    """
    sizes = np.asarray([weight.numel() for weight in weights])
    gone = np.asarray([int((weight == 0).sum()) for weight in weights])
    match rule:
        case "distortion":
            assert curves is not None
            return allocate(curves, sizes, sparsity, gone, max(1, math.ceil(sizes.sum() / units)))
        case "lamp" | "global":
            scored = {str(place): lamp.scores(weight) if rule == "lamp" else weight.abs() for place, weight in enumerate(weights)}
            limit = lamp.threshold(scored, int(sizes.sum()) - int((1 - sparsity) * sizes.sum()))
            removed = np.asarray([int((score <= limit).sum()) for score in scored.values()])
        case "erk":
            removed = sizes - sizes * erk_densities([tuple(weight.shape) for weight in weights], sparsity)
        case "uniform":
            removed = sizes * sparsity
        case "uniform-plus":
            removed = sizes * uniform_plus(sizes, sparsity, min_last)
    return Allocation(np.maximum(np.round(removed).astype(np.int64), gone), math.nan)


def allocate(curves: Curves, sizes: Counts, sparsity: float, gone: Counts | None = None, unit: int = 1) -> Allocation:
    """The amounts of least total distortion that keep at most `int((1 - sparsity) * n)` weights, exactly with `unit` 1.

    Dynamic programming over layers and budgets: best[j] is the least distortion of the layers so far if they keep at most j units.
    O(layers * amounts * budget / unit), one vector operation an amount.

    Args:
        curves: distortion by layer and amount, `[P, K + 1]`, amounts k / K.
        sizes: weights of each layer.
        sparsity: of all layers together, in [0, 1).
        gone: weights of each layer that are zero already: its amount is not below that.
        unit: weights that are counted together; what a layer keeps is rounded up, so that the budget is never exceeded.

    Raises ConfigError if no combination fits.
    """
    levels = curves.shape[1] - 1
    gone = np.zeros_like(sizes) if gone is None else gone
    budget = int((1 - sparsity) * int(sizes.sum())) // unit
    removed = np.asarray([amounts(size, levels) for size in sizes.tolist()])
    kept = -(-(sizes[:, None] - removed) // unit)
    best, choices = np.zeros(budget + 1), []
    for layer in range(len(sizes)):
        least, choice = np.full(budget + 1, np.inf), np.zeros(budget + 1, np.int16)
        for level in range(levels + 1):
            cost = int(kept[layer, level])
            if cost > budget or removed[layer, level] + levels_slack(int(sizes[layer]), levels) < gone[layer]:
                continue
            total = curves[layer, level] + best[: budget + 1 - cost]
            better = total < least[cost:]
            least[cost:][better], choice[cost:][better] = total[better], level
        best = least
        choices.append(choice)
    if not np.isfinite(best[budget]):
        raise ConfigError.at(
            "No amounts of the layers fit into the budget", "sparsity", sparsity, "a larger one", "or take more levels or units"
        )
    left, chosen = budget, np.zeros(len(sizes), np.int64)
    for layer in reversed(range(len(sizes))):
        chosen[layer] = choices[layer][left]
        left -= int(kept[layer, chosen[layer]])
    rows = np.arange(len(sizes))
    return Allocation(np.maximum(removed[rows, chosen], gone), float(best[budget]))


def levels_slack(size: int, levels: int) -> int:
    """How far below the zeros of a layer its amount may lie: a rounding, since what is gone is kept in whole weights."""
    return 1 if size >= levels else size


def erk_densities(shapes: Sequence[tuple[int, ...]], sparsity: float) -> NDArray[np.float64]:
    """The share that each layer keeps, proportional to the sum over the product of its sizes (Evci et al., RigL, ICML 2020), at most 1."""
    sizes = np.asarray([math.prod(shape) for shape in shapes], np.float64)
    raw = np.asarray([sum(shape) for shape in shapes]) / sizes
    dense = np.zeros(len(shapes), bool)
    while True:
        factor = ((1 - sparsity) * sizes.sum() - sizes[dense].sum()) / (raw * sizes)[~dense].sum()
        over = ~dense & (raw * factor > 1)
        if not over.any():
            return np.where(dense, 1.0, raw * factor)
        dense |= over


def uniform_plus(sizes: Counts, sparsity: float, min_last: float) -> NDArray[np.float64]:
    """The share that each layer loses: none of the first, at most `1 - min_last` of the last, and the same of all the others."""
    goes = sparsity * sizes.sum()
    shares: NDArray[np.float64] = np.full(len(sizes), goes / max(1, sizes[1:].sum()))
    shares[0] = 0.0
    if len(sizes) > 2 and shares[-1] > 1 - min_last:
        shares[-1] = 1 - min_last
        shares[1:-1] = (goes - shares[-1] * sizes[-1]) / sizes[1:-1].sum()
    return shares.clip(max=1.0)


def _features(model: nn.Module, chosen: Sequence[Tower], batches: Sequence[Batch]) -> dict[str, Tensor]:
    return {tower.kind: torch.cat([tower.encode(model, batch) for batch in batches]) for tower in chosen}


def from_each_block(model: nn.Module, tower: Tower, batches: Sequence[Batch]) -> Iterator[tuple[list[Matrix], Callable[[], Tensor]]]:
    """For every block its matrices, and what gives the tower's features `[N, D]`, computed from that block on."""
    states = [first_inputs(model, tower, batch) for batch in batches]
    blocks = list(tower.blocks.items())
    by_block = {name: [matrix for matrix in tower.matrices() if matrix.name.startswith(f"{name}.")] for name, _ in blocks}
    for place, (name, block) in enumerate(blocks):
        with _starting_at(block, [other for _, other in blocks[:place]]) as begin:

            def outputs(begin: Callable[[Tensor], None] = begin) -> Tensor:
                found = []
                for inputs, batch in zip(states, batches, strict=True):
                    begin(inputs.hidden_NLD)
                    found.append(tower.encode(model, batch))
                return torch.cat(found)

            yield by_block[name], outputs
        for inputs in states:
            inputs.hidden_NLD = inputs.call(block)


@contextmanager
def _starting_at(block: nn.Module, earlier: Sequence[nn.Module]) -> Iterator[Callable[[Tensor], None]]:
    """While open, a tower runs from `block` on, with the input that was last handed over; the earlier blocks pass theirs through."""
    given: list[Tensor] = []

    def take(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        del module
        return (given[-1], *args[1:])

    def begin(hidden_NLD: Tensor) -> None:
        given[:] = [hidden_NLD]

    handle = block.register_forward_pre_hook(take)
    for module in earlier:
        module.forward = lambda x, *_, **__: x
    try:
        yield begin
    finally:
        handle.remove()
        for module in earlier:
            del module.forward
