"""AdAdaGrad: batches that grow when gradients are too noisy for their size, under AdaGrad.

Lau, Liu, Kolar, "AdAdaGrad: Adaptive Batch Size Schemes for Adaptive Gradient Methods" (arXiv 2402.11215). At a point, with gradients
g_i of b samples and their mean g, a test asks for the batch T at which the noise of the mean would be small beside it:

- norm test: T = sum_j Var(g_ij) / (eta^2 |g|^2);
- inner product test: T = Var(<g_i, g>) / (theta^2 |g|^4);
- orthogonality test: T = sum_j Var(r_ij) / (nu^2 |g|^2), r_i = g_i - <g_i, g> / |g|^2 g; with the one before: the augmented test;
- coordinate-wise, for AdaGrad (the paper's, not in the authors' code): T = max_j Var(g_ij) / (eta^2 g_j^2).

A contrastive loss is no sum over samples. There the samples of the test are the gradients of disjoint micro-batches of fixed size,
negatives included: their variance times their size stands for that of a sample (`of_micro_batches`).

Shape legend: b samples; a per-sample gradient is `[b, ...]`, the shape of its parameter behind the samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from diptych.core.config import Config as BaseConfig
from diptych.core.errors import ConfigError
from diptych.core.points import Curvature
from diptych.optimizers.checks import dense_gradient

# ---------------------------------------------------------------- statistics


class Noise(NamedTuple):
    """What a test looks at: the variance of single samples, summed over its coordinates, and |g|^2 of the mean gradient."""

    variance: float
    square_norm: float


def norm_noise(grads: Sequence[Tensor]) -> Noise:
    """Of the norm test: sum_j Var(g_ij) with divisor b - 1, over all parameters."""
    matrices = [_matrix(grad) for grad in grads]
    return Noise(_total(m.var(dim=0).sum() for m in matrices), _square_norm(matrices))


def inner_product_noise(grads: Sequence[Tensor], *, by_tensor: bool = False) -> Noise:
    """Of the inner product test: Var(<g_i, g>). `by_tensor` takes each parameter alone and adds up, as the authors' code does, which drops
    what they have in common."""
    matrices = [_matrix(grad) for grad in grads]
    products = [m @ m.mean(dim=0) for m in matrices]
    found = products if by_tensor else [torch.stack(products).sum(dim=0)]
    return Noise(_total(product.var() for product in found), _square_norm(matrices))


def orthogonality_noise(grads: Sequence[Tensor], *, by_tensor: bool = False) -> Noise:
    """Of the orthogonality test: sum_j Var(r_ij); `by_tensor` as above."""
    matrices = [_matrix(grad) for grad in grads]
    groups = [[m] for m in matrices] if by_tensor else [matrices]
    return Noise(_total(part for group in groups for part in _orthogonal_variances(group)), _square_norm(matrices))


def _orthogonal_variances(matrices: Sequence[Tensor]) -> list[Tensor]:
    means = [m.mean(dim=0) for m in matrices]
    along = torch.stack([m @ mean for m, mean in zip(matrices, means, strict=True)]).sum(dim=0) / sum(mean @ mean for mean in means)
    return [(m - along.unsqueeze(1) * mean).var(dim=0).sum() for m, mean in zip(matrices, means, strict=True)]


def coordinate_request(grads: Sequence[Tensor], eta: float) -> float:
    """T of the coordinate-wise test; infinite where a coordinate has noise and no mean, 0 where it has neither."""
    largest = 0.0
    for m in map(_matrix, grads):
        variance, square = m.var(dim=0), m.mean(dim=0).square()
        ratio = torch.where(variance == 0, 0, variance / square)
        largest = max(largest, float(ratio.max()))
    return largest / eta**2


def pooled_noise(parts: Sequence[Sequence[Tensor]], *, along: bool = False, official: bool = False) -> Noise:
    """The noise of samples that lie in equal parts, on ranks or in micro-steps, from means and variances of each part alone.

    Args:
        parts: per part the per-sample gradients of every parameter; all parts have as many samples.
        along: of <g_i, g>, parameter by parameter, in place of g_i.
        official: as the authors add it up: unbiased within the parts plus biased between them, which is too much, the more so the
            smaller the parts. False: exactly the variance of all samples together.
    """
    m = len(parts[0][0])
    total = torch.zeros((), dtype=torch.float64)
    square = 0.0
    for of_parameter in zip(*parts, strict=True):
        samples = [_matrix(grad) for grad in of_parameter]
        mean = torch.stack([each.mean(dim=0) for each in samples]).mean(dim=0)
        square += float(mean @ mean)
        values = [(each @ mean).unsqueeze(1) for each in samples] if along else samples
        means = torch.stack([each.mean(dim=0) for each in values])
        within = torch.stack([each.var(dim=0) for each in values]).mean(dim=0)
        between = means.var(dim=0, correction=0)
        n = m * len(values)
        total += (within + between if official else ((m - 1) / m * within + between) * (n / (n - 1))).sum()
    return Noise(float(total), square)


def of_micro_batches(squares: Sequence[float], square_norm: float, size: int) -> Noise:
    """The noise of a sample from that of micro-batches: only the norms of their gradients are needed.

    Args:
        squares: |g_k|^2 of each micro-batch's mean gradient, at least two.
        square_norm: |g|^2 of the mean over the micro-batches.
        size: samples in a micro-batch, a variance of which is 1 / size of a sample's.
    """
    count = len(squares)
    between = max(0.0, sum(squares) - count * square_norm) / (count - 1)
    return Noise(between * size, square_norm)


def _matrix(grad: Tensor) -> Tensor:
    """`[b, coordinates]`, float64: sums of squares of small numbers."""
    return grad.reshape(len(grad), -1).double()


def _total(values: Iterable[Tensor]) -> float:
    return float(sum(values, torch.zeros((), dtype=torch.float64)))


def _square_norm(matrices: Sequence[Tensor]) -> float:
    return _total(m.mean(dim=0).square().sum() for m in matrices)


# ---------------------------------------------------------------- the batch


def norm_test(noise: Noise, eta: float) -> float:
    """T of the norm test and, with nu for eta, of the orthogonality test; infinite at a gradient of zero that has noise."""
    return _ratio(noise.variance, eta**2 * noise.square_norm)


def inner_product_test(noise: Noise, theta: float) -> float:
    """T of the inner product test."""
    return _ratio(noise.variance, theta**2 * noise.square_norm**2)


def grown(batch_size: int, request: float, largest: int | None = None) -> int:
    """The next batch: what the test asks for, never less than now, never more than `largest`."""
    wanted = max(float(batch_size), request)
    if largest is not None and wanted >= largest:
        return max(batch_size, largest)
    if math.isinf(wanted):
        raise ConfigError.at(
            "The batch would grow without bound", "max_batch_size", None, "a largest batch", "the gradient is zero but noisy"
        )
    return math.ceil(wanted)


def _ratio(noise: float, signal: float) -> float:
    return 0.0 if noise == 0 else noise / signal if signal > 0 else math.inf


class Division(NamedTuple):
    """How a global batch lies: `global_batch = micro * world * accumulation`."""

    global_batch: int
    micro: int
    accumulation: int


def divide(request: int, last: Division, world: int, max_global: int, max_micro: int) -> Division:
    """From a requested batch to one that `world` ranks can take; the authors' rules, all in whole numbers rounded up.

    The micro-batch grows first, then the number of them. The result may lie above `max_global` by less than a round of micro-batches.
    """
    a = last.accumulation
    mb = _ceil(min(request, max_global), world * a)
    a = _ceil(min(request, max_global), world * mb)
    b = mb * world * a
    if b > max_global:
        b, mb = max_global, max_micro
        a = _ceil(b, world * mb)
    if b > last.global_batch:
        mb = _ceil(b, world * a)
        b = mb * world * a
        if mb > max_micro:
            mb, a = max_micro, _ceil(b, max_micro * world)
            b = mb * world * a
        if b > max_global:
            mb = _ceil(max_global, world * a)
            a = _ceil(max_global, mb * world)
            b = mb * world * a
    return Division(b, mb, a)


def _ceil(number: int, by: int) -> int:
    return -(-number // by)


def cosine_by_samples(samples: int, warmup: int, decay: int, min_lr: float, max_lr: float) -> float:
    """The learning rate after so many samples: linear up to `warmup`, half a cosine to `min_lr` at `decay`, and `min_lr` from there on."""
    if samples <= warmup and warmup > 0:
        return max_lr * samples / warmup
    if samples >= decay:
        return min_lr
    return min_lr + 0.5 * (1 + math.cos(math.pi * (samples - warmup) / (decay - warmup))) * (max_lr - min_lr)


LrScaling = Literal["none", "sqrt", "linear"]


@dataclass(frozen=True)
class AdaptiveBatchSize:
    """The plug-in point `BatchSize`: the norm test, made every so many updates; it remembers nothing.

    Attributes:
        eta: the noise that is allowed, as a share of the gradient's norm, > 0.
        max_batch_size: samples of the largest batch; the test is not made from there on.
        interval: updates between two tests.
        lr_scaling: how the learning rate follows the batch.
    """

    eta: float
    max_batch_size: int
    interval: int = 1
    lr_scaling: LrScaling = "none"

    def next(self, statistics: Mapping[str, float]) -> int:
        """The global batch size of the next step.

        Args:
            statistics: of the step just made: `batch_size`; `updates` made before it (0 if absent); `variance` of a sample's gradient,
                summed over coordinates; `square_norm` of the mean gradient. Without the last two nothing grows.
        """
        batch_size = int(statistics["batch_size"])
        is_due = (int(statistics.get("updates", 0)) + 1) % self.interval == 0
        if not is_due or batch_size >= self.max_batch_size or "variance" not in statistics:
            return batch_size
        return grown(batch_size, norm_test(Noise(statistics["variance"], statistics["square_norm"]), self.eta), self.max_batch_size)

    def lr_factor(self, batch_size: int, first: int) -> float:
        """What a batch of this size multiplies the learning rate of the first batch size by."""
        return float((batch_size / first) ** {"none": 0.0, "sqrt": 0.5, "linear": 1.0}[self.lr_scaling])


# ---------------------------------------------------------------- AdaGrad


class _Gathering(Optimizer):
    """The closure, the checks and the order of a step."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient; gives the closure's loss, if there is one.

        Raises ConfigError for a gradient that is sparse or not real floating; nothing was updated.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        members = [[(p, dense_gradient(p, self)) for p in group["params"] if p.grad is not None] for group in self.param_groups]
        if any(members):
            self._update([(group, each) for group, each in zip(self.param_groups, members, strict=True) if each])
        return loss

    def _update(self, groups: list[tuple[dict[str, Any], list[tuple[Tensor, Tensor]]]]) -> None:
        raise NotImplementedError


class AdaGradNorm(_Gathering):
    """AdaGrad with one number for all parameters: s += |g|^2, then x -= lr g / sqrt(s). Its state is that number.

    Args:
        params: parameters or groups, as for any torch optimizer.
        lr: step size alpha, >= 0.
        start: s before the first step, > 0; s of the first step is known before x moves.
        weight_decay: decoupled, per unit of lr, >= 0.
    """

    def __init__(self, params: ParamsT, lr: float = 1.0, *, start: float = 1e-2, weight_decay: float = 0.0) -> None:
        if start <= 0:
            raise ConfigError.at("AdaGradNorm cannot run", "start", start, "a number above 0")
        super().__init__(params, {"lr": lr, "start": start, "weight_decay": weight_decay})

    def _update(self, groups: list[tuple[dict[str, Any], list[tuple[Tensor, Tensor]]]]) -> None:
        holder = self.state[next(p for group in self.param_groups for p in group["params"])]
        norms = torch._foreach_norm([grad for _, members in groups for _, grad in members])
        total: float = holder.get("sum", self.defaults["start"]) + float(torch.stack([norm.double() for norm in norms]).square().sum())
        holder["sum"] = total  # a plain number: loading a state would round a tensor to the parameter's precision
        for group, members in groups:
            weights, grads = [p for p, _ in members], [grad for _, grad in members]
            if group["weight_decay"]:
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(weights, grads, alpha=-group["lr"] / math.sqrt(total))


class RowAdaGrad(_Gathering):
    """AdaGrad with one number a row of matrices and kernels: what the authors' code calls AdaGrad-norm.

    x -= lr_t g / (sqrt(acc) + eps), lr_t = lr / (1 + (t - 1) lr_decay); a row's accumulator gets |g_r|^2, other shapes g * g.

    Args:
        params: parameters or groups, as for any torch optimizer.
        lr: step size, >= 0.
        momentum: in [0, 1): the step takes buf = momentum buf + (1 - momentum) g.
        lr_decay: >= 0, per step.
        weight_decay: decoupled, per unit of lr, >= 0.
        start: of the accumulators, >= 0.
        eps: beside the root, >= 0.
        leaks: the authors' code hands the row norms of a matrix on to the next tensors whose length fits, normally the layer's bias,
            which then count in its accumulator too. True does the same; False keeps each parameter to itself.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-2,
        *,
        momentum: float = 0.0,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        start: float = 1e-2,
        eps: float = 1e-10,
        leaks: bool = False,
    ) -> None:
        hyper = {"lr": lr, "momentum": momentum, "lr_decay": lr_decay, "weight_decay": weight_decay}
        super().__init__(params, {**hyper, "start": start, "eps": eps, "leaks": leaks})

    def _update(self, groups: list[tuple[dict[str, Any], list[tuple[Tensor, Tensor]]]]) -> None:
        row_squares: Tensor | None = None
        for group, members in groups:
            for parameter, grad in members:
                state = self.state[parameter]
                has_rows = grad.ndim in (2, 4)
                shape = (len(grad), *(1,) * (grad.ndim - 1)) if has_rows else grad.shape
                if not state:
                    state |= {"step": 0, "sum": grad.new_full(shape, group["start"])}
                state["step"] += 1
                square = torch.linalg.vector_norm(grad.flatten(1), dim=1).square() if has_rows else grad.square()
                state["sum"].add_(square.view(shape))
                if has_rows:
                    row_squares = square
                elif group["leaks"] and row_squares is not None and row_squares.shape == grad.shape:
                    state["sum"].add_(row_squares)
                self._move(group, parameter, grad, state)

    def _move(self, group: dict[str, Any], parameter: Tensor, grad: Tensor, state: dict[str, Any]) -> None:
        lr = group["lr"] / (1 + (state["step"] - 1) * group["lr_decay"])
        if group["momentum"]:
            buffer = state.setdefault("momentum", torch.zeros_like(grad))
            grad = buffer.lerp_(grad, 1 - group["momentum"])
        if group["weight_decay"]:
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.addcdiv_(grad, state["sum"].sqrt().add_(group["eps"]), value=-lr)


# ---------------------------------------------------------------- configurations


class Config(BaseConfig):
    """AdAdaGrad's batch sizes: the norm test on gradients of micro-batches."""

    method: Literal["adadagrad"] = "adadagrad"
    eta: float = Field(0.5, gt=0, description="noise allowed in a batch's gradient, as a share of its norm")
    max_batch_size: int = Field(4096, ge=1, description="pairs of the largest batch, over all workers")
    interval: int = Field(1, ge=1, description="updates between two tests")
    lr_scaling: LrScaling = Field("none", description="how the learning rate follows the batch: not at all, by its root, in proportion")

    def build(self) -> AdaptiveBatchSize:
        """The batch size controller."""
        return AdaptiveBatchSize(self.eta, self.max_batch_size, self.interval, self.lr_scaling)


class AdaGradConfig(BaseConfig):
    """AdaGrad by coordinates: torch's, foreach."""

    curvature: ClassVar[Curvature] = "none"

    method: Literal["adagrad"] = "adagrad"
    lr: float = Field(8e-3, gt=0, description="peak learning rate, per update")
    weight_decay: float = Field(0.0, ge=0, description="added to the gradient per unit of weight, on parameters that decay")
    eps: float = Field(1e-10, ge=0, description="added to the root of the sum of squares")
    start: float = Field(0.0, ge=0, description="the sum of squares before the first update")

    def build(self, groups: Iterable[dict[str, Any]]) -> torch.optim.Adagrad:
        """The optimizer over parameter groups; a group's own values win over the configuration's."""
        hyper: dict[str, Any] = {"weight_decay": self.weight_decay, "eps": self.eps, "initial_accumulator_value": self.start}
        return torch.optim.Adagrad(list(groups), lr=self.lr, **hyper, foreach=True)


class AdaGradNormConfig(BaseConfig):
    """AdaGrad with one number for the model, as in the paper, or one a row, as in the authors' code."""

    curvature: ClassVar[Curvature] = "none"

    method: Literal["adagrad-norm"] = "adagrad-norm"
    lr: float = Field(1e-2, gt=0, description="peak learning rate, per update")
    per: Literal["model", "row"] = Field("model", description="what shares one step size")
    weight_decay: float = Field(0.0, ge=0, description="decoupled decay per unit of learning rate, on parameters that decay")
    start: float = Field(1e-2, gt=0, description="the sum of squares before the first update")

    def build(self, groups: Iterable[dict[str, Any]]) -> AdaGradNorm | RowAdaGrad:
        """The optimizer over parameter groups; a group's own values win over the configuration's."""
        chosen = AdaGradNorm if self.per == "model" else RowAdaGrad
        return chosen(list(groups), lr=self.lr, weight_decay=self.weight_decay, start=self.start)
