"""Re-parameterisation as a compressor: towers of MobileOne and RepMixer blocks become chains of single convolutions.

Vasu et al., "MobileCLIP" (CVPR 2024), section 3.3. Exact in evaluation mode, up to rounding; what was fused can be trained no further as it
was meant to be, so this comes last. The directory is read by Diptych alone: open_clip's configuration cannot say that a tower is fused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, cast

from torch import Tensor, nn

from diptych.core.config import Config as BaseConfig
from diptych.core.errors import ConfigError
from diptych.models.clip import DualEncoder
from diptych.models.reparameterize import fuse_encoder, fusible
from diptych.models.store import MASK


class Config(BaseConfig):
    """Re-parameterisation; there is nothing to choose."""

    method: Literal["reparameterize"] = "reparameterize"

    def build(self) -> Reparameterize:
        """The compressor."""
        return Reparameterize()


class Reparameterize:
    """The compressor. It looks at no data, so calibration batches are not read."""

    def __init__(self) -> None:
        self._figures: dict[str, Any] = {}

    def compress(self, model: nn.Module, calibration: Iterable[Mapping[str, Tensor]]) -> nn.Module:
        """Fuses in place and gives the model back. Raises ConfigError for one with nothing to fuse, or with masks on what would be fused."""
        del calibration
        encoder = cast(DualEncoder, model)
        inside = tuple(f"{name}." for name in fusible(encoder.clip))
        if masks := [name for name, _ in encoder.clip.named_buffers() if name.endswith(MASK) and name.startswith(inside)]:
            raise ConfigError.at(
                "A pruned model cannot be fused: zeros would fill up", "compress", masks[0], "reparameterize before pruning"
            )
        before = _parameters(model)
        fused = fuse_encoder(encoder)
        if not fused:
            got, expected = type(encoder.clip.visual).__name__, "a tower of timm's FastViT or MCi"
            raise ConfigError.at("The model has nothing to fuse", "compress", got, expected)
        self._figures = {"fused": fused, "parameters_before": before, "parameters_after": _parameters(model)}
        return model

    def report(self, model: nn.Module) -> dict[str, Any]:
        """How many modules were fused, and the parameters before and after."""
        del model
        return self._figures


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
