"""What the methods that work inside feature clusters share: the features of a batch, a keyed sample of them, and the clusters.

Shape legend: N pairs in a batch, D feature width, K clusters, S sampled pairs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator

from diptych.core.chance import key_hash, key_hashes, mix
from diptych.core.config import Config
from diptych.core.errors import DataError
from diptych.core.points import Fold, Labour
from diptych.pairs.sample import Bar, BarFold, Draw, DrawnFold
from diptych.prune.kmeans import nearest, similarity, spherical_kmeans

Order = Literal["hard", "easy", "random"]

ROWS_PER_CENTROID = 20
"""Fewer sampled rows than this fit a centroid badly: the number of clusters that is chosen for the user stays below it."""

TRIED_ON = 2048
"""Pairs in the sample of a trial, at least."""


class ClusterConfig(Config):
    """The parameters of a method that clusters features first."""

    clusters: int | None = Field(None, ge=1, description="feature clusters; None: chosen from the number of pairs")
    iterations: int = Field(20, ge=1, description="most iterations of k-means")
    sample: int = Field(100_000, ge=1, description="pairs whose features fit the centroids, drawn by key")
    features: str = Field("pixels", min_length=1, description="`pixels`, `scout`, or an open_clip model by name or directory")

    @model_validator(mode="after")
    def _sample_holds_the_clusters(self) -> Self:
        if self.clusters is not None and self.clusters > self.sample:
            raise ValueError(f"clusters ({self.clusters}) at most sample ({self.sample}): every centroid starts at a sampled pair")
        return self

    def tried_on(self, share: float) -> Self:
        """With that share of the sample, which of few pairs would else be all of them; enough of it for any clusters."""
        return self.model_copy(update={"sample": min(self.sample, max(self.clusters or 0, TRIED_ON, round(self.sample * share)))})

    def state_bytes(self, rows: int, width: int, choose: Callable[[int], int]) -> int:
        """Most memory of the folds for `rows` pairs with features of `width` floats: a sample being put in order, or the centroids."""
        sample = 2 * min(self.sample, rows) * (4 * width + 8)
        return max(sample, (self.clusters or choose(rows)) * (4 * width + 32))

    def count(self, rows: int, choose: Callable[[int], int]) -> int:
        """Clusters made of `rows` pairs; of none: 1."""
        return self.clusters or min(choose(rows), max(1, min(self.sample, rows) // ROWS_PER_CENTROID))

    def labour(self, rows: int, choose: Callable[[int], int], lookups: int = 1) -> Labour:
        """The work of fitting the clusters to a sample, and of finding every pair's so many times."""
        looks = self.iterations * min(self.sample, rows) + lookups * rows
        return Labour(looks, looks * self.count(rows, choose))


@dataclass(frozen=True)
class Clusters:
    """Centroids `[K, D]` (float32, unit rows) over a pool of `rows` pairs. Costs `4 K D` bytes."""

    centroids_KD: NDArray[np.float32]
    rows: int

    def label(self, features_ND: torch.Tensor) -> NDArray[np.int64]:
        """The cluster `[N]` of every row; depends on the row alone."""
        return nearest(features_ND, tensor(self.centroids_KD)).numpy()

    def distance(self, features_ND: torch.Tensor, label_N: NDArray[np.int64]) -> NDArray[np.float32]:
        """Cosine distance `[N]`, in [0, 2] up to rounding, of every row to the centroid of its cluster; depends on the row alone."""
        return 1 - similarity(features_ND, tensor(self.centroids_KD), torch.from_numpy(label_N)).numpy()


def cluster_folds(config: ClusterConfig, seed: int, choose: Callable[[int], int]) -> list[Fold]:
    """Two folds to `Clusters`, fitted to the `sample` pairs whose keys hash smallest with the seed: the same however the pool is cut.

    Args:
        config: sizes and iterations.
        seed: names the draw of the sample and of the first centroids.
        choose: number of clusters for a number of pairs, used when `config.clusters` is None.

    Raises what `features_of` and `fit` raise.
    """
    draw = Draw(config.sample, "prune.sample", seed)

    def fitted(feature_SD: NDArray[np.float32], bar: Bar) -> Clusters:
        return fit(feature_SD, bar.rows, config, seed, choose)

    return [BarFold(draw), DrawnFold(draw, lambda batch: features_of(batch).numpy(), fitted)]


def fit(feature_SD: NDArray[np.float32], rows: int, config: ClusterConfig, seed: int, choose: Callable[[int], int]) -> Clusters:
    """K-means on a sample of `rows` pairs. Raises DataError if it holds none, or fewer than clusters were asked for."""
    held = len(feature_SD)
    if held == 0:
        raise DataError.at("There are no pairs to cluster", "the pair table", "0 pairs", "at least one pair", "look at what left before")
    wanted = config.count(rows, choose)
    if wanted > held:
        raise DataError.at(
            "Fewer pairs than clusters", "clusters", wanted, f"at most {held}, the pairs there are", "lower it, or leave it out"
        )
    found = spherical_kmeans(tensor(feature_SD), wanted, config.iterations, seed)
    return Clusters(found.centroids_KD.numpy(), rows)


def features_of(batch: pl.DataFrame) -> torch.Tensor:
    """The column `feature` as float32 `[N, D]`, rows of norm 1 (or 0: a feature that says nothing).

    Raises DataError if the column is missing or of another type, or naming the first pair whose feature is not such a row.
    """
    kind = batch.schema.get("feature")
    if not isinstance(kind, pl.Array) or kind.inner != pl.Float32:
        raise DataError.at(
            "The batch has no features", "column 'feature'", kind, "Array(Float32, D)", "supply the features that `features` names"
        )
    if batch["feature"].null_count():
        key = batch.filter(pl.col("feature").is_null())["key"][0]
        raise DataError.at("A pair has no feature", key, None, "a unit vector", "compute the features again")
    values_ND = batch["feature"].rechunk().to_numpy().reshape(batch.height, kind.shape[0])
    norm_N = np.sqrt(np.einsum("nd,nd->n", values_ND, values_ND))
    good_N = (np.abs(norm_N - 1) < 1e-3) | (norm_N == 0)
    if not good_N.all():
        first = int(np.flatnonzero(~good_N)[0])
        raise DataError.at(
            "A feature is not normalised", batch["key"][first], f"norm {norm_N[first]}", "a unit vector", "normalise the features"
        )
    return tensor(values_ND)


def tensor(values: NDArray[np.float32]) -> torch.Tensor:
    """The array as a tensor of the same memory, also if it is read-only (as polars and Ray lend theirs): nobody writes into features."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(values)


def decision_order(
    batch: pl.DataFrame, label_N: NDArray[np.int64], distance_N: NDArray[np.float32], how: Order, seed: int
) -> list[NDArray[np.int64]]:
    """The rows of every cluster in the batch, first come first kept; clusters by rising label.

    `hard` puts the pairs farthest from the centroid first, `easy` the nearest, `random` draws by `(seed, key)`. Equal distances
    are told apart by key, so that the order of the batch never matters.
    """
    match how:
        case "hard":
            rank = -pl.Series(distance_N)
        case "easy":
            rank = pl.Series(distance_N)
        case "random":
            rank = pl.Series(mix(seed, key_hash("prune.order"), key_hashes(batch["key"])))
    frame = pl.DataFrame({"label": label_N, "rank": rank, "key": batch["key"]})
    order_N = frame.select(pl.arg_sort_by("label", "rank", "key")).to_series().to_numpy().astype(np.int64)
    return np.split(order_N, np.flatnonzero(np.diff(label_N[order_N])) + 1) if len(order_N) else []
