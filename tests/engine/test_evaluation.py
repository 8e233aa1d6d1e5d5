"""Stored features: what is kept, under which name, and that a warm cache gives the same numbers as a cold one."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image
from tests.evaluation_sets import png, write_set

from diptych.core.errors import ConfigError, DataError
from diptych.engine import evaluation, feature_files
from diptych.engine.evaluation import StoredEncoder
from diptych.engine.features import View
from diptych.evaluate.corruptions import Corrupted
from diptych.evaluate.encode import encode_images
from diptych.evaluate.zero_shot import Config as ZeroShot
from diptych.models import clip
from diptych.models.preprocess import preprocess
from diptych.pairs.dataset import PairDataset
from diptych.pairs.ingest import ingest_all
from diptych.pairs.sources.clip_benchmark import Config as ClipBenchmark
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
    half, whole = encoder.images(pairs, transform), encode_images(encoder.model, encoder._pictures(pairs, transform))
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


def family(home: Path, cache: Path, count: int, **options: object) -> list[StoredEncoder]:
    """Checkpoints that look at the same pictures together."""
    dataset = PairDataset.open(home / "pairs")
    for seed in range(1, count):
        if not (home / f"model-{seed}").exists():
            clip.save(clip.create("vit-micro-40", seed=seed), home / f"model-{seed}", {})
    folders = [home / "model", *(home / f"model-{seed}" for seed in range(1, count))]
    found = [StoredEncoder(folder, dataset, cache, **options) for folder in folders]  # type: ignore[arg-type]
    for encoder in found:
        encoder.companions = found
    return found


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pictures were decoded, a number a call."""
    counts: list[int] = []
    original = View.of

    def counting(view: View, data: bytes) -> object:
        counts.append(1)
        return original(view, data)

    monkeypatch.setattr(View, "of", counting)
    return counts


def test_a_picture_is_decoded_once_for_all_checkpoints_and_gives_what_each_gives_alone(
    home: Path, tmp_path: Path, decoded: list[int]
) -> None:
    together = family(home, tmp_path / "together", 3)
    pairs = together[0].dataset.read()[:150]
    for transform in (None, Corrupted("fog", 2)):
        decoded.clear()
        shared = [encoder.images(pairs, transform) for encoder in together]
        assert len(decoded) == 150
        assert not (shared[0] == shared[1]).all()
        for one, encoder in zip(shared, family(home, tmp_path / "alone", 3), strict=True):
            encoder.companions = ()
            assert (one == encoder.images(pairs, transform)).all()


def test_no_more_checkpoints_are_held_than_allowed(home: Path, tmp_path: Path, decoded: list[int]) -> None:
    encoders = family(home, tmp_path / "cache", 3, together=2)
    pairs = encoders[0].dataset.read()[:30]
    encoders[0].images(pairs)
    assert len(files(encoders[0])) == 2
    assert ["model" in encoder.checkpoint.__dict__ for encoder in encoders] == [True, False, False]
    encoders[1].images(pairs)
    assert len(decoded) == 30
    encoders[2].images(pairs)
    assert len(decoded) == 60


def test_checkpoints_that_see_pictures_otherwise_are_encoded_apart(home: Path, tmp_path: Path, decoded: list[int]) -> None:
    squashing = clip.create("vit-micro-40", seed=5)
    squashing.preprocess_cfg.update(resize_mode="squash", interpolation="bilinear")
    clip.save(squashing, tmp_path / "squashing", {})
    first, other = family(home, tmp_path / "cache", 1)[0], StoredEncoder(tmp_path / "squashing", PairDataset.open(home / "pairs"), tmp_path)
    first.companions = other.companions = (first, other)
    pairs = first.dataset.read()[:10]
    first.images(pairs)
    other.images(pairs)
    assert len(decoded) == 20
    assert first.settings != other.settings


def test_a_view_is_what_open_clip_makes_of_the_picture() -> None:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(png(1, 64))).resize((90, 50)).save(buffer, "PNG")
    picture = Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")
    for view in (View(32), View(32, "squash", "bilinear"), View(32, "longest", "bicubic", 7)):
        assert (view.of(buffer.getvalue()) == preprocess(picture, *view)).all()  # type: ignore[arg-type]


def test_texts_and_facts_are_kept_so_that_a_later_run_loads_no_model(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = StoredEncoder(home / "model", PairDataset.open(home / "pairs"), tmp_path)
    pairs, texts = first.dataset.read()[:9], ["a one", "a two", "a one"]
    expected = first.images(pairs), first.texts(texts), first.logit_scale
    monkeypatch.setattr(clip, "load", lambda _: pytest.fail("the model was loaded"))
    again = StoredEncoder(home / "model", PairDataset.open(home / "pairs"), tmp_path)
    assert (again.images(pairs) == expected[0]).all()
    assert (again.texts(texts) == expected[1]).all()
    assert (expected[1][0] == expected[1][2]).all()
    assert again.logit_scale == expected[2]
    assert again.texts([]).shape == again.images(pairs[:0]).shape == (0, 0)


def test_clean_features_are_memory_mapped(encoder: StoredEncoder) -> None:
    pairs = encoder.dataset.read()[:5]
    encoder.images(pairs)
    assert isinstance(encoder.images(pairs).base, np.memmap)


def test_half_precision_has_a_file_of_its_own_of_half_the_size(home: Path, tmp_path: Path) -> None:
    full, half = (family(home, tmp_path, 1, precision=precision)[0] for precision in ("full", "half"))
    pairs = full.dataset.read()[:64]
    assert half.images(pairs) == pytest.approx(full.images(pairs), abs=5e-4)
    small, large = sorted(path.stat().st_size for path in files(full))
    assert 1.8 < large / small < 2.1


def test_other_words_ask_for_no_picture_and_other_pictures_or_code_for_other_files(
    encoder: StoredEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = encoder.dataset.read()[:12]
    name = encoder.image_file(pairs)
    assert encoder.image_file(pairs.with_columns(label_name=pl.lit("x"), captions=pl.lit(None))) == name
    moved = pairs.with_columns(pl.col("image").struct.with_fields(offset=pl.field("offset") + 1))
    assert encoder.image_file(moved) != name
    assert encoder.image_file(pairs[::-1]) != name
    monkeypatch.setattr(feature_files, "code", lambda: "other")
    assert encoder.image_file(pairs) != name


def test_pictures_that_were_changed_in_place_get_other_features(home: Path, tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", labels=[0, 1], names=["cat", "dog"])
    for checksum in (True, False):
        source = ClipBenchmark(path=str(folder), checksum=checksum)
        one = ingest_all(source.build(), tmp_path / f"one-{checksum}")
        before = StoredEncoder(home / "model", one, tmp_path / "cache").images(one.read())
        shutil.rmtree(folder)
        write_set(folder, labels=[0, 1], names=["cat", "dog"], seed=2 + checksum)
        other = ingest_all(source.build(), tmp_path / f"other-{checksum}")
        after = StoredEncoder(home / "model", other, tmp_path / "cache").images(other.read())
        assert not np.allclose(before, after)


def test_a_failure_leaves_no_features(encoder: StoredEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = encoder.dataset.read()[:200]
    original, calls = View.of, iter(range(1000))

    def failing(view: View, data: bytes) -> object:
        if next(calls) == 150:
            raise DataError("broken")
        return original(view, data)

    monkeypatch.setattr(View, "of", failing)
    with pytest.raises(DataError, match="cannot be decoded"):
        encoder.images(pairs)
    assert not list(encoder.cache.glob("*.npy*"))
    assert encoder.images(pairs).shape == (200, 128)


def test_a_folder_without_a_model_is_named(home: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no model directory"):
        StoredEncoder(tmp_path, PairDataset.open(home / "pairs"), tmp_path).images(PairDataset.open(home / "pairs").read()[:2])


def test_a_set_brings_its_templates_and_its_classes(home: Path, tmp_path: Path) -> None:
    names = ["cat", "dog", "owl"]
    folder = write_set(tmp_path / "set", labels=[0, 0, 2, 2], names=names)
    dataset = ingest_all(ClipBenchmark(path=str(folder)).build(), tmp_path / "pairs")
    encoder = StoredEncoder(home / "model", dataset, tmp_path / "cache")
    brought = evaluation.measure(encoder, [{"method": "zero-shot", "templates": "set"}], "pets", 0)
    written = {"method": "zero-shot", "templates": ["a photo of a {}.", "{}, a pet"], "classes": names}
    assert [m.value for m in brought] == [m.value for m in evaluation.measure(encoder, [written], "pets", 0)]
    assert brought[0].settings["classes"] == 3, "the class without examples competes"
    assert [m.settings for m in brought] == [m.settings for m in evaluation.measure(encoder, [written], "pets", 0)]
    plain = evaluation.measure(encoder, [{"method": "zero-shot"}], "pets", 0)
    assert plain[0].settings["templates"] != brought[0].settings["templates"]
    digits = StoredEncoder(home / "model", PairDataset.open(home / "pairs"), tmp_path / "cache")
    with pytest.raises(ConfigError, match="brings no prompt templates"):
        evaluation.measure(digits, [{"method": "zero-shot", "templates": "set"}], "digits", 0)


def test_the_same_pictures_under_another_model(home: Path, tmp_path: Path) -> None:
    one, two = family(home, tmp_path / "cache", 2)
    pairs = one.dataset.scan().head(20).collect()
    beside = one.beside(f"local-dir:{two.model_dir}")
    np.testing.assert_array_equal(beside.images(pairs), two.images(pairs))
    assert (beside.images(pairs) != one.images(pairs)).any()
    with pytest.raises(DataError, match="no model directory"):
        one.beside(str(tmp_path))


def test_a_second_encoder_is_known_by_its_files(encoder: StoredEncoder, tmp_path: Path) -> None:
    pairs, other = encoder.dataset.read()[:10], tmp_path / "other"
    clip.save(clip.create("digits-16", seed=0), other, {})
    first = encoder.auxiliary(pairs, str(other))
    assert (encoder.auxiliary(pairs, str(other)) == first).all()
    clip.save(clip.create("digits-16", seed=1), other, {})
    assert np.abs(encoder.auxiliary(pairs, str(other)) - first).max() > 0.1


def test_a_captioner_is_measured_whole(home: Path, tmp_path: Path) -> None:
    from diptych.models.captioner import keep_only, tokens_of

    model = clip.create("coca-digits-16", 0)
    keep_only(model, tokens_of(["the number seven", "a handwritten three"], model.tokenizer))
    clip.save(model, tmp_path / "captioner", {})
    clip.save(clip.create("digits-16", seed=0), tmp_path / "judge", {})
    encoder = StoredEncoder(tmp_path / "captioner", PairDataset.open(home / "pairs"), tmp_path / "cache")
    benchmarks = [
        {"method": "captioning", "task": f"guided-{scale:g}", "guidance": scale, "max_length": 5, "names": "label_name"}
        | ({} if judge is None else {"scorer": str(tmp_path / judge)})
        for scale, judge in ((1.0, None), (3.0, "judge"))
    ]
    metrics = evaluation.measure(encoder, benchmarks, "digits", 0)
    found = {(metric.task, metric.metric): metric for metric in metrics}
    assert all(
        ("guided-1", name) in found and ("guided-3", name) in found for name in ("clip_score", "cider", "bleu_4", "named", "recall@5")
    )
    assert found["guided-3", "clip_score"].settings["guidance"] == 3.0
    assert found["guided-1", "cider"].n == found["guided-1", "clip_score"].n == 597
    assert evaluation.long_form(metrics, {})["value"].null_count() == 0
