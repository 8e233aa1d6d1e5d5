"""The small convolutional classifier of data-set distillation, run with its parameters as one flat vector.

Its weights are an argument and not its state, so that a whole training can be differentiated (`torch.func.functional_call`).

Source: Zhao et al., Dataset Condensation with Gradient Matching (ICLR 2021), section 4; Cazenavette et al., Dataset Distillation by
Matching Training Trajectories (CVPR 2022).

Shape legend: N pictures, C channels, H x W pixels, K classes, P parameters.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import nn


class NetShape(NamedTuple):
    """What a network is built from: channels and side (pixels) of its pictures, classes, filters a block, and blocks."""

    channels: int
    classes: int
    width: int = 128
    depth: int = 3
    size: int = 32


class ConvNet(nn.Module):
    """Blocks of convolution 3 x 3, instance norm with gains and biases, ReLU and average pooling by 2; then one linear layer.

    The first convolution of grey pictures has a padding of 3 instead of 1, as in the published networks.
    """

    def __init__(self, shape: NetShape) -> None:
        super().__init__()
        self.shape = shape
        layers: list[nn.Module] = []
        channels, side = shape.channels, shape.size
        for block in range(shape.depth):
            padding = 3 if shape.channels == 1 and block == 0 else 1
            layers += [
                nn.Conv2d(channels, shape.width, 3, padding=padding),
                nn.GroupNorm(shape.width, shape.width, affine=True),
                nn.ReLU(),
                nn.AvgPool2d(2),
            ]
            channels, side = shape.width, (side + 2 * (padding - 1)) // 2
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels * side * side, shape.classes)

    def forward(self, image_NCHW: torch.Tensor) -> torch.Tensor:
        """Logits `[N, K]`."""
        return cast(torch.Tensor, self.classifier(self.features(image_NCHW).flatten(1)))


def create(shape: NetShape, seed: int) -> ConvNet:
    """A network with torch's initial weights, drawn from `seed`; no global state changes."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return ConvNet(shape)


def flatten(net: nn.Module) -> torch.Tensor:
    """A copy of all parameters as one vector `[P]`, in the module's order. It never shares memory with the network."""
    return torch.cat([parameter.detach().reshape(-1) for parameter in net.parameters()])


def named(net: nn.Module, flat_P: torch.Tensor) -> dict[str, torch.Tensor]:
    """The parts of a flat vector by parameter name, as views."""
    shapes = {name: parameter.shape for name, parameter in net.named_parameters()}
    parts = torch.split(flat_P, [shape.numel() for shape in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def run(net: nn.Module, flat_P: torch.Tensor, image_NCHW: torch.Tensor) -> torch.Tensor:
    """Logits `[N, K]` of the network with the parameters `flat_P`; differentiable in both, any number of times."""
    return cast(torch.Tensor, torch.func.functional_call(net, named(net, flat_P), (image_NCHW,)))
