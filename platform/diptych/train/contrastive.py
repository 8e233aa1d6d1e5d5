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

from diptych.core.points import Encoded, Objective

MAX_LOG_SCALE = math.log(100)
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
        objective: maps `Encoded` to `{"loss": …}`.
        accumulate: micro-batches; must divide the batch of a rank.
        precision: `"bf16"` encodes under autocast. Features and loss have float32 at least, either way.
    """

    def __init__(self, model: nn.Module, objective: Objective, accumulate: int = 1, precision: str = "fp32") -> None:
        self.model, self.objective, self.accumulate, self.precision = model, objective, accumulate, precision

    def losses(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """`loss` and the objective's named parts, scalars of this rank."""
        if self.accumulate == 1:
            image_ND, text_ND = self._encode(batch["image_NCHW"], batch["text_NL"])
        else:
            image_ND, text_ND = self._encode_in_parts(batch["image_NCHW"], batch["text_NL"])
        logit_scale: Any = self.model.logit_scale
        return self.objective(Encoded(image_ND, text_ND, logit_scale.exp(), batch, self.model, step))

    @torch.no_grad()
    def after_step(self) -> None:
        """Keeps the logit scale between 1 and 100. On the parameter, since a clamp in the graph would stop its gradient."""
        logit_scale: Any = self.model.logit_scale
        logit_scale.clamp_(0.0, MAX_LOG_SCALE)

    def _encode(self, image_NCHW: Tensor, text_NL: Tensor) -> tuple[Tensor, Tensor]:
        model: Any = self.model
        with torch.autocast(image_NCHW.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
            image_ND, text_ND = model.encode_image(image_NCHW), model.encode_text(text_NL)
        return _at_least_float32(image_ND), _at_least_float32(text_ND)

    def _encode_in_parts(self, image_NCHW: Tensor, text_NL: Tensor) -> tuple[Tensor, Tensor]:
        parts = zip(image_NCHW.chunk(self.accumulate), text_NL.chunk(self.accumulate), strict=True)
        features = [checkpoint(self._encode, image, text, use_reentrant=False) for image, text in parts]
        return torch.cat([image_ND for image_ND, _ in features]), torch.cat([text_ND for _, text_ND in features])


def _at_least_float32(feature_ND: Tensor) -> Tensor:
    return feature_ND.to(torch.promote_types(feature_ND.dtype, torch.float32))
