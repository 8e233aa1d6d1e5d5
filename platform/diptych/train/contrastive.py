"""The default training task: encode both sides of a batch, compare them through an objective.

Shape legend: N pairs on this rank, D feature width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diptych.core.errors import ConfigError
from diptych.core.points import Encoded, Objective, Tower, Wants

MAX_LOG_SCALE = math.log(100)
INPUTS: dict[Tower, str] = {"image": "image_NCHW", "text": "text_NL"}
Batch = Mapping[str, Tensor]


class Contrastive:
    """Contrastive training of a dual encoder (`models.clip.DualEncoder`) with any `Objective`.

    With `accumulate > 1` a batch is encoded in that many micro-batches of which only the features are kept; the loss sees all
    features, and the backward encodes each micro-batch again to carry its features' gradient into the weights. That is
    GradCache (Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup"), here
    written as activation checkpointing of the encoder: loss and gradients are those of the undivided batch, memory that of
    a micro-batch, and one more forward pass its price. Dropout repeats its draws; batch norms would see each micro-batch twice.

    Args:
        model: has `encode_image`, `encode_text` and the parameter `logit_scale`, a logarithm.
        objective: maps `Encoded` to `{"loss": …}`; its `encodes` names the towers whose features it wants (`core.points.Wants`).
        accumulate: micro-batches; must divide the batch of a rank.
        precision: `"bf16"` encodes under autocast. Features and loss have float32 at least, either way.
    """

    def __init__(self, model: nn.Module, objective: Objective, accumulate: int = 1, precision: str = "fp32") -> None:
        self.model, self.objective, self.accumulate, self.precision = model, objective, accumulate, precision
        self.towers = Wants.of(objective).encodes
        if accumulate > 1 and getattr(objective, "whole_batch", False):
            fix = "set accumulate: 1, and a smaller batch_size if memory is short"
            raise ConfigError.at("The objective needs the whole batch at once", "accumulate", accumulate, "1", fix)
        self.step = 0
        self.features: dict[Tower, Tensor] = {}
        """Of the batch at hand `[N, D]`, by tower, without gradient: what the loop watches."""

    def losses(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """`loss` and the objective's named parts, scalars of this rank."""
        return self.objective(self._encoded(batch, step))

    @property
    def can_sample(self) -> bool:
        """Whether the objective knows its loss against labels sampled from the model."""
        return hasattr(self.objective, "sampled_loss")

    def sampled_loss(self, batch: Batch, step: int, generator: torch.Generator) -> tuple[Tensor, int]:
        """The objective's loss against labels sampled from the model, and the number of softmaxes, over all ranks, that it averages."""
        objective: Any = self.objective
        loss, softmaxes = objective.sampled_loss(self._encoded(batch, step), generator)
        return loss, softmaxes

    def encode_image(self, image_NCHW: Tensor, normalize: bool = True) -> Tensor:
        """Features of pictures that the objective brings: in this task's precision and micro-batches."""
        return self._encode_all({"image": image_NCHW}, normalize)[0]

    def encode_text(self, text_NL: Tensor, normalize: bool = True) -> Tensor:
        """Features of captions that the objective brings, likewise."""
        return self._encode_all({"text": text_NL}, normalize)[0]

    @torch.no_grad()
    def after_step(self) -> None:
        """Keeps the logit scale between 1 and 100, on the parameter, since a clamp in the graph would stop its gradient. Then the
        objective's own `after_step`, if it has one.
        """
        logit_scale: Any = self.model.logit_scale
        logit_scale.clamp_(0.0, MAX_LOG_SCALE)
        hook = getattr(self.objective, "after_step", None)
        if hook is not None:
            hook(self.step + 1, self.model)

    def _encoded(self, batch: Batch, step: int) -> Encoded:
        """What the objective sees of a batch."""
        self.step = step
        inputs = {tower: batch[INPUTS[tower]] for tower in self.towers}
        features = dict(zip(inputs, self._encode_all(inputs), strict=True))
        self.features = {tower: feature_ND.detach() for tower, feature_ND in features.items()}
        image_ND, text_ND = (features.get(tower, torch.empty(0, 0)) for tower in INPUTS)
        logit_scale: Any = self.model.logit_scale
        return Encoded(image_ND, text_ND, logit_scale.exp(), batch, self.model, step, self)

    def _encode_all(self, inputs: Mapping[Tower, Tensor], normalize: bool = True) -> list[Tensor]:
        """The features of each input, in micro-batches."""
        if not inputs:
            return []
        if self.accumulate == 1:
            return self._encode(inputs, normalize)
        parts = zip(*(tensor.chunk(self.accumulate) for tensor in inputs.values()), strict=True)
        features = [checkpoint(self._encode, dict(zip(inputs, part, strict=True)), normalize, use_reentrant=False) for part in parts]
        return [torch.cat(feature) for feature in zip(*features, strict=True)]

    def arithmetic(self, device: torch.device) -> torch.autocast:
        """The precision of the encoders, for what an objective runs itself."""
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")

    def _encode(self, inputs: Mapping[Tower, Tensor], normalize: bool) -> list[Tensor]:
        model: Any = self.model
        encode = {"image": model.encode_image, "text": model.encode_text}
        device = next(iter(inputs.values())).device
        with self.arithmetic(device):
            features = [encode[tower](tensor, normalize=normalize) for tower, tensor in inputs.items()]
        return [_at_least_float32(feature_ND) for feature_ND in features]


def _at_least_float32(feature_ND: Tensor) -> Tensor:
    return feature_ND.to(torch.promote_types(feature_ND.dtype, torch.float32))
