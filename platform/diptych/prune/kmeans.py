"""Spherical k-means: clusters of directions, by Lloyd's algorithm on the unit sphere, on CPU or GPU.

A cluster's centroid is the normalised mean of its members; a row belongs to the centroid of largest inner product. One matrix
product a block of rows is nearly all of the work. It only screens: centroids that rounding can have left in question are told apart by
float64 products, row by row. So it screens with bfloat16 where that is fast, and labels as float32 does where it is not.

Shape legend: N rows, D feature width, K centroids, B rows of a block, L lanes, M centroids of a lane, Q (row, centroid) pairs.
Source: Dhillon and Modha, Concept Decompositions for Large Sparse Text Data Using Clustering (2001), section 3; the screen and
the reseeding are ours.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import embedding_bag, normalize, pad

from diptych.core.chance import generator
from diptych.core.errors import ConfigError
from diptych.core.points import Labour

BLOCK_VALUES = 1 << 21
"""Similarities held at once, whatever N and K are: 4 MiB of bfloat16, 8 of float32; more leaves the cache of a core."""

EXACT_VALUES = 1 << 15
"""Values of a factor at a time in float64 products: more, and what lies between the steps leaves the cache (four times as slow)."""

LANES = 64
"""Centroid k lies in lane `k % LANES`: the maximum of every lane is one vector instruction a centroid, unlike that of a row."""

PACE_ROWS, PACE_LANES, PACE_ROUNDS = 8192, 8, 3
"""Rows, lanes' worth of centroids and repetitions by which the pace of this machine is taken."""


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
    screen: torch.dtype | None = None,
) -> Clustering:
    """Fits `k` unit centroids to the rows of `features_ND` (float32, L2-normalised), from `k` distinct rows drawn by `seed`.

    Stops after `iterations` updates, or when the objective (a mean of cosines, at most 1) grew by no more than `tolerance`
    in one. An empty cluster restarts at the row that is worst served, the next one at the next worst. `weights_N` (float32,
    >= 0) counts a row that often. `screen` is float32 or bfloat16; None takes the faster one on this machine. Same rows in
    the same order give the same centroids, to the bit on one kind of machine. Memory beyond the rows: `8 * block_values`
    bytes, `12 K D` and 32 N. Raises ConfigError unless 1 <= k <= rows.
    """
    usable = len(features_ND) if weights_N is None else int(weights_N.count_nonzero())
    if not 1 <= k <= usable:
        raise ConfigError.at(
            "Impossible number of clusters", "k", k, f"1 to {usable}, the rows with a weight", "lower the number of clusters"
        )
    screen = screen or fastest(features_ND.device)
    centroids_KD = _first(features_ND, weights_N, k, seed)
    total = float(len(features_ND) if weights_N is None else weights_N.double().sum())
    objectives: list[float] = []
    reseeded = 0
    for _ in range(iterations):
        label_N, score_N = _label(features_ND, centroids_KD, screen, block_values)
        sum_KD = _member_sums(features_ND, label_N, weights_N, k)
        objectives.append(float((sum_KD.double() * centroids_KD).sum()) / total)
        if len(objectives) > 1 and objectives[-1] - objectives[-2] <= tolerance:
            break
        centroids_KD, empty = _update(features_ND, label_N, score_N, weights_N, sum_KD, centroids_KD)
        reseeded += empty
    return Clustering(centroids_KD, tuple(objectives), reseeded)


def nearest(
    features_ND: torch.Tensor, centroids_KD: torch.Tensor, block_values: int = BLOCK_VALUES, screen: torch.dtype | None = None
) -> torch.Tensor:
    """The centroid of largest inner product of every row, int64 `[N]`; the first of equal ones.

    Depends on the row and the centroids alone, neither on the batch around it nor on `screen` (as in `spherical_kmeans`). Rows and
    centroids are finite float32 of norm at most 1. Memory: `8 * block_values` bytes.
    """
    label_N, _ = _label(features_ND, centroids_KD, screen or fastest(features_ND.device), block_values)
    return label_N


def assign(features_ND: torch.Tensor, centroids_KD: torch.Tensor, block_values: int = BLOCK_VALUES) -> tuple[torch.Tensor, torch.Tensor]:
    """`nearest`, and the similarity `[N]` float32 of every row to it, which depends on as little."""
    label_N = nearest(features_ND, centroids_KD, block_values)
    return label_N, similarity(features_ND, centroids_KD, label_N)


def similarity(features_ND: torch.Tensor, centroids_KD: torch.Tensor, label_N: torch.Tensor) -> torch.Tensor:
    """Inner product of every row with the centroid of its label, float32 `[N]`: summed in float64, so the same for a row in any batch."""
    similarity_N = torch.empty(len(features_ND), dtype=torch.float32, device=features_ND.device)
    for rows in _slices(len(features_ND), _exact_rows(features_ND)):
        similarity_N[rows] = _dot64(features_ND[rows], centroids_KD[label_N[rows]])
    return similarity_N


def pace(width: int, rows: int = PACE_ROWS) -> Labour:
    """Seconds of one look at a row and of one product with a centroid, in an iteration of k-means on this machine. Takes a quarter of a second."""
    features_ND = normalize(torch.from_numpy(generator(0, "pace").standard_normal((rows, width), dtype=np.float32)), dim=1)

    def seconds(k: int) -> float:
        best_s = float("inf")
        for _ in range(PACE_ROUNDS):
            started = time.perf_counter()
            spherical_kmeans(features_ND, k, 1, 0)
            best_s = min(best_s, time.perf_counter() - started)
        return best_s

    few_s, many_s = seconds(LANES), seconds(PACE_LANES * LANES)
    product_s = max(0.0, many_s - few_s) / (rows * (PACE_LANES - 1) * LANES)
    return Labour(max(0.0, few_s / rows - LANES * product_s), product_s)


def fastest(device: torch.device) -> torch.dtype:
    """The type to screen with: bfloat16 where the machine multiplies it natively, else float32."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.cpu.get_capabilities()
        native = bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return torch.bfloat16 if native else torch.float32


def _first(features_ND: torch.Tensor, weights_N: torch.Tensor | None, k: int, seed: int) -> torch.Tensor:
    """Unit centroids `[K, D]` at distinct rows that have a weight, any of them with the same odds."""
    usable = torch.arange(len(features_ND)) if weights_N is None else weights_N.cpu().nonzero().squeeze(1)
    drawn = generator(seed, "spherical-kmeans").choice(len(usable), k, replace=False, shuffle=False)
    return normalize(features_ND[usable[torch.from_numpy(drawn)].to(features_ND.device)], dim=1)


def _slices(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _exact_rows(features_ND: torch.Tensor) -> int:
    return max(1, EXACT_VALUES // features_ND.shape[1])


def _dot64(left_ND: torch.Tensor, right_ND: torch.Tensor) -> torch.Tensor:
    return (left_ND.double() * right_ND).sum(dim=1)


def _label(
    features_ND: torch.Tensor, centroids_KD: torch.Tensor, screen: torch.dtype, block_values: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Index of the nearest centroid, int64 `[N]`, settled by float64 wherever the screen leaves a doubt; and the screen's score of it."""
    k = len(centroids_KD)
    # Taking their mean off the centroids shifts all scores of a row alike. What is left is small where features share a direction,
    # as those of encoders do, and so is its rounding.
    mean_D = centroids_KD.double().mean(dim=0)
    offset_KD = centroids_KD - mean_D
    margin = slack(screen, features_ND.shape[1]) * float(offset_KD.norm(dim=1).max())
    table_KD = pad(offset_KD, (0, 0, 0, -k % LANES)).to(screen)
    block = max(1, min(block_values // len(table_KD), len(features_ND)))
    buffer_BK = torch.empty(block, len(table_KD), dtype=screen, device=features_ND.device)
    label_N = torch.empty(len(features_ND), dtype=torch.int64, device=features_ND.device)
    score_N = torch.empty(len(features_ND), dtype=torch.float32, device=features_ND.device)
    for rows in _slices(len(features_ND), block):
        block_BD = features_ND[rows]
        scores_BK = torch.mm(block_BD.to(screen), table_KD.t(), out=buffer_BK[: len(block_BD)])
        scores_BK[:, k:] = -torch.inf
        best_B, *rivals = _rivals(scores_BK, margin)
        score_N[rows] = best_B + block_BD @ mean_D.float()
        label_N[rows] = _settle(block_BD, centroids_KD, *rivals)
    return label_N, score_N


def _rivals(scores_BK: torch.Tensor, margin: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The best score of every row `[B]`, and row and column `[Q]` of all that rounding cannot tell from it."""
    grid_BML = scores_BK.view(len(scores_BK), -1, LANES)
    top_BL = grid_BML.amax(dim=1)
    best_B = top_BL.amax(dim=1).float()
    bar_B = best_B - margin - best_B.abs() * torch.finfo(scores_BK.dtype).eps
    row_P, lane_P = (top_BL >= bar_B[:, None]).nonzero(as_tuple=True)
    pair_Q, place_Q = (grid_BML[row_P, :, lane_P] >= bar_B[row_P, None]).nonzero(as_tuple=True)
    return best_B, row_P[pair_Q], place_Q * LANES + lane_P[pair_Q]


def slack(screen: torch.dtype, width: int) -> float:
    """How much the errors of two products of unit vectors can differ, before the scores themselves are rounded: a bound."""
    # A float32 sum of D products is off by at most D * eps / 2. Twice that for norms just above 1.
    summed = 2 * width * torch.finfo(torch.float32).eps
    # Either factor is off by eps / 2 of itself, so a product by eps. A little more, again, for norms just above 1.
    return summed if screen == torch.float32 else summed + 2.02 * torch.finfo(screen).eps


def _settle(block_BD: torch.Tensor, centroids_KD: torch.Tensor, row_Q: torch.Tensor, column_Q: torch.Tensor) -> torch.Tensor:
    """The best candidate `[B]` of every row by float64 products; the first one of equals."""
    contested_R = (row_Q.bincount(minlength=len(block_BD)) > 1)[row_Q].nonzero().squeeze(1)
    score_Q = torch.zeros(len(row_Q), dtype=torch.float64, device=row_Q.device)
    for piece_R in torch.split(contested_R, _exact_rows(block_BD)):
        score_Q[piece_R] = _dot64(block_BD[row_Q[piece_R]], centroids_KD[column_Q[piece_R]])
    best_B = score_Q.new_full((len(block_BD),), -torch.inf).scatter_reduce_(0, row_Q, score_Q, "amax")
    winner_Q = score_Q == best_B[row_Q]
    label_B = row_Q.new_full((len(block_BD),), len(centroids_KD))
    return label_B.scatter_reduce_(0, row_Q[winner_Q], column_Q[winner_Q], "amin")


def _member_sums(features_ND: torch.Tensor, label_N: torch.Tensor, weights_N: torch.Tensor | None, k: int) -> torch.Tensor:
    """(Weighted) sums of the members `[K, D]`, in row order: unlike an atomic scatter-add the same on every run, on a GPU too."""
    member_N = label_N.argsort(stable=True)
    size_K = label_N.bincount(minlength=k)
    share_N = None if weights_N is None else weights_N[member_N].float()
    sum_KD: torch.Tensor = embedding_bag(member_N, features_ND, size_K.cumsum(0) - size_K, mode="sum", per_sample_weights=share_N)
    return sum_KD


def _update(
    features_ND: torch.Tensor,
    label_N: torch.Tensor,
    score_N: torch.Tensor,
    weights_N: torch.Tensor | None,
    sum_KD: torch.Tensor,
    previous_KD: torch.Tensor,
) -> tuple[torch.Tensor, int]:
    """Normalised member sums, and how many clusters had no member and were reseeded."""
    # Members that cancel out leave no direction: such a cluster keeps the one it had.
    centroids_KD = torch.where(sum_KD.norm(dim=1, keepdim=True) > 0, normalize(sum_KD, dim=1), previous_KD)
    counted_N = label_N if weights_N is None else label_N[weights_N > 0]
    empty = (counted_N.bincount(minlength=len(previous_KD)) == 0).nonzero().squeeze(1)
    if len(empty):
        served_N = score_N if weights_N is None else score_N.masked_fill(weights_N == 0, torch.inf)
        centroids_KD[empty] = normalize(features_ND[served_N.argsort(stable=True)[: len(empty)]], dim=1)
    return centroids_KD, len(empty)
