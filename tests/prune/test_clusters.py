from __future__ import annotations

import warnings
from functools import reduce

import numpy as np
import polars as pl
import pytest
import torch

from diptych.core.errors import ConfigError, DataError
from diptych.prune.clusters import ClusterConfig, ClusterFold, Clusters, decision_order, features_of, tensor


def fold(seed: int = 0, choose: int = 4, **values: object) -> ClusterFold:
    return ClusterFold(ClusterConfig.parse(values), seed, lambda rows: choose)


def test_the_sample_is_bounded_and_the_same_however_the_pool_is_cut(pairs, cut, directions) -> None:
    table = pairs(directions(5, 60, 16, 0.5))
    clusters = fold(sample=40)
    whole = clusters.map(table, None)
    assert len(whole.rank_S) == 40
    for sizes, seed in [([100, 100], None), ([1, 0, 250], 1), ([30] * 9, 2)]:
        merged = reduce(clusters.merge, [clusters.map(batch, None) for batch in cut(table, sizes, seed)])
        assert merged.rows == 300
        np.testing.assert_array_equal(merged.rank_S, whole.rank_S)
        np.testing.assert_array_equal(merged.feature_SD, whole.feature_SD)
        np.testing.assert_array_equal(clusters.finish(merged, None).centroids_KD, clusters.finish(whole, None).centroids_KD)


def test_merging_is_associative(pairs, cut, directions) -> None:
    clusters = fold(sample=25)
    a, b, c = (clusters.map(batch, None) for batch in cut(pairs(directions(3, 40, 8, 0.5)), [50, 30], 3))
    left, right = clusters.merge(clusters.merge(a, b), c), clusters.merge(a, clusters.merge(b, c))
    np.testing.assert_array_equal(left.rank_S, right.rank_S)
    np.testing.assert_array_equal(left.feature_SD, right.feature_SD)


def test_the_seed_draws_the_sample(pairs, directions) -> None:
    table = pairs(directions(3, 40, 8, 0.5))
    one, other = (set(map(bytes, fold(seed, sample=30).map(table, None).feature_SD)) for seed in (0, 1))
    assert len(one & other) < 20


def test_chosen_clusters_leave_rows_enough_for_each(pairs, directions) -> None:
    table = pairs(directions(3, 40, 8, 0.5))
    assert len(fold(choose=50).finish(fold().map(table, None), None).centroids_KD) == 120 // 20
    assert len(fold(choose=2).finish(fold().map(table, None), None).centroids_KD) == 2
    assert len(fold(choose=50).finish(fold().map(table.head(3), None), None).centroids_KD) == 1
    assert len(fold(clusters=90).finish(fold().map(table, None), None).centroids_KD) == 90


def test_too_few_pairs_are_an_error(pairs, directions) -> None:
    table = pairs(directions(1, 5, 8, 0.5))
    with pytest.raises(DataError, match="at most 5"):
        fold(clusters=6).finish(fold().map(table, None), None)
    with pytest.raises(DataError, match="no pairs to cluster"):
        fold().finish(fold().map(table.head(0), None), None)
    with pytest.raises(ConfigError, match="at most sample"):
        ClusterConfig.parse({"clusters": 10, "sample": 9})


@pytest.mark.parametrize(
    ("column", "words"),
    [
        (pl.Series([[0.6, 0.8], [1.0, 1.0]], dtype=pl.Array(pl.Float32, 2)), "k1"),
        (pl.Series([[0.6, 0.8], [float("nan"), 1.0]], dtype=pl.Array(pl.Float32, 2)), "k1"),
        (pl.Series([[0.6, 0.8], None], dtype=pl.Array(pl.Float32, 2)), "A pair has no feature"),
        (pl.Series([[0.6, 0.8], [1.0, 0.0]], dtype=pl.Array(pl.Float64, 2)), "no features"),
        (pl.Series(["a", "b"]), "no features"),
    ],
)
def test_features_that_cannot_be_clustered_are_named(column: pl.Series, words: str) -> None:
    with pytest.raises(DataError, match=words):
        features_of(pl.DataFrame({"key": ["k0", "k1"], "feature": column}))


def test_a_feature_of_zeros_belongs_to_the_first_cluster() -> None:
    batch = pl.DataFrame({"key": ["k0", "k1"], "feature": pl.Series([[0.0, 0.0], [0.0, 1.0]], dtype=pl.Array(pl.Float32, 2))})
    clusters = Clusters(np.eye(2, dtype=np.float32), 2)
    features_ND = features_of(batch)
    assert clusters.label(features_ND).tolist() == [0, 1]
    assert clusters.distance(features_ND, clusters.label(features_ND)).tolist() == [1.0, 0.0]


def test_read_only_arrays_are_taken_without_a_warning() -> None:
    lent = np.eye(3, dtype=np.float32)
    lent.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(tensor(lent), torch.eye(3))
        assert Clusters(lent, 3).label(torch.eye(3)).tolist() == [0, 1, 2]


def test_decision_order_is_by_cluster_then_rank_then_key() -> None:
    batch = pl.DataFrame({"key": ["d", "a", "c", "b", "e"]})
    label_N = np.array([1, 0, 1, 1, 0])
    distance_N = np.array([0.2, 0.1, 0.2, 0.5, 0.3], dtype=np.float32)

    def named(how: str, seed: int = 0) -> list[list[str]]:
        return [batch["key"].gather(rows).to_list() for rows in decision_order(batch, label_N, distance_N, how, seed)]  # type: ignore[arg-type]

    assert named("hard") == [["e", "a"], ["b", "c", "d"]]
    assert named("easy") == [["a", "e"], ["c", "d", "b"]]
    assert {tuple(named("random", seed)[1]) for seed in range(30)} > {("b", "c", "d"), ("d", "c", "b")}
    assert decision_order(batch.head(0), label_N[:0], distance_N[:0], "hard", 0) == []


def test_state_bytes_bound_what_the_folds_hold(pairs, cut, directions) -> None:
    table = pairs(directions(5, 60, 16, 0.5))
    config = ClusterConfig.parse({"sample": 50})
    clusters = ClusterFold(config, 0, lambda rows: 4)
    merged = reduce(clusters.merge, [clusters.map(batch, None) for batch in cut(table, [100, 100])])
    held = merged.rank_S.nbytes + merged.feature_SD.nbytes
    assert held <= config.state_bytes(300, 16, lambda rows: 4) <= 4 * held
    assert config.state_bytes(10**9, 16, lambda rows: 4) == config.state_bytes(300, 16, lambda rows: 4)
