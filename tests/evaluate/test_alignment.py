"""Alignment, uniformity and the gap on features whose figures are known, and the benchmark's rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl
import pytest

from diptych.core.errors import ConfigError, DataError
from diptych.evaluate.alignment import Config, distances, modality_gap, potentials, relative_distances, uniformity


def features(pairs: int = 40, width: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    image, text = draw.normal(size=(2, pairs, width))
    text += image
    return image / np.linalg.norm(image, axis=1, keepdims=True), text / np.linalg.norm(text, axis=1, keepdims=True)


def test_figures_by_their_definition() -> None:
    image, text = features()
    both = np.concatenate([image, text])
    apart = np.square(both[:, None] - both[None]).sum(axis=2)
    upper = np.triu_indices(len(both), 1)
    assert uniformity(image, text) == pytest.approx(np.log(np.exp(-2 * apart[upper]).mean()))
    np.testing.assert_allclose(distances(image, text), np.square(image - text).sum(axis=1))
    others = apart[:40, 40:] + 1e9 * np.eye(40)
    np.testing.assert_allclose(relative_distances(image, text), np.diag(apart[:40, 40:]) - others.min(axis=1))
    assert modality_gap(image, text) == pytest.approx(np.linalg.norm(image.mean(axis=0) - text.mean(axis=0)))


def test_one_point_for_all_is_aligned_and_not_uniform() -> None:
    point = np.tile([[1.0, 0.0]], (5, 1))
    assert distances(point, point).max() == 0
    np.testing.assert_allclose(potentials(np.concatenate([point, point])), 1)
    assert modality_gap(point, -point) == 2


def test_the_rows(pairs_of: Callable[..., pl.DataFrame], table_encoder: Callable[..., Any]) -> None:
    image, text = features()
    keys = [f"p{row}" for row in range(40)]
    pairs = pairs_of(keys, [[f"text {row}", "another"] for row in range(40)])
    encoder = table_encoder(dict(zip(keys, image, strict=True)), lambda words: text[int(words.split()[1])])
    rows = {row.metric: row for row in Config().build().run(encoder, pairs, "set", seed=0)}
    assert rows["alignment"].value == pytest.approx(distances(image, text).mean(), rel=1e-5)
    assert rows["uniformity"].value == pytest.approx(uniformity(image, text), rel=1e-5)
    assert rows["gap"].value == pytest.approx(modality_gap(image, text), rel=1e-5)
    for name, row in rows.items():
        assert row.n == 40
        assert row.low <= row.value or name == "gap", "chance alone makes a gap larger, so the bootstrap's may lie above it"
        assert row.value <= row.high
        assert row.low < row.high
    fewer = {row.metric: row for row in Config(pairs=10).build().run(encoder, pairs.reverse(), "set", seed=0)}
    again = {row.metric: row for row in Config(pairs=10).build().run(encoder, pairs, "set", seed=0)}
    assert fewer["gap"].n == 10
    assert fewer["gap"].value == pytest.approx(again["gap"].value), "which pairs are looked at does not depend on their order"


def test_what_cannot_be_measured_is_refused(pairs_of: Callable[..., pl.DataFrame], table_encoder: Callable[..., Any]) -> None:
    encoder = table_encoder({}, lambda _: np.ones(2))
    with pytest.raises(DataError, match="Too few pairs"):
        Config().build().run(encoder, pairs_of(["a", "b"], [["x"], ["y"]]), "set", seed=0)
    with pytest.raises(ConfigError, match="pairs"):
        Config.parse({"method": "alignment", "pairs": 2})
