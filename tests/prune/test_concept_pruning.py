from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from diptych.core.errors import ConfigError
from diptych.prune import concept_pruning as dbp
from diptych.prune.clusters import Clusters
from diptych.prune.concept_pruning import Config

GOLDEN = Path(__file__).parents[1] / "golden" / "vectors" / "concept-pruning.npz"


def uneven(directions) -> np.ndarray:
    """A tight concept and a wide one of 150 pairs each, and five small ones."""
    tight, wide, rest = directions(1, 150, 16, 0.15, 0), directions(1, 150, 16, 1.2, 1), directions(5, 20, 16, 0.4, 2)
    return np.concatenate([tight, wide, rest])


# ---------------------------------------------------------------- the pass


@pytest.mark.parametrize("select", ["hard", "easy", "random"])
def test_the_same_pairs_stay_however_the_pool_is_cut(run_pass, pairs, cut, directions, select: str) -> None:
    features_ND = uneven(directions)
    table = pairs(np.concatenate([features_ND, features_ND[:50]]))  # exact copies: ties in the distance
    method = Config(keep=0.3, clusters=12, select=select, sample=300).build(3)
    expected = run_pass(method, [table])
    assert len(expected.kept) == int(0.3 * table.height)
    for sizes, seed, buckets in [([200], None, 1), ([1, 37, 300], 5, 2), ([50] * 8, 6, 7)]:
        outcome = run_pass(method, cut(table, sizes, seed), buckets)
        assert outcome.kept == expected.kept
        assert outcome.rejected.equals(expected.rejected)
        np.testing.assert_array_equal(outcome.state.budget_K, expected.state.budget_K)


@pytest.mark.parametrize("keep", [0.07, 0.31, 0.77, 1.0])
@pytest.mark.parametrize("balance_ratio", [0.0, 0.5])
def test_budgets_meet_the_total_and_their_bounds(run_pass, pairs, directions, keep: float, balance_ratio: float) -> None:
    table = pairs(uneven(directions))
    method = Config(keep=keep, clusters=15, balance_ratio=balance_ratio, complexity_mean=0.25).build(0)
    outcome = run_pass(method, [table])
    state, total = outcome.state, int(keep * table.height)
    assert state.budget_K.sum() == len(outcome.kept) == total
    assert (state.budget_K <= state.size_K).all()
    floor = int(total / 15 * balance_ratio) if balance_ratio else 1
    assert (state.budget_K >= np.minimum(floor, state.size_K - 1)).all()
    assert state.complexity_K.mean() == pytest.approx(0.25)


@pytest.mark.parametrize("most", [dbp.TWINS_AMONG, 2])
def test_a_pair_that_left_names_the_one_of_its_concept_that_stays_and_is_most_like_it(
    run_pass, pairs, directions, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(dbp, "TWINS_AMONG", most)
    table = pairs(uneven(directions))
    outcome = run_pass(Config(keep=0.4, clusters=8).build(0), [table])
    feature_ND = table["feature"].to_numpy()
    label_N = outcome.state.clusters.label(torch.from_numpy(feature_ND.copy()))
    row_of = {key: row for row, key in enumerate(table["key"])}
    kept_K = np.array([row_of[key] for key in outcome.kept])
    for key, twin in outcome.rejected.select("key", "twin").iter_rows():
        concept = label_N[row_of[key]]
        own = kept_K[label_N[kept_K] == concept]
        # Of many, those that only just stayed: the least far from the centroid.
        own = own[np.argsort(-feature_ND[own] @ outcome.state.clusters.centroids_KD[concept])[:most]]
        assert row_of[twin] in own
        likeness = feature_ND[own] @ feature_ND[row_of[key]]
        assert feature_ND[row_of[twin]] @ feature_ND[row_of[key]] == pytest.approx(likeness.max(), abs=1e-6)


def test_a_concept_that_leaves_whole_names_nobody() -> None:
    features_ND = torch.eye(3)
    assert dbp.nearest_among(features_ND, np.array([0, 2]), np.array([], dtype=np.int64)).tolist() == [-1, -1]
    assert dbp.nearest_among(features_ND, np.array([], dtype=np.int64), np.array([1])).tolist() == []


def test_wide_concepts_get_more_than_tight_ones_of_their_size(run_pass, pairs, directions) -> None:
    table = pairs(uneven(directions))
    outcome = run_pass(Config(keep=0.25, clusters=8, complexity_mean=0.25).build(0), [table])
    tight, wide = (sum(low <= int(key[1:]) < low + 150 for key in outcome.kept) for low in (0, 150))
    assert wide > 2 * tight


@pytest.mark.parametrize(("select", "sign"), [("hard", 1), ("easy", -1)])
def test_hard_keeps_the_farthest_and_easy_the_nearest(run_pass, pairs, directions, select: str, sign: int) -> None:
    table = pairs(uneven(directions))
    method = Config(keep=0.4, clusters=5, select=select).build(0)
    outcome = run_pass(method, [table])
    features_ND = torch.from_numpy(table["feature"].to_numpy().copy())
    label_N = outcome.state.clusters.label(features_ND)
    distance_N = outcome.state.clusters.distance(features_ND, label_N)
    kept_N = table["key"].is_in(outcome.kept).to_numpy()
    for concept in range(5):
        inside = label_N == concept
        kept, left = sign * distance_N[inside & kept_N], sign * distance_N[inside & ~kept_N]
        assert not len(left) or kept.min() >= left.max()
    scores = dict(zip(table["key"], distance_N, strict=True))
    assert outcome.rejected["score"].to_list() == [scores[key] for key in outcome.rejected["key"]]
    assert set(outcome.rejected["reason"]) == {"over the concept's budget"}


def test_one_concept_keeps_its_farthest(run_pass, pairs, directions) -> None:
    outcome = run_pass(Config(keep=0.5, clusters=1).build(0), [pairs(directions(1, 40, 8, 0.5))])
    assert len(outcome.kept) == 20
    assert outcome.state.share_K.tolist() == [1.0]


@pytest.mark.parametrize("values", [{"keep": 0.01, "clusters": 10}, {"keep": 0.0001, "clusters": 1}])
def test_too_small_a_share_is_refused(run_pass, pairs, directions, values: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="do not reach for all concepts"):
        run_pass(Config.parse(values).build(0), [pairs(uneven(directions))])


def test_an_empty_concept_gets_no_budget() -> None:
    clusters = Clusters(np.eye(4, dtype=np.float32), 30)
    sizes, distances = np.array([10, 0, 10, 10]), np.array([9.0, 0.0, 0.1, 0.1])
    partial = np.stack([sizes, np.rint(distances / dbp.DISTANCE_UNIT).astype(np.int64)])
    state = dbp.BudgetFold(Config(keep=5 / 30, tau=0.01)).finish(partial, clusters)
    assert state.budget_K.tolist() == [3, 0, 1, 1]
    assert state.complexity_K[1] == pytest.approx(np.delete(state.complexity_K, 1).mean())


def test_a_concept_in_pieces_is_our_fault(run_pass, pairs, directions) -> None:
    table = pairs(directions(2, 30, 8, 0.4))
    method = Config(keep=0.5, clusters=2).build(0)
    state = run_pass(method, [table]).state
    grouped = table.with_columns(group=method.group(table, state))
    with pytest.raises(AssertionError, match="pieces"):
        method.apply(grouped.head(10), state)


def test_report_and_state(run_pass, pairs, directions) -> None:
    method = Config(keep=0.25, clusters=8).build(0)
    state = run_pass(method, [pairs(uneven(directions))]).state
    report = method.report(state)
    assert (report["pairs"], report["concepts"], report["kept"]) == (400, 8, 100)
    assert 0 < report["share_min"] <= 1 / 8 <= report["share_max"]
    assert report["complexity_min"] <= report["complexity_mean"] <= report["complexity_max"]
    arrays = [state.clusters.centroids_KD, state.size_K, state.complexity_K, state.share_K, state.budget_K]
    assert method.state_bytes(400, 16) >= sum(array.nbytes for array in arrays)


def test_configuration() -> None:
    config = Config.parse({"method": "concept-pruning", "keep": 0.8})
    assert (config.neighbours, config.tau, config.balance_ratio, config.select) == (20, 0.1, 0, "hard")
    for wrong in (
        {},
        {"keep": 0},
        {"keep": 1.5},
        {"keep": 0.5, "tau": 0},
        {"keep": 0.5, "select": "far"},
        {"keep": 0.5, "balance_ratio": 2},
    ):
        with pytest.raises(ConfigError):
            Config.parse(wrong)


# ---------------------------------------------------------------- the formulas


def test_distance_sums_are_exact_and_add_up() -> None:
    rng = np.random.default_rng(0)
    distance_N, label_N = rng.uniform(0, 2, 1000).astype(np.float32), rng.integers(7, size=1000)
    whole = dbp.distance_sums(distance_N, label_N, 8)
    parts = sum(dbp.distance_sums(distance_N[rows], label_N[rows], 8) for rows in np.split(rng.permutation(1000), [3, 400]))
    np.testing.assert_array_equal(whole, parts)
    intra_K = dbp.intra_distance(whole)
    np.testing.assert_allclose(intra_K[:7], [distance_N[label_N == j].mean(dtype=np.float64) for j in range(7)], rtol=1e-8)
    assert np.isnan(intra_K[7])


@pytest.mark.parametrize("block_rows", [4, 1024])
def test_inter_distance(block_rows: int) -> None:
    centroids_KD = normalize(torch.randn(10, 6, generator=torch.Generator().manual_seed(0)), dim=1)
    centroids_KD[3] = centroids_KD[7]  # a copy is a neighbour at distance 0, not oneself
    distance_KK = 1 - (centroids_KD.double() @ centroids_KD.double().t()).numpy()
    others = [np.sort(np.delete(distance_KK[j], j)) for j in range(10)]
    for neighbours, used in [(3, 3), (9, 9), (20, 9)]:
        found_K = dbp.inter_distance(centroids_KD, neighbours, block_rows)
        np.testing.assert_allclose(found_K, [row[:used].mean() for row in others], atol=1e-12)
    assert dbp.inter_distance(centroids_KD[:1], 20).tolist() == [0.0]


def test_missing_complexities_take_the_mean_of_the_others() -> None:
    complexity_K = np.array([0.1, np.nan, 0.3])
    assert dbp.filled(complexity_K).tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert dbp.filled(np.array([np.nan, np.nan])).tolist() == [0, 0]
    share_K = dbp.target_distribution(complexity_K, 0.1)
    np.testing.assert_allclose(share_K, np.exp([1, 2, 3]) / np.exp([1, 2, 3]).sum())
    scaled_K = dbp.complexity(np.array([1.0, 1.0, 2.0]), np.array([0.1, np.nan, 0.15]), mean=1.0)
    np.testing.assert_allclose(scaled_K, [0.5, np.nan, 1.5])


def test_a_tiny_temperature_does_not_overflow() -> None:
    assert dbp.target_distribution(np.array([0.2, 0.5, 0.1]), 1e-9).tolist() == [0, 1, 0]
    assert dbp.complexity(np.zeros(3), np.ones(3), mean=0.25).tolist() == [0, 0, 0]


@pytest.mark.parametrize("seed", range(20))
def test_allocation_is_the_nearest_point_inside_the_bounds(seed: int) -> None:
    rng = np.random.default_rng(seed)
    size_K = rng.integers(0, 60, 25)
    share_K = rng.dirichlet(np.full(25, 0.3))
    lower_K, upper_K = np.minimum(1, np.maximum(size_K - 1, 0)), size_K
    total = int(rng.integers(lower_K.sum(), upper_K.sum() + 1))
    exact_K = dbp.allocate(total * share_K, lower_K, upper_K, total)
    assert exact_K.sum() == pytest.approx(total, abs=1e-9 * max(total, 1))
    assert (lower_K <= exact_K).all()
    assert (exact_K <= upper_K).all()
    # Optimality: what could still grow is no farther below its target than anything that could shrink.
    gap_K = exact_K - total * share_K
    grow, shrink = gap_K[exact_K < upper_K - 1e-9], gap_K[exact_K > lower_K + 1e-9]
    assert not len(grow) or not len(shrink) or grow.min() >= shrink.max() - 1e-7
    budget_K = dbp.round_to_total(exact_K, total)
    assert budget_K.sum() == total
    assert (lower_K <= budget_K).all()
    assert (budget_K <= upper_K).all()
    assert np.abs(budget_K - exact_K).max() < 1


@pytest.mark.parametrize("total", [0, 11])
def test_a_total_outside_the_bounds_is_refused(total: int) -> None:
    with pytest.raises(ConfigError, match="1 to 10"):
        dbp.allocate(np.array([5.0, 5.0]), np.array([1, 0]), np.array([5, 5]), total)


def test_largest_remainders_are_rounded_up() -> None:
    assert dbp.round_to_total(np.array([1.4, 2.5, 3.1]), 7).tolist() == [1, 3, 3]
    assert dbp.round_to_total(np.array([0.5, 0.5, 0.5, 0.5]), 2).tolist() == [1, 1, 0, 0]
    assert dbp.round_to_total(np.array([2.9999999999, 1.5, 1.5000000001]), 6).tolist() == [3, 1, 2]


def test_floors_of_budgets() -> None:
    sizes = np.array([0, 1, 2, 100])
    assert dbp.budget_bounds(sizes, 50, 0.0).lower_K.tolist() == [-1, 0, 1, 1]
    assert dbp.budget_bounds(sizes, 50, 0.5).lower_K.tolist() == [-1, 0, 1, 6]
    assert dbp.budget_bounds(sizes, 50, 0.5).upper_K.tolist() == sizes.tolist()


def test_selection_takes_nothing_for_a_budget_of_nothing() -> None:
    ranked = [np.array([4, 2, 0]), np.array([3, 1])]
    assert dbp.select(ranked, np.array([2, 0]), "hard").tolist() == [4, 2]
    assert dbp.select(ranked, np.array([0, 1]), "easy").tolist() == [1]


def test_farthest_first_keeps_ties_in_the_order_of_the_data() -> None:
    ranked = dbp.farthest_first(np.array([0.1, 0.3, 0.3, 0.2, 0.3], dtype=np.float32), np.array([0, 0, 0, 2, 0]), 3)
    assert [rows.tolist() for rows in ranked] == [[1, 2, 4, 0], [], [3]]
    with np.load(GOLDEN) as golden:
        for name in ("a", "b"):
            ranked = dbp.farthest_first(1 - golden[f"{name}_sim_to_centroid"], golden[f"{name}_assign"], len(golden[f"{name}_centroids"]))
            np.testing.assert_array_equal(np.concatenate(ranked), golden[f"{name}_order"])


def test_default_concepts() -> None:
    assert [dbp.default_concepts(rows) for rows in (0, 150, 5000, 10**8)] == [1, 1, 50, 500]
