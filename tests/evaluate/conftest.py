"""A checkpoint made of tables: every key and every text has its vector."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray

from diptych.pairs.schema import CAPTIONS


class TableEncoder:
    """An `Encoder` that looks features up and remembers what it was asked for."""

    def __init__(self, image_of: Mapping[str, NDArray[Any]], text_of: Callable[[str], NDArray[Any]], logit_scale: float = 100.0) -> None:
        self.image_of, self.text_of, self.logit_scale = image_of, text_of, logit_scale
        self.asked: list[str] = []

    def images(self, pairs: pl.DataFrame) -> NDArray[np.float32]:
        return unit(np.stack([self.image_of[key] for key in pairs["key"]]))

    def texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        self.asked += texts
        return unit(np.stack([self.text_of(text) for text in texts]))


def unit(feature: NDArray[Any]) -> NDArray[np.float32]:
    return np.asarray(feature / np.linalg.norm(feature, axis=-1, keepdims=True), np.float32)


def pair_table(keys: Sequence[str], captions: Sequence[Sequence[str]], **columns: Any) -> pl.DataFrame:
    held = [[{"text": text, "source": "alt", "score": None} for text in texts] for texts in captions]
    data = {"key": list(keys), "captions": held, "split": ["test"] * len(keys), **columns}
    return pl.DataFrame(data, schema_overrides={"captions": CAPTIONS, "key": pl.String, "split": pl.String})


@pytest.fixture
def table_encoder() -> type[TableEncoder]:
    return TableEncoder


@pytest.fixture
def pairs_of() -> Callable[..., pl.DataFrame]:
    return pair_table
