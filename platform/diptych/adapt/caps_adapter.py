"""CapS-Adapter: pictures and their captions as keys of a training-free cache; affinities of both kinds are mixed before the exponential.

`logits = scale q T + alpha exp(-beta (1 - A)) V - gamma Ktilde V` with `A = (1 - delta) q K_img + delta q K_cap`; gamma = 0 is the fast variant
(the authors' M-Adapter-F). The support is made by `caption_support.py`.
Source: Wang et al., CapS-Adapter: Caption-based MultiModal Adapter in Zero-Shot Classification (ACM MM 2024).
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from diptych.adapt.cache import Chosen
from diptych.adapt.sus_x import Grids, SusX, TipXConfig

Share = Annotated[float, Field(ge=0, le=1)]


class Config(TipXConfig):
    """CapS-Adapter. The authors' grids, with eleven deltas, make 2.2 million points."""

    method: Literal["caps-adapter"] = "caps-adapter"
    delta: float = Field(0.5, ge=0, le=1, description="share of the caption keys in the affinities, where nothing is searched")
    deltas: tuple[Share, ...] = Field(
        (0.0, 0.2, 0.4, 0.6, 0.8, 1.0), min_length=1, description="values of delta to try; the authors take 0, 0.1, … 1"
    )
    fast: bool = Field(False, description="leave the inter-modal term out: gamma is 0")
    block: int = Field(8192, ge=1, description="queries whose divergences are rescaled together; some 60 bytes of memory a query and key")

    def build(self) -> CapsAdapter:
        """The adapter, not yet fitted."""
        return CapsAdapter(self)

    @property
    def inter(self) -> bool:
        """Whether there is an inter-modal term: not in the fast variant."""
        return not self.fast

    def grids(self) -> Grids:
        """The values to try."""
        gammas = np.zeros(1) if self.fast else self.gammas.values()
        return super().grids()._replace(deltas=np.array(self.deltas), gammas=gammas)

    def defaults(self) -> Chosen:
        """The hyper-parameters where nothing is searched."""
        return Chosen(self.alpha, self.beta, 0.0 if self.fast else self.gamma, self.delta)


class CapsAdapter(SusX):
    """SuS-X with two keys a picture, of its image and of its caption. `fast`: a prediction does not depend on its neighbours."""

    needs = frozenset({"labelled", "captions"})
    method = "caps-adapter"
