"""Small heads that training alone uses: linear layers with batch norms over the pairs of all ranks.

Shape legend: n rows on this rank, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from diptych.objectives.gather import gather, world_size


class GlobalBatchNorm(nn.BatchNorm1d):
    """`nn.BatchNorm1d` whose mean and variance are those of the rows of all ranks, as if they were on one.

    Every rank must call it equally often with equally many rows. The variance is taken about the common mean, so that nothing cancels.
    """

    def forward(self, input: Tensor) -> Tensor:
        """`[n, C]`, normalised; in evaluation by the running statistics."""
        x_nC = input
        if not self.training:
            return super().forward(x_nC)
        mean_C = gather(x_nC.mean(dim=0, keepdim=True), with_grad=True).mean(dim=0)
        apart_nC = x_nC - mean_C
        variance_C = gather(apart_nC.square().mean(dim=0, keepdim=True), with_grad=True).mean(dim=0)
        self._remember(mean_C.detach(), variance_C.detach(), len(x_nC) * world_size())
        y_nC = apart_nC / (variance_C + self.eps).sqrt()
        return y_nC * self.weight + self.bias if self.affine else y_nC

    @torch.no_grad()
    def _remember(self, mean_C: Tensor, variance_C: Tensor, rows: int) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean_C.to(self.running_mean), self.momentum)
        self.running_var.lerp_((variance_C * rows / max(1, rows - 1)).to(self.running_var), self.momentum)


def mlp(widths: Sequence[int], *, last_norm: bool = False, last_affine: bool = True, bias: bool = True) -> nn.Sequential:
    """Linear layers of these widths, the first being the input's; a batch norm and a ReLU between two of them.

    `last_norm` puts a batch norm behind the last one, with its own gains and offsets if `last_affine`.
    """
    layers: list[nn.Module] = []
    for index, (inputs, outputs) in enumerate(pairwise(widths), start=1):
        last = index == len(widths) - 1
        layers.append(nn.Linear(inputs, outputs, bias=bias or (last and not last_norm)))
        if not last:
            layers += [GlobalBatchNorm(outputs), nn.ReLU()]
        elif last_norm:
            layers.append(GlobalBatchNorm(outputs, affine=last_affine))
    return nn.Sequential(*layers)


def cosine_regression(predicted_nC: Tensor, target_nC: Tensor) -> Tensor:
    """`2 - 2 cos`, the mean over the rows: the loss of BYOL (Grill et al. 2020, equation 2). No gradient reaches the targets."""
    return 2 - 2 * (normalize(predicted_nC, dim=-1) * normalize(target_nC.detach(), dim=-1)).sum(dim=-1).mean()


@torch.no_grad()
def follow(average: nn.Module, module: nn.Module, momentum: float) -> None:
    """Moves the parameters of a running average: `momentum * average + (1 - momentum) * module`. Buffers stay as they are."""
    torch._foreach_lerp_(list(average.parameters()), [each.detach() for each in module.parameters()], 1 - momentum)
