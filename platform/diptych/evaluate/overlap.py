"""Data-overlap analysis: does an evaluation set score higher where the training set holds near copies of it?

The near copies come from a duplicate detector; this file holds the statistics only.
Source: Radford et al., Learning Transferable Visual Models From Natural Language Supervision (2021), section 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from diptych.core.errors import DataError

LEVEL = 0.995


class Counts(NamedTuple):
    """Examples and hits of an evaluation set without (clean) and with (overlap) a near copy in training."""

    n_clean: int
    k_clean: int
    n_overlap: int
    k_overlap: int


@dataclass(frozen=True)
class Overlap:
    """The contamination of one evaluation set.

    Attributes:
        counts: what it was computed from.
        contamination: overlap examples over all, in [0, 1].
        all_minus_clean: accuracy on all examples minus accuracy on the clean ones: what contamination adds, in [-1, 1].
        p_value: one-tailed binomial, of at least these hits on the overlap if its accuracy were that of the clean examples.
        low, high: Clopper-Pearson interval of the accuracy on the overlap.
        p_bonferroni: `p_value` times the number of sets in the report, at most 1.
    """

    counts: Counts
    contamination: float
    all_minus_clean: float
    p_value: float
    low: float
    high: float
    p_bonferroni: float


def count(hit: ArrayLike, overlaps: ArrayLike) -> Counts:
    """Counts from per-example hits (0/1, `[n]`) and flags (bool, `[n]`) that tell which examples have a near copy in training."""
    hits, copied = np.asarray(hit) > 0, np.asarray(overlaps, dtype=bool)
    if hits.shape != copied.shape or hits.ndim != 1:
        raise DataError.at("Hits and overlap flags do not match", "overlaps", (hits.shape, copied.shape), "one flag an example")
    return Counts(int((~copied).sum()), int((hits & ~copied).sum()), int(copied.sum()), int((hits & copied).sum()))


def contamination(counts: Counts, level: float = LEVEL, sets: int = 1) -> Overlap:
    """The statistics of one evaluation set; `sets` is the number of sets tested together, `level` the coverage of the interval.

    A set without overlap has p-value 1 and the interval (0, 1). Raises DataError if nothing is clean or the counts contradict each other.
    """
    from scipy.stats import binomtest

    n_clean, k_clean, n_overlap, k_overlap = counts
    if not (0 <= k_clean <= n_clean and 0 <= k_overlap <= n_overlap and n_clean > 0):
        raise DataError.at("These counts give no clean accuracy", "counts", counts, "hits within examples, and at least one clean example")
    clean = k_clean / n_clean
    everything = (k_clean + k_overlap) / (n_clean + n_overlap)
    share = n_overlap / (n_clean + n_overlap)
    if n_overlap == 0:
        return Overlap(counts, share, 0.0, 1.0, 0.0, 1.0, 1.0)
    test = binomtest(k_overlap, n_overlap, clean, alternative="greater")
    bounds = binomtest(k_overlap, n_overlap).proportion_ci(level, method="exact")
    p_value = float(test.pvalue)
    return Overlap(counts, share, everything - clean, p_value, float(bounds.low), float(bounds.high), min(1.0, p_value * sets))


def report(counts_by_set: Mapping[str, Counts], level: float = LEVEL) -> dict[str, Overlap]:
    """The contamination of every set, with Bonferroni's correction over the sets that overlap at all."""
    tested = sum(counts.n_overlap > 0 for counts in counts_by_set.values())
    return {name: contamination(counts, level, max(1, tested)) for name, counts in counts_by_set.items()}
