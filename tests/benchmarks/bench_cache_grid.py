"""Tip-Adapter's 20 x 20 grid on 50,000 validation features of width 512, beside the authors' loops; CPU seconds of one thread.

    python tests/benchmarks/bench_cache_grid.py [--small]

The peer is the published search in torch, float32: for every (beta, alpha) it computes affinities, exponentials, their product with the one-hot
values and the accuracy anew. Ours is float64. With 160 keys the peer runs the whole grid, and the chosen points must be equal; with
1,000 keys it runs every 50th point, its seconds are scaled to the grid, and the counts at those points are compared. Float32
may count a row otherwise that lies within rounding of a tie: one row in 10,000 is allowed.
"""

from __future__ import annotations

import argparse
import os
import time
from functools import partial

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from diptych.adapt import tip_adapter
from diptych.adapt.cache import Cache
from diptych.core.points import Examples

CLASSES, WIDTH, SCALE = 10, 512, 100.0
TARGET = 10
LIMIT_S = 5.0
CONFIG = tip_adapter.Config()
Hits = np.ndarray


def features(rows: int, seed: int) -> Examples:
    """Unit rows around ten directions, clouds that overlap."""
    random = np.random.default_rng(seed)
    middle_CD = np.random.default_rng(0).standard_normal((CLASSES, WIDTH)) / WIDTH**0.5
    label_N = np.arange(rows) % CLASSES
    feature_ND = middle_CD[label_N] + random.standard_normal((rows, WIDTH)) * (3.5 / WIDTH**0.5)
    return Examples((feature_ND / np.linalg.norm(feature_ND, axis=1, keepdims=True)).astype(np.float32), label_N)


def ours(shots: Examples, text_CD: np.ndarray, validation: Examples) -> Hits:
    return tip_adapter.search(
        Cache.of(shots, CLASSES), SCALE * text_CD.astype(np.float64), validation.feature_ND, validation.label_N,
        CONFIG.alphas.values(), CONFIG.betas.values(),
    )  # fmt: skip


def peer(shots: Examples, text_CD: np.ndarray, validation: Examples, every: int) -> Hits:
    """Right answers `[beta, alpha]`, -1 where a point was left out."""
    query_ND, key_DM, weight_DC = (torch.from_numpy(rows) for rows in (validation.feature_ND, shots.feature_ND.T, text_CD.T))
    value_MC = torch.nn.functional.one_hot(torch.from_numpy(shots.label_N), CLASSES).float()
    label_N = torch.from_numpy(validation.label_N)
    clip_NC = SCALE * query_ND @ weight_DC
    betas, alphas = CONFIG.betas.values().tolist(), CONFIG.alphas.values().tolist()
    hits = np.full((len(betas), len(alphas)), -1)
    for point in range(0, hits.size, every):
        b, a = divmod(point, len(alphas))
        affinity_NM = query_ND @ key_DM
        cache_NC = torch.exp(-(betas[b] - betas[b] * affinity_NM)) @ value_MC
        hits[b, a] = int(((clip_NC + cache_NC * alphas[a]).argmax(dim=1) == label_N).sum())
    return hits


def main() -> None:
    """Prints two lines `BENCH cache_grid …`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="5,000 queries instead of 50,000")
    queries = 5_000 if parser.parse_args().small else 50_000
    torch.set_num_threads(1)
    text = features(CLASSES * 4, 1)
    text_CD = text.feature_ND[:CLASSES]
    validation = features(queries, 2)
    for keys, every in ((160, 1), (1000, 50)):
        shots = features(keys, 3)
        runs = {"ours": partial(ours, shots, text_CD, validation), "peer": partial(peer, shots, text_CD, validation, every)}
        spent: dict[str, list[float]] = {name: [] for name in runs}
        counts: dict[str, Hits] = {}
        for _ in range(3 if every > 1 else 1):
            for name, run in runs.items():
                start = time.process_time()
                counts[name] = run()
                spent[name].append(time.process_time() - start)
        ours_s, peer_s = min(spent["ours"]), min(spent["peer"]) * every
        found, hits = counts["ours"], counts["peer"]
        ran = hits >= 0
        assert np.abs(found - hits)[ran].max() <= max(1, queries // 10_000), "other counts than the authors' loops"
        chosen = tip_adapter.choose(found, CONFIG.alphas.values(), CONFIG.betas.values(), queries)
        if every == 1:
            assert chosen == tip_adapter.choose(hits, CONFIG.alphas.values(), CONFIG.betas.values(), queries), "another point was chosen"
        print(
            f"BENCH cache_grid {keys} keys: ours {ours_s:.2f} s, peer {peer_s:.1f} s, ratio {peer_s / ours_s:.1f}, target {TARGET} "
            f"({queries} x {WIDTH}, {CLASSES} classes, 20 x 20; at most {LIMIT_S:g} s wanted; peer ran {ran.sum()} of {ran.size} points; "
            f"largest difference of counts {np.abs(found - hits)[ran].max()}; chosen alpha {chosen.alpha:g}, beta {chosen.beta:g}, "
            f"accuracy {chosen.accuracy:.4f})"
        )


if __name__ == "__main__":
    main()
