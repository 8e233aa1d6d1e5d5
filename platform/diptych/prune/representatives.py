"""Which pictures stand for a class: those nearest to the centres of its k-means in the logits of a trained classifier.

Source: Shen et al., Efficient Dataset Distillation through Alignment with Smooth and High-Quality Expert Trajectories (2023), section 3.3.

Shape legend: N pictures of a class, K logits, Q centres, S picks.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Index = NDArray[np.int64]
CLUSTERS = 10


def nearest_to_centres(logits_NK: Floats, centres_QK: Floats, each: int = 1, *, distinct: bool = True) -> Index:
    """Rows of the `each` pictures nearest to every centre, nearest first, centre after centre: int64 `[Q * each]`.

    With `distinct` a picture that an earlier centre took is passed over; without, as published, it may be taken twice.
    """
    distance_QN = np.linalg.norm(logits_NK[None] - centres_QK[:, None], axis=2)
    taken: list[int] = []
    for order_N in np.argsort(distance_QN, axis=1, kind="stable").tolist():
        free = [row for row in order_N if row not in taken] if distinct else order_N
        taken += free[:each]
    return np.asarray(taken, dtype=np.int64)


def representatives(logits_NK: Floats, count: int, seed: int) -> Index:
    """Rows of `count` different pictures of a class, int64 `[count]`; `count` is at most N.

    A multiple of ten takes `count / 10` pictures of each of ten centres, as published. The published code gives nothing for one picture a
    class; any other number takes one picture of each of as many centres.
    """
    from sklearn.cluster import KMeans

    assert 1 <= count <= len(logits_NK), "as many pictures as are asked for"
    clusters = CLUSTERS if count % CLUSTERS == 0 else count
    centres_QK = KMeans(n_clusters=clusters, random_state=seed % 2**32, n_init=4).fit(logits_NK).cluster_centers_
    return nearest_to_centres(logits_NK, centres_QK, count // clusters)
