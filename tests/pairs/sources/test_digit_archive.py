"""Digits among plots, and under long captions."""

from __future__ import annotations

import pytest

from diptych.core.errors import ConfigError
from diptych.core.points import RawPair
from diptych.pairs.sources.digit_archive import DIGIT, PLOT, Config
from diptych.pairs.sources.digits import PICTURES, TEST, WORDS


def pairs(**values: object) -> list[RawPair]:
    source = Config.parse(values).build()
    return [raw for part in source.parts() for raw in source.read(part)]


def test_a_few_digits_among_plots() -> None:
    train = [raw for raw in pairs(pool="plots", rows=1000) if raw.split == "train"]
    kinds = [raw.extra["meta.kind"] for raw in train]
    assert (kinds.count(DIGIT), kinds.count(PLOT)) == (80, 920)
    assert 0 < kinds[:100].count(DIGIT) < 25  # spread, not all at one end
    for raw in train:
        named = [word for word in WORDS if word in str(raw.captions[0][0]).split()]
        assert named == ([raw.extra["label_name"]] if raw.extra["meta.kind"] == DIGIT else [])
    assert len({raw.image for raw in train}) > 900


def test_long_captions_name_the_digit_once_anywhere() -> None:
    found = pairs(pool="long", copies=2)
    assert len(found) == PICTURES
    assert sum(raw.split == "test" for raw in found) == TEST
    places = []
    for raw in found:
        assert len(raw.captions) == (1 if raw.split == "test" else 2)
        for text, _ in raw.captions:
            words = str(text).split()
            assert 41 <= len(words) <= 231
            assert [word for word in words if word in WORDS] == [raw.extra["label_name"]]
            places.append(words.index(raw.extra["label_name"]) / len(words))
    assert 0.45 < sum(places) / len(places) < 0.55
    texts = [text for raw in found for text, _ in raw.captions]
    assert len(set(texts)) == len(texts)


def test_the_seed_names_the_pool() -> None:
    assert pairs(rows=200, seed=1) == pairs(rows=200, seed=1)
    assert pairs(rows=200, seed=1) != pairs(rows=200, seed=2)


@pytest.mark.parametrize("values", [{"rows": 100_000}, {"least_words": 9, "most_words": 8}, {"size_px": 12}])
def test_refusals(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        Config.parse(values)
