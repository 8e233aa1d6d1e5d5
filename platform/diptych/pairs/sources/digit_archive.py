"""Handwritten digits as an archive of articles would hold them: among far more plots, or under captions that say much beside their name.

Both pools rest on the 1,797 digits of `digits`, of which the seed draws 597 for the split `test` and the others for training:

- `plots`: a few digits with captions that name them among many generated bar plots with captions of their own. `meta.kind` tells the two
  apart, for whoever plays the expert and looks at a few; nobody else may look (BIOMEDICA);
- `long`: the word of the digit stands anywhere among filler words, in captions that are longer than CLIP's context; those of the split
  `test` are such captions that no training pair has (BiomedCLIP).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from diptych.core import chance
from diptych.core.config import Config as BaseConfig
from diptych.core.points import RawPair, Source
from diptych.pairs.sources.digits import LEVELS, PICTURES, SIDE_PX, TEST, TEST_TEXT, TEXTS, WORDS, load, png

DIGIT, PLOT = "clinical imaging", "plots and charts"
PLOT_TEXTS = (
    "bar plot of {} and {} over time", "{} by {}, mean and error", "comparison of {} between {} groups", "{} against {} in all samples",
    "levels of {} after {}", "number of {} by {}",
)  # fmt: skip
THINGS = (
    "dose", "weight", "protein", "cells", "age", "mice", "survival", "pressure", "growth", "expression", "patients", "weeks", "treatment",
    "control", "temperature", "response", "volume", "rate",
)  # fmt: skip
FILLER = (
    "the", "of", "and", "in", "was", "with", "for", "as", "after", "image", "slice", "left", "right", "arrow", "shown", "axial", "contrast", "tissue",
    "patient", "normal", "signal", "region", "white", "dark", "scan", "view", "upper", "lower", "area", "large", "small", "border", "line", "line",
    "before", "under", "month", "day", "case", "series", "level", "side", "shape", "point", "test", "study", "group", "lesion",
)  # fmt: skip
PART_ROWS = 2000


class Config(BaseConfig):
    """A pool of digits among other things; the seed draws the training share and the pool."""

    method: Literal["digit-archive"] = "digit-archive"
    pool: Literal["plots", "long"] = Field("plots", description="digits among plots, or digits under long captions")
    seed: int = Field(0, ge=0, lt=2**63, description="names the draws: which pictures are for training, plots, texts and places of words")
    rows: int = Field(8000, ge=100, le=1_000_000, description="plots: pairs of the pool; digits among them are drawn once each")
    digits: float = Field(0.08, gt=0, le=1, description="plots: share of digits in the pool")
    least_words: int = Field(40, ge=1, le=1000, description="long: filler words of the shortest caption")
    most_words: int = Field(230, ge=1, le=1000, description="long: filler words of the longest caption")
    copies: int = Field(4, ge=1, le=32, description="long: captions a training picture")
    size_px: int = Field(16, ge=SIDE_PX, le=256, multiple_of=SIDE_PX, description="side of the picture in pixels, a multiple of 8")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.most_words < self.least_words:
            raise ValueError("most_words lies below least_words")
        if self.pool == "plots" and self.digits_in_pool > PICTURES - TEST:
            raise ValueError(f"digits of {self.rows} rows are more than the {PICTURES - TEST} of the training share")
        return self

    @property
    def digits_in_pool(self) -> int:
        """plots: how many digits the pool has."""
        return max(1, round(self.digits * self.rows))

    def build(self) -> DigitArchive:
        """The source. Needs nothing but scikit-learn's own data file."""
        return DigitArchive(self)


class DigitArchive(Source):
    """Pairs with `meta.kind`, and for digits `label` (0 to 9) and `label_name` (its word)."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def parts(self) -> Sequence[str]:
        """`test`, then runs of 2,000 pairs of the pool."""
        return ["test", *(f"train-{index:05d}" for index in range(-(-len(self._pool) // PART_ROWS)))]

    def read(self, part: str) -> Iterator[RawPair]:
        """The pairs of one part."""
        split, _, number = part.partition("-")
        if split == "test":
            for row, picture in enumerate(np.sort(self._order[:TEST]).tolist()):
                text = self._long("test", row, 0, picture) if self.config.pool == "long" else TEST_TEXT.format(_word(picture))
                yield self._digit(f"test-{row:04d}", picture, [text], "test")
            return
        start = int(number) * PART_ROWS
        for row, picture in enumerate(self._pool[start : start + PART_ROWS].tolist(), start):
            key = f"{self.config.pool}-{row:05d}"
            if picture < 0:
                yield self._plot(key, row)
            elif self.config.pool == "long":
                yield self._digit(key, picture, [self._long("train", row, copy, picture) for copy in range(self.config.copies)], "train")
            else:
                form = int(chance.generator(self.config.seed, "archive text", row).integers(len(TEXTS)))
                yield self._digit(key, picture, [TEXTS[form].format(_word(picture))], "train")

    def _digit(self, key: str, picture: int, texts: list[str], split: str) -> RawPair:
        images, labels = load()
        extra = {"label": int(labels[picture]), "label_name": _word(picture), "meta.kind": DIGIT}
        return RawPair(key, png(images[picture], self.config.size_px), [(text, "alt") for text in texts], extra, split)

    def _plot(self, key: str, row: int) -> RawPair:
        draw = chance.generator(self.config.seed, "archive plot", row)
        grey_HW = np.zeros((SIDE_PX, SIDE_PX))
        for left in range(0, SIDE_PX, 2):
            grey_HW[int(draw.integers(0, SIDE_PX)) :, left : left + int(draw.integers(1, 3))] = draw.uniform(0.4, 1) * LEVELS
        things = draw.choice(THINGS, 2, replace=False)
        text = PLOT_TEXTS[int(draw.integers(len(PLOT_TEXTS)))].format(*things)
        extra = {"label": None, "label_name": None, "meta.kind": PLOT}
        return RawPair(key, png(grey_HW, self.config.size_px), [(text, "alt")], extra, "train")

    def _long(self, split: str, row: int, copy: int, picture: int) -> str:
        """A caption of filler words with the digit's word at a place that is as likely as any other."""
        draw = chance.generator(self.config.seed, f"archive long {split}", row, copy)
        words = draw.choice(FILLER, int(draw.integers(self.config.least_words, self.config.most_words + 1))).tolist()
        words.insert(int(draw.integers(len(words) + 1)), _word(picture))
        return " ".join(words)

    @cached_property
    def _order(self) -> NDArray[np.int64]:
        return chance.generator(self.config.seed, "digits split").permutation(PICTURES)

    @cached_property
    def _pool(self) -> NDArray[np.int64]:
        """The picture of every row of the pool; -1 for a plot."""
        if self.config.pool == "long":
            return self._order[TEST:]
        digits = self._order[TEST : TEST + self.config.digits_in_pool]
        rows = np.concatenate([digits, np.full(self.config.rows - len(digits), -1)])
        return chance.generator(self.config.seed, "archive pool").permutation(rows)


def _word(picture: int) -> str:
    return WORDS[load()[1][picture]]
