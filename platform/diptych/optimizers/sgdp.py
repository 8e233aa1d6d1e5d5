"""The configuration of SGDP: Heo et al., "AdamP" (ICLR 2021), algorithm 1. The optimizer stands beside AdamP, in `adamp.py`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

from pydantic import Field

from diptych.core.config import Config as BaseConfig
from diptych.core.points import Curvature
from diptych.optimizers.adamp import SGDP
from diptych.optimizers.adamw import Beta


class Config(BaseConfig):
    """SGDP; rate, momentum and decay as is usual for SGD, the projection's values the paper's."""

    curvature: ClassVar[Curvature] = "none"

    method: Literal["sgdp"] = "sgdp"
    lr: float = Field(0.1, gt=0, description="peak learning rate, per update")
    momentum: Beta = Field(0.9, description="decay per update of the sum of gradients")
    dampening: float = Field(0.0, ge=0, le=1, description="share of each gradient that does not enter the momentum")
    weight_decay: float = Field(1e-4, ge=0, description="decoupled decay per unit of lr / (1 - momentum), on parameters that decay")
    nesterov: bool = Field(True, description="look one gradient ahead")
    eps: float = Field(1e-8, ge=0, description="added to norms")
    delta: float = Field(0.1, ge=0, description="a weight is scale-invariant if |cos(gradient, weight)| < delta / sqrt(width)")
    wd_ratio: float = Field(0.1, ge=0, le=1, description="factor on the weight decay of weights found scale-invariant")
    alias_buffer: bool = Field(False, description="without nesterov, project the momentum along with the step, as the official code does")

    def build(self, groups: Iterable[dict[str, Any]]) -> SGDP:
        """The optimizer over parameter groups; a group's own values win over the configuration's."""
        return SGDP(list(groups), **self.model_dump(exclude={"method"}))
