"""Small problems whose answer is known, and the loop that an optimizer solves them in: what claims about optimizers alone rest on.

The loop is that of a training without its data: the same curvature, the same schedules, the same plug-in points for the optimizer and
the batch size. What a problem draws depends on the seed and the step.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from diptych.core import chance
from diptych.core.errors import ConfigError
from diptych.core.points import BatchSize
from diptych.train import curvature
from diptych.train.schedule import Schedule

Named = tuple[str, nn.Parameter]


class Problem(ABC):
    """Parameters, a loss of them, and what is worth knowing at the end. `start` comes first."""

    batch_size: int = 1
    """Samples of the first step."""

    @abstractmethod
    def start(self, seed: int) -> Sequence[Named]:
        """Draws the problem of a seed; its parameters, named as a model's are."""

    @abstractmethod
    def batch(self, step: int, size: int) -> Mapping[str, Tensor]:
        """What a step looks at."""

    @abstractmethod
    def losses(self, batch: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
        """The scalar `loss` at the parameters."""

    @abstractmethod
    def figures(self) -> dict[str, float]:
        """What came out, by name; figures are of the whole problem, without a step's noise."""

    def after_step(self) -> None:  # noqa: B027 - most problems have nothing to do then
        """Called after every update."""

    def noise(self, batch: Mapping[str, Tensor]) -> tuple[float, float]:
        """For a `BatchSize`: the variance of one sample's gradient, summed over coordinates, and the squared norm of the mean gradient.

        Raises ConfigError where the problem has no samples.
        """
        del batch
        raise ConfigError.at("This problem has no batch that could grow", "train.batch_growth", type(self).__name__, "null")


@dataclass(frozen=True)
class Outcome:
    """What an optimizer made of a problem: its figures, and the loss of each step."""

    figures: dict[str, float]
    losses: list[float]


def solve(
    problem: Problem,
    seed: int,
    steps: int,
    schedule: Callable[[float, int], Schedule],
    build_optimizer: Callable[[Iterable[dict[str, Any]]], torch.optim.Optimizer],
    build_batch_size: Callable[[], BatchSize] | None = None,
) -> Outcome:
    """Runs an optimizer on a problem for a number of updates.

    Args:
        schedule: makes the learning rates of a run from the peak and the number of updates (`ScheduleConfig.build`).
        build_optimizer, build_batch_size: as for a training. The batch grows by whole samples.

    Beside the problem's own figures: `samples` seen, `finite` (0 where the loss ended as no number), and with a batch that may
    grow `batch_at_10`, `batch_end` and `shrinks`, the number of times that it became smaller. Nothing is raised for a loss that is not
    finite: the figures of such a run are infinite.
    """
    named = problem.start(seed)
    parameters = [parameter for _, parameter in named]
    optimizer = build_optimizer([{"params": parameters, "param_names": [name for name, _ in named]}])
    if hasattr(optimizer, "plan"):
        optimizer.plan(steps)
    rates = schedule(optimizer.defaults["lr"], steps)
    backward = curvature.backward(optimizer, problem, seed)
    batch_size = None if build_batch_size is None else build_batch_size()
    sizes, losses = [problem.batch_size], []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rates(step)
        batch = problem.batch(step, sizes[-1])
        optimizer.zero_grad(set_to_none=True)
        loss = float(backward(batch, step)["loss"].detach())
        losses.append(loss)
        if not math.isfinite(loss):
            break
        if batch_size is not None:
            variance, square_norm = problem.noise(batch)
            seen = {"batch_size": float(sizes[-1]), "updates": float(step), "variance": variance, "square_norm": square_norm}
            sizes.append(batch_size.next(seen))
        backward.supply_curvature(step)
        optimizer.step()
        problem.after_step()
    return Outcome(_figures(problem, sizes, losses, grows=batch_size is not None), losses)


def _figures(problem: Problem, sizes: list[int], losses: list[float], *, grows: bool) -> dict[str, float]:
    found = {name: value if math.isfinite(value) else math.inf for name, value in problem.figures().items()}
    found["finite"] = float(math.isfinite(losses[-1]))
    found["samples"] = float(sum(sizes[:-1]) if grows else sizes[0] * len(losses))
    if grows:
        shrinks = sum(after < before for before, after in pairwise(sizes))
        found |= {"batch_at_10": float(sizes[min(10, len(sizes) - 1)]), "batch_end": float(sizes[-1]), "shrinks": float(shrinks)}
    return found


def generator(seed: int, name: str, step: int = 0) -> torch.Generator:
    """The draws of a seed that are called `name`, in a step."""
    return torch.Generator().manual_seed(int(chance.mix(seed, chance.key_hash(name), step)) >> 1)
