"""Concept pruning of features, whole, beside the published steps: faiss k-means, faiss search, then a loop over clusters in NumPy.

    python tests/benchmarks/bench_concept_pruning.py [--small] [--rounds 1]

Both cluster the same 100,000 rows of 200,000 (20 iterations, 500 concepts), assign all rows, measure how near the concepts lie to each
other and how wide each is, share a budget of 30 % out by complexity, and keep the farthest of each concept. The peer assigns by a flat
inner-product index, measures each cluster in a loop and ranks it by sorting, as the published code does; its budgets are the exact solution
and not a solver's, which would only cost it more. After the clocks have stopped, the peer's steps are run on our centroids: nearly all
of the kept rows must be ours (float32 products of two libraries place the rows at a border differently).
"""

from __future__ import annotations

import argparse
import os
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import faiss
import numpy as np
import polars as pl
import torch

from diptych.core.chance import key_hash, key_hashes, mix
from diptych.prune import concept_pruning as ours_method
from diptych.prune.concept_pruning import Config

TARGET = 1.0
KEEP, NEIGHBOURS, TAU, ITERATIONS, WIDTH, TABLES = 0.3, 20, 0.1, 20, 512, 8
AGREEMENT = 0.995


def pool(count: int, concepts: int) -> pl.DataFrame:
    """Unit rows in clouds of uneven size and spread."""
    generator = torch.Generator().manual_seed(0)
    middle_KD = torch.nn.functional.normalize(torch.randn(concepts, WIDTH, generator=generator), dim=1)
    spread_K = 0.4 + 1.2 * torch.rand(concepts, generator=generator)
    label_N = torch.multinomial(torch.rand(concepts, generator=generator) ** 2, count, replacement=True, generator=generator)
    noise_ND = torch.randn(count, WIDTH, generator=generator) * (spread_K[label_N, None] / WIDTH**0.5)
    features_ND = torch.nn.functional.normalize(noise_ND + middle_KD[label_N], dim=1).numpy()
    return pl.DataFrame(
        {"key": [f"p{row:07d}" for row in range(count)], "feature": pl.Series(features_ND, dtype=pl.Array(pl.Float32, WIDTH))}
    )


def ours(frame: pl.DataFrame, config: Config) -> tuple[set[str], np.ndarray]:
    """The method as the engine runs it, table by table; kept keys and the centroids."""
    method, state = config.build(0), None
    tables = [frame.slice(start, -(-frame.height // TABLES)) for start in range(0, frame.height, -(-frame.height // TABLES))]
    for fold in method.folds():
        merged = fold.map(tables[0], state)
        for table in tables[1:]:
            merged = fold.merge(merged, fold.map(table, state))
        state = fold.finish(merged, state)
    whole = pl.concat([table.with_columns(group=pl.Series(method.group(table, state), dtype=pl.Int64)) for table in tables])
    return set(method.apply(whole, state).kept["key"]), state.clusters.centroids_KD


def fitted(sample_SD: np.ndarray, concepts: int) -> np.ndarray:
    """The peer's centroids."""
    fit = faiss.Kmeans(WIDTH, concepts, niter=ITERATIONS, nredo=1, spherical=True, max_points_per_centroid=len(sample_SD), seed=0)
    fit.train(sample_SD)
    return np.asarray(fit.centroids).reshape(concepts, WIDTH)


def published(features_ND: np.ndarray, centroids_KD: np.ndarray) -> np.ndarray:
    """The steps after clustering: the kept rows."""
    index = faiss.IndexFlatIP(WIDTH)
    index.add(centroids_KD)
    similarity_N1, label_N1 = index.search(features_ND, 1)
    near_KM, _ = index.search(centroids_KD, NEIGHBOURS + 1)
    label_N, distance_N = label_N1[:, 0], 1 - similarity_N1[:, 0]
    members = [np.flatnonzero(label_N == concept) for concept in range(len(centroids_KD))]
    intra_K = np.array([distance_N[rows].mean() if len(rows) else np.nan for rows in members])
    complexity_K = (1 - near_KM[:, 1:]).mean(axis=1) * intra_K
    sizes_K = np.array([len(rows) for rows in members])
    keep_n = int(KEEP * len(features_ND))
    share_K = ours_method.target_distribution(complexity_K, TAU)
    lower_K, upper_K = ours_method.budget_bounds(sizes_K, keep_n, 0.0)
    budget_K = ours_method.round_to_total(ours_method.allocate(keep_n * share_K, np.maximum(lower_K, 0), upper_K, keep_n), keep_n)
    return np.concatenate(
        [rows[np.argsort(-distance_N[rows], kind="stable")][:budget] for rows, budget in zip(members, budget_K, strict=True)]
    )


def main() -> None:
    """Prints one line `BENCH concept-pruning: …`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="20,000 rows and 100 concepts")
    parser.add_argument("--rounds", type=int, default=1, help="rounds, ours and the peer in turn; the best of each counts")
    options = parser.parse_args()
    count, concepts = (20_000, 100) if options.small else (200_000, 500)
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    frame = pool(count, concepts)
    config = Config(keep=KEEP, clusters=concepts, iterations=ITERATIONS, neighbours=NEIGHBOURS, tau=TAU, sample=count // 2)
    features_ND = np.ascontiguousarray(frame["feature"].to_numpy())
    sampled = np.argsort(mix(0, key_hash("prune.sample"), key_hashes(frame["key"])))[: count // 2]
    spent: dict[str, list[float]] = {"ours": [], "peer": []}
    kept: set[str] = set()
    centroids_KD = np.empty((0, WIDTH))
    for _ in range(options.rounds):
        start = time.process_time()
        kept, centroids_KD = ours(frame, config)
        spent["ours"].append(time.process_time() - start)
        start = time.process_time()
        published(features_ND, fitted(features_ND[sampled], concepts))
        spent["peer"].append(time.process_time() - start)
    other = set(frame["key"].gather(published(features_ND, centroids_KD)))
    agreement = len(kept & other) / len(kept)
    own, peer = min(spent["ours"]), min(spent["peer"])
    print(
        f"BENCH concept-pruning: ours {own:.1f} s, peer {peer:.1f} s, ratio {peer / own:.2f}, target {TARGET} "
        f"({count:,} x {WIDTH}, {concepts} concepts, {len(kept):,} kept, {agreement:.2%} of them the peer's on the same centroids)"
    )
    assert len(kept) == len(other) == int(KEEP * count)
    assert agreement >= AGREEMENT, "other pairs than the published steps keep"


if __name__ == "__main__":
    main()
