"""Another set of weights for the same function: what a norm gives is scaled channel by channel, and the next matrix takes it back.

Nothing gets smaller. Pruning by magnitude chooses other weights afterwards, pruning by what weights do must not: this is the situation of
language models' outlier features, made on purpose (the experiments of GBLM and DIMAP).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from diptych.compress.blocks import Batch, towers
from diptych.core.chance import generator
from diptych.core.config import Config as BaseConfig
from diptych.core.errors import ConfigError
from diptych.models.structure import parts


class Config(BaseConfig):
    """Rescaling that leaves the function as it is."""

    method: Literal["rescale"] = "rescale"
    spread: float = Field(1.0, ge=0, le=5, description="standard deviation of the factors' logarithm")
    per: Literal["channel", "layer"] = Field(
        "channel", description="one factor for each channel, or one for all channels in front of a matrix"
    )
    towers: Literal["both", "image", "text"] = Field("both", description="which towers are rescaled")
    seed: int = Field(0, ge=0, lt=2**63, description="names the draws")

    def build(self) -> Rescale:
        """The compressor."""
        return Rescale(self)


class Rescale:
    """The compressor, as far as it is one. It looks at no data."""

    def __init__(self, config: Config) -> None:
        self.config = config

    @torch.no_grad()
    def compress(self, model: nn.Module, calibration: Iterable[Batch]) -> nn.Module:
        """Rescales the norms before attention and MLP of every block, in place. Raises ConfigError for blocks of an unknown kind."""
        del calibration
        for tower in towers(model, self.config.towers):
            for name, block in tower.blocks.items():
                found = parts(block, name)
                module, leaf, _ = found.qkv
                for norm, weight in zip(_norms(block, name), (getattr(module, leaf), found.inner.weight), strict=True):
                    draws = generator(self.config.seed, "rescale", f"{name}.{leaf if weight is not found.inner.weight else 'mlp'}")
                    count = weight.shape[1] if self.config.per == "channel" else 1
                    factor_I = torch.from_numpy(draws.standard_normal(count)).mul(self.config.spread).exp().to(weight)
                    norm.weight.mul_(factor_I)
                    norm.bias.mul_(factor_I)
                    weight.div_(factor_I)
        return model


def _norms(block: nn.Module, name: str) -> tuple[nn.LayerNorm, nn.LayerNorm]:
    """The norms before attention and before the MLP: open_clip's names, then timm's."""
    for first, second in (("ln_1", "ln_2"), ("norm1", "norm2")):
        norms = getattr(block, first, None), getattr(block, second, None)
        if all(isinstance(norm, nn.LayerNorm) and isinstance(norm.bias, Tensor) for norm in norms):
            return norms  # type: ignore[return-value]
    raise ConfigError.at("This block's norms are not known", name, type(block).__name__, "open_clip's own or timm's plain blocks")
