"""How pictures and texts lie on the sphere: alignment, uniformity, relative alignment, and the gap between the modalities.

Sources: Wang & Isola, Understanding Contrastive Representation Learning through Alignment and Uniformity on the Hypersphere (ICML 2020),
and for relative alignment Oh, So et al., Geodesic Multi-Modal Mixup (NeurIPS 2023), section 3; the gap is that of Liang et al., Mind the
Gap (NeurIPS 2022), section 2.

Shape legend: N pairs, M = 2N features of both modalities, D feature width.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field

from diptych.core.chance import generator, key_hashes
from diptych.core.config import Config as BaseConfig
from diptych.core.errors import DataError
from diptych.core.points import Encoder, Metric
from diptych.evaluate.intervals import RESAMPLES
from diptych.evaluate.ranks import chunks
from diptych.evaluate.rows import Rows, of_split, preprocessing

Features = NDArray[np.floating[Any]]
Floats = NDArray[np.float64]

TASK = "alignment"
SHARPNESS = 2.0
"""t of the Gaussian potential in uniformity."""


class Config(BaseConfig):
    """Alignment, uniformity and the modality gap of the pairs of a split, each with its first caption."""

    method: Literal["alignment"] = "alignment"
    split: str = Field("test", min_length=1, description="the split to look at")
    pairs: int = Field(5000, ge=3, description="pairs at most, the first by key hash: the cost is quadratic")

    def build(self) -> Alignment:
        """The benchmark."""
        return Alignment(self)


def distances(image_ND: Features, text_ND: Features) -> Floats:
    """Squared distance of every picture from its own text, float64 `[N]`; their mean is the alignment, the less the better."""
    return np.asarray(np.square(image_ND.astype(np.float64) - text_ND).sum(axis=1))


def relative_distances(image_ND: Features, text_ND: Features) -> Floats:
    """Squared distance from the own text less that from the nearest other text, float64 `[N]`. For N >= 2."""
    nearest = []
    for part in chunks(len(image_ND), len(text_ND)):
        apart = _squared_distances(image_ND[part], text_ND)
        apart[np.arange(len(apart)), np.arange(part.start, part.start + len(apart))] = np.inf
        nearest.append(apart.min(axis=1))
    return np.asarray(distances(image_ND, text_ND) - np.concatenate(nearest))


def potentials(feature_MD: Features) -> Floats:
    """The mean Gaussian potential `exp(-2 d^2)` of every feature to all others, float64 `[M]`."""
    parts = chunks(len(feature_MD), len(feature_MD))
    sums = [np.exp(-SHARPNESS * _squared_distances(feature_MD[part], feature_MD)).sum(axis=1) for part in parts]
    return (np.concatenate(sums) - 1.0) / (len(feature_MD) - 1)


def _squared_distances(left_ND: Features, right_MD: Features) -> Floats:
    """Every row from every row, float64 `[N, M]`, never below zero."""
    left_ND, right_MD = left_ND.astype(np.float64), right_MD.astype(np.float64)
    squares = np.square(left_ND).sum(axis=1)[:, None] + np.square(right_MD).sum(axis=1)
    return np.asarray((squares - 2 * left_ND @ right_MD.T).clip(min=0))


def uniformity(image_ND: Features, text_ND: Features) -> float:
    """The logarithm of the mean potential over all pairs of features of both modalities: the lower, the more evenly spread."""
    return float(np.log(potentials(np.concatenate([image_ND, text_ND])).mean()))


def modality_gap(image_ND: Features, text_ND: Features) -> float:
    """The distance between the mean picture and the mean text."""
    return float(np.linalg.norm((image_ND.astype(np.float64) - text_ND).mean(axis=0)))


class Alignment:
    """The benchmark."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def run(self, encoder: Encoder, pairs: pl.DataFrame, name: str, seed: int) -> list[Metric]:
        """The rows `alignment`, `relative_alignment`, `uniformity` and `gap`. Raises DataError for a split of less than three pairs."""
        rows = of_split(pairs, self.config.split)
        if rows.height < 3:
            raise DataError.at("Too few pairs to see how they lie", "split", rows.height, "three pairs or more")
        kept = np.sort(np.argsort(key_hashes(rows["key"]), kind="stable")[: self.config.pairs])
        rows = rows[kept]
        texts = rows["captions"].list.first().struct.field("text").to_list()
        image_ND, text_ND = encoder.images(rows), encoder.texts(texts)
        settings = {"split": self.config.split, "pairs": rows.height, **preprocessing(encoder)}
        make = Rows(name, TASK, rows["key"].to_list(), seed, settings)
        potential_N2 = potentials(np.concatenate([image_ND, text_ND])).reshape(2, -1)
        spread = make.mean("uniformity", potential_N2.mean(axis=0))
        value, low, high = (float(np.log(figure)) for figure in (spread.value, spread.low, spread.high))
        gap_low, gap_high = _gap_interval(image_ND.astype(np.float64) - text_ND, seed)
        return [
            make.mean("alignment", distances(image_ND, text_ND)),
            make.mean("relative_alignment", relative_distances(image_ND, text_ND)),
            Metric(name, TASK, "uniformity", value, rows.height, low, high, settings),
            Metric(name, TASK, "gap", modality_gap(image_ND, text_ND), rows.height, gap_low, gap_high, settings),
        ]


def _gap_interval(difference_ND: Floats, seed: int) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval over pairs of the length of the mean difference, which chance alone makes larger."""
    count = len(difference_ND)
    draw = generator(seed, "bootstrap gap")
    lengths = [
        np.linalg.norm(draw.multinomial(count, np.full(count, 1 / count), size=100) @ difference_ND / count, axis=1)
        for _ in range(RESAMPLES // 100)
    ]
    low, high = np.quantile(np.concatenate(lengths), [0.025, 0.975])
    return float(low), float(high)
