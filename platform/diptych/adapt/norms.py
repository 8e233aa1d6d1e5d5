"""Batch-norm statistics of a network whose weights were edited: the old ones describe activations that no longer occur.

Source: Izmailov et al., Averaging Weights Leads to Wider Optima (UAI 2018), section 3.2; Cai et al., Robust Weight Signatures (ICML 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from diptych.adapt.states import evaluating
from diptych.core.errors import DataError


def tracked(model: nn.Module) -> list[_BatchNorm]:
    """The batch-norm layers that keep running statistics."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm) and module.running_mean is not None]


@torch.no_grad()
def recompute(model: nn.Module, batches: Iterable[Tensor], forward: Callable[[Tensor], object] | None = None, share: float = 1.0) -> None:
    """Running statistics as one cumulative average over `batches` (a batch of b after n examples counts b / (n + b)), in place.

    Args:
        model: any module; `num_batches_tracked` and the mode of its modules stay.
        batches: inputs of `forward`, examples along the first dimension.
        forward: by default the model itself.
        share: in [0, 1]; below 1 the result is `(1 - share) * old + share * recomputed`.

    Raises DataError if the model has batch norms and there is no batch.
    """
    layers = tracked(model)
    if not layers or share == 0:
        return
    before = [{name: buffer.clone() for name, buffer in layer.named_buffers(recurse=False)} for layer in layers]
    momenta = [layer.momentum for layer in layers]
    with evaluating(model):
        for layer in layers:
            layer.reset_running_stats()
            layer.train()
        seen = _average(layers, batches, forward or model)
    for layer, momentum, old in zip(layers, momenta, before, strict=True):
        layer.momentum = momentum
        _blend(layer, old, share if seen else 0.0)
    if not seen:
        raise DataError.at("Batch-norm statistics cannot be recomputed", "calibration", 0, "at least one batch of pictures")


def _average(layers: Iterable[_BatchNorm], batches: Iterable[Tensor], forward: Callable[[Tensor], object]) -> int:
    seen = 0
    for batch in batches:
        for layer in layers:
            layer.momentum = len(batch) / (seen + len(batch))
        forward(batch)
        seen += len(batch)
    return seen


def _blend(layer: _BatchNorm, old: Mapping[str, Tensor], share: float) -> None:
    for name, buffer in layer.named_buffers(recurse=False):
        if buffer.is_floating_point():
            buffer.mul_(share).add_(old[name], alpha=1 - share)
        else:
            buffer.copy_(old[name])
