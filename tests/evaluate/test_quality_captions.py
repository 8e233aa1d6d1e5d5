from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from diptych.core.errors import ConfigError, DataError
from diptych.core.points import Metric
from diptych.evaluate.quality_captions import (
    Config,
    by_cell,
    by_place,
    dense_features,
    dense_labels,
    fit_classes,
    mean_iou,
    standardised,
)
from diptych.models import clip


@pytest.fixture(scope="module")
def model() -> clip.DualEncoder:
    return clip.create("shapes-16", 0)


def scenes(count: int, kind: Any = pl.Int64, start: int = 0) -> tuple[pl.DataFrame, np.ndarray]:
    """Pictures of 2 x 2 flat tiles, whose brightness is their class."""
    cells = np.random.default_rng(start).integers(0, 3, (count, 4))
    tiles = (cells * 100).astype(np.uint8).reshape(count, 1, 2, 2).repeat(8, axis=2).repeat(8, axis=3).repeat(3, axis=1)
    frame = pl.DataFrame({"key": [f"k{start + row}" for row in range(count)], "cells": pl.Series(cells.tolist(), dtype=pl.List(kind))})
    return frame, tiles


def measured(model: Any, kind: Any = pl.Int64, **fields: Any) -> dict[str, Metric]:
    (fit, fit_tiles), (test, test_tiles) = scenes(60, kind), scenes(30, kind, start=60)
    pairs = pl.concat([fit.with_columns(split=pl.lit("pool")), test.with_columns(split=pl.lit("test"))])
    tile_of = dict(zip(pairs["key"], np.concatenate([fit_tiles, test_tiles]), strict=True))
    encoder: Any = SimpleNamespace(model=model, load_pixels=lambda rows: np.stack([tile_of[key] for key in rows["key"]]))
    config = Config.parse({"cells": "cells", **fields})
    return {row.metric: row for row in config.build().run(encoder, pairs, "s", 0)}


def test_tiles_are_told_apart_and_more_labels_do_no_harm(model: clip.DualEncoder) -> None:
    rows = measured(model, shots=[2, 60])
    assert set(rows) == {"acc1_2", "miou_2", "acc1_60", "miou_60"}
    assert rows["acc1_60"].value > 0.95
    assert rows["miou_60"].value > 0.9
    assert rows["acc1_60"].value >= rows["acc1_2"].value
    assert rows["acc1_60"].n == 30
    assert rows["acc1_60"].settings["pictures"] == 60
    assert measured(model)["acc1"].value == rows["acc1_60"].value


def test_values_are_regressed(model: clip.DualEncoder) -> None:
    rows = measured(model, pl.Float32)
    assert rows["rmse"].value == pytest.approx(rows["mse"].value ** 0.5)
    assert rows["rmse"].value < 0.4, "a constant would miss by 0.8"


def test_the_map_runs_row_by_row_without_the_class_token(model: clip.DualEncoder) -> None:
    _, tiles = scenes(3)
    found = dense_features(model, tiles)
    assert found.shape == (3, 4, 4, 64)
    np.testing.assert_allclose(np.linalg.norm(found, axis=-1), 1, rtol=1e-5)
    changed = tiles.copy()
    changed[:, :, :4, 12:] = 255 - changed[:, :, :4, 12:]
    moved = np.abs(dense_features(model, changed) - found).sum(axis=(0, 3))
    assert np.unravel_index(moved.argmax(), moved.shape) == (0, 3)


def test_a_resnet_has_a_map_too() -> None:
    assert dense_features(clip.create("rn-nano-64", 0), np.zeros((1, 3, 64, 64), np.uint8)).shape[1:3] == (2, 2)


def test_another_size_gives_a_finer_map_and_leaves_the_model_alone(model: clip.DualEncoder) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert measured(model, size_px=32)["acc1"].value > 0.9
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert measured(model, size_px=16)["acc1"].value == measured(model)["acc1"].value
    with pytest.raises(ConfigError, match="one size only"):
        measured(clip.create("rn-nano-64", 0), size_px=32)


def test_labels_and_places() -> None:
    labels = np.array([[1, 2, 3, 4]])
    assert by_place(labels, 2, 4).tolist() == [[[1, 1, 2, 2], [3, 3, 4, 4]]]
    assert by_cell(by_place(labels, 4, 4)[..., None].astype(np.float32), 2)[..., 0].tolist() == [[1, 2, 3, 4]]
    with pytest.raises(DataError, match="does not divide"):
        by_place(labels, 3, 4)


def test_only_the_fitted_split_standardises() -> None:
    fit, test = np.array([[0.0, 5.0], [2.0, 5.0]], np.float32), np.array([[4.0, 7.0]], np.float32)
    assert standardised(fit, test)[1].tolist() == [[3.0, 0.0]], "a feature that does not vary says nothing"


def test_the_layer_is_that_of_the_least_loss() -> None:
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(50, 3)).astype(np.float32), draw.integers(0, 3, 50)
    weight, bias = (torch.from_numpy(part).double().requires_grad_(True) for part in fit_classes(x, y, 3, 0.01))
    loss = (
        torch.nn.functional.cross_entropy(torch.from_numpy(x).double() @ weight + bias, torch.from_numpy(y)) + 0.01 * weight.square().sum()
    )
    for slope in torch.autograd.grad(loss, (weight, bias)):
        assert slope.abs().max() < 1e-3


def test_intersection_over_union() -> None:
    assert mean_iou(np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1]), 5) == pytest.approx((1 / 2 + 2 / 3) / 2)


@pytest.mark.parametrize("cells", [[[1, 2, 3]], [[1, 2, 3, 4], [1]], [["a"]], None])
def test_what_is_no_grid_is_refused(cells: Any) -> None:
    frame = pl.DataFrame({"key": ["k"] * len(cells or [1]), **({"cells": cells} if cells else {})})
    with pytest.raises(DataError, match="no dense labels"):
        dense_labels(frame, "cells")


def test_other_refusals(model: clip.DualEncoder) -> None:
    with pytest.raises(ConfigError, match="More shots"):
        measured(model, shots=[61])
    with pytest.raises(DataError, match="no model to look into"):
        measured(None)
