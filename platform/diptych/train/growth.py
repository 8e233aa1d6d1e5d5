"""Batches that grow while a run trains: a few more lines of an update, for runs with a `BatchSize`.

The loader's batches become micro-batches of fixed size, and an update takes several of them: all of the update's gradient is
the mean of theirs, and each micro-batch is compared within itself, so the negatives of a pair stay as many as they were. The stream of
data is that of any other run: `state.step` counts micro-batches, nothing is skipped or seen twice, the schedule and the length of the
run go by pairs seen and not by updates. What a run goes on from is two integers: micro-batches an update, and updates made.

Statistics for the `BatchSize` come from the micro-batches themselves, at the point of the update and before it: the variance of their
gradients needs only their norms. All ranks see the same ones, for gradients are averaged a micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from diptych.core import chance
from diptych.core.errors import ConfigError
from diptych.core.points import BatchSize
from diptych.train import sync
from diptych.train.checkpoint import TrainState
from diptych.train.loader import Batch
from diptych.train.loop import Run, next_tensors

FIRST = 2  # one micro-batch has no variance


class Growth:
    """How many micro-batches an update takes, as `batch_size` chooses.

    `batch_size.next` gets, after each update: `batch_size` (pairs), `updates` (made before it), `square_norm` of its gradient, and, where it
    had two micro-batches at least, `variance` of the gradient of a pair, summed over coordinates. Its answer is rounded up to whole
    micro-batches. If it has a method `lr_factor(batch_size, first)`, that multiplies the scheduled learning rate.

    Args:
        batch_size: the plug-in; it keeps no state of its own.
        micro_batch: pairs in a micro-batch, over all workers.
        first: micro-batches of the first update, >= 2.
        optimizer: what steps; one that asks for curvature or plans over the run is refused, for it counts updates, not pairs.
    """

    def __init__(self, batch_size: BatchSize, micro_batch: int, first: int = FIRST, optimizer: torch.optim.Optimizer | None = None) -> None:
        if first < FIRST:
            raise ConfigError.at("A growing batch must begin with a variance", "first", first, f"at least {FIRST} micro-batches")
        if getattr(optimizer, "curvature", "none") != "none" or hasattr(optimizer, "plan"):
            got = type(optimizer).__name__
            raise ConfigError.at(
                "The batch cannot grow under an optimizer that plans by updates", "optimizer", got, "one that does not count"
            )
        self.batch_size, self.micro_batch, self.first = batch_size, micro_batch, first

    def micro_batches(self, state: TrainState) -> int:
        """How many the next update takes, if as many are left."""
        return state.growth.get("micro_batches", self.first)

    def lr_factor(self, state: TrainState) -> float:
        """What the scheduled learning rate of the next update is multiplied by."""
        factor: Any = getattr(self.batch_size, "lr_factor", None)
        return 1.0 if factor is None else float(factor(self.micro_batches(state) * self.micro_batch, self.first * self.micro_batch))

    def complete(
        self, run: Run, state: TrainState, batches: Iterator[Batch], parameters: list[Tensor], losses: dict[str, Tensor]
    ) -> tuple[int, dict[str, Tensor]]:
        """Takes the further micro-batches of an update whose first has left its averaged gradient; how many it took, and their mean losses.

        Leaves the mean of the gradients in `.grad`, and in `state.growth` what the next update takes.
        """
        count = min(self.micro_batches(state), run.total_steps - state.step)
        total: dict[Tensor, Tensor] = {}
        squares = [_collect(parameters, total)]
        means = {name: value.detach() / count for name, value in losses.items()}
        for step in range(state.step + 1, state.step + count):
            tensors = next_tensors(run, batches)
            with run.clock("step"):
                torch.manual_seed(int(chance.mix(run.seed, step, run.rank)) >> 1)
                more = run.task.losses(tensors, step)
                torch.autograd.backward(more["loss"])
            with run.clock("sync"):
                sync.average_gradients(parameters, run.world)
            squares.append(_collect(parameters, total))
            means = {name: value + more[name].detach() / count for name, value in means.items()}
        for parameter, gradient in total.items():
            parameter.grad = gradient.div_(count)
        self._choose(state, squares, _square_norm(list(total.values())))
        return count, means

    def _choose(self, state: TrainState, squares: list[float], square_norm: float) -> None:
        count, updates = len(squares), state.growth.get("updates", 0)
        statistics = {"batch_size": float(count * self.micro_batch), "updates": float(updates), "square_norm": square_norm}
        if count > 1:
            statistics["variance"] = max(0.0, sum(squares) - count * square_norm) / (count - 1) * self.micro_batch
        chosen = -(-self.batch_size.next(statistics) // self.micro_batch)
        state.growth = {"micro_batches": max(count, chosen), "updates": updates + 1}


def _collect(parameters: list[Tensor], total: dict[Tensor, Tensor]) -> float:
    """Moves the gradients out of the parameters into their sums; the square of their norm."""
    found = {parameter: parameter.grad for parameter in parameters if parameter.grad is not None}
    square = _square_norm(list(found.values()))
    for parameter, gradient in found.items():
        total[parameter] = total[parameter].add_(gradient) if parameter in total else gradient
        parameter.grad = None
    return square


def _square_norm(gradients: list[Tensor]) -> float:
    norms = torch._foreach_norm(gradients)
    return float(torch.stack([norm.double() for norm in norms]).square().sum())
