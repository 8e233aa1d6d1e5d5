from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torch.nn.functional import normalize

from diptych.core.errors import ConfigError
from diptych.prune import kmeans
from diptych.prune.clusters import Clusters
from diptych.prune.semantic_dedup import (
    Config,
    default_clusters,
    is_copy,
    nearest_before,
    similarity_before,
    similarity_before_by_cluster,
    suspects,
)


def planted(originals: int, copies: int, width: int = 64, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Clustered features and near copies (cosine about 0.99) of some of them; and which row every row was made from."""
    rng = np.random.default_rng(seed)
    middles = rng.normal(size=(20, width))
    base_ND = middles[rng.integers(20, size=originals)] + rng.normal(size=(originals, width))
    base_ND /= np.linalg.norm(base_ND, axis=1, keepdims=True)
    source = rng.choice(originals, copies, replace=False)
    copy_ND = base_ND[source] + rng.normal(size=(copies, width)) * 0.14 / np.sqrt(width)
    return np.concatenate([base_ND, copy_ND]), np.concatenate([np.arange(originals), source])


@pytest.mark.parametrize("keep", ["hard", "easy", "random"])
def test_planted_near_copies_are_found(run_pass, pairs, keep: str) -> None:
    features_ND, source = planted(2000, 400)
    table = pairs(features_ND)
    outcome = run_pass(Config(epsilon=0.05, keep=keep, clusters=10).build(0), [table])
    left = {key: source[int(key[1:])] for key in outcome.rejected["key"]}
    doubled = set(source[2000:])
    found = doubled & set(left.values())
    kept_source = source[[int(key[1:]) for key in outcome.kept]]
    assert len(found) >= 0.95 * len(doubled)
    assert sum(origin not in doubled for origin in left.values()) < 0.02 * 2000
    assert doubled <= set(kept_source), "one of a pair of copies always stays"
    assert set(outcome.rejected["reason"]) == {"near copy"}
    assert outcome.rejected["score"].min() > 0.95


def test_the_same_pairs_stay_however_the_pool_is_cut(run_pass, pairs, cut) -> None:
    features_ND, _ = planted(400, 200)
    table = pairs(np.concatenate([features_ND, features_ND[:100]]))  # exact copies: ties in the distance
    method = Config(epsilon=0.05, clusters=6, sample=300).build(7)
    expected = run_pass(method, [table])
    assert 300 < len(expected.kept) < 500
    for sizes, seed, buckets in [([200, 200], None, 1), ([1, 37, 400], 5, 2), ([50] * 12, 6, 7)]:
        outcome = run_pass(method, cut(table, sizes, seed), buckets)
        assert outcome.kept == expected.kept
        assert outcome.rejected.equals(expected.rejected)


def test_of_exact_copies_the_smallest_key_stays(run_pass, pairs, directions) -> None:
    table = pairs(np.repeat(directions(4, 1, 8, 1.0), 5, axis=0))
    outcome = run_pass(Config(epsilon=0.01, clusters=1).build(0), [table.reverse()])
    assert outcome.kept == ["p000000", "p000005", "p000010", "p000015"]


@pytest.mark.parametrize("epsilon", [0.2, 1.0, 1.9])
def test_the_first_pair_of_a_cluster_always_stays(run_pass, pairs, directions, epsilon: float) -> None:
    table = pairs(directions(6, 30, 8, 0.3))
    outcome = run_pass(Config(epsilon=epsilon, clusters=3).build(0), [table])
    clusters = outcome.state.label(torch.from_numpy(table["feature"].to_numpy().copy()))
    kept = set(outcome.kept)
    assert {label for key, label in zip(table["key"], clusters, strict=True) if key in kept} == set(clusters)


@pytest.mark.parametrize(("keep", "stays"), [("hard", "far"), ("easy", "near")])
def test_keep_says_which_copy_stays(keep: str, stays: str) -> None:
    angles = {"near": 0.10, "far": 0.12}
    features = pl.Series([[np.cos(a), np.sin(a)] for a in angles.values()], dtype=pl.Array(pl.Float32, 2))
    batch = pl.DataFrame({"key": list(angles), "feature": features, "group": [0, 0]})
    verdict = Config(epsilon=0.01, keep=keep).build(0).apply(batch, Clusters(np.array([[1, 0]], dtype=np.float32), 2))
    assert verdict.kept["key"].to_list() == [stays]
    np.testing.assert_allclose(verdict.rejected["score"], np.cos(0.02), atol=1e-6)


@pytest.mark.parametrize("tile_rows", [1, 7, 64, 1000])
def test_similarity_before_is_the_maximum_of_the_upper_triangle(tile_rows: int) -> None:
    features_MD = normalize(torch.randn(100, 5, generator=torch.Generator().manual_seed(0)), dim=1)
    expected_M = (features_MD @ features_MD.t()).triu(diagonal=1).amax(dim=0)
    torch.testing.assert_close(similarity_before(features_MD, tile_rows), expected_M, atol=1e-6, rtol=0)
    assert similarity_before(features_MD, tile_rows)[0] == 0
    assert similarity_before(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), tile_rows).tolist() == [0, 0]


def test_a_removed_pair_still_removes_others() -> None:
    angles = torch.tensor([0.0, 0.1, 0.2])
    chain_MD = torch.stack([angles.cos(), angles.sin()], dim=1)
    assert (similarity_before(chain_MD) > np.cos(0.15)).tolist() == [False, True, True]


def test_clusters_of_one_are_marked() -> None:
    features_ND = torch.eye(3)
    largest_N = similarity_before_by_cluster(features_ND, [np.array([2]), np.array([0, 1]), np.array([], dtype=np.int64)])
    assert largest_N.tolist() == [0, 0, -2]


def test_default_clusters() -> None:
    assert [default_clusters(rows) for rows in (0, 999, 5000, 250_000, 10**6, 16 * 10**6)] == [1, 1, 5, 250, 500, 2000]


def test_configuration() -> None:
    config = Config.parse({"method": "semantic-dedup", "epsilon": 0.03})
    assert (config.epsilon, config.keep, config.features) == (0.03, "hard", "pixels")
    for wrong in ({"epsilon": 0}, {"epsilon": 2}, {"keep": "first"}, {"clusters": 0}, {"features": ""}):
        with pytest.raises(ConfigError):
            Config.parse(wrong)


def test_needs_and_report(run_pass, pairs, directions) -> None:
    method = Config(clusters=2).build(0)
    outcome = run_pass(method, [pairs(directions(2, 20, 8, 0.3))])
    assert method.needs == {"captions", "features"}
    assert method.report(outcome.state) == {"pairs": 40, "clusters": 2, "width": 8}
    assert method.state_bytes(40, 8) >= outcome.state.centroids_KD.nbytes


@pytest.mark.parametrize("tile_rows", [1, 7, 1000])
def test_nearest_before_is_the_plain_maximum(tile_rows: int) -> None:
    features_MD = normalize(torch.randn(60, 4, generator=torch.Generator().manual_seed(1)), dim=1)
    rows_R = np.array([1, 5, 20, 59])
    expected = [int((features_MD[:row] @ features_MD[row]).argmax()) for row in rows_R]
    likeness_R, place_R = nearest_before(features_MD, rows_R, tile_rows)
    assert place_R.tolist() == expected
    np.testing.assert_allclose(
        likeness_R, [float(features_MD[row] @ features_MD[place]) for row, place in zip(rows_R, expected, strict=True)], rtol=1e-6
    )
    assert [len(part) for part in nearest_before(features_MD, rows_R[:0])] == [0, 0]
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert nearest_before(opposite, np.array([1]), tile_rows)[0].tolist() == [0], "as published, no less"


@pytest.mark.parametrize("screen", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 60, 1300])
def test_suspects_are_all_copies_and_few_others(screen: torch.dtype, rows: int) -> None:
    features_MD = normalize(torch.from_numpy(planted(max(1, rows * 3 // 4), rows // 4)[0]).float(), dim=1)
    largest_M = similarity_before(features_MD).numpy()
    for epsilon in (0.01, 0.05, 0.3, 0.6):
        copy_M = is_copy(largest_M, epsilon)
        suspect_M = suspects(features_MD, epsilon, screen)
        assert suspect_M.dtype == bool
        assert not (copy_M & ~suspect_M).any()
        assert not (suspect_M & ~is_copy(largest_M, epsilon + 0.03)).any()
        assert not suspect_M[0]
    assert suspects(features_MD, 1.5, screen).sum() == len(features_MD) - 1, "everything is like the first by at least 0"


def test_a_suspect_at_the_border_is_judged_exactly(pairs) -> None:
    """Cosines a millionth on either side of the threshold, which bfloat16 cannot tell apart."""
    epsilon = 0.05
    angles = [0.0, *(float(np.arccos(1 - epsilon + off)) for off in (1e-6, -1e-6))]
    batch = pairs(
        np.array(
            [[np.cos(angle), np.sin(angle), 0] for angle in (angles[0], angles[1])] + [[0, 1, 0], [0, np.cos(angles[2]), np.sin(angles[2])]]
        )
    )
    batch = batch.with_columns(group=pl.Series([0, 0, 1, 1]))
    state = Clusters(np.eye(3, dtype=np.float32)[[0, 1]], 4)
    verdict = Config(epsilon=epsilon, keep="easy").build(0).apply(batch, state)
    assert verdict.rejected["key"].to_list() == [batch["key"][1]]


def test_a_copy_names_its_twin(run_pass, pairs) -> None:
    features_ND, source = planted(300, 100)
    outcome = run_pass(Config(epsilon=0.05, clusters=3).build(0), [pairs(features_ND)])
    hits = [source[int(key[1:])] == source[int(twin[1:])] for key, twin in outcome.rejected.select("key", "twin").iter_rows()]
    assert np.mean(hits) > 0.95


def test_its_labour_is_what_is_multiplied(pairs, directions, monkeypatch: pytest.MonkeyPatch) -> None:
    method = Config(clusters=3, iterations=1, sample=50).build(0)
    table = pairs(directions(2, 60, 8, 0.3))
    done: list[int] = []

    def counted(features_ND: torch.Tensor, centroids_KD: torch.Tensor, *rest: Any, own: Any = kmeans._label) -> Any:
        done.append(len(features_ND) * len(centroids_KD))
        return own(features_ND, centroids_KD, *rest)

    monkeypatch.setattr(kmeans, "_label", counted)
    state = None
    for fold in method.folds():
        state = fold.finish(fold.map(table, state), state)
    method.group(table, state)
    labour = method.labour(120)
    compared = 120**2 / 6  # clusters of 40, of whose pairs half come before
    assert (labour.looks, labour.products) == (50 + 120, sum(done) + compared)
    assert method.labour(0).products == 0
