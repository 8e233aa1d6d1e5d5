"""The forgetting protocol: its figures by their definition, and the benchmark over sessions of a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from diptych.core.errors import ConfigError, DataError
from diptych.evaluate import forgetting
from diptych.evaluate.forgetting import Config, accuracy, backward_transfer, phase_matrix


def test_figures_by_their_definition() -> None:
    class_accuracy = np.random.default_rng(0).random((3, 6))
    matrix = phase_matrix(class_accuracy, 3)
    for session in range(3):
        for phase in range(3):
            assert matrix[session, phase] == pytest.approx(
                (class_accuracy[session, 2 * phase] + class_accuracy[session, 2 * phase + 1]) / 2
            )
    np.testing.assert_allclose(accuracy(matrix), [matrix[0, 0], matrix[1, :2].mean(), matrix[2].mean()])
    gained = (matrix[2, 0] - matrix[0, 0]) + (matrix[2, 1] - matrix[1, 1])
    np.testing.assert_allclose(backward_transfer(matrix), [0, (matrix[1, 0] - matrix[0, 0]) / 2, gained / 3])


def test_classes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match="do not divide"):
        phase_matrix(np.zeros((2, 5)), 2)


class Session:
    """A checkpoint that knows some classes: their pictures point at their names, those of others at the next class."""

    logit_scale = 1.0

    def __init__(self, knows: Sequence[int]) -> None:
        self.knows = knows

    def images(self, pairs: pl.DataFrame) -> np.ndarray:
        label = pairs["label"].to_numpy()
        return np.eye(4, dtype=np.float32)[np.where(np.isin(label, self.knows), label, (label + 1) % 4)]

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        return np.eye(4, dtype=np.float32)[[int(text.split()[-1]) for text in texts]]

    def load_pixels(self, pairs: pl.DataFrame) -> np.ndarray:
        raise AssertionError(pairs)


@pytest.fixture
def pairs(pairs_of: Callable[..., pl.DataFrame]) -> pl.DataFrame:
    label = [0, 0, 0, 1, 2, 3]
    keys = [f"p{row}" for row in range(6)]
    return pairs_of(keys, [["x"]] * 6, label=label, label_name=[f"class {each}" for each in label])


def measured(pairs: pl.DataFrame, monkeypatch: pytest.MonkeyPatch, knows: Sequence[Sequence[int]], **settings: Any) -> dict[str, float]:
    earlier = {f"session{number}": Session(known) for number, known in enumerate(knows[:-1])}
    monkeypatch.setattr(forgetting.clip, "load", lambda folder: earlier[folder.name])
    monkeypatch.setattr(forgetting, "ModelEncoder", lambda model, _: model)
    benchmark = Config(earlier=tuple(earlier), templates=("{}",), **settings).build()
    return {row.metric: row.value for row in benchmark.run(Session(knows[-1]), pairs, "set", seed=0)}


def test_what_two_sessions_leave(pairs: pl.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = measured(pairs, monkeypatch, [[0, 1], [1, 2, 3]])
    assert rows == {"acc": pytest.approx(0.75), "phase0": 0.5, "phase1": 1.0, "bwt": pytest.approx(-0.25)}


def test_what_four_sessions_leave(pairs: pl.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = measured(pairs, monkeypatch, [[0], [0, 1], [1], [0, 2, 3]])
    assert rows["bwt"] == pytest.approx((0 - 1 + 1) / 4), "the third session's own class was learnt afterwards"
    assert [rows[f"phase{number}"] for number in range(4)] == [1, 0, 1, 1]


def test_what_untrained_classes_lose(pairs: pl.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = measured(pairs, monkeypatch, [[0, 1, 2], [0], [1, 3]], untrained=True)
    assert rows == {"acc": pytest.approx(0.5), "change": pytest.approx(-0.25)}


def test_what_cannot_be_measured_is_refused(
    pairs: pl.DataFrame, monkeypatch: pytest.MonkeyPatch, table_encoder: Any, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="do not divide"):
        measured(pairs, monkeypatch, [[0], [0], [0]])
    with pytest.raises(DataError, match="no pictures to test"):
        measured(pairs.with_columns(split=pl.when(pl.col("label") == 3).then(pl.lit("train")).otherwise("split")), monkeypatch, [[0], [0]])
    blind = table_encoder({}, lambda _: np.ones(4))
    with pytest.raises(DataError, match="cannot be read for another model"):
        Config(earlier=("a",)).build().run(blind, pairs, "set", seed=0)
    with pytest.raises(ConfigError, match="earlier"):
        Config.parse({"method": "forgetting", "earlier": []})
