"""Worst-case (adaptive) sharpness: how far the loss rises inside a ball around the weights, by Auto-PGD on each batch.

Source: Andriushchenko et al., A modern look at the relationship between sharpness and generalization (ICML 2023); the ascent follows Croce &
Hein, Reliable evaluation of adversarial robustness (ICML 2020), section 3, in the form in which the published measure runs it:

- the momentum is `delta <- 0.75 z + 0.25 before`, with z the projected step and `before` the delta that the previous step started from;
- a restart puts the weights back to the best ones, but not delta: the next gradient is the best weights', the next move starts from the old delta.

The result is a lower bound of the true maximum. It is a function of the weights and the batch: no draw is made.

Shape legend: N examples of a batch, C classes, P attacked weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from diptych.adapt.states import State, evaluating
from diptych.core.errors import DataError

Predict = Callable[[State, Tensor], Tensor]
"""`predict(weights, inputs) -> logits [N, C]`, differentiable in the weights, without dropout."""
Batch = tuple[Tensor, Tensor]
"""Inputs with examples along the first dimension, and labels int64 `[N]` in [0, C)."""
Loss = Callable[[Tensor, Tensor], Tensor]
"""`loss(logits [N, C], labels [N]) -> [N]`."""

MOMENTUM = 0.75
IMPROVED = 0.75
"""The share of steps that must improve the loss between two checkpoints for the step size to stay."""
TINY = 1e-12
BISECTIONS = 100


@dataclass(frozen=True)
class Attack:
    """The ball and the ascent in it.

    Attributes:
        rho: radius, >= 0; relative to each weight if adaptive.
        norm: `linf` bounds every weight's change, `l2` the Euclidean norm of all changes together.
        adaptive: measure changes in units of the weight's magnitude, which makes layers comparable. Zero weights then do not move.
        steps: of Auto-PGD, each a forward and a backward pass.
        normalise: centre the logits and divide them by their norm first; else sharpness mostly measures the logit scale.
    """

    rho: float
    norm: Literal["linf", "l2"] = "linf"
    adaptive: bool = True
    steps: int = 20
    normalise: bool = True


class Sharpness(NamedTuple):
    """The rise of loss and of error, float64 `[batches]` each; loss rises are never negative."""

    rise_B: Tensor
    error_B: Tensor

    @property
    def loss(self) -> float:
        """The mean rise of the loss over batches: the sharpness."""
        return float(self.rise_B.mean())

    @property
    def error(self) -> float:
        """The mean rise of the error over batches, in [-1, 1]."""
        return float(self.error_B.mean())


def cross_entropy(logit_NC: Tensor, label_N: Tensor) -> Tensor:
    """`-log softmax` at the label, in nats, `[N]`."""
    loss_N: Tensor = nn.functional.cross_entropy(logit_NC, label_N, reduction="none")
    return loss_N


def normalised(logit_NC: Tensor) -> Tensor:
    """Logits centred on each row's mean and divided by the row's norm, at least 1e-10."""
    centred_NC = logit_NC - logit_NC.mean(dim=-1, keepdim=True)
    norm_N1: Tensor = torch.linalg.vector_norm(centred_NC, dim=-1, keepdim=True)
    return centred_NC / norm_N1.clamp_min(1e-10)


def predictor(model: nn.Module) -> Predict:
    """`predict` of a module in evaluation mode. Weights that it is not given are the module's own."""

    def predict(weights: State, inputs: Tensor) -> Tensor:
        with evaluating(model):
            logit_NC: Tensor = torch.func.functional_call(model, dict(weights), (inputs,))
        return logit_NC

    return predict


def worst_case_sharpness(
    predict: Predict,
    weights: State,
    batches: Iterable[Batch],
    attack: Attack,
    names: Sequence[str] | None = None,
    loss: Loss = cross_entropy,
) -> Sharpness:
    """The largest rise of a batch's mean loss that a change of the weights inside the ball makes, for each batch on its own.

    Args:
        predict: the network as a function of its weights.
        weights: where to look; not changed.
        batches: at least one.
        attack: the ball and the ascent.
        names: the weights that may move, e.g. one layer's; all floating-point ones by default. The l2 norms cover these alone.
        loss: of an example; errors are counted by the highest logit.

    Raises DataError if there is no batch, or a name is not among the weights.
    """
    chosen = [name for name, tensor in weights.items() if tensor.is_floating_point()] if names is None else list(names)
    if missing := [name for name in chosen if name not in weights] or ([] if chosen else ["(none)"]):
        raise DataError.at("There are no such weights", "names", missing[:5], f"some of {list(weights)[:5]}…")
    risen = [_attack_batch(_Objective(predict, weights, chosen, batch, attack.normalise, loss), attack) for batch in batches]
    if not risen:
        raise DataError.at("Sharpness needs data", "batches", 0, "at least one batch")
    rise_B, error_B = torch.tensor(risen, dtype=torch.float64).T
    return Sharpness(rise_B, error_B)


def checkpoints(steps: int) -> list[int]:
    """The steps at which Auto-PGD looks back, increasing, up to `steps`: shares 0.22, then gaps that shrink by 0.03 down to 0.06."""
    shares = [0.0, 0.22]
    while shares[-1] < 1:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    # The sums are those of floating point, as in the published code: 0.22 + 0.19 + 0.16 + 0.13 lies a bit above 0.7, and of 20 steps gives 15.
    found = [math.ceil(share * steps) for share in shares[1:]]
    return sorted({step for step in found if step <= steps})


# ---------------------------------------------------------------- the ball


def towards(gradient_P: Tensor, scale_P: Tensor, attack: Attack) -> Tensor:
    """The direction of a step, `[P]`: signs (linf) or the gradient at unit norm (l2), in units of `scale_P`."""
    if attack.norm == "linf":
        return gradient_P.sign() * scale_P
    norm: Tensor = torch.linalg.vector_norm(gradient_P)
    return gradient_P / (norm + TINY) * scale_P


def onto_ball(change_P: Tensor, scale_P: Tensor, attack: Attack) -> Tensor:
    """The nearest point of the ball, `[P]`. `scale_P` >= 0 is the weights' magnitude if the ball is adaptive, else ones."""
    if attack.norm == "linf":
        return torch.clamp(change_P, -attack.rho * scale_P, attack.rho * scale_P)
    if not attack.adaptive:
        norm = torch.linalg.vector_norm(change_P)
        return change_P * (attack.rho / norm) if norm > attack.rho else change_P
    return onto_ellipsoid(change_P, scale_P, attack.rho)


def onto_ellipsoid(point_P: Tensor, axis_P: Tensor, rho: float) -> Tensor:
    """The nearest point of `sum (x / axis)^2 <= rho^2`, by bisection on the multiplier; coordinates with a zero axis are 0.

    With multiplier m the solution is `x = point * axis^2 / (axis^2 + m)`, whose length falls as m rises.
    """
    inside_P = torch.where(axis_P > 0, point_P, 0.0)
    square_P = torch.where(axis_P > 0, axis_P, 1.0).square()
    relative_P = inside_P * square_P.sqrt()

    def length(multiplier: float) -> float:
        return float(torch.linalg.vector_norm(relative_P / (square_P + multiplier)))

    if length(0.0) <= rho:
        return inside_P
    if rho == 0:
        return torch.zeros_like(point_P)
    low, high = 0.0, float(torch.linalg.vector_norm(relative_P)) / rho  # length(m) < |relative| / m
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if length(middle) > rho else (low, middle)
        if high - low <= 1e-12 * high:
            break
    return inside_P * square_P / (square_P + high)


# ---------------------------------------------------------------- the ascent


class _Seen(NamedTuple):
    """A point that was evaluated: weights `[P]`, mean loss, error, and the loss's gradient `[P]`."""

    weight_P: Tensor
    loss: float
    error: float
    gradient_P: Tensor


class _Objective:
    """The mean loss of one batch as a function of the attacked weights as one vector."""

    def __init__(self, predict: Predict, weights: State, names: Sequence[str], batch: Batch, normalise: bool, loss: Loss) -> None:
        self.predict, self.weights, self.names, self.batch, self.loss = predict, weights, names, batch, loss
        self.transform = normalised if normalise else (lambda logit_NC: logit_NC)

    def start(self) -> Tensor:
        return torch.cat([self.weights[name].detach().reshape(-1) for name in self.names])

    def at(self, weight_P: Tensor) -> _Seen:
        inputs, label_N = self.batch
        free_P = weight_P.detach().requires_grad_()
        with torch.enable_grad():
            logit_NC = self.predict({**self.weights, **self._split(free_P)}, inputs)
            loss = self.loss(self.transform(logit_NC), label_N).mean()
            # A loss that does not see these weights at all has no graph.
            (gradient_P,) = torch.autograd.grad(loss, free_P) if loss.requires_grad else (torch.zeros_like(free_P),)
        error = float((logit_NC.detach().argmax(dim=-1) != label_N).double().mean())
        return _Seen(free_P.detach(), float(loss.detach()), error, gradient_P)

    def _split(self, weight_P: Tensor) -> Mapping[str, Tensor]:
        sizes = [self.weights[name].numel() for name in self.names]
        parts = zip(self.names, torch.split(weight_P, sizes), strict=True)
        return {name: part.view_as(self.weights[name]) for name, part in parts}


def _attack_batch(objective: _Objective, attack: Attack) -> tuple[float, float]:
    """The rise of loss and error of a batch at the worst weights that Auto-PGD meets."""
    theta_P = objective.start()
    scale_P = theta_P.abs() if attack.adaptive else torch.ones_like(theta_P)
    clean = here = best = objective.at(theta_P)
    delta_P = before_P = torch.zeros_like(theta_P)
    size, improvements = 2 * attack.rho, 0
    last, last_best, halved = 0, clean.loss, False
    stops = set(checkpoints(attack.steps))
    for step in range(attack.steps):
        target_P = onto_ball(delta_P + size * towards(here.gradient_P, scale_P, attack), scale_P, attack)
        before_P, delta_P = delta_P, MOMENTUM * target_P + (1 - MOMENTUM) * before_P
        here = objective.at(theta_P + delta_P)
        if here.loss > best.loss:
            best, improvements = here, improvements + 1
        if step in stops:
            stalled = not halved and last_best >= best.loss
            halved = stalled or improvements < IMPROVED * (step - last)
            if halved:
                size, here = size / 2, best
            last, last_best, improvements = step, best.loss, 0
    return best.loss - clean.loss, best.error - clean.error
