"""The stored column: found by row, augmentation and text, in half precision, and refused where it does not fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from diptych.core.chance import key_hashes
from diptych.core.errors import DataError
from diptych.pairs.augmentations import Augmentation, apply
from diptych.pairs.reinforced import COLUMN, REINFORCED, Reinforced, Reinforcement, series

KEYS = pl.Series("key", ["a", "b", "c"])
TEXTS = (("one", "two"), ("three",), ("four", "two", "five"))
WIDTHS = (2, 3)


def pair(row: int) -> Reinforcement:
    """Two or more augmentations; every feature tells its row, kind and place."""
    augmentations = [Augmentation((index, row, 8, 6), ((2, -0.25), (7, 0.5))[:index]) for index in range(2 + row)]
    image_AF = np.array([[row, index, 1, 0.5, 0.25] for index in range(len(augmentations))])
    text_MF = np.array([[row, 10 + place, -1, -0.5, -0.25] for place in range(len(TEXTS[row]))])
    return Reinforcement(augmentations, image_AF, TEXTS[row], text_MF)


def column() -> pl.Series:
    return series(32, WIDTHS, [pair(row) for row in range(3)])


def test_features_are_found_by_augmentation_and_by_text(tmp_path: Path) -> None:
    pl.DataFrame([column()]).write_parquet(tmp_path / "pairs.parquet")
    stored = Reinforced(pl.read_parquet(tmp_path / "pairs.parquet")[COLUMN], KEYS)
    rows_N = np.array([2, 0, 1, 2])
    image_NKD = stored.image_features(rows_N, np.array([3, 1, 0, 0]))
    assert image_NKD[:, 0, :2].tolist() == [[2, 3], [0, 1], [1, 0], [2, 0]]
    assert image_NKD[:, 1].tolist() == [[1, 0.5, 0.25]] * 4
    assert not image_NKD[:, 0, 2].any(), "the narrower teacher's are padded"
    text_NKD = stored.text_features(rows_N, ["two", "two", "three", "five"])
    assert text_NKD[:, 0, :2].tolist() == [[2, 11], [0, 11], [1, 10], [2, 12]]


def test_the_column_has_its_schema_and_half_precision() -> None:
    assert column().dtype == REINFORCED
    third = series(32, (1,), [Reinforcement([Augmentation((0, 0, 1, 1))], np.array([[1 / 3]]), ["x"], np.array([[2 / 3]]))])
    assert Reinforced(third, KEYS[:1]).image_features(np.array([0]), np.array([0]))[0, 0, 0] == np.float16(1 / 3)


def test_pictures_come_out_as_they_went_in() -> None:
    stored = Reinforced(column(), KEYS)
    picture_HWC = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    for row in range(3):
        for choice, augmentation in enumerate(pair(row).augmentations):
            for size in (16, 32):
                expected = apply(picture_HWC, augmentation, size, drawn_at=32)
                assert np.array_equal(stored.picture(picture_HWC, row, choice, size), expected)
    with pytest.raises(DataError, match="not of this picture"):
        stored.picture(picture_HWC[:7], 2, 0, 16)


def test_draws_reach_every_augmentation_and_depend_on_the_visit() -> None:
    stored, rows_N = Reinforced(column(), KEYS), np.array([0, 1, 2])
    key_N = key_hashes(KEYS)
    drawn = np.stack([stored.draw(0, epoch, key_N, rows_N) for epoch in range(60)])
    assert [sorted(set(of_row.tolist())) for of_row in drawn.T] == [[0, 1], [0, 1, 2], [0, 1, 2, 3]]
    assert np.array_equal(stored.draw(0, 5, key_N[::-1], rows_N[::-1]), drawn[5][::-1])
    assert not np.array_equal(np.stack([stored.draw(1, epoch, key_N, rows_N) for epoch in range(60)]), drawn)


def test_a_caption_that_nobody_was_asked_about_is_refused() -> None:
    stored = Reinforced(column(), KEYS)
    with pytest.raises(DataError, match="not asked about a caption"):
        stored.text_features(np.array([0]), ["three"])  # another pair's


def test_what_does_not_fit_together_is_refused() -> None:
    plain = column()
    with pytest.raises(DataError, match="b and 0 more"):
        Reinforced(pl.Series(COLUMN, [plain[0], None, plain[2]], dtype=REINFORCED), KEYS)
    other = series(32, (3, 2), [pair(1)])
    with pytest.raises(DataError, match="reinforced differently"):
        Reinforced(pl.concat([plain[:2], other]), KEYS)
    short = Reinforcement(pair(0).augmentations, pair(0).image_AF[:1], TEXTS[0], pair(0).text_MF)
    with pytest.raises(DataError, match="damaged"):
        Reinforced(series(32, WIDTHS, [short]), KEYS[:1])
