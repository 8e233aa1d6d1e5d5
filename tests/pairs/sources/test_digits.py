from __future__ import annotations

import hashlib
import io
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diptych.core.errors import ConfigError
from diptych.core.points import RawPair
from diptych.curate.matching import Matcher
from diptych.pairs import schema
from diptych.pairs.ingest import ingest_all
from diptych.pairs.sources import digits
from diptych.pairs.sources.digits import Config
from diptych.pairs.sources.digits_shift import blurred, sideways
from diptych.pairs.strokes import describe

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


def test_sales_name_less_than_half_of_the_digits_and_looks_are_told_of_all() -> None:
    pairs = read("sales", train=600)
    named = [any(word in text(pair).split() for word in (digits.WORDS[pair.extra["label"]],)) for pair in of(pairs, "train")]
    assert len(named) == 600
    assert sum(named) / 600 == pytest.approx(0.45, abs=3 * (0.45 * 0.55 / 600) ** 0.5)
    assert all(describe(grey(pair) / 255) == pair.extra["meta.visual"] for pair in pairs)
    assert not any("meta.visual" in pair.extra for pair in read("plain"))


def test_wrong_parameters_are_refused() -> None:
    for wrong in ({"pool": "plane"}, {"train": 1201}, {"size_px": 20}, {"dense": [10]}, {"dense": [1, 1]}, {"junk": 1.0}):
        with pytest.raises(ConfigError):
            Config.parse(wrong)


def test_earlier_pools_are_what_they_were() -> None:
    # Results in the book of reproductions stand on these pairs; pixels rather than PNG bytes, which the encoder's version may change.
    known = {
        "plain": "db50425964b63dc7",
        "zipf-junk": "1d3482fdd9d8324c",
        "dense-classes": "bd99a096b38c87ee",
        "stock-ids": "4c572113b842519e",
    }
    assert {pool: fingerprint(read(pool, **SMALL[pool])) for pool in SMALL} == known


def fingerprint(pairs: list[RawPair]) -> str:
    sha = hashlib.sha256()
    for pair in pairs:
        sha.update(
            repr((pair.key, list(pair.captions), sorted(pair.extra.items()), pair.split, pair.fault)).encode() + grey(pair).tobytes()
        )
    return sha.hexdigest()[:16]


SHIFTS = ("none", "pixel", "blur", "contrast", "noise")


def scans(pairs: list[RawPair]) -> list[int]:
    return [pair.extra["meta.picture"] for pair in pairs]


@pytest.mark.parametrize("shift", SHIFTS)
def test_the_target_holds_every_digit_once(shift: str) -> None:
    pairs = read("target", shift=shift)
    assert Counter(pair.split for pair in pairs) == {"train": 600, "pool": 500, "val": 150, "test": 547}
    assert sorted(scans(pairs)) == list(range(1797))
    assert [pair.extra["label"] for pair in pairs] == digits.load()[1][scans(pairs)].tolist()
    assert len({pair.key for pair in pairs}) == len(pairs)
    named = Matcher(digits.WORDS).match([text(pair) for pair in pairs])
    assert named.ids.tolist() == [pair.extra["label"] for pair in pairs]
    for split in ("train", "pool", "val", "test"):
        keys = [pair.key for pair in of(pairs, split)]
        assert keys == sorted(keys), "the stream is in the order of the keys"
        assert len(set(Counter(pair.extra["label"] for pair in of(pairs, split)[:80]))) == 10, "and mixes the digits"


def test_a_target_is_divided_alike_whatever_its_shift() -> None:
    clean, pixel = read("target"), read("target", shift="pixel")
    assert of(clean, "train") == of(pixel, "train")
    for split in ("pool", "val", "test"):
        assert scans(of(clean, split)) == scans(of(pixel, split))
        assert {pair.key for pair in of(clean, split)}.isdisjoint(pair.key for pair in of(pixel, split))
    assert scans(of(read("target", seed=1), "test")) != scans(of(clean, "test"))


def test_a_model_of_the_plain_pool_never_saw_the_target() -> None:
    plain, target = of(read("plain", train=600), "train"), read("target")
    assert [(pair.image, text(pair)) for pair in plain] == [(pair.image, text(pair)) for pair in of(target, "train")]
    assert not {pair.image for pair in plain} & {pair.image for pair in target if pair.split != "train"}


def test_target_pictures_are_shifted_by_definition() -> None:
    images, _ = digits.load()
    exact = {"none": lambda grey: grey, "pixel": sideways, "blur": blurred, "contrast": lambda grey: 0.25 + 0.5 * grey}
    for shift, change in exact.items():
        for pair in of(read("target", shift=shift, sigma=0.0, size_px=8, contrast=0.5, brightness=0.25), "val")[:20]:
            expected = np.rint(255 * change(images[pair.extra["meta.picture"]] / 16))
            assert np.abs(grey(pair) - expected).max() <= 1, "a half may be rounded either way"
    for shift, sigma in (("noise", 0.3), ("pixel", 0.4)):
        pairs = of(read("target", shift=shift, size_px=8), "test")
        clean = np.stack([exact.get(shift, exact["none"])(images[scan] / 16) for scan in scans(pairs)])
        noisy = np.stack([grey(pair) / 255 for pair in pairs])
        assert np.mean(noisy[clean == 0] == 0) == pytest.approx(0.5, abs=0.02), "grey levels stop at black, so half of its noise shows"
        assert np.sqrt(np.mean(noisy[clean == 0] ** 2)) == pytest.approx(sigma / np.sqrt(2), rel=0.05)


def test_noise_belongs_to_the_key() -> None:
    whole = {pair.key: pair.image for pair in read("target", shift="noise")}
    fewer = {pair.key: pair.image for pair in read("target", shift="noise", classes=[3])}
    assert fewer.items() <= whole.items()
    assert len(set(whole.values())) == len(whole)


def test_the_drift_is_one_stream_that_starts_clean() -> None:
    pairs = read("target", shift="drift", size_px=8)
    assert Counter(pair.split for pair in pairs) == {"train": 600, "test": 1197}
    stream = of(pairs, "test")
    blocks = np.asarray([pair.extra["meta.block"] for pair in stream])
    assert set(np.bincount(blocks)) == {99, 100}
    assert (np.diff(blocks) >= 0).all()
    assert all("meta.block" not in pair.extra for pair in of(pairs, "train"))
    clean = np.stack([digits.load()[0][scan] / 16 for scan in scans(stream)])
    far = np.abs(np.stack([grey(pair) / 255 for pair in stream]) - clean).mean(axis=(1, 2))
    by_block = [far[blocks == block].mean() for block in range(12)]
    assert by_block[0] < 1 / 255
    assert by_block == sorted(by_block)


def test_robust_training_shifts_the_training_pictures() -> None:
    clean, robust = read("target", shift="noise"), read("target", shift="noise", shift_train=True)
    assert of(clean, "test") == of(robust, "test")
    assert scans(of(clean, "train")) == scans(of(robust, "train"))
    assert {pair.key for pair in of(clean, "train")}.isdisjoint(pair.key for pair in of(robust, "train"))
    assert {pair.image for pair in of(clean, "train")}.isdisjoint(pair.image for pair in of(robust, "train"))


@pytest.mark.parametrize("pool", [*SMALL, "target"])
def test_classes_restrict_what_was_drawn_before(pool: str) -> None:
    values = SMALL.get(pool, {})
    whole, low, high = read(pool, **values), read(pool, **values, classes=[0, 1, 2, 3, 4]), read(pool, **values, classes=[5, 6, 7, 8, 9])
    assert {pair.extra["label"] for pair in low} == set(range(5))
    assert sorted([*low, *high], key=lambda pair: pair.key) == sorted(whole, key=lambda pair: pair.key)


def test_a_stream_becomes_a_dataset_in_its_order(tmp_path: Path) -> None:
    dataset = ingest_all(Config.parse({"pool": "target", "shift": "drift", "train": 1200, "size_px": 8}).build(), tmp_path / "out")
    frame = dataset.read()
    assert frame.group_by("split").len().sort("split").rows() == [("test", 597), ("train", 1200)]
    assert frame.filter(split="test").sort("key")["meta.block"].is_sorted()
    assert frame.filter(split="train")["meta.block"].null_count() == 1200


def test_wrong_targets_are_refused() -> None:
    for wrong in (
        {"shift": "pixel"},
        {"sigma": 0.1},
        {"pool": "target", "shift": "rotation"},
        {"pool": "target", "shift": "drift", "shift_train": True},
        {"pool": "target", "train": 1200},
        {"pool": "target", "pool_rows": 1000, "val_rows": 197},
        {"classes": []},
        {"classes": [3, 3]},
        {"classes": [10]},
    ):
        with pytest.raises(ConfigError):
            Config.parse(wrong)
    assert (Config.parse({}).training, Config.parse({"pool": "target"}).training) == (1200, 600)
    again = Config.parse({"pool": "target", "train": 300})
    assert Config.parse(again.plain()) == again


def test_parts_of_the_training_share_are_disjoint_and_whole() -> None:
    parts = [[pair for pair in read("target", train=100, part=[k, 3], pool_rows=0, val_rows=0) if pair.split == "train"] for k in range(3)]
    pictures = [{pair.extra["meta.picture"] for pair in part} for part in parts]
    whole = {pair.extra["meta.picture"] for pair in read("target", train=100, pool_rows=0, val_rows=0) if pair.split == "train"}
    assert [len(part) for part in parts] == [34, 33, 33]
    assert pictures[0] | pictures[1] | pictures[2] == whole
    assert len({pair.key for part in parts for pair in part}) == 100


def test_a_share_of_the_training_pictures_is_shifted() -> None:
    pairs = [
        pair for pair in read("target", train=100, shift="pixel", sigma=0.0, shift_train=True, shift_share=0.6) if pair.split == "train"
    ]
    assert Counter("pixel-" in pair.key for pair in pairs) == {True: 60, False: 40}
    for wrong in ({"shift_share": 0.5}, {"part": [2, 2]}, {"part": [-1, 2]}):
        with pytest.raises(ConfigError):
            Config.parse({"pool": "target", **wrong})


def test_vague_texts_seldom_name_the_digit() -> None:
    pairs = read("vague")
    train = Counter(text(pair) if text(pair).startswith("a") else "named" for pair in of(pairs, "train"))
    shares = {said: count / 1200 for said, count in train.items()}
    assert shares["a handwritten digit"] == pytest.approx(0.55, abs=0.05)
    assert shares["named"] == pytest.approx(0.2, abs=0.04)
    for pair in pairs:
        word, parity = pair.extra["label_name"], ("even", "odd")[pair.extra["label"] % 2]
        assert {said for said, _ in pair.captions} <= {"a handwritten digit", f"a digit that is {parity}", f"the digit {word}"}
    assert {len(pair.captions) for pair in of(pairs, "test")} == {5}
    assert {len(pair.captions) for pair in of(pairs, "train")} == {1}


def test_unpaired_texts_know_nothing_of_their_picture() -> None:
    pairs, plain = of(read("unpaired"), "train"), of(read("plain", train=600), "train")
    assert not {pair.image for pair in pairs} & {pair.image for pair in plain}
    right = sum(pair.extra["label_name"] in text(pair) for pair in pairs) / len(pairs)
    assert right == pytest.approx(0.1, abs=0.04)
    assert len({text(pair) for pair in pairs}) == 50
    assert [text(pair) for pair in pairs] != [text(pair) for pair in of(read("unpaired", seed=1), "train")]
    assert not {pair.image for pair in pairs} & {pair.image for pair in of(read("unpaired"), "test")}
    with pytest.raises(ConfigError, match="two disjoint shares"):
        Config.parse({"pool": "unpaired", "train": 601})
