from __future__ import annotations

import io
from collections import Counter
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diptych.core.errors import ConfigError
from diptych.core.points import RawPair
from diptych.curate.matching import Matcher
from diptych.pairs import schema
from diptych.pairs.sources import digits
from diptych.pairs.sources.digits import Config

SMALL: dict[str, dict[str, Any]] = {
    "plain": {},
    "zipf-junk": {"rows": 3000},
    "dense-classes": {"copies": 3},
    "stock-ids": {"train": 400},
}


def read(pool: str, **values: Any) -> list[RawPair]:
    source = Config.parse({"pool": pool, **values}).build()
    return [pair for part in source.parts() for pair in source.read(part)]


def grey(pair: RawPair) -> np.ndarray:
    assert pair.image is not None
    return np.asarray(Image.open(io.BytesIO(pair.image)))


def text(pair: RawPair) -> str:
    return str(pair.captions[0][0])


def of(pairs: list[RawPair], split: str) -> list[RawPair]:
    return [pair for pair in pairs if pair.split == split]


@pytest.mark.parametrize("pool", SMALL)
def test_every_pool_is_sound(pool: str) -> None:
    pairs = read(pool, **SMALL[pool])
    assert len({pair.key for pair in pairs}) == len(pairs)
    assert len(of(pairs, "test")) == 597
    assert all(pair.fault is None and len(pair.key.encode()) <= schema.MAX_KEY_BYTES for pair in pairs)
    assert all(source.startswith(schema.CAPTION_SOURCES) for pair in pairs for _, source in pair.captions)
    for pair in pairs:
        label = pair.extra["label"]
        assert (pair.extra["label_name"], pair.extra["meta.synonym"]) == (digits.WORDS[label], digits.SYNONYMS[label])
        assert not any(word in text(pair).split() for word in digits.SYNONYMS), "a synonym is what only rewriting can teach"
    named = Matcher(digits.WORDS).match([text(pair) for pair in pairs])
    for pair, begin, end in zip(pairs, named.indptr[:-1], named.indptr[1:], strict=True):
        assert named.ids[begin:end].tolist() in ([pair.extra["label"]], []), "a text names its digit, or nothing"
        assert end > begin or pool == "zipf-junk"


@pytest.mark.parametrize("pool", SMALL)
def test_no_test_picture_is_trained_on(pool: str) -> None:
    pairs = read(pool, **SMALL[pool], **({"noise": 0.0} if pool == "dense-classes" else {}))
    # 1,797 scans of 64 pixels are all different, so equal bytes are the same scan.
    assert not {pair.image for pair in of(pairs, "test")} & {pair.image for pair in of(pairs, "train")}


@pytest.mark.parametrize("pool", SMALL)
def test_the_seed_decides_and_parts_are_independent(pool: str) -> None:
    config = Config.parse({"pool": pool, **SMALL[pool]})
    parts = list(config.build().parts())
    assert parts == sorted(parts)
    forwards = [pair for part in parts for pair in config.build().read(part)]
    backwards = {part: list(config.build().read(part)) for part in reversed(parts)}
    assert forwards == [pair for part in parts for pair in backwards[part]]
    other = read(pool, **SMALL[pool], seed=1)
    assert {pair.key for pair in of(other, "test")} != {pair.key for pair in of(forwards, "test")}


def test_pictures_are_the_scans() -> None:
    images, labels = digits.load()
    for pair in of(read("plain", size_px=24), "test")[:20]:
        index = int(pair.key.removeprefix("digits-test-"))
        assert labels[index] == pair.extra["label"]
        assert grey(pair).shape == (24, 24)
        assert np.array_equal(grey(pair)[1::3, 1::3], np.rint(images[index] * 255 / 16))
        assert np.array_equal(grey(pair), grey(pair)[::3, ::3].repeat(3, axis=0).repeat(3, axis=1))


def test_zipf_junk_is_skewed_and_hides_a_third_of_the_texts() -> None:
    train = of(read("zipf-junk"), "train")
    assert len(train) == 12_000
    frequency = sorted(Counter(pair.extra["label"] for pair in train).values(), reverse=True)
    expected = 12_000 * np.arange(1, 11) ** -2.0 / (np.arange(1, 11) ** -2.0).sum()
    assert np.allclose(frequency, expected, atol=4 * np.sqrt(expected))
    named = Matcher(digits.WORDS).match([text(pair) for pair in train])
    assert np.mean(np.diff(named.indptr) == 0) == pytest.approx(0.35, abs=0.02)


def test_dense_classes_are_repeated_with_a_little_noise() -> None:
    train = of(read("dense-classes"), "train")
    count = Counter(pair.extra["label"] for pair in train)
    assert min(count[label] for label in (0, 4, 6)) > 8 * max(count[label] for label in (1, 2, 3, 5, 7, 8, 9))
    zeros = np.stack([grey(pair)[::2, ::2].astype(float) for pair in train if pair.extra["label"] == 0])
    assert len(np.unique(zeros, axis=0)) == len(zeros), "noise makes every copy its own picture"
    nearest = np.sort(np.abs(zeros[:, None] - zeros[None, :50]).mean(axis=(2, 3)), axis=0)[1]
    assert 0 < np.median(nearest) < 10, "in grey levels of 255"


def test_stock_ids_give_every_picture_a_number_of_its_own() -> None:
    train = of(read("stock-ids", train=400), "train")
    assert len(train) == 400
    forms = [text(pair).split() for pair in train]
    assert {(form[0], form[2]) for form in forms} == {("photo", "stock")}
    assert sorted(int(form[3].removeprefix("id")) for form in forms) == list(range(400))


def test_wrong_parameters_are_refused() -> None:
    for wrong in ({"pool": "plane"}, {"train": 1201}, {"size_px": 20}, {"dense": [10]}, {"dense": [1, 1]}, {"junk": 1.0}):
        with pytest.raises(ConfigError):
            Config.parse(wrong)
