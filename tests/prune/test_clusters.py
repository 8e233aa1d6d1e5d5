from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import reduce

import numpy as np
import polars as pl
import pytest
import torch

from diptych.core.errors import ConfigError, DataError
from diptych.prune.clusters import ClusterConfig, Clusters, cluster_folds, decision_order, features_of, tensor


def found(batches: Sequence[pl.DataFrame], seed: int = 0, choose: int = 4, **values: object) -> Clusters:
    state = None
    for fold in cluster_folds(ClusterConfig.parse(values), seed, lambda rows: choose):
        state = fold.finish(reduce(fold.merge, [fold.map(batch, state) for batch in batches]), state)
    assert isinstance(state, Clusters)
    return state


def test_the_clusters_are_the_same_however_the_pool_is_cut(pairs, cut, directions) -> None:
    table = pairs(directions(5, 60, 16, 0.5))
    whole = found([table], sample=40)
    for sizes, seed in [([100, 100], None), ([1, 0, 250], 1), ([30] * 9, 2)]:
        parts = found(cut(table, sizes, seed), sample=40)
        assert parts.rows == 300
        np.testing.assert_array_equal(parts.centroids_KD, whole.centroids_KD)


def test_chosen_clusters_leave_rows_enough_for_each(pairs, directions) -> None:
    table = pairs(directions(3, 40, 8, 0.5))
    assert len(found([table], choose=50).centroids_KD) == 120 // 20
    assert len(found([table], choose=2).centroids_KD) == 2
    assert len(found([table.head(3)], choose=50).centroids_KD) == 1
    assert len(found([table], clusters=90).centroids_KD) == 90


def test_too_few_pairs_are_an_error(pairs, directions) -> None:
    table = pairs(directions(1, 5, 8, 0.5))
    with pytest.raises(DataError, match="at most 5"):
        found([table], clusters=6)
    with pytest.raises(DataError, match="no pairs to cluster"):
        found([table.head(0)])
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


def test_state_bytes_do_not_grow_with_the_pool() -> None:
    config = ClusterConfig.parse({"sample": 50})
    assert config.state_bytes(300, 16, lambda rows: 4) == 2 * 50 * (4 * 16 + 8)
    assert config.state_bytes(10**9, 16, lambda rows: 4) == config.state_bytes(300, 16, lambda rows: 4)


def test_labour_grows_with_the_pool_and_its_clusters() -> None:
    config = ClusterConfig.parse({"sample": 100, "iterations": 5})
    assert config.labour(60, lambda rows: 9) == (5 * 60 + 60, (5 * 60 + 60) * 3), "20 sampled pairs a cluster"
    assert config.labour(10**6, lambda rows: 2, lookups=2) == (500 + 2 * 10**6, (500 + 2 * 10**6) * 2)


def test_a_trial_takes_its_share_of_the_sample_and_enough_for_the_clusters() -> None:
    config = ClusterConfig.parse({"sample": 100_000})
    assert [config.tried_on(share).sample for share in (1.0, 0.5, 1e-6)] == [100_000, 50_000, 2048]
    assert ClusterConfig.parse({"sample": 5000, "clusters": 4000}).tried_on(0.1).sample == 4000
    assert ClusterConfig.parse({"sample": 50}).tried_on(0.1).sample == 50
