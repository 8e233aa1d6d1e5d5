"""Stored features: what is kept, under which name, and that a warm cache gives the same numbers as a cold one."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from diptych.engine.evaluation import StoredEncoder
from diptych.evaluate.corruptions import Corrupted
from diptych.evaluate.zero_shot import Config as ZeroShot
from diptych.models import clip
from diptych.pairs.dataset import PairDataset
from diptych.pairs.ingest import ingest_all
from diptych.pairs.sources.digits import Config as Digits


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of digits and a small model."""
    root = tmp_path_factory.mktemp("evaluation")
    ingest_all(Digits.parse({"pool": "zipf-junk", "rows": 200, "size_px": 16}).build(), root / "pairs", version="0")
    clip.save(clip.create("vit-micro-40", seed=0), root / "model", {})
    return root


@pytest.fixture
def encoder(home: Path, tmp_path: Path) -> StoredEncoder:
    return StoredEncoder(home / "model", PairDataset.open(home / "pairs"), tmp_path / "cache")


def files(encoder: StoredEncoder) -> list[Path]:
    return sorted(encoder.cache.glob("*.npy"))


def test_a_transform_has_a_file_of_its_own_and_changes_features(encoder: StoredEncoder) -> None:
    pairs = encoder.dataset.read()[:40]
    clean, weak, strong = (encoder.images(pairs, t) for t in (None, Corrupted("shot_noise", 1), Corrupted("shot_noise", 5)))
    assert len(files(encoder)) == 3
    near, far = (np.linalg.norm(clean - other, axis=1).mean() for other in (weak, strong))
    assert 0 < near < far
    encoder.images(pairs, Corrupted("shot_noise", 5, seed=1))
    assert len(files(encoder)) == 4


def test_a_warm_cache_gives_the_same_numbers_and_reads_no_picture(encoder: StoredEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = encoder.dataset.read()[:20]
    cold = [encoder.images(pairs, transform) for transform in (None, Corrupted("fog", 3))]
    monkeypatch.setattr("diptych.engine.features.pictures", lambda *_: pytest.fail("a picture was read"))
    for first, transform in zip(cold, (None, Corrupted("fog", 3)), strict=True):
        warm = encoder.images(pairs, transform)
        assert warm.dtype == first.dtype == np.float32
        assert (warm == first).all()
    assert {np.load(path).dtype for path in files(encoder)} == {np.dtype("float16"), np.dtype("float32")}


def test_half_precision_moves_no_prediction(encoder: StoredEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = encoder.dataset.read().filter(encoder.dataset.read()["split"] == "test")[:200]
    transform = Corrupted("contrast", 3)
    half, whole = encoder.images(pairs, transform), encoder._encoded(pairs, transform)
    assert half == pytest.approx(whole, abs=5e-4)
    assert np.linalg.norm(half, axis=1) == pytest.approx(1, abs=1e-3)
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    weight_DC = ZeroShot().build().weights(encoder, names)[0]
    assert ((half @ weight_DC).argmax(1) == (whole @ weight_DC).argmax(1)).mean() >= 0.99


def test_features_depend_on_the_selection(encoder: StoredEncoder, home: Path) -> None:
    pairs = encoder.dataset.read()
    first = encoder.images(pairs[:8])
    assert encoder.images(pairs[4:12])[:4] == pytest.approx(first[4:], abs=1e-5)
    assert len(files(encoder)) == 2
    shutil.copytree(home / "model", encoder.cache / "other")
    same = StoredEncoder(encoder.cache / "other", encoder.dataset, encoder.cache)
    assert (same.images(pairs[:8]) == first).all()
    assert len(files(encoder)) == 2
