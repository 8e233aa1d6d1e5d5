"""SemDeDup: inside feature clusters, drop every pair that has a near copy before it.

Source: Abbas et al., SemDeDup: Data-efficient learning at web-scale through semantic deduplication (2023).
Shape legend: N pairs in a batch, M members of a cluster in decision order, D feature width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from pydantic import Field

from diptych.core.points import Fold, Labour, Need, PairMethod, Verdict
from diptych.prune.clusters import ClusterConfig, Clusters, Order, cluster_folds, decision_order, features_of
from diptych.prune.kmeans import fastest, similarity, slack
from diptych.prune.verdicts import verdict

TILE_ROWS = 2048
"""Rows and columns of the similarities held at once: 16 MiB of float32, however large a cluster is."""

SCREEN_ROWS = 512
"""The same while they are only screened: half a MiB of bfloat16, which stays in the cache of a core."""

PAIRS_A_CLUSTER = 1000
REASON = "near copy"


class Config(ClusterConfig):
    """SemDeDup. `clusters: null` takes one cluster per 1,000 pairs, fewer of many (`default_clusters`); at least 1, at most one per 20 sampled pairs."""

    method: Literal["semantic-dedup"] = "semantic-dedup"
    epsilon: float = Field(0.05, gt=0, lt=2, description="cosine distance below which a pair is a copy; 0.05 to 0.3 in the paper's tables")
    keep: Order = Field(
        "hard", description="which copy stays: the farthest from its centroid (hard), the nearest (easy), or one drawn by key"
    )

    def build(self, seed: int) -> SemanticDedup:
        """The method; `seed` names the sample, the first centroids and the order of `keep: random`."""
        return SemanticDedup(self, seed)


@dataclass(frozen=True)
class SemanticDedup(PairMethod):
    """Drops pair j iff its largest cosine to the pairs before it in its cluster exceeds `1 - epsilon`. One pass, not greedy.

    The first pair of a cluster always stays. Memory: the sample (`pairs/sample.py`), centroids of `4 K D` bytes,
    and to decide, the whole clusters at hand plus one tile of similarities.
    """

    config: Config
    seed: int
    needs = frozenset[Need]({"captions", "features"})

    def folds(self) -> Sequence[Fold]:
        """The clusters, fitted to a keyed sample."""
        return cluster_folds(self.config, self.seed, default_clusters)

    def state_bytes(self, rows: int, width: int) -> int:
        """Most memory of the state, for `rows` pairs with features of `width` floats: the merged sample, then the centroids."""
        return self.config.state_bytes(rows, width, default_clusters)

    def labour(self, rows: int) -> Labour:
        """That of the clusters, and to compare every pair with those before it in its cluster."""
        found = self.config.labour(rows, default_clusters)
        return found._replace(products=found.products + rows**2 / (2 * self.config.count(rows, default_clusters)))

    def group(self, batch: pl.DataFrame, state: Clusters) -> NDArray[np.int64]:
        """The cluster of every pair."""
        return state.label(features_of(batch))

    def apply(self, batch: pl.DataFrame, state: Clusters) -> Verdict:
        """The verdict on whole clusters (column `group`); a rejected pair's score is its largest cosine to a pair before it."""
        label_N = batch["group"].to_numpy()
        features_ND = features_of(batch)
        score_N = np.zeros(batch.height, dtype=np.float32)
        rejected_N = np.zeros(batch.height, dtype=bool)
        twin_N = np.zeros(batch.height, dtype=np.int64)
        for member_M in decision_order(batch, label_N, state.distance(features_ND, label_N), self.config.keep, self.seed):
            feature_MD = features_ND[torch.from_numpy(member_M)]
            suspect_R = np.flatnonzero(suspects(feature_MD, self.config.epsilon))
            likeness_R, place_R = nearest_before(feature_MD, suspect_R)
            copy_R = is_copy(likeness_R, self.config.epsilon)
            rows_R = member_M[suspect_R[copy_R]]
            rejected_N[rows_R], score_N[rows_R], twin_N[rows_R] = True, likeness_R[copy_R], member_M[place_R[copy_R]]
        return verdict(batch, rejected_N, REASON, score_N, batch["key"].gather(twin_N))

    def report(self, state: Clusters) -> Mapping[str, Any]:
        """How many clusters were made of how many pairs, and the width of their features."""
        return {"pairs": state.rows, "clusters": len(state.centroids_KD), "width": state.centroids_KD.shape[1]}


def default_clusters(rows: int) -> int:
    """One cluster per 1,000 pairs, and half a root of the pairs from a quarter of a million on.

    To find a pair's cluster costs as the clusters do, to compare it with its like as the pairs in one: so neither outgrows the other.
    (50,000 clusters for 440 million pairs, as published, are nearly 9,000 in each.)
    """
    return max(1, min(rows // PAIRS_A_CLUSTER, math.isqrt(rows) // 2))


def similarity_before(features_MD: torch.Tensor, tile_rows: int = TILE_ROWS) -> torch.Tensor:
    """`m_j = max(0, max_{i<j} e_i . e_j)`, float32 `[M]`, for unit rows in decision order; 0 for the first.

    The maximum down the columns of the strict upper triangle of `E E^T`, a tile at a time: `4 tile_rows^2` bytes, `M^2 D / 2`
    multiplications. The floor at 0 is the paper's code, whose lower triangle is filled with zeros.
    """
    largest_M = torch.zeros(len(features_MD), dtype=features_MD.dtype, device=features_MD.device)
    tiles = torch.split(features_MD, tile_rows)
    for j, column_TD in enumerate(tiles):
        largest_T = largest_M[j * tile_rows :][: len(column_TD)]
        for row_TD in tiles[:j]:
            torch.maximum(largest_T, (row_TD @ column_TD.t()).amax(dim=0), out=largest_T)
        torch.maximum(largest_T, (column_TD @ column_TD.t()).triu(diagonal=1).amax(dim=0), out=largest_T)
    return largest_M


def suspects(features_MD: torch.Tensor, epsilon: float, screen: torch.dtype | None = None) -> NDArray[np.bool_]:
    """Which unit rows in decision order may have a copy before them, bool `[M]`: all that do, and those that rounding cannot tell from them.

    `screen` is float32 or bfloat16, None takes the faster one on this machine; holds `4 SCREEN_ROWS^2` bytes and half of the features.
    """
    screen = screen or fastest(features_MD.device)
    # A score is half as far off as two of them are against each other; the last term is for its own rounding.
    bar = 1 - epsilon - slack(screen, features_MD.shape[1]) / 2 - 1.01 * torch.finfo(screen).eps
    largest_M = torch.full((len(features_MD),), -torch.inf, dtype=screen, device=features_MD.device)
    tiles = torch.split(features_MD.to(screen), SCREEN_ROWS)
    for j, tile_TD in enumerate(tiles):
        largest_T = largest_M[j * SCREEN_ROWS :][: len(tile_TD)]
        for before_TD in tiles[:j]:
            torch.maximum(largest_T, (tile_TD @ before_TD.t()).amax(dim=1), out=largest_T)
        own_TT = (tile_TD @ tile_TD.t()).masked_fill_(torch.ones(len(tile_TD), len(tile_TD), dtype=torch.bool).triu_(), -torch.inf)
        torch.maximum(largest_T, own_TT.amax(dim=1), out=largest_T)
    # No pair is less than 0 like one before it, as published, so a bar below it leaves the first pair alone.
    suspect_M = (largest_M.float() >= bar).cpu().numpy() if bar > 0 else np.ones(len(features_MD), dtype=bool)
    suspect_M[:1] = False
    return suspect_M


def nearest_before(
    features_MD: torch.Tensor, rows_R: NDArray[np.int64], tile_rows: int = TILE_ROWS
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """For some rows in decision order, none of them the first: cosine (at least 0) and place of the nearest before each, `[R]`. In tiles."""
    found = [np.empty(0, dtype=np.int64)]
    for start in range(0, len(rows_R), tile_rows):
        part_T = torch.from_numpy(rows_R[start : start + tile_rows])
        best_T, place_T = torch.full((len(part_T),), -torch.inf), torch.zeros(len(part_T), dtype=torch.int64)
        for first in range(0, int(part_T.max()), tile_rows):
            similarity_TU = features_MD[part_T] @ features_MD[first : first + tile_rows].t()
            place_U = torch.arange(first, first + similarity_TU.shape[1])
            value_T, column_T = similarity_TU.masked_fill(place_U[None] >= part_T[:, None], -torch.inf).max(dim=1)
            better_T = value_T > best_T
            best_T[better_T], place_T[better_T] = value_T[better_T], place_U[column_T][better_T]
        found.append(place_T.numpy())
    place_R = np.concatenate(found)
    likeness_R = similarity(features_MD[torch.from_numpy(rows_R)], features_MD, torch.from_numpy(place_R))
    return likeness_R.clamp(min=0).numpy(), place_R


def is_copy(similarity_M: NDArray[np.float32], epsilon: float) -> NDArray[np.bool_]:
    """`m_j > 1 - epsilon`, compared in float64."""
    return similarity_M.astype(np.float64) > 1 - epsilon


def similarity_before_by_cluster(features_ND: torch.Tensor, clusters: Sequence[NDArray[np.int64]]) -> NDArray[np.float32]:
    """`similarity_before` of every row of a data set; -2 in a cluster of one, as the paper's code marks what it cannot compare.

    `clusters` lists the rows of every cluster in decision order.
    """
    largest_N = np.full(len(features_ND), -2, dtype=np.float32)
    for member_M in clusters:
        if len(member_M) > 1:
            largest_N[member_M] = similarity_before(features_ND[torch.from_numpy(member_M)]).numpy()
    return largest_N
