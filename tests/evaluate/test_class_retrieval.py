"""The nearest text counts if it is of the picture's class, whosever it is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray

from diptych.core.errors import DataError
from diptych.evaluate.class_retrieval import Config, hits


class Given:
    """Pictures and texts lie at known angles, in degrees."""

    logit_scale = 100.0

    def images(self, pairs: pl.DataFrame) -> NDArray[np.float32]:
        return unit(pairs["angle"].to_list())

    def texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return unit([float(text) for text in texts])


def unit(angles: Sequence[float]) -> NDArray[np.float32]:
    turned = np.deg2rad(np.asarray(angles, np.float64))
    return np.stack([np.cos(turned), np.sin(turned)], axis=1).astype(np.float32)


def pairs(*rows: tuple[float, str, int | None], split: str = "test") -> pl.DataFrame:
    keys, captions = [f"k{index}" for index in range(len(rows))], [[{"text": text}, {"text": "0"}] for _, text, _ in rows]
    angles, labels = [row[0] for row in rows], [row[2] for row in rows]
    return pl.DataFrame({"key": keys, "captions": captions, "angle": angles, "label": labels, "split": [split] * len(rows)})


def test_another_pairs_text_of_the_class_is_a_hit() -> None:
    table = pairs((0, "50", 1), (60, "4", 1), (90, "100", 2), (180, "80", 3), (5, "5", None))
    image_to_text, text_to_image = Config().build().run(Given(), table, "set", 0)
    assert (image_to_text.set, image_to_text.task, image_to_text.metric, image_to_text.n) == ("set", "class-retrieval", "image_to_text", 4)
    # Nearest texts of 0, 60, 90, 180 degrees are 4, 50, 80 or 100 (the first of both), 100; classes 1, 1, 2, 2.
    assert image_to_text.per_example is not None
    assert image_to_text.per_example.tolist() == [1, 1, 1, 0]
    # Nearest pictures of 50, 4, 100, 80 degrees are 60, 0, 90, 90.
    assert text_to_image.value == 0.75


def test_hits_do_not_depend_on_the_partner() -> None:
    label_N = np.array([0, 0, 1])
    assert hits(unit([0, 1, 90]), unit([1, 0, 90]), label_N).tolist() == [1, 1, 1]
    assert hits(unit([0, 1, 90]), unit([90, 91, 0]), label_N).tolist() == [0, 0, 0]


def test_sets_without_classes_are_refused() -> None:
    with pytest.raises(DataError, match="no classes"):
        Config().build().run(Given(), pairs((0, "0", None)), "set", 0)
    with pytest.raises(DataError, match="no classes"):
        Config(label="other").build().run(Given(), pairs((0, "0", 1)), "set", 0)
    with pytest.raises(DataError, match="no such split"):
        Config(split="val").build().run(Given(), pairs((0, "0", 1)), "set", 0)
