"""Near-duplicate search among 64-bit picture hashes: ours band by band, beside every hash against every other.

    python tests/benchmarks/bench_duplicates.py [--small] [--rounds 2]

Hashes are random, a fifth of them with up to three bits turned of another's: what is to be found is known. Two lines: 100,000 hashes beside
the plain scan in NumPy (one row against all others at a time, population count of the difference), and 5,000 beside imagededup, which
does that scan in C++; the second line is left out where imagededup is not installed (it is no dependency: `pip install imagededup`).
Ours is what the engine runs: a group a band, then the verdict, over a polars frame. The found copies must be the same.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import time
from collections.abc import Callable

import numpy as np
import polars as pl

from diptych.prune.perceptual_duplicates import Config

RADIUS = 3
TARGET = 10.0


def hashes(count: int) -> np.ndarray:
    """Random hashes, the last fifth copies of earlier ones with 1 to 3 bits turned."""
    rng = np.random.default_rng(0)
    copies = count // 5
    own = rng.integers(0, 2**64, count - copies, dtype=np.uint64)
    masks = [sum(1 << int(bit) for bit in rng.choice(64, 1 + row % RADIUS, replace=False)) for row in range(copies)]
    return np.concatenate([own, own[rng.choice(len(own), copies, replace=False)] ^ np.array(masks, dtype=np.uint64)])


def ours(frame: pl.DataFrame) -> set[int]:
    """The rows that left in any band."""
    left: set[int] = set()
    for step in Config(radius=RADIUS, keep="first").steps()[1:]:
        method = step.build(0)  # type: ignore[attr-defined]
        grouped = frame.with_columns(group=pl.Series(method.group(frame, None), dtype=pl.Int64))
        verdict = method.apply(grouped, None)
        left |= {int(key) for key in verdict.rejected["key"]}
        frame = verdict.kept.drop("group")
    return left


def scan(hash_N: np.ndarray) -> set[int]:
    """Every row against all rows before it."""
    return {row for row in range(1, len(hash_N)) if (np.bitwise_count(hash_N[:row] ^ hash_N[row]) <= RADIUS).any()}


def imagededup(hash_N: np.ndarray) -> set[int]:
    """imagededup's own search over names and hexadecimal hashes; of every pair the later name leaves."""
    from imagededup.handlers.search.retrieval import HashEval
    from imagededup.methods.hashing import Hashing

    names = {f"{row:08d}": f"{int(value):016x}" for row, value in enumerate(hash_N)}
    found = HashEval(names, names, Hashing.hamming_distance, verbose=False, threshold=RADIUS, num_dist_workers=0).retrieve_results(
        scores=False
    )
    return {int(name) for name, others in found.items() if any(other < name for other in others)}


def cpu_s() -> float:
    """CPU seconds of this process and of its workers that have ended: imagededup searches in a worker."""
    return time.process_time() + sum(os.times()[2:4])


def measure(name: str, count: int, peer: Callable[[np.ndarray], set[int]], rounds: int) -> None:
    """Prints a line of the best of the rounds, in turn."""
    hash_N = hashes(count)
    frame = pl.DataFrame(
        {"key": [f"{row:08d}" for row in range(count)], "image": [{"width": 1, "height": 1}] * count, "meta.phash": pl.Series(hash_N)}
    )
    spent: dict[str, list[float]] = {"ours": [], "peer": []}
    found: dict[str, set[int]] = {}
    for _ in range(rounds):
        for side, run in (("ours", lambda: ours(frame)), ("peer", lambda: peer(hash_N))):
            start = cpu_s()
            found[side] = run()
            spent[side].append(cpu_s() - start)
    assert found["ours"] == found["peer"], "other copies than the peer's"
    assert len(found["ours"]) >= count // 5, "planted copies were missed"
    own, other = min(spent["ours"]), min(spent["peer"])
    print(
        f"BENCH duplicates {name}: ours {own:.2f} s, peer {other:.2f} s, ratio {other / own:.1f}, target {TARGET} ({count:,} hashes, radius {RADIUS}, {len(found['ours']):,} copies)"
    )


def main() -> None:
    """Prints one line a peer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="a fifth of the hashes")
    parser.add_argument("--rounds", type=int, default=2, help="rounds, ours and the peer in turn; the best of each counts")
    options = parser.parse_args()
    part = 5 if options.small else 1
    measure("numpy scan", 100_000 // part, scan, options.rounds)
    if importlib.util.find_spec("imagededup") is None:
        print("imagededup is not installed: its line is left out")
    else:
        importlib.import_module("imagededup.methods")  # before the clock: it imports torch
        measure("imagededup", 5_000 // part, imagededup, options.rounds)


if __name__ == "__main__":
    main()
