"""Accuracy under common corruptions: the pictures of a set are corrupted, encoded again and classified zero-shot.

Source: Hendrycks & Dietterich, Benchmarking Neural Network Robustness to Common Corruptions and Perturbations (ICLR 2019), section 4.2. The
mean is over corruptions of the mean over severities; it is an accuracy, not relative to another model's.

Shape legend: N images, S severities, K corruptions.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field, field_validator

from diptych.core.chance import key_hashes, uniform
from diptych.core.errors import ConfigError
from diptych.core.points import Encoder, Metric
from diptych.evaluate.classified import Classified, cosines
from diptych.evaluate.corruptions import NAMES, SEVERITIES, Corrupted, Name
from diptych.evaluate.ranks import target_rank
from diptych.evaluate.rows import Rows
from diptych.evaluate.zero_shot import Labels, classes

TASK = "corruption"
SAMPLE_DRAW = 0x636F7272
"""Names the draw of the pictures, apart from the run's seed: every checkpoint and every seed see the same."""


class Config(Classified):
    """Zero-shot accuracy under common corruptions."""

    method: Literal["corruption-robustness"] = "corruption-robustness"
    corruptions: tuple[Name, ...] = Field(NAMES, min_length=1, description="which corruptions")
    severities: tuple[int, ...] = Field(SEVERITIES, min_length=1, description="which severities, from 1 to 5")
    pictures: int | None = Field(
        None,
        ge=1,
        description="use this many pairs, drawn by key, instead of the whole split; each is encoded once a corruption and severity",
    )
    draw: int = Field(0, description="names the corruptions' draws; figures of checkpoints are compared under the same draw")

    @field_validator("corruptions", "severities")
    @classmethod
    def _once(cls, chosen: tuple[Name | int, ...]) -> tuple[Name | int, ...]:
        if len(set(chosen)) < len(chosen):
            raise ValueError("each one once")
        return chosen

    @field_validator("severities")
    @classmethod
    def _known(cls, severities: tuple[int, ...]) -> tuple[int, ...]:
        if not set(severities) <= set(SEVERITIES):
            raise ValueError("severities from 1 to 5")
        return severities

    def build(self) -> CorruptionRobustness:
        """The benchmark."""
        return CorruptionRobustness(self)


class CorruptionRobustness:
    """The benchmark.

    Metrics: `acc1` of the clean pictures, `acc1.<corruption>.<severity>`, `acc1.<corruption>` (the mean over severities) and `mean_acc1`, the
    mean over corruptions.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def run(self, encoder: Encoder, pairs: pl.DataFrame, name: str, seed: int) -> list[Metric]:
        """The rows for the set `name`. Raises DataError for a set without classes (see `zero_shot.classes`) or pictures below 16 px."""
        config = self.config
        known, found = classes(pairs, config.split, name=config.classnames)
        chosen = _sample(found["key"].to_list(), config.pictures)
        sample, label_N = found[chosen], known.label_N[chosen]
        weight_DC = config.classifier(encoder, known.names)
        settings = {**config.settings(encoder, known.names), **config.model_dump(mode="json", include={"pictures", "draw"})}
        rows = Rows(name, TASK, sample["key"].to_list(), seed, settings)
        clean = rows.mean("acc1", _hits(encoder.images(sample), weight_DC, label_N))
        hit_KSN = np.stack(
            [
                [
                    _hits(encoder.images(sample, Corrupted(kind, severity, config.draw)), weight_DC, label_N)
                    for severity in config.severities
                ]
                for kind in config.corruptions
            ]
        )
        return [clean, *self._metrics(hit_KSN, rows)]

    def _metrics(self, hit_KSN: NDArray[np.float64], rows: Rows) -> list[Metric]:
        metrics = []
        for kind, hit_SN in zip(self.config.corruptions, hit_KSN, strict=True):
            metrics += [
                *(rows.mean(f"acc1.{kind}.{severity}", hit_N) for severity, hit_N in zip(self.config.severities, hit_SN, strict=True)),
                rows.mean(f"acc1.{kind}", hit_SN.mean(axis=0)),
            ]
        what = {"corruptions": sorted(self.config.corruptions), "severities": sorted(self.config.severities)}
        whole = Rows(rows.set, rows.task, rows.keys, rows.seed, {**rows.settings, **what})
        return [*metrics, whole.mean("mean_acc1", hit_KSN.mean(axis=(0, 1)))]


def _hits(image_ND: NDArray[np.float32], weight_DC: NDArray[np.float32], label_N: Labels) -> NDArray[np.float64]:
    return np.asarray(target_rank(cosines(image_ND, weight_DC), label_N) == 0, np.float64)


def _sample(keys: list[str], size: int | None) -> NDArray[np.int64]:
    """The rows to use: all, or `size` of them drawn by key, in their order."""
    if size is None:
        return np.arange(len(keys))
    if size > len(keys):
        raise ConfigError.at("The sample is larger than the split", "pictures", size, f"at most {len(keys)}")
    return np.sort(np.argsort(uniform(SAMPLE_DRAW, key_hashes(keys)), kind="stable")[:size])
