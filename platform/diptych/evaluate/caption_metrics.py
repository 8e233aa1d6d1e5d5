"""How near captions come to what people wrote: BLEU, ROUGE-L and CIDEr, on words.

The figures of the field's usual scorer for captions, without its Java: the same formulas and constants, given the same words.
Sources: Papineni et al., BLEU (ACL 2002); Lin, ROUGE (2004); Vedantam, Zitnick and Parikh, CIDEr (CVPR 2015), in the form CIDEr-D that is
reported as CIDEr. METEOR is NLTK's (`meteor`); the scorer itself, on its own words, is `coco_agreement`.

Shape legend: N captions, G orders of n-grams.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Words = Sequence[str]
Grams = Counter[tuple[str, ...]]

WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")
ORDERS = 4
SIGMA = 6.0
"""Of CIDEr-D's penalty for another length, in words."""
ROUGE_BETA = 1.2
TINY, SMALL = 1e-15, 1e-9
"""Added to BLEU's numerators and denominators by the usual scorer, so that no order is empty."""


class Agreement(NamedTuple):
    """How captions agree with their references: `cider_N`, `rouge_l_N` and `meteor_N` a caption; of the set `bleu_4`, and the counts it is of."""

    cider_N: Floats
    rouge_l_N: Floats
    meteor_N: Floats
    bleu_4: float
    counts: BleuCounts


def words_of(text: str) -> list[str]:
    """The lower-cased words of a text, without punctuation."""
    return WORD.findall(text.lower())


def grams(words: Words, orders: int = ORDERS) -> Grams:
    """How often each run of 1 to `orders` words occurs."""
    return Counter(tuple(words[at : at + n]) for n in range(1, orders + 1) for at in range(len(words) - n + 1))


# ---------------------------------------------------------------- BLEU


class BleuCounts(NamedTuple):
    """What BLEU adds up: `matched_NG` and `said_NG` n-grams of each caption, its `length_N`, and that of its nearest reference."""

    matched_NG: Floats
    said_NG: Floats
    length_N: Floats
    reference_N: Floats


def bleu_counts(captions: Sequence[Words], references: Sequence[Sequence[Words]], orders: int = ORDERS) -> BleuCounts:
    """The counts of every caption. An n-gram matches as often as the reference that has it most often; of equally near lengths the shorter."""
    matched, spoken, lengths, nearest = [], [], [], []
    for words, others in zip(captions, references, strict=True):
        most: Grams = Counter()
        for other in others:
            most |= grams(other, orders)
        hits = [0] * orders
        for gram, times in grams(words, orders).items():
            hits[len(gram) - 1] += min(times, most[gram])
        matched.append(hits)
        spoken.append([max(0, len(words) - n) for n in range(orders)])
        lengths.append(len(words))
        nearest.append(min((abs(len(other) - len(words)), len(other)) for other in others)[1] if others else 0)
    as_floats = (np.asarray(part, dtype=np.float64) for part in (matched, spoken, lengths, nearest))
    matched_NG, said_NG, length_N, reference_N = as_floats
    return BleuCounts(matched_NG.reshape(-1, orders), said_NG.reshape(-1, orders), length_N, reference_N)


def bleu(counts: BleuCounts) -> Floats:
    """BLEU-1 to BLEU-G of a whole set `[G]`, in [0, 1]: geometric means of the precisions, times the brevity penalty."""
    return np.asarray(bleu_of_sums(np.column_stack(counts).sum(axis=0)[None])[0])


def bleu_of_sums(sum_RK: Floats) -> Floats:
    """BLEU-1 to BLEU-G `[R, G]` of counts that are added up: the K = 2 G + 2 columns are those of `BleuCounts`, in its order."""
    orders = sum_RK.shape[1] // 2 - 1
    matched_RG, said_RG, length_R, reference_R = np.split(sum_RK, [orders, 2 * orders, 2 * orders + 1], axis=1)
    precision_RG = (matched_RG + TINY) / (said_RG + SMALL)
    ratio_R1 = (length_R + TINY) / (reference_R + SMALL)
    brevity_R1 = np.exp(np.minimum(0.0, 1 - 1 / ratio_R1))
    return np.asarray(np.exp(np.log(precision_RG).cumsum(axis=1) / np.arange(1, orders + 1)) * brevity_R1)


# ---------------------------------------------------------------- ROUGE-L


def rouge_l(words: Words, references: Sequence[Words], beta: float = ROUGE_BETA) -> float:
    """ROUGE-L of a caption in [0, 1]: the F-measure of the best precision and the best recall of its longest common subsequences."""
    common = [_common(words, other) for other in references]
    if not words or not any(common):
        return 0.0
    precision = max(common) / len(words)
    recall = max(same / len(other) for same, other in zip(common, references, strict=True) if other)
    return (1 + beta**2) * precision * recall / (recall + beta**2 * precision)


def _common(left: Words, right: Words) -> int:
    """The length of the longest common subsequence."""
    row = [0] * (len(right) + 1)
    for word in left:
        before = row[:]
        for at, other in enumerate(right):
            row[at + 1] = before[at] + 1 if word == other else max(before[at + 1], row[at])
    return row[-1]


# ---------------------------------------------------------------- CIDEr


def cider(captions: Sequence[Words], references: Sequence[Sequence[Words]], orders: int = ORDERS, sigma: float = SIGMA) -> Floats:
    """CIDEr-D of every caption `[N]`, in [0, 10]: clipped TF-IDF cosines with its references, averaged over them and the orders.

    Document frequencies are those of the references that are handed in, so scores of small sets compare with nothing but each other; with
    one picture every weight is 0.
    """
    seen: Grams = Counter()
    counted = [[grams(other, orders) for other in others] for others in references]
    for others in counted:
        seen.update(set().union(*others))
    log_pictures = math.log(len(captions)) if captions else 0.0

    def weighed(count: Grams) -> _Vector:
        weight = {gram: times * (log_pictures - math.log(max(1, seen[gram]))) for gram, times in count.items()}
        norm_G = np.zeros(orders)
        for gram, value in weight.items():
            norm_G[len(gram) - 1] += value**2
        pairs = sum(times for gram, times in count.items() if len(gram) == min(2, orders))
        return _Vector(weight, np.sqrt(norm_G), pairs)

    scores = np.zeros(len(captions))
    for row, (words, others) in enumerate(zip(captions, counted, strict=True)):
        own = weighed(grams(words, orders))
        likeness = [_likeness(own, weighed(other), sigma) for other in others]
        scores[row] = 10 * float(np.mean(likeness)) if likeness else 0.0
    return scores


class _Vector(NamedTuple):
    """TF-IDF weights, their norm an order `[G]`, and the length in pairs of words, by which lengths are compared."""

    weight: Mapping[tuple[str, ...], float]
    norm_G: Floats
    pairs: int


def _likeness(own: _Vector, other: _Vector, sigma: float) -> float:
    """The clipped cosines of both, averaged over the orders, less for another length."""
    dot_G = np.zeros(len(own.norm_G))
    for gram, value in own.weight.items():
        if gram in other.weight:
            dot_G[len(gram) - 1] += min(value, other.weight[gram]) * other.weight[gram]
    scale_G = own.norm_G * other.norm_G
    cosine_G = np.divide(dot_G, scale_G, out=np.zeros_like(dot_G), where=scale_G > 0)
    return float(cosine_G.mean()) * math.exp(-((own.pairs - other.pairs) ** 2) / (2 * sigma**2))
