from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diptych.core.errors import ConfigError
from diptych.core.points import RawPair
from diptych.models.tokenizer import Tokenizer
from diptych.pairs.sources.digit_scenes import CELLS, MARKS, Config
from diptych.pairs.sources.digits import WORDS, load


def read(**values: Any) -> list[RawPair]:
    source = Config(**{"train": 60, "pool": 10, "test": 20, **values}).build()
    return [pair for part in source.parts() for pair in source.read(part)]


def quadrants(pair: RawPair) -> np.ndarray:
    assert pair.image is not None
    grey = np.asarray(Image.open(io.BytesIO(pair.image)))
    return grey.reshape(2, 8, 2, 8).transpose(0, 2, 1, 3).reshape(4, 64)


def test_the_cells_name_the_digits_of_the_quadrants_row_by_row() -> None:
    scans = np.rint(load()[0] * (255 / 16)).astype(np.uint8).reshape(-1, 64)
    label_of = {scan.tobytes(): label for scan, label in zip(scans, load()[1].tolist(), strict=True)}
    for pair in read():
        assert [label_of[quadrant.tobytes()] for quadrant in quadrants(pair)] == pair.extra[CELLS]


def test_texts_change_nothing_else() -> None:
    poor, quality, both = (read(texts=texts) for texts in ("poor", "quality", "both"))
    for one, other, two in zip(poor, quality, both, strict=True):
        assert (one.key, one.image, one.extra, one.split) == (other.key, other.image, other.extra, other.split)
        assert list(two.captions) == [*one.captions, *other.captions]


def test_a_good_text_names_all_with_their_places_and_fits_a_short_context() -> None:
    for pair in read(texts="quality"):
        ((text, source),) = pair.captions
        assert source == "alt"
        assert str(text).split() == [word for mark, cell in zip(MARKS, pair.extra[CELLS], strict=True) for word in (mark, WORDS[cell])]
        assert Tokenizer(77).encode_cut([str(text)]).shape[1] <= 16


def test_a_poor_text_is_right_by_its_share() -> None:
    def right(wrong: float) -> float:
        pairs = read(texts="poor", train=400, wrong=wrong)
        return float(np.mean([str(pair.captions[0][0]).split()[2] in {WORDS[cell] for cell in pair.extra[CELLS]} for pair in pairs]))

    assert right(0.0) == 1
    assert right(1.0) == pytest.approx(1 - 0.9**4, abs=0.08)


def test_no_digit_of_the_test_is_in_another_split() -> None:
    pairs = read(test=200, train=300)
    shown = {split: {q.tobytes() for pair in pairs if pair.split == split for q in quadrants(pair)} for split in ("train", "pool", "test")}
    assert not shown["test"] & (shown["train"] | shown["pool"])
    assert len({pair.key for pair in pairs}) == len(pairs)
    assert read() == read()
    assert read(seed=1)[0].image != read()[0].image
    with pytest.raises(ConfigError):
        Config.parse({"texts": "good"})
