from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest

from diptych.core.errors import ConfigError, DataError
from diptych.core.points import Metric
from diptych.evaluate.fresh_networks import LR, Config
from diptych.pairs.dataset import PairDataset
from diptych.pairs.ingest import ingest_all
from diptych.pairs.sources import digits

FIELDS: dict[str, Any] = {
    "size_px": 8, "channels": 1, "width": 4, "depth": 1, "networks": 2,
    "training": {"epochs": 6, "lr": 0.05, "batch_size": 32, "clipping": False, "gradient_penalty": 0.0},
}  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PairDataset:
    return ingest_all(digits.Config(train=200, size_px=8, classes=(0, 1)).build(), tmp_path_factory.mktemp("fresh") / "ingest", version="0")


def measured(dataset: PairDataset, trained_on: Any, seed: int = 0, **fields: Any) -> dict[str, Metric]:
    encoder: Any = SimpleNamespace(dataset=dataset, trained_on=trained_on)
    return {row.metric: row for row in Config.parse({**FIELDS, **fields}).build().run(encoder, dataset.read(), "digits", seed)}


class Changed:
    """A data set whose table is another one."""

    def __init__(self, dataset: PairDataset, frame: pl.DataFrame) -> None:
        self.frame, self.reader = frame, dataset.reader

    def read(self) -> pl.DataFrame:
        return self.frame


def test_zeros_and_ones_are_learnt_and_rows_are_reproducible(dataset: PairDataset) -> None:
    rows = measured(dataset, dataset)
    assert rows["acc1"].value > 0.9
    assert rows["acc1"].n == len(rows["acc1"].keys) == dataset.read().filter(pl.col("split") == "test").height
    assert rows["movement"].value > 0
    again = measured(dataset, dataset)
    assert again["acc1"].value == rows["acc1"].value
    assert measured(dataset, dataset, seed=1)["movement"].value != rows["movement"].value


def test_only_the_training_pairs_teach(dataset: PairDataset) -> None:
    frame = dataset.read()
    is_train = pl.col("split") == "train"
    swapped = frame.with_columns(label=pl.when(is_train).then(1 - pl.col("label")).otherwise(pl.col("label")))
    assert measured(dataset, Changed(dataset, swapped))["acc1"].value < 0.1


def test_the_learnt_rate_is_taken_over(dataset: PairDataset) -> None:
    with_rate = Changed(dataset, dataset.read().with_columns(pl.lit(1e-5, pl.Float32).alias(LR)))
    still = measured(dataset, with_rate)
    assert still["movement"].value < 0.01
    assert still["acc1"].settings["training"]["lr"] == pytest.approx(1e-5)
    assert measured(dataset, with_rate, distilled_lr=False)["movement"].value > 0.01


def test_refusals(dataset: PairDataset) -> None:
    with pytest.raises(ConfigError, match="not at hand"):
        measured(dataset, None)
    one = dataset.read().filter((pl.col("split") == "test") | (pl.col("label") == 0))
    with pytest.raises(DataError, match="lack classes"):
        measured(dataset, Changed(dataset, one))
    with pytest.raises(DataError, match="no labelled"):
        measured(dataset, Changed(dataset, dataset.read().drop("label")))
