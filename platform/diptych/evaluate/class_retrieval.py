"""Retrieval by class: is the text nearest to a picture one of its class, and the picture nearest to a text?

Where many pairs show the same thing, a pair's own partner is one right answer among many; the class is what can be found.

Shape legend: N pairs, D feature width.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field

from diptych.core.config import Config as BaseConfig
from diptych.core.errors import DataError
from diptych.core.points import Encoder, Metric
from diptych.evaluate.ranks import chunks
from diptych.evaluate.rows import Rows, of_split, preprocessing

TASK = "class-retrieval"


class Config(BaseConfig):
    """Retrieval among the first captions and pictures of a split."""

    method: Literal["class-retrieval"] = "class-retrieval"
    split: str = Field("test", min_length=1, description="the split to search")
    label: str = Field("label", min_length=1, description="column of classes; a pair without class is left out")

    def build(self) -> ClassRetrieval:
        """The benchmark."""
        return ClassRetrieval(self)


class ClassRetrieval:
    """The benchmark. Metrics: `image_to_text` and `text_to_image`, the shares of queries whose nearest candidate is of their class."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def run(self, encoder: Encoder, pairs: pl.DataFrame, name: str, seed: int) -> list[Metric]:
        """The rows for the set `name`. Raises DataError for an unknown split, or one without classes."""
        config = self.config
        rows = of_split(pairs, config.split)
        if config.label not in rows.columns or rows[config.label].null_count() == rows.height:
            raise DataError.at("The set has no classes to find", config.label, rows.columns, "a class a pair", "name the column in `label`")
        rows = rows.filter(pl.col(config.label).is_not_null())
        label_N = rows[config.label].to_numpy()
        texts = [captions[0]["text"] for captions in rows["captions"].to_list()]
        image_ND, text_ND = encoder.images(rows), encoder.texts(texts)
        settings: dict[str, Any] = {"split": config.split, "label": config.label, "pairs": rows.height, **preprocessing(encoder)}
        found = Rows(name, TASK, rows["key"].to_list(), seed, settings)
        return [
            found.mean("image_to_text", hits(image_ND, text_ND, label_N)),
            found.mean("text_to_image", hits(text_ND, image_ND, label_N)),
        ]


def hits(query_ND: NDArray[np.float32], found_ND: NDArray[np.float32], label_N: NDArray[Any]) -> NDArray[np.float32]:
    """1 for every query whose nearest candidate has its label, else 0, `[N]`; the first of equally near ones counts."""
    nearest = [(query_ND[part] @ found_ND.T).argmax(axis=1) for part in chunks(len(query_ND), len(found_ND))]
    return np.asarray(label_N[np.concatenate(nearest)] == label_N, dtype=np.float32)
