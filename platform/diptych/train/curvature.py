"""Gradients for every optimizer, and curvature for those that ask for it: an estimate of the diagonal of the loss's Hessian.

An optimizer asks by the attributes of `Curved`. Two estimates are known:

- `hutchinson`: z * (H z) with one probe z over all parameters together, of Gaussian numbers or of signs. H z is the gradient of
  <gradient, z>, so the step's own backward keeps its graph; attention runs without its fused kernels in that step, for those
  cannot be differentiated twice.
- `gauss-newton-bartlett` (Liu et al., "Sophia", ICLR 2024, section 2.3): B * g * g, where g is the gradient of the mean loss of B
  softmaxes against labels drawn from those softmaxes: one more forward and backward pass, in the step that asks for it. The objective
  must say what its loss is then (`sampled_loss`); the true labels would give the empirical Fisher matrix instead.

Draws are named by `(seed, step)` and equal on all ranks. H z and g are averaged over the ranks before anything is done to them that
is not linear, so the estimate is that of the global batch; it is made before gradients are clipped. Both estimates see the micro-batches
of `accumulate` as one batch, as the gradients do: a micro-batch is encoded once more for each backward through it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from diptych.core import chance
from diptych.core.errors import ConfigError, DataError
from diptych.core.points import Curvature, TrainingTask

Batch = Mapping[str, Tensor]
Losses = dict[str, Tensor]
Probe = Literal["gaussian", "rademacher"]


class Curved(Protocol):
    """What an optimizer has that asks for curvature.

    Attributes:
        curvature: which estimate.
        probe: the distribution of Hutchinson's probes; not read for others.
        param_groups: as for any torch optimizer.
    """

    curvature: Curvature
    probe: Probe
    param_groups: list[dict[str, Any]]

    def curvature_due(self, step: int) -> bool:
        """Whether an estimate is wanted before update `step`, counted from 0."""
        ...

    def update_curvature(self, estimates: Mapping[Tensor, Tensor]) -> None:
        """Takes in an estimate of the Hessian's diagonal for each parameter that has a gradient."""
        ...

    def figures(self) -> dict[str, float]:
        """What is worth a curve in the log, by name."""
        ...


class Backward:
    """Losses of a batch, with their gradients left in `.grad`: all that most optimizers need."""

    def __init__(self, task: TrainingTask) -> None:
        self.task = task

    @property
    def to_average(self) -> Sequence[Tensor]:
        """Tensors to be averaged over the ranks, beside the gradients."""
        return ()

    def __call__(self, batch: Batch, step: int) -> Losses:
        """The losses of update `step`, counted from 0."""
        losses = self.task.losses(batch, step)
        torch.autograd.backward(losses["loss"])
        return losses

    def supply_curvature(self, step: int) -> None:
        """Hands the optimizer what it asked for, after `to_average` was averaged and before its step."""

    def figures(self) -> dict[str, float]:
        """What the optimizer says of itself."""
        return {}


class CurvedBackward(Backward):
    """Also estimates curvature in the steps for which the optimizer asks. Subclasses fill `found`."""

    def __init__(self, task: TrainingTask, optimizer: Curved, seed: int) -> None:
        super().__init__(task)
        self.optimizer, self.seed = optimizer, seed
        self.parameters: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        self.found: dict[Tensor, Tensor] = {}

    @property
    def to_average(self) -> Sequence[Tensor]:
        """What was found for each parameter."""
        return list(self.found.values())

    def supply_curvature(self, step: int) -> None:
        """Raises DataError if the estimate is not finite, before the optimizer sees it; it is the same on every rank."""
        if not self.found:
            return
        found = list(self.found.values())
        norm = float(torch.nn.utils.get_total_norm(found))
        if not math.isfinite(norm):
            raise DataError.at(
                "The estimate of the curvature is not finite; the weights are from before it",
                f"step {step}",
                f"<norm {norm}>",
                "a finite Hessian",
                "lower the learning rate, lengthen schedule.warmup, or train with precision fp32",
            )
        self.optimizer.update_curvature(dict(zip(self.found, self.estimates(found), strict=True)))
        self.found = {}

    def estimates(self, found: list[Tensor]) -> Iterable[Tensor]:
        """The diagonal, from what was found and averaged."""
        return found

    def figures(self) -> dict[str, float]:
        """What the optimizer says of itself."""
        return self.optimizer.figures()


class Hutchinson(CurvedBackward):
    """z * (H z), from the graph of the step's own gradients."""

    def __call__(self, batch: Batch, step: int) -> Losses:
        """The losses of update `step`. Raises ConfigError if the model or the objective cannot be differentiated twice."""
        if not self.optimizer.curvature_due(step):
            return super().__call__(batch, step)
        with sdpa_kernel(SDPBackend.MATH):
            losses = self.task.losses(batch, step)
            reached = torch.autograd.grad(losses["loss"], self.parameters, create_graph=True, allow_unused=True)
            pairs = [(p, g) for p, g in zip(self.parameters, reached, strict=True) if g is not None]
            for p, g in pairs:
                p.grad = g.detach().clone()
            draws = probes([p for p, _ in pairs], self.optimizer.probe, self.seed, step)
            products = hessian_products(pairs, draws)
        self.found = {p: product.mul_(z) for (p, _), product, z in zip(pairs, products, draws, strict=True)}
        return losses


class GaussNewtonBartlett(CurvedBackward):
    """B * g * g, from labels sampled from the model."""

    softmaxes = 0

    def __init__(self, task: TrainingTask, optimizer: Curved, seed: int) -> None:
        if not getattr(task, "can_sample", False):
            raise ConfigError.at(
                f"{type(optimizer).__name__} needs labels sampled from the model",
                "objective",
                type(getattr(task, "objective", task)).__name__,
                "an objective with `sampled_loss`, such as clip",
                "choose that objective, or an optimizer that needs no labels, such as sophiah",
            )
        super().__init__(task, optimizer, seed)

    def __call__(self, batch: Batch, step: int) -> Losses:
        """The losses of update `step`. The sampled labels' gradients never touch `.grad`."""
        if self.optimizer.curvature_due(step):
            task: Any = self.task
            loss, self.softmaxes = task.sampled_loss(batch, step, generator(self.seed, step))
            gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
            self.found = {p: g.clone() for p, g in zip(self.parameters, gradients, strict=True) if g is not None}
        return super().__call__(batch, step)

    def estimates(self, found: list[Tensor]) -> Iterable[Tensor]:
        """Squares, made after the average: the square of the mean gradient, not the mean of squares."""
        squares = torch._foreach_mul(found, found)
        torch._foreach_mul_(squares, float(self.softmaxes))
        return squares


KINDS: Mapping[Curvature, type[CurvedBackward]] = {"hutchinson": Hutchinson, "gauss-newton-bartlett": GaussNewtonBartlett}


def backward(optimizer: torch.optim.Optimizer, task: TrainingTask, seed: int) -> Backward:
    """What makes the gradients, and the curvature, for an optimizer. Raises ConfigError if the task cannot supply what it asks for."""
    kind: Curvature = getattr(optimizer, "curvature", "none")
    return Backward(task) if kind == "none" else KINDS[kind](task, cast(Curved, optimizer), seed)


def generator(seed: int, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The generator of a step's draws for its curvature: the same on every rank, other than that of its dropout."""
    return torch.Generator(device).manual_seed(int(chance.mix(seed, step, chance.key_hash("curvature"))) >> 1)


def probes(parameters: Sequence[Tensor], kind: Probe, seed: int, step: int) -> list[Tensor]:
    """One probe: for each parameter a tensor of its shape, dtype and device, of independent numbers of mean 0 and variance 1."""
    if not parameters:
        return []
    draws = generator(seed, step, parameters[0].device)
    place = [{"dtype": p.dtype, "device": p.device} for p in parameters]
    if kind == "gaussian":
        return [torch.randn(p.shape, generator=draws, **at) for p, at in zip(parameters, place, strict=True)]  # type: ignore[call-overload]
    return [torch.randint(0, 2, p.shape, generator=draws, **at).mul_(2).sub_(1) for p, at in zip(parameters, place, strict=True)]  # type: ignore[call-overload]


def hessian_products(pairs: Sequence[tuple[Tensor, Tensor]], draws: Sequence[Tensor]) -> list[Tensor]:
    """H z for each parameter: the gradient of <gradient, z>, taken over all parameters together; 0 where the loss is linear.

    Args:
        pairs: parameters, and their gradients with graph, which is freed.
        draws: z, aligned with the pairs.

    Raises:
        ConfigError: an operation on the way has no second derivative.
    """
    curved = [(g, z) for (_, g), z in zip(pairs, draws, strict=True) if g.requires_grad]
    parameters = [p for p, _ in pairs]
    if not curved:
        return [torch.zeros_like(p) for p in parameters]
    try:
        products = torch.autograd.grad([g for g, _ in curved], parameters, [z for _, z in curved], allow_unused=True)
    except RuntimeError as error:
        if "not implemented" not in str(error) and "twice" not in str(error):
            raise
        fix = "choose an optimizer without Hutchinson probes, such as sophiag or adamw"
        raise ConfigError.at(
            "The loss cannot be differentiated twice", "optimizer", str(error), "a second derivative of every operation", fix
        ) from error
    return [torch.zeros_like(p) if product is None else product.clone() for p, product in zip(parameters, products, strict=True)]
