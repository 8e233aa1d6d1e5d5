"""Optimizers that treat every coordinate alone: whole lists of tensors a call, in lots that stay in a processor's cache.

torch's foreach functions step a list of tensors at once, which on an accelerator is a handful of launches. On a processor such a
list streams through memory once an operation; cut into lots of a megabyte, it streams through memory once a step.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import repeat
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from diptych.core.errors import ConfigError
from diptych.core.points import Curvature
from diptych.optimizers.checks import refuse_gradient, refuse_hyperparameters

LOT_ELEMENTS = 1 << 18
"""Elements a lot on a processor: six float32 columns of it are 6 MiB."""


class Elementwise(Optimizer):
    """Refuses what it cannot step, keeps the state, and hands lots of aligned tensors to `_update`.

    Complex and sparse gradients are refused before anything moves. State tensors have the parameter's dtype and layout. Subclasses
    that count steps put `capturable` among their defaults: with it, counts live on the parameter's device, so that a CUDA graph may
    hold the step; without it, a step inside a graph is refused.
    """

    state_names: ClassVar[tuple[str, ...]]
    """State tensors of a parameter's shape, zero at first, in the order in which `_update` takes them."""

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        refuse_hyperparameters(self, defaults)
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient; gives the closure's loss, if there is one.

        Raises:
            ConfigError: a gradient is sparse or not real floating; nothing was updated.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        self._check([p for _, parameters in work for p in parameters])
        for group, parameters in work:
            states = [self._state(p, group) for p in parameters]
            moments = [[state[name] for state in states] for name in self.state_names]
            scalars = [_beside(parameters, column) for column in self._scalars(group, states)]
            for lot in lots([parameters, [p.grad for p in parameters], *moments, *scalars]):
                self._update(group, *lot)
        return loss

    def _check(self, parameters: Sequence[Tensor]) -> None:
        """Raises ConfigError for what cannot be stepped."""
        for p in parameters:
            refuse_gradient(p, self)

    def _state(self, parameter: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        state: dict[str, Any] = self.state[parameter]
        if self.state_names[0] not in state:
            if "capturable" in group:
                device = parameter.device if group["capturable"] else "cpu"
                state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            state.update({name: torch.zeros_like(parameter, memory_format=torch.preserve_format) for name in self.state_names})
        return state

    def _scalars(self, group: Mapping[str, Any], states: Sequence[Mapping[str, Any]]) -> Sequence[Sequence[Any]]:
        """Further columns of the lots: one number, or 0-D tensor, a parameter."""
        del group, states
        return ()

    @abstractmethod
    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], *columns: Any) -> None:
        """Steps a lot in place: the columns are those of `state_names`, then those of `_scalars`."""


class Curved(Elementwise):
    """An optimizer that lives on an estimate of the Hessian's diagonal, which whoever makes the gradients supplies.

    Before the update number `step` (counted from 0) that `curvature_due` names, the caller estimates the diagonal as `curvature`
    says and hands it to `update_curvature`: from Hutchinson probes, z * (H z) with z drawn as `probe` says; from labels sampled
    from the model, B * g * g with g the gradient of the mean loss over B softmaxes.
    """

    curvature: ClassVar[Curvature]
    probe: ClassVar[Literal["gaussian", "rademacher"]] = "gaussian"

    def curvature_due(self, step: int) -> bool:
        """Whether an estimate is wanted before update `step`, counted from 0."""
        every: int = self.defaults["every"]
        delay: int = self.defaults.get("delay", 0)
        return step >= delay and (step - delay) % every == 0

    @torch.no_grad()
    def update_curvature(self, estimates: Mapping[Tensor, Tensor]) -> None:
        """Takes in an estimate of the Hessian's diagonal, a tensor of a parameter's shape for each parameter that has a gradient.

        Raises:
            ConfigError: an estimate has another shape than its parameter, or is not for one of this optimizer's.
        """
        own = [(group, [p for p in group["params"] if p in estimates]) for group in self.param_groups]
        if sum(len(parameters) for _, parameters in own) != len(estimates):
            raise ConfigError.at("Curvature of unknown parameters", "estimates", len(estimates), "this optimizer's parameters")
        for p, estimate in estimates.items():
            if p.shape != estimate.shape:
                raise ConfigError.at("A curvature has another shape than its parameter", "estimates", estimate.shape, str(p.shape))
        for group, parameters in own:
            self._take_in(group, parameters, [estimates[p] for p in parameters])

    def figures(self) -> dict[str, float]:
        """What is worth a curve in the log, by name."""
        return {}

    @abstractmethod
    def _take_in(self, group: dict[str, Any], params: list[Tensor], estimates: list[Tensor]) -> None:
        """Updates the state of some parameters of a group from their estimates."""


def advance(states: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Counts a step in each state; the counts, as floats where they live on the host, else in double precision.

    Raises:
        ConfigError: a CUDA graph is being captured, into which counts on the host would be frozen.
    """
    steps: list[Tensor] = [state["step"] for state in states]
    if not steps:
        return []
    torch._foreach_add_(steps, 1)
    if torch.compiler.is_compiling() or steps[0].device.type != "cpu":
        return [step.double() for step in steps]  # 1 - beta^t has few digits left in single precision
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise ConfigError.at("A CUDA graph would freeze the count of steps", "capturable", False, "True", "build it with capturable=True")
    return [step.item() for step in steps]


def lots(columns: Sequence[Sequence[Any]]) -> Iterator[list[list[Any]]]:
    """Cuts aligned columns into lots of one device and dtype, taken from the first column.

    Off the processor, and under `torch.compile`, a lot is everything alike; on it, `LOT_ELEMENTS` elements, larger tensors being
    cut along their first axis; so are the tensors beside them that have as many axes and as long a first one. Other values go along
    with every part.
    """
    alike: dict[tuple[torch.device, torch.dtype], list[tuple[Any, ...]]] = {}
    for row in zip(*columns, strict=True):
        alike.setdefault((row[0].device, row[0].dtype), []).append(row)
    for (device, _), rows in alike.items():
        if device.type != "cpu" or torch.compiler.is_compiling():
            yield [list(column) for column in zip(*rows, strict=True)]
        else:
            yield from _small_lots(rows)


def _small_lots(rows: Iterable[tuple[Any, ...]]) -> Iterator[list[list[Any]]]:
    gathered: list[tuple[Any, ...]] = []
    size = 0
    for row in rows:
        for part in _parts(row):
            count = part[0].numel()
            if gathered and size + count > LOT_ELEMENTS:
                yield [list(column) for column in zip(*gathered, strict=True)]
                gathered, size = [], 0
            gathered.append(part)
            size += count
    if gathered:
        yield [list(column) for column in zip(*gathered, strict=True)]


def _parts(row: tuple[Any, ...]) -> Iterable[tuple[Any, ...]]:
    """A row of the columns, cut along the first axis of its tensors so that no part is larger than a lot, if rows are not."""
    size, ndim = row[0].numel(), row[0].ndim
    if size <= LOT_ELEMENTS or len(row[0]) == 1:
        return [row]
    length = len(row[0])
    height = max(1, LOT_ELEMENTS * length // size)
    fits = [isinstance(value, Tensor) and value.ndim == ndim and len(value) == length for value in row]
    cut = [value.split(height) if fit else repeat(value) for value, fit in zip(row, fits, strict=True)]
    return zip(*cut, strict=False)


def _beside(parameters: Sequence[Tensor], scalars: Sequence[Any]) -> Sequence[Any]:
    """Scalars in the precision in which they meet their parameters: compiled kernels would not vectorise over doubles among singles."""
    if not scalars or not isinstance(scalars[0], Tensor):
        return scalars
    if torch.compiler.is_compiling():  # stacked, they are made once; else the formula of each is repeated for every element
        scalars = torch.stack(list(scalars)).unbind()
    return [scalar.to(torch.promote_types(p.dtype, torch.float32)) for p, scalar in zip(parameters, scalars, strict=True)]
