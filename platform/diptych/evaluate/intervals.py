"""How far a figure can be trusted: bootstrap over examples, paired tests between checkpoints, t intervals over seeds.

The bootstrap draws from cells, not from rows, where it can: n examples with u distinct values, resampled with replacement, are one
multinomial draw over u cells. For 0/1 values that is one binomial a resample, whatever n is, and the distribution is exactly the same.

Thousands of examples with values that hardly repeat are cut into narrow strata. Which stratum each draw falls into is drawn exactly; what
the draws of a stratum add to its mean is a sum of thousands of bounded terms, and one normal draw with their exact variance stands for it.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diptych.core.chance import generator
from diptych.core.errors import ConfigError, DataError

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]
Name = TypeVar("Name", bound=Hashable)

RESAMPLES = 2000
CHUNK = 1 << 22
"""Draws held at a time: 32 MiB of counts or indices."""
STRATA, OUTERMOST, MANY = 256, 32, 4096
"""Strata of equal width; values at either end that are a stratum each; examples from which on strata stand for rows."""


# ---------------------------------------------------------------- one figure


def interval(
    per_example: ArrayLike, seed: int, level: float = 0.95, resamples: int = RESAMPLES, weights: ArrayLike | None = None
) -> tuple[float, float]:
    """The percentile bootstrap interval of a mean over examples.

    Args:
        per_example: `[n]`, finite, n >= 1.
        seed: names the draws; equal inputs and seed give equal bounds.
        level: coverage in (0, 1).
        resamples: bootstrap replicates, >= 100.
        weights: `[n]`, positive: the figure is then the weighted mean, each replicate divided by its own sum of weights.

    Raises:
        DataError: no examples, or a value that is not finite.

    Source: Efron & Tibshirani, An Introduction to the Bootstrap (1993), ch. 13.
    """
    _check_resampling(level, resamples)
    means = bootstrap_means(_finite(per_example), seed, resamples, None if weights is None else _finite(weights))
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bootstrap_means(values: Floats, seed: int, resamples: int, weights: Floats | None = None) -> Floats:
    """The bootstrapped (weighted) means of `values` `[n]`, float64 `[resamples]`."""
    rows = values[None] if weights is None else np.stack([values, weights])
    cells, count = _cells(rows)
    # A multinomial costs about ten times as much a cell as an index and its gather cost a row.
    few = 10 * len(count) <= len(values)
    if weights is None and not few and len(values) >= MANY:
        return _stratified_means(values, seed, resamples)
    drawn = cells if few else rows
    summands = drawn if weights is None else np.stack([drawn[0] * drawn[1], drawn[1]])
    rng = generator(seed, "bootstrap")
    draw = partial(_from_cells, rng, summands, count) if few else partial(_from_rows, rng, summands)
    sums = np.concatenate([draw(size) for size in _chunks(resamples, summands.shape[1])], axis=1)
    return np.asarray(sums[0] / (len(values) if weights is None else sums[1]))


def _cells(rows: Floats) -> tuple[Floats, Counts]:
    """The distinct columns of `[S, n]`, sorted, `[S, cells]`, and how often each occurs, `[cells]`."""
    if len(rows) == 1:
        value, count = np.unique(rows[0], return_counts=True)
        return value[None], count
    cells, count = np.unique(rows, axis=1, return_counts=True)
    return cells, count


def _from_cells(rng: np.random.Generator, summands: Floats, count: Counts, resamples: int) -> Floats:
    """Sums `[S, resamples]` of S rows of summands `[S, cells]`, each cell drawn in proportion to its count."""
    n = int(count.sum())
    return np.asarray(summands @ rng.multinomial(n, count / n, size=resamples).T)


def _from_rows(rng: np.random.Generator, summands: Floats, resamples: int) -> Floats:
    """Sums `[S, resamples]` of S rows of summands `[S, n]`, drawn row by row."""
    n = summands.shape[1]
    return np.asarray(summands[:, rng.integers(0, n, size=(resamples, n), dtype=np.int32)].sum(axis=2))


def _stratified_means(values: Floats, seed: int, resamples: int) -> Floats:
    """Bootstrapped means `[resamples]` of many values `[n]`: strata drawn exactly, what varies within them as a normal.

    Mean and variance of a replicate are the bootstrap's own; of its skewness, what lies within the strata is lost, which is less than the
    cube of a stratum's width over the values' deviation, over the root of n: far below what 10,000 resamples can show.
    """
    mean, variance, count = _strata(values)
    n = len(values)
    # Two streams, each read in order, so that the draws do not depend on the chunks.
    between, within = generator(seed, "bootstrap"), generator(seed, "bootstrap", "within strata")
    sums = []
    for size in _chunks(resamples, len(count)):
        drawn = between.multinomial(n, count / n, size=size)
        sums.append(drawn @ mean + np.sqrt(drawn @ variance) * within.standard_normal(size))
    return np.concatenate(sums) / n


def _strata(values: Floats) -> tuple[Floats, Floats, Counts]:
    """Mean, variance and size of the strata of `values` `[n]`, n > 2 OUTERMOST, in rising order."""
    ordered = np.sort(values)
    inner = ordered[OUTERMOST:-OUTERMOST]
    width = (inner[-1] - inner[0]) / STRATA
    place = np.minimum((inner - inner[0]) / (width or 1.0), STRATA - 1).astype(np.int64)
    ends = np.arange(OUTERMOST)
    stratum = np.concatenate([ends, OUTERMOST + place, OUTERMOST + STRATA + ends])
    _, row, count = np.unique(stratum, return_inverse=True, return_counts=True)
    mean = np.bincount(row, weights=ordered) / count
    return mean, np.bincount(row, weights=(ordered - mean[row]) ** 2) / count, count


def _chunks(resamples: int, width: int) -> Iterator[int]:
    step = max(1, CHUNK // max(1, width))
    return (min(step, resamples - start) for start in range(0, resamples, step))


def quantile_interval(per_example: ArrayLike, share: float = 0.5, level: float = 0.95) -> tuple[float, float]:
    """The interval of a quantile, from order statistics: what the bootstrap of a quantile converges to, without draws.

    `per_example` is `[n]`, finite; `share` of it lies below the quantile, by default the median. Source: Efron (1979), Bootstrap methods, section 3; exact binomial ranks.
    """
    from scipy.stats import binom

    values = np.sort(_finite(per_example))
    low, high = binom.ppf([(1 - level) / 2, (1 + level) / 2], len(values), share).astype(int)
    return float(values[max(low - 1, 0)]), float(values[min(high, len(values) - 1)])


# ---------------------------------------------------------------- two checkpoints, the same examples


@dataclass(frozen=True)
class Paired:
    """`b - a` on the same examples.

    Attributes:
        n: examples.
        difference, low, high: the mean difference and its bootstrap interval.
        p_value: two-sided; McNemar's exact test for 0/1 values, else the bootstrap under the null of no mean difference.
        test: which of the two gave `p_value`.
        p_bootstrap: the bootstrap's p-value, at least 1 / (resamples + 1).
        effect: Cohen's h for 0/1 values, else the mean difference over the root mean variance of the two.
        higher, equal, lower: examples whose value is higher in `b`, equal in both, lower in `b`.
    """

    n: int
    difference: float
    low: float
    high: float
    p_value: float
    test: str
    p_bootstrap: float
    effect: float
    higher: int
    equal: int
    lower: int


def paired(
    a: ArrayLike,
    b: ArrayLike,
    keys_a: Sequence[str],
    keys_b: Sequence[str],
    *,
    seed: int,
    level: float = 0.95,
    resamples: int = RESAMPLES,
) -> Paired:
    """Compares two vectors of per-example values, joined by key; the order of either does not matter.

    Args:
        a, b: `[n]`, finite.
        keys_a, keys_b: their examples' keys; the same set, each key once.
        seed: names the bootstrap's draws.
        level: coverage of the interval.
        resamples: bootstrap replicates.

    Raises:
        DataError: the keys differ or repeat, or a value is not finite.
    """
    _check_resampling(level, resamples)
    left, right = _aligned(_finite(a), _finite(b), keys_a, keys_b)
    gap = right - left
    difference = float(gap.mean())
    means = bootstrap_means(gap, seed, resamples)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    # Under the null the replicates lie around zero as they now lie around the difference; the slack forgives rounding, so ties count.
    extreme = int((np.abs(means - difference) >= abs(difference) * (1 - 1e-12)).sum())
    p_bootstrap = (1 + extreme) / (1 + resamples)
    binary = _binary(left) and _binary(right)
    p_value = mcnemar(left, right) if binary else p_bootstrap
    effect = cohens_h(float(left.mean()), float(right.mean())) if binary else standardised_difference(left, right)
    higher, lower = int((gap > 0).sum()), int((gap < 0).sum())
    test = "mcnemar" if binary else "bootstrap"
    bounds = float(low), float(high)
    return Paired(len(gap), difference, *bounds, p_value, test, p_bootstrap, effect, higher, len(gap) - higher - lower, lower)


def mcnemar(a: ArrayLike, b: ArrayLike) -> float:
    """McNemar's exact two-sided p-value for two 0/1 vectors `[n]` over the same examples; 1 where they never differ.

    Source: McNemar (1947), in the exact form: the discordant examples are a Binomial(d, 1/2), which is symmetric, so that two-sided is
    twice the smaller tail.
    """
    from scipy.special import bdtr

    left, right = np.asarray(a) > 0, np.asarray(b) > 0
    gained, lost = int((right & ~left).sum()), int((left & ~right).sum())
    return 1.0 if gained == lost else float(min(1.0, 2 * bdtr(min(gained, lost), gained + lost, 0.5)))


def cohens_h(share_a: float, share_b: float) -> float:
    """Cohen's h of two shares in [0, 1], signed as `b - a`, in [-pi, pi]; 0.2 is small, 0.5 medium, 0.8 large (Cohen 1988, ch. 6)."""
    return 2 * (math.asin(math.sqrt(share_b)) - math.asin(math.sqrt(share_a)))


def standardised_difference(a: ArrayLike, b: ArrayLike) -> float:
    """`(mean b - mean a)` over the root mean of the two sample variances (Cohen's d_av); 0 where nothing varies and nothing differs."""
    left, right = np.asarray(a, np.float64), np.asarray(b, np.float64)
    difference = float(right.mean() - left.mean())
    spread = math.sqrt((_variance(left) + _variance(right)) / 2)
    if spread == 0:
        return math.copysign(math.inf, difference) if difference else 0.0
    return difference / spread


def holm(p_values: Mapping[Name, float]) -> dict[Name, float]:
    """Holm's step-down correction over many tests: name -> adjusted p-value in [0, 1], in the order given. Source: Holm (1979)."""
    ranked = sorted(p_values, key=lambda name: p_values[name])
    adjusted: dict[Name, float] = {}
    worst = 0.0
    for position, name in enumerate(ranked):
        worst = max(worst, min(1.0, p_values[name] * (len(ranked) - position)))
        adjusted[name] = worst
    return {name: adjusted[name] for name in p_values}


def _aligned(a: Floats, b: Floats, keys_a: Sequence[str], keys_b: Sequence[str]) -> tuple[Floats, Floats]:
    if keys_a == keys_b and len(set(keys_a)) == len(keys_a) == len(a) == len(b):
        return a, b
    place = {key: row for row, key in enumerate(keys_b)}
    if len(a) != len(keys_a) or len(b) != len(keys_b) or len(place) != len(keys_b) or len(set(keys_a)) != len(keys_a):
        raise DataError.at(
            "Keys and values do not match", "keys", [len(keys_a), len(a), len(keys_b), len(b)], "one value a key, each key once"
        )
    if missing := sorted(set(keys_a) ^ place.keys()):
        raise DataError.at("The two sides hold different examples", "keys", missing[:5], "the same keys on both sides")
    return a, b[[place[key] for key in keys_a]]


# ---------------------------------------------------------------- few seeds


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds or a difference of two, with its t interval. `p_value` is two-sided, against a true value of zero."""

    mean: float
    low: float
    high: float
    p_value: float
    degrees: float
    n: int


def mean_over_seeds(values: ArrayLike, level: float = 0.95) -> Estimate:
    """The mean of `values` `[n]`, n >= 2, with Student's t interval on n - 1 degrees of freedom. Raises DataError for fewer."""
    sample = _seeds(values)
    return _student(float(sample.mean()), math.sqrt(_variance(sample) / len(sample)), len(sample) - 1, len(sample), level)


def difference(a_by_seed: Mapping[int, float], b_by_seed: Mapping[int, float], level: float = 0.95) -> Estimate:
    """The mean of `b - a` with its t interval: paired where both sides ran the same seeds, Welch's otherwise.

    Args:
        a_by_seed, b_by_seed: seed -> figure, at least two seeds a side.
        level: coverage.

    Raises:
        DataError: fewer than two seeds on a side, or a value that is not finite.

    Source: Student (1908); Welch (1947) with Satterthwaite's degrees of freedom.
    """
    if a_by_seed.keys() == b_by_seed.keys():
        return mean_over_seeds([b_by_seed[seed] - a_by_seed[seed] for seed in sorted(a_by_seed)], level)
    a, b = _seeds(list(a_by_seed.values())), _seeds(list(b_by_seed.values()))
    error_a, error_b = _variance(a) / len(a), _variance(b) / len(b)
    total = error_a + error_b
    degrees = total**2 / (error_a**2 / (len(a) - 1) + error_b**2 / (len(b) - 1)) if total else len(a) + len(b) - 2
    return _student(float(b.mean() - a.mean()), math.sqrt(total), degrees, len(a) + len(b), level)


def _student(mean: float, error: float, degrees: float, n: int, level: float) -> Estimate:
    from scipy.stats import t

    reach = float(t.ppf((1 + level) / 2, degrees)) * error
    if error == 0:
        return Estimate(mean, mean, mean, 0.0 if mean else 1.0, degrees, n)
    return Estimate(mean, mean - reach, mean + reach, float(2 * t.sf(abs(mean) / error, degrees)), degrees, n)


# ---------------------------------------------------------------- checks


def _finite(values: ArrayLike) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array) or not np.isfinite(array).all():
        raise DataError.at("These values have no mean", "per_example", array, "a vector of at least one finite number")
    return array


def _seeds(values: ArrayLike) -> Floats:
    sample = _finite(values)
    if len(sample) < 2:
        raise DataError.at("One run has no spread", "seeds", len(sample), "at least 2 seeds", "run more seeds")
    return sample


def _check_resampling(level: float, resamples: int) -> None:
    if not 0 < level < 1 or resamples < 100:
        raise ConfigError.at(
            "No bootstrap can be made of this", "level, resamples", (level, resamples), "level in (0, 1), resamples >= 100"
        )


def _binary(values: Floats) -> bool:
    return bool(np.isin(values, (0.0, 1.0)).all())


def _variance(sample: Floats) -> float:
    return float(sample.var(ddof=1)) if len(sample) > 1 else 0.0
