"""Reinforcement stores what the teachers say of the very pictures and captions that training will see."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from diptych.caption.reinforce import Config, Reinforce
from diptych.core.errors import ConfigError, DataError
from diptych.models import clip
from diptych.pairs.decode import decode
from diptych.pairs.reinforced import COLUMN, Reinforced
from diptych.pairs.schema import CAPTIONS

TEXTS = [("a red ball", "alt"), ("ball for sale", "alt"), ("it is a red ball", "synthetic:one")]


def table(rows: int = 5) -> pl.DataFrame:
    generator, pixels = np.random.default_rng(0), []
    for _ in range(rows):
        file = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (20, 26, 3), dtype=np.uint8)).resize((52, 40)).save(file, "PNG")
        pixels.append(file.getvalue())
    captions = [[{"text": f"{text} {row}", "source": source, "score": None} for text, source in TEXTS[row % 2 :]] for row in range(rows)]
    schema = {"key": pl.String, "pixels": pl.Binary, "captions": CAPTIONS}
    return pl.DataFrame({"key": [f"k{row}" for row in range(rows)], "pixels": pixels, "captions": captions}, schema=schema)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Two models of other widths and picture sizes."""
    folder: Path = tmp_path_factory.mktemp("teachers")
    for name, architecture, seed in (("one", "digits-16", 1), ("two", "digits-16-small", 2)):
        clip.save(clip.create(architecture, seed), folder / name, {})
    return str(folder / "one"), str(folder / "two")


def settings(teachers: tuple[str, ...], **fields: object) -> Config:
    return Config.parse({"method": "reinforce", "teachers": list(teachers), "augmentations": 3, "size_px": 24, "batch": 4, **fields})


def apply(frame: pl.DataFrame, config: Config, seed: int = 0) -> pl.DataFrame:
    verdict = config.build(seed).apply(frame, None)
    assert verdict.rejected.is_empty()
    assert verdict.kept.drop(COLUMN).equals(frame), "nothing else changes"
    return verdict.kept


def test_features_are_those_of_the_pictures_and_texts_that_come_out_again(teachers: tuple[str, ...]) -> None:
    frame, models = table(), [clip.load(Path(name)).eval() for name in teachers]
    stored = Reinforced(apply(frame, settings(teachers))[COLUMN], frame["key"])
    rows_N, choice_N = np.array([3, 0, 4, 3]), np.array([2, 0, 1, 0])
    texts = ["it is a red ball 3", "ball for sale 0", "a red ball 4", "ball for sale 3"]
    pictures = [
        stored.picture(decode(frame["pixels"][row]), row, choice, 24)
        for row, choice in zip(rows_N.tolist(), choice_N.tolist(), strict=True)
    ]
    image_NCHW = torch.from_numpy(np.stack(pictures).transpose(0, 3, 1, 2).copy())
    image_NKD, text_NKD = stored.image_features(rows_N, choice_N), stored.text_features(rows_N, texts)
    assert image_NKD.dtype == text_NKD.dtype == np.float32
    for place, model in enumerate(models):
        size, width = model.image_size, model.config["embed_dim"]
        small = torch.nn.functional.interpolate(image_NCHW.float(), (size, size), mode="bicubic", antialias=True).round().clamp(0, 255)
        with torch.no_grad():
            expected = model.encode_image(small.byte()), model.encode_text(torch.from_numpy(model.tokenizer.encode_cut(texts)))
        for found_NKD, wanted_ND in zip((image_NKD, text_NKD), expected, strict=True):
            found_ND = torch.from_numpy(found_NKD[:, place])
            torch.testing.assert_close(found_ND[:, :width], wanted_ND, rtol=2e-3, atol=1e-3)
            torch.testing.assert_close(normalize(found_ND, dim=1), found_ND, rtol=0, atol=2e-3)  # each by itself
            assert not found_ND[:, width:].any()


def test_order_and_batches_change_nothing(teachers: tuple[str, ...]) -> None:
    frame, config = table(), settings(teachers)
    whole, turned = apply(frame, config), apply(frame.reverse(), settings(teachers, batch=7)).reverse()
    halves = pl.concat([apply(frame[:2], config), apply(frame[2:], config)])
    for other in (turned, halves):
        ours, theirs = (each[COLUMN].struct.unnest() for each in (whole, other))
        assert ours.drop("image", "text").equals(theirs.drop("image", "text"))
        for name in ("image", "text"):
            np.testing.assert_allclose(*(each[name].explode().cast(pl.Float32).to_numpy() for each in (ours, theirs)), atol=1e-3)
    assert not apply(frame, config, seed=1)[COLUMN].struct.field("augmentations").equals(whole[COLUMN].struct.field("augmentations"))


def test_teachers_are_asked_once_a_picture_and_text(teachers: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"image": 0, "text": 0}
    for kind in asked:
        plain = getattr(clip.DualEncoder, f"encode_{kind}")

        def counting(self: object, inputs: torch.Tensor, *rest: object, kind: str = kind, plain: object = plain) -> torch.Tensor:
            asked[kind] += len(inputs)
            return plain(self, inputs, *rest)  # type: ignore[operator]

        monkeypatch.setattr(clip.DualEncoder, f"encode_{kind}", counting)
    method = settings(teachers).build(0)
    assert isinstance(method, Reinforce)
    method.apply(table(), None)
    assert asked == {"image": 2 * 5 * 3, "text": 2 * (3 * 3 + 2 * 2)}
    assert method.report(None)["augmentations"] == 3


def test_the_same_words_twice_are_asked_about_once(teachers: tuple[str, ...]) -> None:
    twice = pl.concat_list("captions", "captions")
    frame = table(2).with_columns(captions=twice)
    assert apply(frame, settings(teachers))[COLUMN].struct.field("captions").list.len().to_list() == [3, 2]


def test_pairs_without_words_and_broken_pictures_are_named(teachers: tuple[str, ...]) -> None:
    method = settings(teachers).build(0)
    empty = pl.lit([], dtype=CAPTIONS)
    with pytest.raises(DataError, match="k1"):
        method.apply(table().with_columns(captions=pl.when(pl.col("key") == "k1").then(empty).otherwise("captions")), None)
    with pytest.raises(DataError, match="k2"):
        method.apply(table().with_columns(pixels=pl.when(pl.col("key") == "k2").then(pl.lit(b"no")).otherwise("pixels")), None)


def test_what_cannot_be_is_refused(teachers: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="no such teacher"):
        settings((*teachers, "nowhere/at/all")).build(0)
    for wrong, word in (
        ({"crop_scale": [0.9, 0.1]}, "crop_scale"),
        ({"crop_ratio": [0.0, 1.0]}, "crop_ratio"),
        ({"magnitude": 31}, "magnitude"),
        ({"teachers": []}, "teachers"),
    ):
        with pytest.raises(ConfigError, match=word):
            Config.parse({"method": "reinforce", "teachers": ["a"], **wrong})
