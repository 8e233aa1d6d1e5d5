"""Is the model still learning something? Figures of the embeddings for the log, and an end to runs that cannot recover.

For features x of unit norm, over the pairs of the global batch:

- rank: the participation ratio of their covariance, (sum of eigenvalues)^2 / sum of squares: 1 where all lie on a line, D where they
  spread evenly. (Gao et al. 2017, "A theory of multineuronal dimensionality, dynamics and measurement")
- alignment: the mean squared distance of the two sides of a pair; uniformity: the logarithm of the mean of exp(-2 d^2) over pairs of one
  tower, here those of one rank, at most 256 rows. (Wang and Isola, ICML 2020, section 4)
- spread: the mean squared distance from the mean feature, in [0, 1]; 0 where the tower says the same of everything.

Shape legend: N pairs on this rank, D feature width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from diptych.core.errors import DataError

if TYPE_CHECKING:
    from diptych.core.points import Tower
    from diptych.train.checkpoint import Checkpoints, TrainState

LEAST_ROWS = 8
UNIFORMITY_ROWS = 256
SAME = 1e-9
"""Spread of features that differ by rounding alone."""
LOST = 0.01
"""A tower that keeps less than this share of the spread it once had is suspected to have collapsed."""
PATIENCE = 3
"""Looks in a row that a suspicion must last: at high learning rates the first steps can press features together that part again."""


@dataclass(frozen=True)
class Look:
    """What was seen of one batch: figures for the log, and each tower's spread."""

    figures: dict[str, float]
    spread: dict[Tower, float]


def measure(features: Mapping[Tower, Tensor], world: int = 1) -> Look:
    """The figures of the features `[N, D]` of each tower, over all ranks; nothing of fewer than eight pairs.

    Every rank must call it, with as many rows.
    """
    rows = min((len(feature_ND) for feature_ND in features.values()), default=0)
    if rows * world < LEAST_ROWS:
        return Look({}, {})
    figures: dict[str, float] = {}
    spread: dict[Tower, float] = {}
    for tower, feature_ND in features.items():
        x_ND = feature_ND.detach().float()
        mean_D = _mean(x_ND.double().sum(dim=0), rows, world)
        spread[tower] = float(_mean(x_ND.double().square().sum(), rows, world) - mean_D.square().sum())
        centred_ND = x_ND - mean_D.float()
        covariance_DD = _mean(centred_ND.T @ centred_ND, rows, world)
        figures[f"{tower}_rank"] = float(covariance_DD.trace() ** 2 / covariance_DD.square().sum().clamp(min=1e-30))
        some_ND = x_ND[:UNIFORMITY_ROWS]
        near = torch.nn.functional.pdist(some_ND).square().mul(-2).exp().mean() if len(some_ND) > 1 else x_ND.new_ones(())
        figures[f"{tower}_uniformity"] = float(_mean(near, 1, world).log())
    if len(features) == 2:
        image_ND, text_ND = (feature_ND.detach().float() for feature_ND in features.values())
        if image_ND.shape == text_ND.shape:
            figures["alignment"] = float(_mean((image_ND - text_ND).square().sum(), rows, world))
    return Look(figures, spread)


def _mean(total: Tensor, rows: int, world: int) -> Tensor:
    if world > 1:
        dist.all_reduce(total)
    return total / (rows * world)


@dataclass
class Watch:
    """Follows a run and stops it where its embeddings have collapsed or its gradient is not finite.

    Attributes:
        state: `healthy_step` and `spread` are kept up to date there, and with it in checkpoints.
        checkpoints: those that were written after the last healthy look are withdrawn before a run is stopped.
        rank, world: this process's place.
    """

    state: TrainState
    checkpoints: Checkpoints
    rank: int = 0
    world: int = 1
    figures: dict[str, float] = field(default_factory=dict)
    _suspected: int = 0

    def look(self, features: Mapping[Tower, Tensor]) -> None:
        """Measures the features that the present weights gave. Raises DataError if a tower has collapsed; all ranks agree.

        Features that are the same to rounding, or not finite, end the run at once, others that lie close after three looks in a row.
        """
        look, state = measure(features, self.world), self.state
        self.figures = look.figures
        close = any(spread < LOST * state.spread.get(tower, 0.0) for tower, spread in look.spread.items())
        self._suspected = self._suspected + 1 if close else 0
        for tower, spread in look.spread.items():
            most = max(spread, state.spread.get(tower, 0.0))
            if not math.isfinite(spread) or spread < (SAME if self._suspected < PATIENCE else max(SAME, LOST * most)):
                raise self._end(
                    f"The {tower} embeddings have collapsed: nearly the same for every pair",
                    f"<spread {spread:.1e}, once {most:.1e}>",
                    f"{tower}s that are told apart",
                    f"lower the learning rate, lengthen schedule.warmup, or see whether the {tower}s of the batches differ at all",
                )
            state.spread[tower] = most
        if not close:
            state.healthy_step = state.step

    def refuse_non_finite(self, grad_norm: float, losses: Mapping[str, Tensor]) -> None:
        """Raises DataError if the averaged gradient is not finite. It is the same on every rank, so all of them stop at one step."""
        if not math.isfinite(grad_norm):
            parts = ", ".join(f"{name} {float(value.detach()):g}" for name, value in losses.items())
            raise self._end(
                "Training diverged",
                f"<gradient norm {grad_norm}; on this rank {parts}>",
                "finite losses and gradients",
                "lower the learning rate, lengthen schedule.warmup, or set clip_grad_norm",
            )

    def _end(self, headline: str, got: str, expected: str, fix: str) -> Exception:
        """The error that ends the run; it names the newest checkpoint whose weights were seen to be sound."""
        good = self.checkpoints.withdraw(self.state.healthy_step) if self.rank == 0 else None
        where = f"step {self.state.step}"
        last = f"the last good checkpoint is {good}" if good else "no checkpoint is from before it" if self.rank == 0 else "see rank 0"
        return DataError.at(f"{headline}; {last}", where, got, expected, fix)
