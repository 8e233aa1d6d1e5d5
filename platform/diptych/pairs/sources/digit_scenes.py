"""Scenes of four handwritten digits, two by two, with texts of two qualities: what captions do to a backbone, all else equal.

The pictures depend on `(seed, key)` alone and never on `texts`, so that two data sets that differ in it show the same scenes in the same
order. `meta.cells` holds the digits of the quadrants, row by row: the dense labels.

| split | scenes | built from |
|---|---|---|
| `train` | `train` | the training share of the digits |
| `pool` | `pool` | the same digits: labelled scenes for a probe |
| `test` | `test` | digits that no other split shows |

Source of the digits: as in `digits.py`. The design follows Vasu et al., CLIP with Quality Captions (2024), in small.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from diptych.core import chance
from diptych.core.config import Config as BaseConfig
from diptych.core.points import RawPair, Source
from diptych.pairs.sources.digits import LEVELS, PICTURES, SIDE_PX, TEST, WORDS, load

Texts = Literal["poor", "quality", "both"]

QUADRANTS = ("upper left", "upper right", "lower left", "lower right")
MARKS = ("ul", "ur", "ll", "lr")
"""What a name is marked with, one mark a quadrant; as short as the small models' contexts need."""
PART_ROWS = 2000
CELLS = "meta.cells"


class Config(BaseConfig):
    """How many scenes a split has, and what is said of them."""

    method: Literal["digit-scenes"] = "digit-scenes"
    seed: int = Field(0, ge=0, lt=2**63, description="names the draws: which digits are for training, the scenes, the texts")
    texts: Texts = Field(
        "quality",
        description="`poor`: names one of the four digits, or a wrong one, beside an item number; `quality`: names all four with where they are; "
        "`both`: the poor text first, then the good one",
    )
    wrong: float = Field(0.4, ge=0, le=1, description="chance that a poor text names a digit drawn at random")
    train: int = Field(1500, ge=0, le=1_000_000, description="scenes of the split `train`")
    pool: int = Field(300, ge=0, le=1_000_000, description="scenes of the split `pool`")
    test: int = Field(400, ge=0, le=1_000_000, description="scenes of the split `test`")

    def build(self) -> DigitScenes:
        """The source."""
        return DigitScenes(self)


class DigitScenes(Source):
    """Pairs with the extra column `meta.cells`: the digits of the four quadrants, row by row."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def parts(self) -> Sequence[str]:
        """Runs of 2,000 scenes of the splits."""
        counts = {split: getattr(self.config, split) for split in ("pool", "test", "train")}
        return [f"{split}-{index:05d}" for split, count in counts.items() for index in range(-(-count // PART_ROWS))]

    def read(self, part: str) -> Iterator[RawPair]:
        """The scenes of one part; keys tell the split and the row."""
        split, _, number = part.partition("-")
        first = int(number) * PART_ROWS
        for row in range(first, min(first + PART_ROWS, getattr(self.config, split))):
            key = f"scene-{split}-{row:06d}"
            picture_4 = chance.generator(self.config.seed, "scene", key).choice(self._shares[split == "test"], 4)
            cells = [int(load()[1][picture]) for picture in picture_4]
            yield RawPair(key, _png(picture_4), [(text, "alt") for text in self._texts(key, cells)], {CELLS: cells}, split)

    def _texts(self, key: str, cells: Sequence[int]) -> list[str]:
        draw = chance.generator(self.config.seed, "scene text", key)
        place, wrong, digit, item = int(draw.integers(4)), float(draw.random()), int(draw.integers(10)), int(draw.integers(10_000))
        poor = f"item {item:04d} {WORDS[digit if wrong < self.config.wrong else cells[place]]}"
        quality = " ".join(f"{mark} {WORDS[cell]}" for mark, cell in zip(MARKS, cells, strict=True))
        return {"poor": [poor], "quality": [quality], "both": [poor, quality]}[self.config.texts]

    @cached_property
    def _shares(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Digits for training, and digits for the test."""
        order = chance.generator(self.config.seed, "scene digits").permutation(PICTURES)
        return order[TEST:], order[:TEST]


def _png(picture_4: NDArray[np.int64]) -> bytes:
    """An 8-bit grey PNG of 16 x 16 pixels."""
    quadrant_22HW = load()[0][picture_4].reshape(2, 2, SIDE_PX, SIDE_PX)
    grey_HW = quadrant_22HW.transpose(0, 2, 1, 3).reshape(2 * SIDE_PX, 2 * SIDE_PX)
    file = io.BytesIO()
    Image.fromarray(np.rint(grey_HW * (255 / LEVELS)).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()
