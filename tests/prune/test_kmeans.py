from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from diptych.core.errors import ConfigError
from diptych.prune.kmeans import _label, _member_sums, _update, assign, fastest, nearest, pace, similarity, spherical_kmeans


def unit(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    return normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def _step(
    features_ND: torch.Tensor, label_N: torch.Tensor, score_N: torch.Tensor, weights_N: torch.Tensor | None, previous_KD: torch.Tensor
) -> tuple[torch.Tensor, int]:
    sum_KD = _member_sums(features_ND, label_N, weights_N, len(previous_KD))
    return _update(features_ND, label_N, score_N, weights_N, sum_KD, previous_KD)


def lloyd(features_ND: np.ndarray, centroids_KD: np.ndarray, iterations: int) -> tuple[np.ndarray, list[float]]:
    """The definition, in float64 and with a loop a cluster."""
    objectives = []
    for _ in range(iterations):
        scores_NK = features_ND @ centroids_KD.T
        label_N = scores_NK.argmax(axis=1)
        objectives.append(scores_NK.max(axis=1).mean())
        mean_KD = np.stack([features_ND[label_N == j].sum(axis=0) for j in range(len(centroids_KD))])
        centroids_KD = mean_KD / np.linalg.norm(mean_KD, axis=1, keepdims=True)
    return centroids_KD, objectives


def test_follows_the_definition() -> None:
    features_ND = unit(600, 12)
    start_KD = spherical_kmeans(features_ND, 8, 0, seed=3).centroids_KD
    fit = spherical_kmeans(features_ND, 8, 6, seed=3, tolerance=-1)
    expected_KD, objectives = lloyd(features_ND.double().numpy(), start_KD.double().numpy(), 6)
    np.testing.assert_allclose(fit.centroids_KD, expected_KD, atol=1e-5)
    np.testing.assert_allclose(fit.objectives, objectives, atol=1e-6)
    assert fit.objectives == tuple(sorted(fit.objectives))


def test_starts_at_distinct_rows_and_finds_planted_clusters(directions) -> None:
    features_ND = normalize(torch.from_numpy(directions(6, 50, 32, 0.2)), dim=1)
    best = max((spherical_kmeans(features_ND, 6, 20, seed) for seed in range(8)), key=lambda fit: fit.objectives[-1])
    label_N, similarity_N = assign(features_ND, best.centroids_KD)
    assert len({tuple(members.unique().tolist()) for members in label_N.split(50)}) == 6
    assert all(len(members.unique()) == 1 for members in label_N.split(50))
    assert similarity_N.min() > 0.9


def test_the_seed_names_the_result_and_blocks_do_not_change_it() -> None:
    features_ND = unit(500, 16)
    first, again, other = (spherical_kmeans(features_ND, 10, 5, seed) for seed in (1, 1, 2))
    assert torch.equal(first.centroids_KD, again.centroids_KD)
    assert not torch.equal(first.centroids_KD, other.centroids_KD)
    small = spherical_kmeans(features_ND, 10, 5, 1, block_values=370)
    torch.testing.assert_close(small.centroids_KD, first.centroids_KD)


def test_weights_count_a_row_that_often() -> None:
    features_ND = unit(120, 6)
    weights_N = torch.arange(120).remainder(3).float()
    repeated_ND = features_ND.repeat_interleave(weights_N.long(), dim=0)
    label_N = torch.arange(120).remainder(4)
    previous_KD = unit(4, 6, seed=9)
    weighted_KD, _ = _step(features_ND, label_N, torch.ones(120), weights_N, previous_KD)
    counted_KD, _ = _step(repeated_ND, label_N.repeat_interleave(weights_N.long()), torch.ones(len(repeated_ND)), None, previous_KD)
    torch.testing.assert_close(weighted_KD, counted_KD)
    fit = spherical_kmeans(features_ND, 4, 5, seed=0, weights_N=weights_N)
    label_N, similarity_N = assign(features_ND, fit.centroids_KD)
    assert float((similarity_N * weights_N).sum() / weights_N.sum()) >= fit.objectives[0]


def test_an_empty_cluster_restarts_at_the_worst_served_row() -> None:
    features_ND = unit(10, 4)
    label_N, similarity_N = torch.zeros(10, dtype=torch.int64), torch.linspace(0.9, 0.0, 10)
    centroids_KD, empty = _step(features_ND, label_N, similarity_N, None, unit(3, 4, seed=1))
    assert empty == 2
    torch.testing.assert_close(centroids_KD[1:], features_ND[[9, 8]])
    torch.testing.assert_close(centroids_KD[0], normalize(features_ND.sum(dim=0), dim=0))
    weights_N = torch.ones(10)
    weights_N[9] = 0
    weighted_KD, _ = _step(features_ND, label_N, similarity_N, weights_N, unit(3, 4, seed=1))
    torch.testing.assert_close(weighted_KD[1:], features_ND[[8, 7]])


def test_copies_among_the_first_centroids_are_mended() -> None:
    features_ND = torch.cat([unit(1, 8).repeat(200, 1), unit(20, 8, seed=5)])
    fit = spherical_kmeans(features_ND, 6, 30, seed=0)
    label_N, _ = assign(features_ND, fit.centroids_KD)
    assert fit.reseeded > 0
    assert len(label_N.unique()) == 6


def test_members_that_cancel_out_leave_the_centroid_where_it_was() -> None:
    features_ND = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    previous_KD = torch.tensor([[0.0, 1.0]])
    centroids_KD, _ = _step(features_ND, torch.zeros(2, dtype=torch.int64), torch.zeros(2), None, previous_KD)
    assert torch.equal(centroids_KD, previous_KD)


def test_stops_when_nothing_improves() -> None:
    features_ND = torch.eye(5)
    assert len(spherical_kmeans(features_ND, 5, 50, seed=0).objectives) == 2


@pytest.mark.parametrize("k", [0, 6])
def test_an_impossible_number_of_clusters_is_refused(k: int) -> None:
    with pytest.raises(ConfigError, match="1 to 5"):
        spherical_kmeans(torch.eye(5), k, 3, seed=0)


@pytest.mark.parametrize("width", [3, 64, 300])
def test_a_row_is_assigned_alike_in_any_batch(width: int) -> None:
    features_ND = unit(700, width)
    base_KD = unit(20, width, seed=1)
    # Close rivals: float32 products cannot tell these centroids apart.
    centroids_KD = torch.cat([base_KD, normalize(base_KD + 1e-7 * unit(20, width, seed=2), dim=1), base_KD[:5]])
    label_N, similarity_N = assign(features_ND, centroids_KD)
    exact_NK = features_ND.double() @ centroids_KD.double().t()
    assert (exact_NK.max(dim=1).values - exact_NK.gather(1, label_N[:, None]).squeeze(1)).max() < 1e-14
    assert not set(label_N.tolist()) & set(range(40, 45)), "the first of equal centroids wins"
    np.testing.assert_array_equal(similarity_N, similarity(features_ND, centroids_KD, label_N))
    order_N = torch.randperm(700, generator=torch.Generator().manual_seed(0))
    for size, block_values in [(1, 1 << 20), (37, 1 << 20), (700, 45 * 13)]:
        found = [assign(part, centroids_KD, block_values) for part in features_ND[order_N].split(size)]
        assert torch.equal(torch.cat([label for label, _ in found]), label_N[order_N])
        assert torch.equal(torch.cat([similarity for _, similarity in found]), similarity_N[order_N])


@pytest.mark.parametrize("width", [2, 24, 512])
@pytest.mark.parametrize("shift", [0.0, 2.0])
def test_a_coarse_screen_labels_as_an_exact_one(width: int, shift: float) -> None:
    """With a shift all rows point one way, as features of real encoders do: scores are high and close together."""
    features_ND = normalize(unit(3000, width) + shift * unit(1, width, seed=8), dim=1)
    centroids_KD = normalize(unit(150, width, seed=1) + shift * unit(1, width, seed=8), dim=1)
    coarse_N, score_N = _label(features_ND, centroids_KD, torch.bfloat16, 1 << 16)
    exact_N, similarity_N = assign(features_ND, centroids_KD)
    assert torch.equal(coarse_N, exact_N)
    assert torch.equal(coarse_N, nearest(features_ND, centroids_KD, screen=torch.float32))
    assert torch.equal(coarse_N, (features_ND.double() @ centroids_KD.double().t()).argmax(dim=1))
    assert (score_N - similarity_N).abs().max() < 0.02
    assert ((features_ND.bfloat16() @ centroids_KD.bfloat16().t()).float().argmax(dim=1) != exact_N).any(), "the screen alone would err"


def test_a_coarse_screen_settles_near_copies_of_high_score() -> None:
    """A bfloat16 score near 0.9 is rounded by more than its product is off; copies that lie closer may land on either side."""
    base_KD = unit(70, 512)
    centroids_KD = torch.cat([base_KD, normalize(base_KD + 1e-3 * unit(70, 512, seed=1), dim=1)])
    features_ND = normalize(base_KD.repeat(60, 1) + 0.5 * unit(4200, 512, seed=2), dim=1)
    coarse_N, _ = _label(features_ND, centroids_KD, torch.bfloat16, 1 << 16)
    assert torch.equal(coarse_N, nearest(features_ND, centroids_KD, screen=torch.float32))


def test_a_coarse_screen_settles_even_errors_that_add_up() -> None:
    """All factors of the better product round down by nearly half a place, and all of the worse one up."""
    half, used = 256, 254
    down, up = 1 + 0.98 * 2.0**-8, 1 + 1.02 * 2.0**-8
    row_D, better_D, worse_D = (torch.zeros(2 * half) for _ in range(3))
    row_D[:used], row_D[half : half + used] = down / 32, up / 32
    better_D[:used], worse_D[half : half + used] = down / 16, up / 16
    row_D[used] = better_D[used] = 2.0**-5
    # With their opposites the centroids have the mean 0, and are screened as they are.
    centroids_KD = torch.stack([worse_D, better_D, -worse_D, -better_D])
    assert row_D.double() @ better_D.double() > row_D.double() @ worse_D.double()
    assert row_D.bfloat16() @ better_D.bfloat16() < row_D.bfloat16() @ worse_D.bfloat16() - 0.006
    assert nearest(row_D[None], centroids_KD, screen=torch.bfloat16).tolist() == [1]


def test_the_fit_does_not_depend_on_the_screen() -> None:
    features_ND = unit(800, 32)
    fits = [spherical_kmeans(features_ND, 12, 8, seed=0, screen=screen) for screen in (torch.float32, torch.bfloat16)]
    assert torch.equal(fits[0].centroids_KD, fits[1].centroids_KD)
    assert fastest(torch.device("cpu")) in (torch.float32, torch.bfloat16)


def test_no_rows_give_no_labels() -> None:
    label_N, similarity_N = assign(torch.empty(0, 4), unit(3, 4))
    assert label_N.shape == similarity_N.shape == (0,)
    assert label_N.dtype == torch.int64


def test_the_pace_of_a_machine_is_a_time_for_a_look_and_one_for_a_product() -> None:
    looks_s, products_s = pace(16, rows=600)
    assert 0 <= looks_s < 1
    assert 0 <= products_s < 1
    assert looks_s + products_s > 0
