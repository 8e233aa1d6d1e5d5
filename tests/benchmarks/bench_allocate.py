"""rd-prune's dynamic program: the budget of ViT-B/32's layers shared out exactly, and whether its cost is linear in layers and levels.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_allocate.py [--levels 20] [--rounds 3]

Curves are convex with random steepness, as distortions are. The peer of the first line is its limit; that of the others is the program
at half the size.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from numpy.typing import NDArray

from diptych.compress.rd_prune import allocate

LIMIT_S, SPARSITY, UNITS = 10.0, 0.6, 1 << 16
TARGET_LINEAR = 2.3


def sizes(blocks: int = 12) -> NDArray[np.int64]:
    """Weights of the layers of both towers: attention in and out, and the two of the MLP, a block."""
    return np.asarray(
        [size for width in (768, 512) for _ in range(blocks) for size in (3 * width**2, width**2, 4 * width**2, 4 * width**2)]
    )


def curves(layers: int, levels: int) -> NDArray[np.float64]:
    """Distortion by layer and amount, `[P, K + 1]`."""
    steepness = np.random.default_rng(0).lognormal(size=(layers, 1))
    return steepness * np.linspace(0, 1, levels + 1) ** 3


def seconds(blocks: int, levels: int, rounds: int) -> float:
    """The least CPU seconds of one program."""
    size = sizes(blocks)
    found, unit = [], -(-int(size.sum()) // UNITS)
    for _ in range(rounds):
        started = time.process_time()
        allocation = allocate(curves(len(size), levels), size, SPARSITY, unit=unit)
        found.append(time.process_time() - started)
        assert allocation.removed.sum() >= SPARSITY * size.sum(), "the budget is kept"
    return min(found)


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--levels", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    whole = seconds(12, options.levels, options.rounds)
    print(
        f"BENCH rd-prune's allocation, ViT-B/32: ours {whole:.2f} CPU s, peer {LIMIT_S:.2f} CPU s, ratio {whole / LIMIT_S:.3f}, target <= 1"
        f" ({len(sizes())} layers, {options.levels + 1} amounts, {UNITS:,} units)"
    )
    for what, twice in (
        ("twice the layers", seconds(24, options.levels, options.rounds)),
        ("twice the amounts", seconds(12, 2 * options.levels, options.rounds)),
    ):
        print(
            f"BENCH rd-prune's allocation, {what}: ours {twice:.2f} CPU s, peer {whole:.2f} CPU s, ratio {twice / whole:.2f}, target <= {TARGET_LINEAR}"
        )


if __name__ == "__main__":
    main()
