"""One outer iteration of trajectory matching: train on synthetic pictures with the graph kept, compare with where an expert went.

Source: Shen et al., Efficient Dataset Distillation through Alignment with Smooth and High-Quality Expert Trajectories (2023), section 3.3.

Shape legend: N synthetic pictures, C channels, H x W pixels, P parameters, M expert epochs to match, T inner steps, B pictures of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from diptych.models import convnet
from diptych.models.trajectories import Augment

Middle = Literal["none", "equal", "rising"]
BALANCE_BASE, BALANCE_SHIFT = 5, 8


def balance_factor(start: int, max_start: int) -> float:
    """What the inner loss is multiplied with when it starts at an expert's epoch `start` of those below `max_start`.

    Below 1 for early starts, above 1 for late ones; it jumps from 0.73 to 1.29 at the middle.
    """
    half = max_start // 2
    if start >= half:
        return math.log(start - half + BALANCE_SHIFT, BALANCE_BASE)
    return 1 / math.log(half - start + BALANCE_SHIFT, BALANCE_BASE)


def match_steps(steps: int, epochs: int, middle: Middle) -> list[int]:
    """After how many inner steps parameters are compared, the end last. `T // M` is floored: 7 steps, 3 epochs give 2, 4, 7."""
    return [*(index * (steps // epochs) for index in range(1, epochs) if middle != "none"), steps]


def perturbed(net: nn.Module, start_P: torch.Tensor, noise_P: torch.Tensor, alpha: float = 1.0) -> torch.Tensor:
    """The start `[P]` with every convolution's weight W moved by `alpha * D * W`, D the noise over its own Frobenius norm."""
    changed = []
    for weight, noise in zip(convnet.named(net, start_P).values(), convnet.named(net, noise_P).values(), strict=True):
        moved = weight + alpha * (noise / noise.norm()) * weight if weight.ndim == 4 else weight
        changed.append(moved.reshape(-1))
    return torch.cat(changed)


def chunks(orders: Iterator[torch.Tensor], batch_size: int) -> Iterator[torch.Tensor]:
    """Rows of every inner batch: an order of all pictures is cut into chunks, which are taken from its end; then comes the next order."""
    for order_N in orders:
        yield from reversed(torch.split(order_N, batch_size))


@dataclass(frozen=True)
class Matched:
    """What came of an iteration; gradients can be taken of `loss`.

    Attributes:
        loss: the sum of `end` and the weighted `middle`.
        end: squared distance of the last parameters to the target over that of the start.
        middle: the same at the steps between.
        final_P: the parameters after the last step.
        cross_entropy_T: of every inner step, before it was balanced.
    """

    loss: torch.Tensor
    end: torch.Tensor
    middle: tuple[torch.Tensor, ...]
    final_P: torch.Tensor
    cross_entropy_T: torch.Tensor


def matched(
    net: nn.Module,
    image_NCHW: torch.Tensor,
    label_N: torch.Tensor,
    lr: torch.Tensor,
    start_P: torch.Tensor,
    targets_MP: torch.Tensor,
    batches: Sequence[torch.Tensor],
    *,
    momentum: float = 0.9,
    factor: float = 1.0,
    middle: Middle = "equal",
    augment: Augment | None = None,
) -> Matched:
    """Trains on synthetic pictures from `start_P` and measures the distance to an expert. Memory grows with `T * P`: the graph is whole.

    Args:
        net: the network, of the pictures' dtype; its own parameters are not used.
        image_NCHW, label_N: the synthetic pictures and their classes.
        lr: scalar, the inner learning rate; like the pictures it may require a gradient.
        start_P: where the inner training starts, perturbed or not; the distances are over those from here.
        targets_MP: the expert's parameters one, two, … M epochs after the start.
        batches: the pictures of each of the T steps.
        momentum, factor: of the inner updates and of the inner loss; no weight decay.
        middle: compare at the steps between as well, each with weight 1 (`equal`) or with i / M (`rising`).
        augment: changes a batch before the inner loss.
    """
    epochs = len(targets_MP)
    theta_P, velocity_P = start_P.detach().requires_grad_(True), None
    steps = match_steps(len(batches), epochs, middle)
    ratios, losses = [], []
    for step, row_B in enumerate(batches, start=1):
        batch_NCHW = image_NCHW[row_B]
        seen_NCHW = batch_NCHW if augment is None else augment(batch_NCHW)
        entropy = cross_entropy(convnet.run(net, theta_P, seen_NCHW), label_N[row_B])
        losses.append(entropy.detach())
        (slope_P,) = torch.autograd.grad(factor * entropy, theta_P, create_graph=True)
        velocity_P = slope_P if velocity_P is None else momentum * velocity_P + slope_P
        theta_P = theta_P - lr * velocity_P
        ratios += [_ratio(theta_P, targets_MP[place], start_P) for place in _places(step, steps, epochs)]
    *between, end = ratios
    weights = [1.0 if middle == "equal" else index / epochs for index in range(1, len(between) + 1)]
    loss = end + sum((weight * ratio for weight, ratio in zip(weights, between, strict=True)), start=end.new_zeros(()))
    return Matched(loss, end, tuple(between), theta_P, torch.stack(losses))


def _places(step: int, steps: Sequence[int], epochs: int) -> list[int]:
    """The targets that belong to a step: those between in their order, the last one to the last step."""
    between = [place for place, when in enumerate(steps[:-1]) if when == step]
    return [*between, epochs - 1] if step == steps[-1] else between


def _ratio(theta_P: torch.Tensor, target_P: torch.Tensor, start_P: torch.Tensor) -> torch.Tensor:
    return ((theta_P - target_P) ** 2).sum() / ((start_P - target_P) ** 2).sum()
