"""Density-based pruning: every concept gets a budget of pairs that grows with its complexity, and keeps its least prototypical ones.

The symbols are the paper's: concepts j of n_j pairs, C_j = d_inter,j * d_intra,j, P_j = softmax(C_j / tau), budgets x_j.
Source: Abbas et al., Effective pruning of web-scale datasets based on complexity of concept clusters (ICLR 2024), section 3.
Shape legend: N pairs in a batch, K concepts, D feature width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from pydantic import Field

from diptych.core.errors import ConfigError
from diptych.core.points import Fold, Labour, Need, PairMethod, Verdict
from diptych.prune.clusters import ClusterConfig, Clusters, Order, cluster_folds, decision_order, features_of, tensor
from diptych.prune.verdicts import verdict

REASON = "over the concept's budget"
PAIRS_A_CONCEPT = 100
MOST_CONCEPTS = 500

BLOCK_VALUES = 1 << 20
TWINS_AMONG = 1024
"""A pair's twin is looked for among so many that just stayed: among all of a concept, evidence would grow with the square of the pool."""
DISTANCE_UNIT = 2.0**-30
"""Distances are summed in whole units of this size: integers add up to the same sum however the pool is cut. It is finer than
a float32 distance, and 2^32 pairs of the largest distance, 2, fit an int64."""


class Config(ClusterConfig):
    """Density-based pruning. `clusters: null` takes one concept per 100 pairs, at most 500 (the paper's number for LAION)."""

    method: Literal["concept-pruning"] = "concept-pruning"
    keep: float = Field(gt=0, le=1, description="share of the pairs that stay")
    neighbours: int = Field(20, ge=1, description="nearest other centroids, whose mean distance is d_inter; K - 1 if there are fewer")
    tau: float = Field(0.1, gt=0, description="temperature of the softmax over complexities; the smaller, the more uneven the budgets")
    complexity_mean: float | None = Field(
        None, gt=0, description="scale complexities to this mean, so that tau means the same for any features"
    )
    balance_ratio: float = Field(0.0, ge=0, le=1, description="floor of a budget as a share of the even budget; 0: one pair")
    select: Order = Field(
        "hard", description="which pairs of a concept stay: the farthest from its centroid (hard), the nearest (easy), random"
    )

    def build(self, seed: int) -> ConceptPruning:
        """The method; `seed` names the sample, the first centroids and the draw of `select: random`."""
        return ConceptPruning(self, seed)


@dataclass(frozen=True)
class Budgets:
    """The state after both folds: `K (4 D + 32)` bytes.

    Attributes:
        clusters: the concepts.
        size_K: pairs of every concept, int64.
        complexity_K: C, float64, filled and rescaled.
        share_K: P, float64, sums to 1.
        budget_K: pairs to keep of every concept, int64.
    """

    clusters: Clusters
    size_K: NDArray[np.int64]
    complexity_K: NDArray[np.float64]
    share_K: NDArray[np.float64]
    budget_K: NDArray[np.int64]


class BudgetFold(Fold):
    """Sizes and summed distances of the concepts, then their budgets. A partial is int64 `[2, K]`: 16 K bytes."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def map(self, batch: pl.DataFrame, state: Clusters) -> NDArray[np.int64]:
        """`distance_sums` of the batch."""
        features_ND = features_of(batch)
        label_N = state.label(features_ND)
        return distance_sums(state.distance(features_ND, label_N), label_N, len(state.centroids_KD))

    def merge(self, left: NDArray[np.int64], right: NDArray[np.int64]) -> NDArray[np.int64]:
        """The sum: exact, whatever the order."""
        return left + right

    def finish(self, partial: NDArray[np.int64], state: Clusters) -> Budgets:
        """Complexity, shares and budgets. Raises ConfigError if `keep` is too small for the floors of the budgets."""
        config, size_K = self.config, partial[0]
        inter_K = inter_distance(tensor(state.centroids_KD), config.neighbours)
        complexity_K = filled(complexity(inter_K, intra_distance(partial), config.complexity_mean))
        share_K = target_distribution(complexity_K, config.tau)
        keep_n = int(config.keep * int(size_K.sum()))
        lower_K, upper_K = budget_bounds(size_K, keep_n, config.balance_ratio)
        lower_K = np.maximum(lower_K, 0)
        if not max(1, lower_K.sum()) <= keep_n:
            raise ConfigError.at(
                "The pairs to keep do not reach for all concepts", "keep", f"{config.keep}: {keep_n} of {size_K.sum()} pairs",
                f"at least {max(1, lower_K.sum())} pairs, the floors of {len(size_K)} concepts", "raise keep, or lower clusters",
            )  # fmt: skip
        exact_K = allocate(keep_n * share_K, lower_K, upper_K, keep_n)
        return Budgets(state, size_K, complexity_K, share_K, round_to_total(exact_K, keep_n))


@dataclass(frozen=True)
class ConceptPruning(PairMethod):
    """Keeps the budgeted pairs of every concept.

    Memory: the sample (`pairs/sample.py`), then `Budgets`; to decide, the whole concepts at hand.
    """

    config: Config
    seed: int
    needs = frozenset[Need]({"captions", "features"})

    def folds(self) -> Sequence[Fold]:
        """The concepts, fitted to a keyed sample; then their budgets, from all pairs."""
        return [*cluster_folds(self.config, self.seed, default_concepts), BudgetFold(self.config)]

    def state_bytes(self, rows: int, width: int) -> int:
        """Most memory of the state, for `rows` pairs with features of `width` floats: the merged sample, then the budgets."""
        return self.config.state_bytes(rows, width, default_concepts)

    def labour(self, rows: int) -> Labour:
        """That of the clusters, whose members are looked up twice: for the budgets, and to share them out."""
        return self.config.labour(rows, default_concepts, lookups=2)

    def group(self, batch: pl.DataFrame, state: Budgets) -> NDArray[np.int64]:
        """The concept of every pair."""
        return state.clusters.label(features_of(batch))

    def apply(self, batch: pl.DataFrame, state: Budgets) -> Verdict:
        """The verdict on whole concepts (column `group`).

        A rejected pair's score is its distance to the centroid, its twin the pair most like it among those of its concept that stay
        (of more than `TWINS_AMONG` the last in the ranking, which lie as far from the centroid as it does, or nearly).
        """
        label_N, features_ND = batch["group"].to_numpy(), features_of(batch)
        distance_N = state.clusters.distance(features_ND, label_N)
        rejected_N = np.ones(batch.height, dtype=bool)
        twin_N = np.full(batch.height, -1, dtype=np.int64)
        for member_M in decision_order(batch, label_N, distance_N, self.config.select, self.seed):
            concept = label_N[member_M[0]]
            assert len(member_M) == state.size_K[concept], "a concept came in pieces"
            kept_B, gone_R = np.split(member_M, [state.budget_K[concept]])
            rejected_N[kept_B] = False
            twin_N[gone_R] = nearest_among(features_ND, gone_R, kept_B[-TWINS_AMONG:])
        twins = pl.Series(twin_N).replace(-1, None)
        return verdict(batch, rejected_N, REASON, distance_N, batch["key"].gather(twins))

    def report(self, state: Budgets) -> Mapping[str, Any]:
        """Concepts, the width of features, the spread of complexities, shares and budgets, and how many concepts stay whole."""
        return {
            "pairs": int(state.size_K.sum()),
            "concepts": len(state.size_K),
            "width": state.clusters.centroids_KD.shape[1],
            "kept": int(state.budget_K.sum()),
            "whole_concepts": int((state.budget_K == state.size_K).sum()),
            **{f"complexity_{name}": float(getattr(state.complexity_K, name)()) for name in ("min", "mean", "max")},
            **{f"share_{name}": float(getattr(state.share_K, name)()) for name in ("min", "max")},
            **{f"size_{name}": int(getattr(state.size_K, name)()) for name in ("min", "max")},
            **{f"budget_{name}": int(getattr(state.budget_K, name)()) for name in ("min", "max")},
        }


def default_concepts(rows: int) -> int:
    """One concept per 100 pairs, from 1 to 500."""
    return min(MOST_CONCEPTS, max(1, rows // PAIRS_A_CONCEPT))


def distance_sums(distance_N: NDArray[np.float32], label_N: NDArray[np.int64], concepts: int) -> NDArray[np.int64]:
    """Members of every concept and their summed distance to its centroid in units of `DISTANCE_UNIT`, int64 `[2, K]`."""
    sums_2K = np.zeros((2, concepts), dtype=np.int64)
    np.add.at(sums_2K[0], label_N, 1)
    np.add.at(sums_2K[1], label_N, np.rint(distance_N / DISTANCE_UNIT).astype(np.int64))
    return sums_2K


def intra_distance(sums_2K: NDArray[np.int64]) -> NDArray[np.float64]:
    """`d_intra` `[K]`: mean of `1 - e_i . c_j` over a concept's members, from `distance_sums`; NaN for a concept without any."""
    size_K, units_K = sums_2K
    with np.errstate(invalid="ignore"):
        return np.asarray(units_K * DISTANCE_UNIT / size_K)


def inter_distance(centroids_KD: torch.Tensor, neighbours: int, block_rows: int = 1024) -> NDArray[np.float64]:
    """`d_inter` `[K]`: mean of `1 - c_j . c_k` over the `min(neighbours, K - 1)` nearest other centroids; 0 if K is 1.

    A centroid is left out of its own neighbours by its place, not for being the first hit: copies of it count. Holds
    `8 K block_rows` bytes at once.
    """
    near = min(neighbours, len(centroids_KD) - 1)
    if near == 0:
        return np.zeros(1)
    found: list[torch.Tensor] = []
    for start in range(0, len(centroids_KD), block_rows):
        similarity_BK = centroids_KD[start : start + block_rows].double() @ centroids_KD.double().t()
        similarity_BK.diagonal(offset=start).fill_(-torch.inf)
        found.append((1 - similarity_BK.topk(near, dim=1).values).mean(dim=1))
    return np.asarray(torch.cat(found).cpu().numpy())


def filled(complexity_K: NDArray[np.float64]) -> NDArray[np.float64]:
    """Complexities with NaN (a concept without pairs) replaced by the mean of the others; by 0 if there are no others."""
    missing_K = np.isnan(complexity_K)
    return np.where(missing_K, complexity_K[~missing_K].mean() if not missing_K.all() else 0.0, complexity_K)


def complexity(inter_K: NDArray[np.float64], intra_K: NDArray[np.float64], mean: float | None = None) -> NDArray[np.float64]:
    """`C = d_inter * d_intra` `[K]`, scaled to a mean over the concepts if one is given (and not all are 0); NaN stays NaN."""
    complexity_K = inter_K * intra_K
    present = float(filled(complexity_K).mean())
    return complexity_K if mean is None or present == 0 else complexity_K * (mean / present)


def target_distribution(complexity_K: NDArray[np.float64], tau: float) -> NDArray[np.float64]:
    """`P = softmax(C / tau)` `[K]`; NaN complexities are filled first."""
    scaled_K = filled(complexity_K) / tau
    weight_K = np.exp(scaled_K - scaled_K.max())
    return np.asarray(weight_K / weight_K.sum())


class Bounds(NamedTuple):
    """Least and most pairs to keep of every concept, int64 `[K]`."""

    lower_K: NDArray[np.int64]
    upper_K: NDArray[np.int64]


def budget_bounds(size_K: NDArray[np.int64], keep_n: int, balance_ratio: float) -> Bounds:
    """`min(b, n_j - 1)` and `n_j`, with b a share of the even budget, or 1: a concept of one pair may lose it.

    As published, so -1 for an empty concept; whoever needs a number of pairs clips it.
    """
    floor = 1 if balance_ratio == 0 else int(keep_n / len(size_K) * balance_ratio)
    return Bounds(np.minimum(floor, size_K - 1), np.asarray(size_K))


def allocate(target_K: NDArray[np.float64], lower_K: NDArray[np.int64], upper_K: NDArray[np.int64], total: int) -> NDArray[np.float64]:
    """The x nearest to `target_K` with sum `total` inside the bounds: `clip(target + lambda, lower, upper)` for one lambda.

    The sum is piecewise linear and never falls in lambda, with a knee where an x leaves its lower bound or meets its upper one:
    sorting the 2 K knees finds the piece, and the piece gives lambda, with no solver. Raises ConfigError unless
    `sum(lower) <= total <= sum(upper)`.
    """
    if not lower_K.sum() <= total <= upper_K.sum():
        raise ConfigError.at(
            "No allocation inside the bounds", "total", total, f"{lower_K.sum()} to {upper_K.sum()}", "change the total or the bounds"
        )
    knee = np.concatenate([lower_K - target_K, upper_K - target_K])
    order = np.argsort(knee, kind="stable")
    knee = knee[order]
    slope = np.cumsum(np.where(order < len(target_K), 1, -1))
    reached = lower_K.sum() + np.concatenate([[0.0], np.cumsum(slope[:-1] * np.diff(knee))])
    piece = min(int(np.searchsorted(reached, total, side="right")) - 1, len(knee) - 1)
    shift = knee[piece] + (total - reached[piece]) / slope[piece] if slope[piece] else knee[piece]
    return np.asarray(np.clip(target_K + shift, lower_K, upper_K))


def round_to_total(exact_K: NDArray[np.float64], total: int) -> NDArray[np.int64]:
    """Whole budgets `[K]` that sum to `total`, from exact ones that do: the largest remainders are rounded up, ties by index.

    Every budget moves by less than 1, so whole bounds still hold.
    """
    # 2.9999999999 is a 3 that met a rounding error, not a 2 with a remainder.
    near_K = np.rint(exact_K)
    exact_K = np.where(np.abs(exact_K - near_K) < 1e-6, near_K, exact_K)
    floor_K = np.floor(exact_K)
    up = np.argsort(floor_K - exact_K, kind="stable")[: total - int(floor_K.sum())]
    budget_K = floor_K.astype(np.int64)
    budget_K[up] += 1
    assert budget_K.sum() == total, "exact budgets that do not sum to the total"
    return budget_K


def nearest_among(features_ND: torch.Tensor, rows_R: NDArray[np.int64], others_B: NDArray[np.int64]) -> NDArray[np.int64]:
    """For some rows, the most similar one of some others, int64 `[R]`; -1 if there are no others. Holds `4 BLOCK_VALUES` bytes."""
    if not len(others_B):
        return np.full(len(rows_R), -1, dtype=np.int64)
    other_BD = features_ND[torch.from_numpy(others_B)]
    parts = torch.split(torch.from_numpy(rows_R), max(1, BLOCK_VALUES // len(others_B)))
    place_R = torch.cat([(features_ND[part_T] @ other_BD.t()).argmax(dim=1) for part_T in parts])
    return np.asarray(others_B[place_R.numpy()])


def farthest_first(distance_N: NDArray[np.float32], label_N: NDArray[np.int64], concepts: int) -> list[NDArray[np.int64]]:
    """The rows of every concept by falling distance to its centroid, ties in the order of the data set, as published.

    For a pool that lies in memory; over a pair table `decision_order` ranks, which breaks ties by key.
    """
    order_N = np.lexsort((-distance_N, label_N))
    return np.split(order_N, np.cumsum(np.bincount(label_N, minlength=concepts))[:-1])


def select(ranked: Sequence[NDArray[np.int64]], budget_K: NDArray[np.int64], how: Literal["hard", "easy"]) -> NDArray[np.int64]:
    """The kept rows, concept by concept: the first of a ranking for `hard`, its last for `easy` (none for a budget of 0)."""
    cut = [(0, budget) if how == "hard" else (len(rows) - budget, len(rows)) for rows, budget in zip(ranked, budget_K, strict=True)]
    return np.concatenate([rows[start:stop] for rows, (start, stop) in zip(ranked, cut, strict=True)])
