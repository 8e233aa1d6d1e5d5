"""Clusters of pictures for labelling: features on their principal axes, then k-means, with scikit-learn.

Shape legend: N pairs, D feature width, C principal axes, K clusters, S sampled pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from diptych.core.errors import DataError
from diptych.core.points import Fold
from diptych.pairs.sample import Bar, BarFold, Draw, DrawnFold

BLOCK_VALUES = 1 << 22
Real = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Axes:
    """Principal axes: `mean_D`, orthonormal `component_CD` by falling variance, and the variance on each, all float64."""

    mean_D: NDArray[np.float64]
    component_CD: NDArray[np.float64]
    variance_C: NDArray[np.float64]

    def project(self, feature_ND: Real) -> NDArray[np.float64]:
        """Coordinates `[N, C]` on the axes."""
        return np.asarray((feature_ND - self.mean_D) @ self.component_CD.T)


@dataclass(frozen=True)
class Clusters:
    """Axes and cluster centres `[K, C]` on them. They belong together: store both with the labels."""

    axes: Axes
    center_KC: NDArray[np.float64]

    def label(self, feature_ND: Real) -> NDArray[np.int64]:
        """The cluster of the nearest centre, `[N]`; the first of equally near ones. Depends on the row alone."""
        label_N = np.empty(len(feature_ND), dtype=np.int64)
        half_K = 0.5 * np.square(self.center_KC).sum(axis=1)
        block = max(1, BLOCK_VALUES // len(self.center_KC))
        for start in range(0, len(feature_ND), block):
            rows = slice(start, start + block)
            label_N[rows] = (half_K - self.axes.project(feature_ND[rows].astype(np.float64)) @ self.center_KC.T).argmin(axis=1)
        return label_N


def principal_axes(feature_SD: Real, components: int) -> Axes:
    """The first `components` principal axes of the rows; the largest entry of each is positive, so that equal rows give equal axes."""
    from sklearn.decomposition import PCA

    fit = PCA(n_components=components, svd_solver="full").fit(feature_SD.astype(np.float64))
    return Axes(fit.mean_, fit.components_, fit.explained_variance_)


def fitted(feature_SD: Real, components: int, clusters: int, seed: int) -> Clusters:
    """Axes and centres fitted to the rows: k-means from k-means++ starts that `seed` names; on one thread, so that sums come out alike."""
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    axes = principal_axes(feature_SD, components)
    with threadpool_limits(1):
        fit = KMeans(clusters, n_init=1, random_state=seed & 0xFFFFFFFF).fit(axes.project(feature_SD.astype(np.float64)))
    return Clusters(axes, np.asarray(fit.cluster_centers_, dtype=np.float64))


def cluster_folds(sample: int, components: int, clusters: int, seed: int) -> list[Fold]:
    """Two folds to `Clusters`, fitted to the `sample` pairs whose keys draw lowest: the same pairs however the pool is cut.

    Raise DataError if there are fewer pairs than clusters, or than axes.
    """
    draw = Draw(sample, "curate.sample", seed)

    def fit(feature_SD: NDArray[np.float32], bar: Bar) -> Clusters:
        del bar
        held, least = len(feature_SD), max(clusters, components, 2)
        if held < least:
            raise DataError.at("Fewer pairs than clusters or axes", "clusters, components", held, f"{least} pairs or more", "lower them")
        return fitted(feature_SD, min(components, feature_SD.shape[1]), clusters, seed)

    return [BarFold(draw), DrawnFold(draw, features_of, fit)]


def features_of(batch: pl.DataFrame) -> NDArray[np.float32]:
    """The column `feature`, float32 `[N, D]`. Raises DataError if it is missing or holds nulls."""
    kind = batch.schema.get("feature")
    if not isinstance(kind, pl.Array) or kind.inner != pl.Float32 or batch["feature"].null_count():
        raise DataError.at("The batch has no features", "column 'feature'", kind, "Array(Float32, D) without nulls")
    return np.asarray(batch["feature"].rechunk().to_numpy()).reshape(batch.height, kind.shape[0])
