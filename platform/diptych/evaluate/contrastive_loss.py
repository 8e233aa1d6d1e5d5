"""The contrastive loss on pairs that were not trained on: the figure in which small changes of a model show first.

Source: Radford et al., Learning Transferable Visual Models From Natural Language Supervision (ICML 2021), figure 3.

Shape legend: N pairs, D feature width, B pairs that are compared with each other.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field

from diptych.core.chance import key_hashes
from diptych.core.config import Config as BaseConfig
from diptych.core.points import Encoder, Metric
from diptych.evaluate.rows import Rows, of_split, preprocessing

TASK = "contrastive-loss"


class Config(BaseConfig):
    """The contrastive loss of a split."""

    method: Literal["contrastive-loss"] = "contrastive-loss"
    split: str = Field("test", min_length=1, description="the split")
    batch: int = Field(
        64, ge=2, description="pairs that are compared with each other, put together by key hash; the last batches may be larger"
    )

    def build(self) -> ContrastiveLoss:
        """The benchmark."""
        return ContrastiveLoss(self)


def losses(image_ND: NDArray[np.float32], text_ND: NDArray[np.float32], scale: float, batch: int) -> NDArray[np.float64]:
    """Each pair's mean of both directions' cross-entropy, in nats, float64 `[N]`.

    Args:
        image_ND, text_ND: of unit norm; rows are partners.
        scale: the factor of the cosine.
        batch: B; N pairs are cut into `max(1, N // B)` batches of almost equal size.
    """
    parts = np.array_split(np.arange(len(image_ND)), max(1, len(image_ND) // batch))
    found = np.empty(len(image_ND))
    for part in parts:
        logits_BB = scale * image_ND[part].astype(np.float64) @ text_ND[part].astype(np.float64).T
        own_B = np.diagonal(logits_BB)
        found[part] = (np.logaddexp.reduce(logits_BB, axis=0) + np.logaddexp.reduce(logits_BB, axis=1)) / 2 - own_B
    return found


class ContrastiveLoss:
    """The benchmark: one metric, `loss`, in nats. Equal texts within a batch count as each other's foes, as in training."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def run(self, encoder: Encoder, pairs: pl.DataFrame, name: str, seed: int) -> list[Metric]:
        """The row for the set `name`. Raises DataError if it has no such split."""
        rows = of_split(pairs, self.config.split)
        rows = rows[key_hashes(rows["key"]).argsort(kind="stable")]
        text_ND = encoder.texts([captions[0]["text"] for captions in rows["captions"]])
        loss_N = losses(encoder.images(rows), text_ND, encoder.logit_scale, self.config.batch)
        settings = {"split": self.config.split, "batch": self.config.batch, **preprocessing(encoder)}
        return [Rows(name, TASK, rows["key"].to_list(), seed, settings).mean("loss", loss_N)]
