"""Spherical k-means: clusters of directions, by Lloyd's algorithm on the unit sphere, on CPU or GPU.

A cluster's centroid is the normalised mean of its members; a row belongs to the centroid of largest inner product. One
matrix product a block of rows is nearly all of the work, so the speed is that of the machine's `sgemm`.

Shape legend: N rows, D feature width, K centroids, B rows of a block.
Source: Dhillon and Modha, Concept Decompositions for Large Sparse Text Data Using Clustering (2001), section 3; reseeding is ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn.functional import embedding_bag, normalize

from diptych.core.chance import generator
from diptych.core.errors import ConfigError

BLOCK_VALUES = 1 << 23
"""Similarities held at once: 32 MiB of float32, whatever N and K are."""


@dataclass(frozen=True)
class Clustering:
    """What `spherical_kmeans` found.

    Attributes:
        centroids_KD: float32, unit rows.
        objectives: the (weighted) mean similarity of the rows to their centroids, before the update of every iteration made.
        reseeded: how often a cluster that had lost its members was given a new direction.
    """

    centroids_KD: torch.Tensor
    objectives: tuple[float, ...]
    reseeded: int


def spherical_kmeans(
    features_ND: torch.Tensor,
    k: int,
    iterations: int,
    seed: int,
    *,
    weights_N: torch.Tensor | None = None,
    tolerance: float = 1e-6,
    block_values: int = BLOCK_VALUES,
) -> Clustering:
    """Fits `k` unit centroids to the rows of `features_ND` (float32, L2-normalised), from `k` distinct rows drawn by `seed`.

    Stops after `iterations` updates, or when the objective (a mean of cosines, at most 1) grew by no more than `tolerance`
    in one. An empty cluster restarts at the row that is worst served, the next one at the next worst. `weights_N` (float32,
    >= 0) counts a row that often. Same rows in the same order give the same centroids, to the bit on one kind of machine.
    Memory beyond the rows: `4 * block_values` bytes, two times `4 K D`, and 24 N. Raises ConfigError unless 1 <= k <= rows.
    """
    candidates = torch.arange(len(features_ND)) if weights_N is None else weights_N.cpu().nonzero().squeeze(1)
    if not 1 <= k <= len(candidates):
        raise ConfigError.at(
            "Impossible number of clusters", "k", k, f"1 to {len(candidates)}, the rows with a weight", "lower the number of clusters"
        )
    first = generator(seed, "spherical-kmeans").choice(len(candidates), k, replace=False, shuffle=False)
    centroids_KD = normalize(features_ND[candidates[torch.from_numpy(first)].to(features_ND.device)], dim=1)
    objectives: list[float] = []
    reseeded = 0
    for _ in range(iterations):
        label_N, similarity_N = _nearest(features_ND, centroids_KD, block_values)
        objectives.append(_mean(similarity_N, weights_N))
        if len(objectives) > 1 and objectives[-1] - objectives[-2] <= tolerance:
            break
        centroids_KD, empty = _update(features_ND, label_N, similarity_N, weights_N, centroids_KD)
        reseeded += empty
    return Clustering(centroids_KD, tuple(objectives), reseeded)


def assign(features_ND: torch.Tensor, centroids_KD: torch.Tensor, block_values: int = BLOCK_VALUES) -> tuple[torch.Tensor, torch.Tensor]:
    """The centroid of largest inner product of every row: label `[N]` int64, similarity `[N]` float32.

    The result for a row depends on that row and the centroids alone, not on the batch around it: a float32 product finds the
    centroids that rounding leaves in question, float64 decides between them, and the first of equal ones wins.
    Rows and centroids are float32 of norm at most 1. Memory: `4 * block_values` bytes and a few times `8 B D`.
    """
    label_N = torch.empty(len(features_ND), dtype=torch.int64, device=features_ND.device)
    similarity_N = torch.empty(len(features_ND), dtype=torch.float32, device=features_ND.device)
    # Either of two float32 products of unit vectors is off by at most D * eps / 2; twice the sum leaves room for norms just above 1.
    slack = 2 * features_ND.shape[1] * torch.finfo(torch.float32).eps
    for rows, scores_BK in _blocks(features_ND, centroids_KD, block_values):
        label_N[rows] = _settle(features_ND[rows], centroids_KD, scores_BK, slack)
        similarity_N[rows] = dot(features_ND[rows], centroids_KD[label_N[rows]])
    return label_N, similarity_N


def dot(left_ND: torch.Tensor, right_ND: torch.Tensor) -> torch.Tensor:
    """Inner products row by row, float32 `[N]`: summed in float64, so the same for a row in any batch."""
    return _dot64(left_ND, right_ND).float()


def _dot64(left_ND: torch.Tensor, right_ND: torch.Tensor) -> torch.Tensor:
    return (left_ND.double() * right_ND.double()).sum(dim=1)


def _blocks(features_ND: torch.Tensor, centroids_KD: torch.Tensor, block_values: int) -> Iterator[tuple[slice, torch.Tensor]]:
    """Similarities `[B, K]` a block of rows; the buffer is used again for the next block."""
    block = max(1, min(block_values // len(centroids_KD), len(features_ND)))
    buffer_BK = torch.empty(block, len(centroids_KD), dtype=features_ND.dtype, device=features_ND.device)
    for start in range(0, len(features_ND), block):
        rows = slice(start, min(start + block, len(features_ND)))
        yield rows, torch.mm(features_ND[rows], centroids_KD.t(), out=buffer_BK[: rows.stop - start])


def _nearest(features_ND: torch.Tensor, centroids_KD: torch.Tensor, block_values: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As `assign`, at the precision of the float32 product: the inner loop of the fit, where no batch can differ."""
    found = [scores_BK.max(dim=1) for _, scores_BK in _blocks(features_ND, centroids_KD, block_values)]
    return torch.cat([best.indices for best in found]), torch.cat([best.values for best in found])


def _settle(block_BD: torch.Tensor, centroids_KD: torch.Tensor, scores_BK: torch.Tensor, slack: float) -> torch.Tensor:
    """Labels `[B]`; where another score comes within `slack` of the best, float64 products decide. Overwrites `scores_BK`."""
    best_B, label_B = scores_BK.max(dim=1)
    scores_BK.scatter_(1, label_B[:, None], -torch.inf)
    unsure_U = (scores_BK.amax(dim=1) >= best_B - slack).nonzero().squeeze(1)
    if len(unsure_U) == 0:
        return label_B
    scores_BK.scatter_(1, label_B[:, None], best_B[:, None])
    rival_UK = scores_BK[unsure_U] >= best_B[unsure_U, None] - slack
    exact_UK = torch.full(rival_UK.shape, -torch.inf, dtype=torch.float64, device=rival_UK.device)
    # Copies of one centroid make every row unsure: the pairs go in pieces, so that memory stays bounded even then.
    for row_P, column_P in zip(*(torch.split(index, max(len(block_BD), 1024)) for index in rival_UK.nonzero(as_tuple=True)), strict=True):
        exact_UK[row_P, column_P] = _dot64(block_BD[unsure_U[row_P]], centroids_KD[column_P])
    label_B[unsure_U] = exact_UK.argmax(dim=1)
    return label_B


def _mean(similarity_N: torch.Tensor, weights_N: torch.Tensor | None) -> float:
    if weights_N is None:
        return float(similarity_N.double().mean())
    return float((similarity_N.double() * weights_N).sum() / weights_N.double().sum())


def _update(
    features_ND: torch.Tensor, label_N: torch.Tensor, similarity_N: torch.Tensor, weights_N: torch.Tensor | None, previous_KD: torch.Tensor
) -> tuple[torch.Tensor, int]:
    """Normalised member sums, and how many clusters had no member and were reseeded."""
    k = len(previous_KD)
    # Sums over members in row order: unlike an atomic scatter-add the same on every run, on a GPU too.
    member_N = label_N.argsort(stable=True)
    size_K = label_N.bincount(minlength=k)
    start_K = size_K.cumsum(0) - size_K
    share_N = None if weights_N is None else weights_N[member_N].float()
    sum_KD = embedding_bag(member_N, features_ND, start_K, mode="sum", per_sample_weights=share_N)
    # Members that cancel out leave no direction: such a cluster keeps the one it had.
    centroids_KD = torch.where(sum_KD.norm(dim=1, keepdim=True) > 0, normalize(sum_KD, dim=1), previous_KD)
    mass_K = size_K if weights_N is None else size_K.new_zeros(k, dtype=torch.float64).index_add_(0, label_N, weights_N.double())
    empty = (mass_K == 0).nonzero().squeeze(1)
    if len(empty):
        worst = similarity_N if weights_N is None else similarity_N.masked_fill(weights_N == 0, torch.inf)
        centroids_KD[empty] = normalize(features_ND[worst.argsort(stable=True)[: len(empty)]], dim=1)
    return centroids_KD, len(empty)
