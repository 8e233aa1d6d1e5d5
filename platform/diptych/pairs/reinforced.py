"""What strong models know about a pair, found out once and kept in the pair table: the column `meta.reinforced`.

Vasu et al., "MobileCLIP" (CVPR 2024), section 3. Of each pair the numbers of some augmentations of its picture, and of each augmentation and each
caption the teachers' features, in half precision. A feature is found again by its caption's text, not by the caption's place, so that captions may
be filtered, reordered or drawn from later; one that was written later has no feature, and is refused.

Shape legend: A augmentations of a pair, M of its captions, K teachers, D feature width, F the sum of the teachers' widths, N pairs of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import polars as pl
from numpy.typing import NDArray

from diptych.core import chance
from diptych.core.errors import DataError
from diptych.pairs.augmentations import Augmentation, apply
from diptych.pairs.decode import Pixels

COLUMN = "meta.reinforced"
STREAM = chance.key_hash("reinforced")

OPERATION = pl.Struct({"place": pl.UInt8, "magnitude": pl.Float32})
AUGMENTATION = pl.Struct({"left": pl.Int32, "top": pl.Int32, "width": pl.Int32, "height": pl.Int32, "operations": pl.List(OPERATION)})
REINFORCED = pl.Struct(
    {
        "size_px": pl.Int32,
        "widths": pl.List(pl.Int32),
        "augmentations": pl.List(AUGMENTATION),
        "image": pl.List(pl.Float16),
        "captions": pl.List(pl.UInt64),
        "text": pl.List(pl.Float16),
    }
)
"""`size_px`: the side of the augmented picture; `widths`: each teacher's feature width; `augmentations`: how (`pairs/augmentations.py`); `image`: their
features `[A, F]`, flat; `captions`: hashes of the captions' texts; `text`: their features `[M, F]`, flat."""


@dataclass(frozen=True)
class Reinforcement:
    """That of one pair: augmentations, their features `[A, F]`, texts of captions, their features `[M, F]`."""

    augmentations: Sequence[Augmentation]
    image_AF: NDArray[np.floating]
    texts: Sequence[str]
    text_MF: NDArray[np.floating]


def series(size_px: int, widths: Sequence[int], pairs: Sequence[Reinforcement]) -> pl.Series:
    """The column of some pairs."""
    columns = {
        "size_px": [size_px] * len(pairs),
        "widths": [list(widths)] * len(pairs),
        "augmentations": [[_plain(each) for each in pair.augmentations] for pair in pairs],
        "image": [pair.image_AF.astype(np.float16).ravel() for pair in pairs],
        "captions": [chance.key_hashes(pair.texts) for pair in pairs],
        "text": [pair.text_MF.astype(np.float16).ravel() for pair in pairs],
    }
    fields = {field.name: field.dtype for field in REINFORCED.fields}
    return pl.DataFrame(columns, schema=fields).to_struct(COLUMN)


def _plain(augmentation: Augmentation) -> dict[str, object]:
    left, top, width, height = augmentation.box
    operations = [{"place": place, "magnitude": magnitude} for place, magnitude in augmentation.operations]
    return {"left": left, "top": top, "width": width, "height": height, "operations": operations}


class Reinforced:
    """The column of a pair table, ready to be drawn from by row.

    Raises DataError if a pair has nothing stored, or the pairs were asked of different teachers.
    """

    def __init__(self, column: pl.Series, keys: pl.Series) -> None:
        self.keys = keys
        missing = column.is_null() | (column.struct.field("augmentations").list.len().fill_null(0) == 0)
        if missing.any():
            where = f"{keys[int(missing.arg_max() or 0)]} and {int(missing.sum()) - 1} more"
            raise DataError.at("Pairs are not reinforced", where, f"nothing in {COLUMN}", "augmentations and features", _FIX)
        kinds = column.struct.unnest().select("size_px", "widths").unique()
        if kinds.height != 1:
            raise DataError.at("Pairs were reinforced differently", COLUMN, kinds.to_dicts()[:2], "one set of teachers, at one size", _FIX)
        self.size_px, self.widths = int(kinds["size_px"][0]), tuple(int(width) for width in kinds["widths"][0])
        self._augmentations = column.struct.field("augmentations")
        self.count_N = self._augmentations.list.len().cast(pl.Int64).to_numpy()
        self._captions, self._first_caption_N = _laid_out(column.struct.field("captions"))
        self._image_AF, self._text_MF = (self._features(column.struct.field(name)) for name in ("image", "text"))
        self._first_image_N = np.cumsum(self.count_N) - self.count_N
        if len(self._image_AF) != self.count_N.sum() or len(self._text_MF) != len(self._captions):
            got = f"{len(self._image_AF)} and {len(self._text_MF)} features"
            raise DataError.at("The column is damaged", COLUMN, got, f"{self.count_N.sum()} and {len(self._captions)}", _FIX)

    def _features(self, lists: pl.Series) -> NDArray[np.float16]:
        flat, _ = _laid_out(lists)
        return flat.reshape(-1, sum(self.widths))

    def draw(self, seed: int, epoch: int, key_N: NDArray[np.uint64], rows_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which of its augmentations each pair shows on this visit, int64 `[N]`, named by `(seed, epoch, key)`."""
        choice_N = (chance.uniform(seed, STREAM, epoch, key_N) * self.count_N[rows_N]).astype(np.int64)
        return cast(NDArray[np.int64], choice_N)

    def picture(self, picture_HWC: Pixels, row: int, choice: int, size: int) -> Pixels:
        """A pair's picture as one of its augmentations shows it, `[size, size, 3]`. Raises DataError where its box is not in the picture."""
        stored = self._augmentations[row][choice]
        operations = tuple((operation["place"], operation["magnitude"]) for operation in stored["operations"])
        left, top, width, height = (stored[name] for name in ("left", "top", "width", "height"))
        if left + width > picture_HWC.shape[1] or top + height > picture_HWC.shape[0]:
            got, expected = (
                f"a crop of {width} x {height} at {left}, {top}",
                f"one in {picture_HWC.shape[1]} x {picture_HWC.shape[0]} pixels",
            )
            raise DataError.at("A stored augmentation is not of this picture", str(self.keys[row]), got, expected, _FIX)
        return apply(picture_HWC, Augmentation((left, top, width, height), operations), size, self.size_px)

    def image_features(self, rows_N: NDArray[np.int64], choice_N: NDArray[np.int64]) -> NDArray[np.float32]:
        """The teachers' features of the chosen augmentations, `[N, K, D]`."""
        return self._by_teacher(self._image_AF[self._first_image_N[rows_N] + choice_N])

    def text_features(self, rows_N: NDArray[np.int64], texts: Sequence[str]) -> NDArray[np.float32]:
        """The teachers' features of a caption of each pair, `[N, K, D]`. Raises DataError for a text that they were not asked about."""
        return self._by_teacher(self._text_MF[[self._place(row, text) for row, text in zip(rows_N.tolist(), texts, strict=True)]])

    def _place(self, row: int, text: str) -> int:
        first = int(self._first_caption_N[row])
        last = int(self._first_caption_N[row + 1]) if row + 1 < len(self._first_caption_N) else len(self._captions)
        (found,) = np.nonzero(self._captions[first:last] == np.uint64(chance.key_hash(text)))
        if not len(found):
            raise DataError.at("The teachers were not asked about a caption", str(self.keys[row]), text, "a caption that was there", _FIX)
        return first + int(found[0])

    def _by_teacher(self, feature_NF: NDArray[np.float16]) -> NDArray[np.float32]:
        feature_NKD = np.zeros((len(feature_NF), len(self.widths), max(self.widths)), dtype=np.float32)
        for teacher, (width, end) in enumerate(zip(self.widths, np.cumsum(self.widths), strict=True)):
            feature_NKD[:, teacher, :width] = feature_NF[:, end - width : end]
        return feature_NKD


_FIX = "put {method: reinforce} last in the caption phase"


def _laid_out(lists: pl.Series) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """The elements of all lists end to end, and where each list begins."""
    count_N = lists.list.len().cast(pl.Int64).to_numpy()
    flat = lists.filter(lists.list.len() > 0).explode().to_numpy()
    return flat, np.cumsum(count_N) - count_N
