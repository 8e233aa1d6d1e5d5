"""A pass over pairs in a dozen lines, as the engine makes it: folds over batches, whole groups, a verdict on each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray

from diptych.core.points import PairMethod


@dataclass(frozen=True)
class Outcome:
    kept: list[str]
    rejected: pl.DataFrame
    state: Any


def run_pass(method: PairMethod, batches: Sequence[pl.DataFrame], buckets: int = 3) -> Outcome:
    state = None
    for fold in method.folds():
        state = fold.finish(reduce(fold.merge, [fold.map(batch, state) for batch in batches]), state)
    if method.group(batches[0].head(1), state) is not None:
        whole = pl.concat([batch.with_columns(group=pl.Series(method.group(batch, state), dtype=pl.Int64)) for batch in batches])
        batches = [whole.filter(pl.col("group") % buckets == bucket) for bucket in range(buckets)]
    verdicts = [method.apply(batch, state) for batch in batches]
    for batch, verdict in zip(batches, verdicts, strict=True):
        assert verdict.kept.columns == batch.columns
        assert sorted([*verdict.kept["key"], *verdict.rejected["key"]]) == sorted(batch["key"])
    kept = sorted(key for verdict in verdicts for key in verdict.kept["key"])
    return Outcome(kept, pl.concat([verdict.rejected for verdict in verdicts]).sort("key"), state)


def pairs(features_ND: NDArray[np.floating[Any]], prefix: str = "p") -> pl.DataFrame:
    """A pair table of normalised features."""
    unit_ND = features_ND / np.maximum(np.linalg.norm(features_ND, axis=1, keepdims=True), 1e-12)
    keys = [f"{prefix}{index:06d}" for index in range(len(unit_ND))]
    width = features_ND.shape[1]
    return pl.DataFrame({"key": keys, "feature": pl.Series(unit_ND.astype(np.float32), dtype=pl.Array(pl.Float32, width))})


def cut(table: pl.DataFrame, sizes: Sequence[int], seed: int | None = None) -> list[pl.DataFrame]:
    """The table in batches of these sizes (the rest in a last one), shuffled first if a seed is given."""
    table = table if seed is None else table.sample(fraction=1, shuffle=True, seed=seed)
    starts = np.cumsum([0, *sizes])
    stops = [*starts[1:], table.height]
    return [table.slice(start, stop - start) for start, stop in zip(starts, stops, strict=True)]


@pytest.fixture(name="run_pass")
def _run_pass() -> Callable[..., Outcome]:
    return run_pass


@pytest.fixture(name="pairs")
def _pairs() -> Callable[..., pl.DataFrame]:
    return pairs


@pytest.fixture(name="cut")
def _cut() -> Callable[..., list[pl.DataFrame]]:
    return cut


@pytest.fixture(name="directions")
def _directions() -> Callable[..., NDArray[np.float32]]:
    """`directions(centres, each, width, spread, seed)`: unit-scale normal clouds, one after another."""

    def directions(centres: int, each: int, width: int, spread: float, seed: int = 0) -> NDArray[np.float32]:
        rng = np.random.default_rng(seed)
        middle_KD = rng.normal(size=(centres, width))
        middle_KD /= np.linalg.norm(middle_KD, axis=1, keepdims=True)
        noise_ND = rng.normal(size=(centres * each, width)) * spread / np.sqrt(width)
        return (middle_KD.repeat(each, axis=0) + noise_ND).astype(np.float32)

    return directions
