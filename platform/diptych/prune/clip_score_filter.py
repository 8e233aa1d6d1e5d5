"""The CLIP-score filter: pairs whose picture and caption a model finds alike.

Source: Schuhmann et al., LAION-400M (2021), a threshold; Gadre et al., DataComp (NeurIPS 2023), section 4.2, the best share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import polars as pl
from pydantic import Field, field_validator

from diptych.core.errors import DataError
from diptych.core.points import Fold, Need, PairMethod, Verdict
from diptych.prune import scores

REASON, MISSING = "low CLIP score", "no CLIP score"
COLUMN = "meta.clip_score"


class Config(scores.Cut):
    """A threshold of the cosine (LAION: 0.3 for ViT-B/32) or the share of the pairs that stays (DataComp: 0.3)."""

    method: Literal["clip-score-filter"] = "clip-score-filter"
    features: str = Field(
        "scout", min_length=1, description="the model: `scout` (the run's own, trained briefly), or an open_clip model by name or directory"
    )

    @field_validator("features")
    @classmethod
    def _has_words(cls, features: str) -> str:
        if features == "pixels":
            raise ValueError("a model with a text tower; pixels know no words")
        return features

    def build(self, seed: int) -> ClipScoreFilter:
        """The method; nothing is drawn."""
        del seed
        return ClipScoreFilter(self)


@dataclass(frozen=True)
class ClipScoreFilter(PairMethod):
    """Keeps pairs by the cosine of the picture and the pair's first caption; it stands in the column `meta.clip_score` of those kept."""

    config: Config
    needs = frozenset[Need]({"captions", "features", "text features"})

    def folds(self) -> Sequence[Fold]:
        """None for a threshold; for a share two, which find it."""
        return scores.folds(self.config, cosine, -1.0, 1.0)

    def state_bytes(self, rows: int, width: int) -> int:
        """Most memory of the state: two histograms."""
        del rows, width
        return 0 if self.config.keep is None else 16 * (scores.BINS + 1)

    def apply(self, batch: pl.DataFrame, state: scores.Bin | None) -> Verdict:
        """The verdict on a batch; a rejected pair's score is its cosine."""
        return scores.verdict(batch, cosine(batch), scores.threshold_of(self.config, state), REASON, MISSING, COLUMN)

    def report(self, state: scores.Bin | None) -> Mapping[str, Any]:
        """The threshold, and how it was found."""
        return scores.figures(self.config, state)


def cosine(batch: pl.DataFrame) -> scores.Floats:
    """The cosine `[N]` of `feature` and `text_feature`; NaN where a pair has no caption. Raises DataError without the two columns."""
    kinds = [batch.schema.get(name) for name in ("feature", "text_feature")]
    if not all(isinstance(kind, pl.Array) for kind in kinds):
        raise DataError.at("The batch has no features", "feature, text_feature", kinds, "two columns Array(Float32, D)")
    if batch.is_empty():
        return np.empty(0)
    image_ND, text_ND = (batch[name].to_numpy().astype(np.float64) for name in ("feature", "text_feature"))
    if image_ND.shape != text_ND.shape:
        raise DataError.at(
            "Picture and text features differ in width", "feature, text_feature", [image_ND.shape, text_ND.shape], "one model"
        )
    return np.where((text_ND == 0).all(axis=1), np.nan, np.einsum("nd,nd->n", image_ND, text_ND))
