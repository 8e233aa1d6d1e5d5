from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diptych.caption.captioners import Picture
from diptych.caption.captioners.checkpoint import CheckpointCaptioner, CheckpointConfig
from diptych.core.errors import ConfigError, DataError

TEXTS = ["the digit seven", "a dog"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diptych.models import clip
    from diptych.models.captioner import keep_only, tokens_of

    model = clip.create("coca-digits-16", 0)
    keep_only(model, tokens_of(TEXTS, model.tokenizer))
    path = tmp_path_factory.mktemp("models") / "captioner"
    clip.save(model, path, {})
    return path


def picture(row: int, mode: str = "RGB") -> Picture:
    pixels = np.random.default_rng(row).integers(0, 256, (20, 24, len(mode)), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels, mode).save(file, "PNG")
    return Picture(f"key-{row}", file.getvalue())


def build(folder: Path, guidance: float = 2.0, seed: int = 0, **fields: Any) -> CheckpointCaptioner:
    return CheckpointConfig.parse({"batch_size": 2, "max_length": 6, **fields}).build(str(folder), guidance, seed)


def test_neighbours_and_batches_change_nothing(folder: Path) -> None:
    pictures = [picture(row) for row in range(5)]
    answers = build(folder).caption(pictures)
    assert answers == build(folder, batch_size=9).caption(pictures)
    assert answers == build(folder).caption(pictures[::-1])[::-1]
    assert len(set(build(folder, 0.0).caption(pictures))) == 1  # of no picture
    assert answers != build(folder, 0.0).caption(pictures)


def test_samples_are_named_by_seed_and_key(folder: Path) -> None:
    pictures = [picture(row) for row in range(6)]
    options = {"temperature": 1.0, "top_k": 3}
    first = build(folder, **options).caption(pictures)
    assert first == build(folder, **options, batch_size=5).caption(pictures[::-1])[::-1]
    assert first != build(folder, seed=1, **options).caption(pictures)


def test_it_travels_without_its_weights(folder: Path) -> None:
    first = build(folder)
    first.caption([picture(0)])
    assert len(pickle.dumps(first)) < 2000
    assert pickle.loads(pickle.dumps(first)).caption([picture(0)]) == first.caption([picture(0)])


def test_transparent_pictures_lie_on_white(folder: Path) -> None:
    assert build(folder).caption([picture(0, "RGBA")])


def test_refusals(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="There is no captioner"):
        build(tmp_path)
    with pytest.raises(ConfigError, match="exclude each other"):
        CheckpointConfig.parse({"beams": 2, "temperature": 1.0})
    with pytest.raises(DataError, match="cannot be decoded") as error:
        build(folder).caption([Picture("broken", b"no picture")])
    assert "broken" in str(error.value)
