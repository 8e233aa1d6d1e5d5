"""CLIPScore: how well a caption fits its picture, by the cosine alone; RefCLIPScore: how well it also fits what others wrote.

Source: Hessel et al., CLIPScore: A Reference-free Evaluation Metric for Image Captioning (EMNLP 2021), section 3.

Shape legend: N pairs, M texts, R references of all candidates, D feature width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from diptych.core.config import Config as BaseConfig
from diptych.core.errors import DataError
from diptych.core.points import Encoder, Metric
from diptych.evaluate.intervals import quantile_interval
from diptych.evaluate.rows import Rows, of_split, preprocessing

Floats = NDArray[np.float64]
Index = NDArray[np.int64]

TASK = "clip-score"
TEMPLATE = "A photo depicts "
WEIGHT = 2.5
"""w of the paper: stretches the cosines that occur to about [0, 1]."""
WORST = 0.1


class Config(BaseConfig):
    """CLIPScore of a caption of every pair of a split, and RefCLIPScore where a pair has further captions."""

    method: Literal["clip-score"] = "clip-score"
    split: str = Field("test", min_length=1, description="the split to score")
    source: str | None = Field(
        None, min_length=1, description="score a pair's first caption of this source; `rewrite:` takes all that begin so; null: of any"
    )
    references: str | None = Field(
        None, min_length=1, description="the source of the captions to compare with, read as `source`; null: all but the scored one"
    )
    template: str = Field(TEMPLATE, description="put before every caption")
    misfit: float | None = Field(
        None, ge=-1, le=1, description="cosine below which a caption is counted as one that does not fit, in `misfits`; null: not counted"
    )
    task: str = Field(
        TASK, pattern=r"^[a-z0-9][a-z0-9-]*$", description="the figures' name between set and metric, where one set is scored twice"
    )

    def build(self) -> CLIPScore:
        """The benchmark."""
        return CLIPScore(self)


# ---------------------------------------------------------------- the mathematics


def clip_score(cosine: ArrayLike) -> Floats:
    """CLIPScore `w max(cos, 0)` of any shape, in [0, 2.5], from cosines of picture and caption (section 3)."""
    return np.asarray(WEIGHT * np.maximum(np.asarray(cosine, dtype=np.float64), 0))


def ref_clip_score(cosine: ArrayLike, reference_cosine: ArrayLike) -> Floats:
    """RefCLIPScore of any shape, in [0, 10 / 7]: the harmonic mean of the CLIPScore and of what the best reference says, cut at 0.

    `reference_cosine` is the largest cosine of the caption with a reference. 0 where either is 0 (section 3).
    """
    fit = clip_score(cosine)
    agreement = np.maximum(np.asarray(reference_cosine, dtype=np.float64), 0)
    total = fit + agreement
    return np.asarray(2 * fit * agreement / np.where(total > 0, total, 1))


def cosines(left_ND: NDArray[Any], right_ND: NDArray[Any]) -> Floats:
    """The cosine of each row with its counterpart, float64 `[N]`; features are L2-normalised."""
    return np.asarray(np.einsum("nd,nd->n", left_ND, right_ND, dtype=np.float64))


def best_reference(text_ND: NDArray[Any], reference_RD: NDArray[Any], text_of_R: Index) -> Floats:
    """The largest cosine of each text with its own references, float64 `[N]`; -inf without any. `text_of_R` is a reference's text row."""
    best_N = np.full(len(text_ND), -np.inf)
    np.maximum.at(best_N, text_of_R, cosines(text_ND[text_of_R], reference_RD))
    return best_N


# ---------------------------------------------------------------- the captions of a set


class Candidates(NamedTuple):
    """What is scored: `pairs` (a row a picture), the caption of each, and its references with the row that each belongs to."""

    pairs: pl.DataFrame
    texts: list[str]
    references: list[str]
    row_of_R: Index


def candidates(pairs: pl.DataFrame, split: str, source: str | None = None, references: str | None = None) -> Candidates:
    """The first caption of a source of every pair of a split; its other captions (of a source, if one is named) are the references.

    Raises DataError for an unknown split, or for pairs without a caption of that source.
    """
    rows = of_split(pairs, split)
    texts, others, row_of, bare = [], [], [], []
    for row, (key, captions) in enumerate(rows.select("key", "captions").iter_rows()):
        held = captions or []
        chosen = next((place for place, caption in enumerate(held) if _is_from(caption, source)), None)
        if chosen is None:
            bare.append(key)
            continue
        rest = [caption["text"] for place, caption in enumerate(held) if place != chosen and _is_from(caption, references)]
        texts.append(held[chosen]["text"])
        others += rest
        row_of += [row] * len(rest)
    if bare:
        what = "a caption" if source is None else f"a caption of the source {source!r}"
        raise DataError.at(f"{len(bare)} pairs have no caption to score", "captions", bare[:5], f"{what} in every pair of the split")
    return Candidates(rows, texts, others, np.asarray(row_of, dtype=np.int64))


def _is_from(caption: dict[str, Any], source: str | None) -> bool:
    """Whether a caption has a source: that very name, or one that begins with it where it ends in a colon."""
    if source is None:
        return True
    return bool(caption["source"].startswith(source) if source.endswith(":") else caption["source"] == source)


# ---------------------------------------------------------------- the benchmark


class CLIPScore:
    """The benchmark: how well the captions of a set fit its pictures (alignment in "CLIP with Quality Captions", 2024).

    Metrics: `clip_score` over all pairs and `clip_score_p10`, which a tenth of them do not reach; `misfits`, the share below a cosine, if one is
    named; `ref_clip_score` over those that have a reference (no row if none has).
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def run(self, encoder: Encoder, pairs: pl.DataFrame, name: str, seed: int) -> list[Metric]:
        """The rows for the set `name`. Raises as `candidates` does."""
        config = self.config
        found = candidates(pairs, config.split, config.source, config.references)
        keys = found.pairs["key"].to_list()
        image_ND, text_MD = encoder.images(found.pairs), encoder.texts(self._prompts(found.texts + found.references))
        text_ND, reference_RD = text_MD[: len(keys)], text_MD[len(keys) :]
        cosine_N = cosines(image_ND, text_ND)
        rows, score_N = self._rows(name, keys, seed, encoder), clip_score(cosine_N)
        least = float(np.quantile(score_N, WORST, method="inverted_cdf"))
        ends = quantile_interval(score_N, WORST)
        metrics = [rows.mean("clip_score", score_N), Metric(name, rows.task, "clip_score_p10", least, len(keys), *ends, rows.settings)]
        if config.misfit is not None:
            metrics.append(rows.mean("misfits", (cosine_N < config.misfit).astype(np.float64)))
        if found.references:
            best_N = best_reference(text_ND, reference_RD, found.row_of_R)
            has_N = np.isfinite(best_N)
            rows = self._rows(name, [key for key, has in zip(keys, has_N, strict=True) if has], seed, encoder)
            metrics.append(rows.mean("ref_clip_score", ref_clip_score(cosine_N[has_N], best_N[has_N])))
        return metrics

    def _prompts(self, texts: Sequence[str]) -> list[str]:
        return [self.config.template + text for text in texts]

    def _rows(self, name: str, keys: Sequence[str], seed: int, encoder: Encoder) -> Rows:
        settings = self.config.model_dump(include={"split", "source", "references", "template", "misfit"}, exclude_none=True)
        return Rows(name, self.config.task, keys, seed, {**settings, **preprocessing(encoder)})
