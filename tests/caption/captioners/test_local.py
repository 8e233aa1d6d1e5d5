"""With a real, random and very small vision encoder-decoder on disk."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diptych.caption.captioners import Picture
from diptych.caption.captioners.local import LocalConfig
from diptych.core.errors import ConfigError, DataError

pytest.importorskip("torch")


def picture(row: int) -> Picture:
    pixels = np.random.default_rng(row).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return Picture(f"key-{row}", file.getvalue())


def build(folder: Path, **fields: Any) -> Any:
    return LocalConfig(path=str(folder), batch_size=2, max_new_tokens=5).model_copy(update=fields).build()


def test_every_picture_gets_words_of_the_model_whatever_its_neighbours(image_to_text: Path) -> None:
    pictures = [picture(row) for row in range(5)]
    answers = build(image_to_text).caption(pictures)
    assert len(answers) == 5
    assert all(answer is None or set(answer.split()) <= {"a", "red", "blue", "square", "on", "white"} for answer in answers)
    assert any(answers)
    assert answers == [build(image_to_text, batch_size=1).caption([each])[0] for each in pictures]
    assert len(build(image_to_text, beams=3).caption(pictures)) == 5
    assert build(image_to_text).caption([]) == []


def test_it_travels_without_its_weights(image_to_text: Path) -> None:
    first = build(image_to_text)
    first.caption([picture(0)])
    assert len(pickle.dumps(first)) < 2000
    assert pickle.loads(pickle.dumps(first)).caption([picture(0)]) == first.caption([picture(0)])


def test_refusals(image_to_text: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="There is no captioner"):
        LocalConfig(path=str(tmp_path)).build()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError, match="cannot be loaded"):
        LocalConfig(path=str(tmp_path)).build().caption([picture(0)])
    with pytest.raises(DataError, match="cannot be decoded") as error:
        build(image_to_text).caption([Picture("broken", b"no picture")])
    assert "broken" in str(error.value)
