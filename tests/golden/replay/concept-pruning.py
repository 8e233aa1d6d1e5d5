"""Replays concept pruning, SemDeDup inside its clusters, and the allocation problems on their own."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from diptych.prune import concept_pruning as dbp
from diptych.prune.kmeans import assign
from diptych.prune.semantic_dedup import is_copy, similarity_before_by_cluster

Array = NDArray[np.generic]

# `order` is an input of what comes after the ranking, as the card has it: it holds exact ties of one machine's float32 products.
INPUTS = (
    "*_emb", "*_centroids", "*_order", "*_num_nn", "*_temperature", "*_keep_n", "*_cls_bal_ratio", "*_semdedup_eps", "qp*_complexity", "qp*_sizes",
)  # fmt: skip

TOLERANCE = {
    "*_sim_to_centroid": (0, 1e-6),
    "*_d_intra": (1e-5, 2e-7),
    "*_d_inter": (1e-5, 0),
    "*_complexity": (2e-5, 2e-7),
    "*_probs": (2e-5, 0),
    "*exact": (0, 1e-4),
    "*official": (0, 1),
    "*_semdedup_max_sim": (0, 1e-6),
}


def replay(vectors: Mapping[str, Array]) -> dict[str, Array]:
    outputs: dict[str, Array] = {}
    for prefix in sorted({key.partition("_")[0] for key in vectors}):
        given = {key.partition("_")[2]: np.asarray(vectors[key]) for key in vectors if key.startswith(f"{prefix}_")}
        found = pipeline(given) if "emb" in given else problem(given)
        outputs |= {f"{prefix}_{key}": value for key, value in found.items()}
    return outputs


def pipeline(given: dict[str, Array]) -> dict[str, Array]:
    features_ND, centroids_KD = torch.from_numpy(given["emb"]), torch.from_numpy(given["centroids"])
    label_N, similarity_N = (found.numpy() for found in assign(features_ND, centroids_KD))
    sums_2K = dbp.distance_sums(1 - similarity_N, label_N, len(centroids_KD))
    intra_K = dbp.intra_distance(sums_2K)
    inter_K = dbp.inter_distance(centroids_KD, int(given["num_nn"]))
    complexity_K = dbp.complexity(inter_K, intra_K)
    budgets = problem(given | {"complexity": complexity_K, "sizes": sums_2K[0]})
    whole_K = np.rint(budgets["exact"]).astype(np.int64)
    ranked = np.split(given["order"], np.cumsum(sums_2K[0])[:-1])
    largest_N = similarity_before_by_cluster(features_ND, ranked)
    bounds = dbp.budget_bounds(sums_2K[0], int(given["keep_n"]), float(given["cls_bal_ratio"]))
    return {
        "assign": label_N,
        "sim_to_centroid": similarity_N,
        "order_indptr": np.concatenate([[0], np.cumsum(sums_2K[0])]),
        "d_intra": intra_K,
        "d_inter": inter_K,
        "complexity": complexity_K,
        "probs": budgets["probs"],
        "lb": bounds.lower_K.astype(np.float64),
        "ub": bounds.upper_K.astype(np.float64),
        "qp_exact": budgets["exact"],
        "qp_official": budgets["official"],
        "kept_hard": dbp.select(ranked, whole_K, "hard"),
        "kept_easy": dbp.select(ranked, whole_K, "easy"),
        "semdedup_max_sim": largest_N,
        "semdedup_remove": np.stack([is_copy(largest_N, float(epsilon)) for epsilon in given["semdedup_eps"]]),
    }


def problem(given: dict[str, Array]) -> dict[str, Array]:
    """Shares and budgets; the published code rounds half to even and lets the total drift."""
    keep_n = int(given["keep_n"])
    share_K = dbp.target_distribution(given["complexity"], float(given["temperature"]))
    lower_K, upper_K = dbp.budget_bounds(given["sizes"], keep_n, float(given["cls_bal_ratio"]))
    exact_K = dbp.allocate(keep_n * share_K, lower_K, upper_K, keep_n)
    return {"probs": share_K, "exact": exact_K, "official": np.rint(exact_K).astype(np.int64)}
