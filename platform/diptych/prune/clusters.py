"""What the methods that work inside feature clusters share: the features of a batch, a keyed sample of them, and the clusters.

Shape legend: N pairs in a batch, D feature width, K clusters, S sampled pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator

from diptych.core.chance import key_hash, key_hashes, mix
from diptych.core.config import Config
from diptych.core.errors import DataError
from diptych.core.points import Fold, Verdict
from diptych.prune.kmeans import assign, dot, spherical_kmeans

Order = Literal["hard", "easy", "random"]

ROWS_PER_CENTROID = 20
"""Fewer sampled rows than this fit a centroid badly: the number of clusters that is chosen for the user stays below it."""


class ClusterConfig(Config):
    """The parameters of a method that clusters features first."""

    clusters: int | None = Field(None, ge=1, description="feature clusters; None: chosen from the number of pairs")
    iterations: int = Field(20, ge=1, description="most iterations of k-means")
    sample: int = Field(100_000, ge=1, description="pairs whose features fit the centroids, drawn by key; the first fold holds twice as many")
    features: str = Field("pixels", min_length=1, description="image features: `pixels`, `scout`, or an open_clip model by name or directory")

    @model_validator(mode="after")
    def _sample_holds_the_clusters(self) -> Self:
        if self.clusters is not None and self.clusters > self.sample:
            raise ValueError(f"clusters ({self.clusters}) at most sample ({self.sample}): every centroid starts at a sampled pair")
        return self


@dataclass(frozen=True)
class Clusters:
    """Centroids `[K, D]` (float32, unit rows) over a pool of `rows` pairs. Costs `4 K D` bytes."""

    centroids_KD: NDArray[np.float32]
    rows: int

    def label(self, batch: pl.DataFrame) -> NDArray[np.int64]:
        """The cluster `[N]` of every pair of a batch; depends on the pair's feature alone."""
        label_N, _ = assign(features_of(batch), torch.from_numpy(self.centroids_KD))
        return label_N.numpy()

    def similarity(self, batch: pl.DataFrame, label_N: NDArray[np.int64]) -> NDArray[np.float32]:
        """Cosine `[N]` of every pair to the centroid of its cluster, in [-1, 1]; depends on the pair alone."""
        return dot(features_of(batch), torch.from_numpy(self.centroids_KD[label_N])).numpy()


@dataclass(frozen=True)
class Sample:
    """The pairs of smallest rank among `rows` seen; may hold up to twice as many as asked for, to merge in bulk."""

    rows: int
    rank_S: NDArray[np.uint64]
    feature_SD: NDArray[np.float32]

    def smallest(self, limit: int) -> Sample:
        """The `limit` rows of smallest rank, sorted by it."""
        order = np.argsort(self.rank_S)[:limit]
        return Sample(self.rows, self.rank_S[order], self.feature_SD[order])


class ClusterFold(Fold):
    """Clusters from the `sample` pairs whose key hashes smallest with the seed: the same pairs however the pool is cut.

    Args:
        config: sizes and iterations.
        seed: names the draw of the sample and of the first centroids.
        choose: number of clusters for a number of pairs, used when `config.clusters` is None.

    A partial costs at most `sample * (4 D + 8)` bytes a batch, twice that when merged.
    """

    def __init__(self, config: ClusterConfig, seed: int, choose: Callable[[int], int]) -> None:
        self.config, self.seed, self.choose = config, seed, choose

    def map(self, batch: pl.DataFrame, state: Any) -> Sample:
        """The batch's own sample. Raises DataError if its features cannot be clustered."""
        del state
        rank_N = mix(self.seed, key_hash("prune.sample"), key_hashes(batch["key"]))
        return Sample(batch.height, rank_N, features_of(batch).numpy()).smallest(self.config.sample)

    def merge(self, left: Sample, right: Sample) -> Sample:
        """The smallest ranks of both."""
        rows, limit = left.rows + right.rows, self.config.sample
        # A full sample only takes what beats its largest rank: a late batch costs next to nothing.
        fresh = right.rank_S < left.rank_S.max() if len(left.rank_S) >= limit else np.ones(len(right.rank_S), dtype=bool)
        if not fresh.any():
            return Sample(rows, left.rank_S, left.feature_SD)
        rank_S = np.concatenate([left.rank_S, right.rank_S[fresh]])
        joined = Sample(rows, rank_S, np.concatenate([left.feature_SD, right.feature_SD[fresh]]))
        return joined if len(rank_S) <= 2 * limit else joined.smallest(limit)

    def finish(self, partial: Sample, state: Any) -> Clusters:
        """K-means on the sample, sorted by rank. Raises DataError if it holds fewer pairs than clusters were asked for."""
        del state
        sample = partial.smallest(self.config.sample)
        held = len(sample.rank_S)
        wanted = self.config.clusters or min(self.choose(partial.rows), max(1, held // ROWS_PER_CENTROID))
        if wanted > held:
            raise DataError.at("Fewer pairs than clusters", "clusters", wanted, f"at most {held}, the pairs there are", "lower it, or leave it out")
        fit = spherical_kmeans(torch.from_numpy(sample.feature_SD), wanted, self.config.iterations, self.seed)
        return Clusters(fit.centroids_KD.numpy(), partial.rows)


def features_of(batch: pl.DataFrame) -> torch.Tensor:
    """The column `feature` as float32 `[N, D]`, rows of norm 1 (or 0: a feature that says nothing).

    Raises DataError if the column is missing or of another type, or naming the first pair whose feature is not such a row.
    """
    kind = batch.schema.get("feature")
    if not isinstance(kind, pl.Array) or kind.inner != pl.Float32:
        raise DataError.at("The batch has no features", "column 'feature'", kind, "Array(Float32, D)", "supply the features that `features` names")
    if batch["feature"].null_count():
        key = batch.filter(pl.col("feature").is_null())["key"][0]
        raise DataError.at("A pair has no feature", key, None, "a unit vector", "compute the features again")
    values_ND = batch["feature"].rechunk().to_numpy().reshape(batch.height, kind.shape[0])
    norm_N = np.sqrt(np.einsum("nd,nd->n", values_ND, values_ND))
    good_N = (np.abs(norm_N - 1) < 1e-3) | (norm_N == 0)
    if not good_N.all():
        first = int(np.flatnonzero(~good_N)[0])
        raise DataError.at("A feature is not normalised", batch["key"][first], f"norm {norm_N[first]}", "a unit vector", "normalise the features")
    # torch refuses to promise anything about read-only memory, and polars lends nothing else.
    return torch.from_numpy(values_ND if values_ND.flags.writeable else values_ND.copy())


def decision_order(
    batch: pl.DataFrame, label_N: NDArray[np.int64], similarity_N: NDArray[np.float32], how: Order, seed: int
) -> list[NDArray[np.int64]]:
    """The rows of every cluster in the batch, first come first kept; clusters by rising label.

    `hard` puts the pairs farthest from the centroid first, `easy` the nearest, `random` draws by `(seed, key)`. Equal distances
    are told apart by key, so that the order of the batch never matters.
    """
    match how:
        case "hard":
            rank = pl.Series(similarity_N)
        case "easy":
            rank = -pl.Series(similarity_N)
        case "random":
            rank = pl.Series(mix(seed, key_hash("prune.order"), key_hashes(batch["key"])))
    frame = pl.DataFrame({"label": label_N, "rank": rank, "key": batch["key"]})
    order_N = frame.select(pl.arg_sort_by("label", "rank", "key")).to_series().to_numpy().astype(np.int64)
    return np.split(order_N, np.flatnonzero(np.diff(label_N[order_N])) + 1) if len(order_N) else []


def verdict(batch: pl.DataFrame, rejected_N: NDArray[np.bool_], reason: str, score_N: NDArray[np.floating[Any]]) -> Verdict:
    """Splits a batch; every rejected pair gets the one reason and its score."""
    rejected = pl.DataFrame({"key": batch["key"], "reason": pl.repeat(reason, batch.height, eager=True), "score": score_N.astype(np.float32)})
    return Verdict(kept=batch.filter(~rejected_N), rejected=rejected.filter(rejected_N))
