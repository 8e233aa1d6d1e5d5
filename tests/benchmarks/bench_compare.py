"""The paired comparison of two models on 50,000 examples with 10,000 resamples, beside a plain NumPy loop; CPU seconds of one thread.

    python tests/benchmarks/bench_compare.py [--small] [--rounds 2]

Two figures are compared, as on every page of `diptych compare`: accuracy (0/1) and log loss (a continuous value). Ours is the whole of
`comparable.compare`: joining the examples, McNemar's test, the bootstrap, effect sizes, Holm's correction. The peer draws its indices once a
resample for both figures and takes the means, and does nothing else. Both sides' intervals must be those of one distribution: each bound is
the quantile of 10,000 draws, with a standard error of 0.027 of the replicates' deviation, and a difference of six standard errors fails.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Mapping

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from numpy.typing import NDArray
from scipy import special  # noqa: F401 - imported before the clock starts

from diptych.core.points import Metric
from diptych.evaluate import comparable

RESAMPLES = 10_000
LIMIT_S = 2.0
QUANTILES = (0.025, 0.975)
Bounds = dict[str, NDArray[np.float64]]


def model(examples: int, skill: float, difficulty_N: NDArray[np.float64], seed: int) -> list[Metric]:
    """The rows of a model whose log loss falls with its skill, on examples that are as hard for every model."""
    noise_N = np.random.default_rng(seed).standard_normal(examples)
    loss_N = np.logaddexp(0, 2 * difficulty_N + noise_N - skill)
    keys = [f"example-{number}" for number in range(examples)]
    values = {"acc1": (loss_N < 0.7).astype(np.float32), "log_loss": loss_N.astype(np.float32)}
    return [Metric("made", "zero-shot", name, float(value.mean()), examples, 0, 0, {}, keys, value) for name, value in values.items()]


def ours(a: list[Metric], b: list[Metric]) -> Bounds:
    rows = comparable.compare(a, {"b": b}, seed=0, resamples=RESAMPLES)["b"].compared
    return {row.metric: np.array([row.test.low, row.test.high]) for row in rows}


def peer(a: list[Metric], b: list[Metric]) -> Bounds:
    random = np.random.default_rng(1)
    gaps = {row.metric: np.asarray(other.per_example, np.float64) - np.asarray(row.per_example) for row, other in zip(a, b, strict=True)}
    count = len(next(iter(gaps.values())))
    means: dict[str, list[float]] = {name: [] for name in gaps}
    for _ in range(RESAMPLES):
        index = random.integers(0, count, count)
        for name, gap in gaps.items():
            means[name].append(gap[index].mean())
    return {name: np.quantile(drawn, QUANTILES) for name, drawn in means.items()}


def check(found: Mapping[str, Bounds], a: list[Metric], b: list[Metric]) -> float:
    """The largest distance of a bound from the peer's, in deviations of the replicates. Raises AssertionError where they do not agree."""
    worst = 0.0
    for row, other in zip(a, b, strict=True):
        gap = np.asarray(other.per_example, np.float64) - np.asarray(row.per_example)
        distance = np.abs(found["ours"][row.metric] - found["peer"][row.metric]) / (gap.std() / len(gap) ** 0.5)
        worst = max(worst, float(distance.max()))
    assert worst < 6 * 0.027 * 2**0.5, f"other intervals: {found}"
    return worst


def main() -> None:
    """Prints two lines `BENCH compare …`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="5,000 examples instead of 50,000")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    examples = 5_000 if options.small else 50_000
    difficulty_N = np.random.default_rng(0).standard_normal(examples)
    a, b = model(examples, 1.0, difficulty_N, 1), model(examples, 1.02, difficulty_N, 2)
    sides: dict[str, Callable[[list[Metric], list[Metric]], Bounds]] = {"ours": ours, "peer": peer}
    spent: dict[str, list[float]] = {name: [] for name in sides}
    found: dict[str, Bounds] = {}
    for _ in range(options.rounds):
        for name, side in sides.items():
            start = time.process_time()
            found[name] = side(a, b)
            spent[name].append(time.process_time() - start)
    distance = check(found, a, b)
    ours_s, peer_s = min(spent["ours"]), min(spent["peer"])
    about = (
        f"{examples:,} examples, accuracy and log loss, {RESAMPLES:,} resamples; bounds at most {distance:.3f} replicate deviations apart"
    )
    print(f"BENCH compare beside a NumPy loop: ours {ours_s:.2f} s, peer {peer_s:.2f} s, ratio {peer_s / ours_s:.1f}, target 2 ({about})")
    print(f"BENCH compare beside its limit: ours {ours_s:.2f} s, peer {LIMIT_S:.2f} s, ratio {ours_s / LIMIT_S:.2f}, target <= 1")


if __name__ == "__main__":
    main()
