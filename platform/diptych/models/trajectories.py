"""Trainings of a small classifier whose parameters are kept after every epoch: the experts of trajectory matching.

Two ways to smooth a training (AST): early losses are scaled down, and the slope of the logits in the pixels is drawn towards one.

Source: Shen et al., Efficient Dataset Distillation through Alignment with Smooth and High-Quality Expert Trajectories (2023), section 3.2.

Shape legend: N pictures, C channels, H x W pixels, E epochs, P parameters, B pictures of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import nn
from torch.nn.functional import cross_entropy

from diptych.core.config import Config
from diptych.models.convnet import flatten

CLIPPED_EPOCHS = 10

Batches = Callable[[int], Sequence[torch.Tensor]]
"""`epoch -> rows of every batch`, int64 `[B]` each."""
Augment = Callable[[torch.Tensor], torch.Tensor]


class ExpertConfig(Config):
    """How an expert is trained: SGD whose learning rate falls once, just behind the middle."""

    lr: float = Field(0.01, gt=0, description="learning rate of the first half")
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum of SGD")
    weight_decay: float = Field(1e-3, ge=0, description="weight decay of SGD")
    batch_size: int = Field(256, ge=1, description="pictures an update")
    epochs: int = Field(50, ge=2, description="passes over the pictures")
    decay: float = Field(
        0.6, gt=0, le=1, description="factor of the learning rate after the epoch `epochs // 2 + 1`, where momentum starts anew; 1: neither"
    )
    clipping: bool = Field(True, description="scale the loss by 0.5, 0.55, …, 0.95 in the first ten epochs (the paper's clipping loss)")
    gradient_penalty: float = Field(
        2.0,
        ge=0,
        description="weight of the penalty on the logits' slope in the pixels; 0: none. On tiny networks it lengthens trajectories",
    )

    @property
    def factors(self) -> list[float]:
        """What the loss is multiplied with, an epoch."""
        return [clipping_factor(epoch) if self.clipping else 1.0 for epoch in range(self.epochs)]


def clipping_factor(epoch: int) -> float:
    """The clipping loss's factor: from 0.5 by 0.05 an epoch to 0.95 in the tenth, then 1."""
    return 0.5 + 0.05 * epoch if epoch < CLIPPED_EPOCHS else 1.0


def gradient_penalty(net: nn.Module, image_NCHW: torch.Tensor) -> torch.Tensor:
    """Mean over pictures and pixels of `(||G||_2 - 1)^2`, G the slope of the sum of all logits, its norm over the channels alone.

    The graph is kept, so that the penalty trains the network. Unlike in WGAN-GP the norm is a pixel's and not the picture's.
    """
    pixels_NCHW = image_NCHW.detach().requires_grad_(True)
    (slope_NCHW,) = torch.autograd.grad(net(pixels_NCHW).sum(), pixels_NCHW, create_graph=True)
    return torch.square(torch.linalg.vector_norm(slope_NCHW, dim=1) - 1).mean()


@dataclass(frozen=True)
class Trajectory:
    """Parameters `[E + 1, P]` before the training and after every epoch, and the mean loss `[E]` of every epoch, penalty included."""

    flat_EP: torch.Tensor
    loss_E: torch.Tensor


def record(
    net: nn.Module,
    image_NCHW: torch.Tensor,
    label_N: torch.Tensor,
    batches: Batches,
    config: ExpertConfig,
    augment: Augment | None = None,
    factors: Sequence[float] | None = None,
) -> Trajectory:
    """Trains `net` in place and keeps its parameters after every epoch.

    After the epoch `E // 2 + 1`, counted from 0, the learning rate falls and the optimizer starts anew without its momentum, unless `decay`
    is 1. The penalty is taken on the pictures as they are, also when the loss's are augmented.

    Args:
        net: a classifier of the pictures' dtype.
        image_NCHW, label_N: normalised pictures, and their classes as int64.
        batches: the rows of every batch of an epoch.
        config: how to train.
        augment: changes a batch of pictures before the loss.
        factors: what the loss is multiplied with, an epoch; by default the configuration's.
    """
    factor_E = config.factors if factors is None else list(factors)
    assert len(factor_E) == config.epochs, "a factor an epoch"
    lr = config.lr
    optimizer = _sgd(net, lr, config)
    snapshots, losses = [flatten(net)], []
    for epoch, factor in enumerate(factor_E):
        total, count = 0.0, 0
        for row_B in batches(epoch):
            batch_NCHW = image_NCHW[row_B]
            seen_NCHW = batch_NCHW if augment is None else augment(batch_NCHW)
            loss = factor * cross_entropy(net(seen_NCHW), label_N[row_B])
            if config.gradient_penalty:
                loss = loss + config.gradient_penalty * gradient_penalty(net, batch_NCHW)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total, count = total + loss.item() * len(row_B), count + len(row_B)
        losses.append(total / max(1, count))
        snapshots.append(flatten(net))
        if config.decay < 1 and epoch == config.epochs // 2 + 1:
            lr *= config.decay
            optimizer = _sgd(net, lr, config)
    return Trajectory(torch.stack(snapshots), torch.tensor(losses, dtype=torch.float64))


def movement(flat_EP: torch.Tensor, epochs: int = 4) -> float:
    """Mean length of the parameters' step an epoch, over the first `epochs`: the shorter, the smoother."""
    return float((flat_EP[1:] - flat_EP[:-1])[:epochs].norm(dim=1).mean())


def _sgd(net: nn.Module, lr: float, config: ExpertConfig) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=lr, momentum=config.momentum, weight_decay=config.weight_decay)
