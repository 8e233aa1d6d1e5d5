"""MetaCLIP: keep the pairs whose text names a concept, and cap the concepts that everybody writes about.

With `count[e]` the pairs whose text contains entry e, and t the threshold:

    p[e] = t / max(count[e], t)                      1 for the tail, t / count for the head
    keep pair i  iff  any e in its text has u(i, e) < p[e],   u uniform in [0, 1)
    P(keep i)    = 1 - prod over e in i of (1 - p[e])

So a text with one tail concept always stays, and one of head concepts alone stays with about the sum of its small p. The draw
u(i, e) is a function of (seed, key of i, e): neither order nor sharding moves it. A pair with several captions has the union of their
entries, each counted once; with one caption a pair this is the paper's per-text rule.

Source: "Demystifying CLIP Data" (ICLR 2024), section 3 and algorithm 1; the share of the tail: section 3.4.
Shape legend: N pairs or texts, E entries, M matches (one a text and entry, text after text).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field, model_validator

from diptych.core import chance
from diptych.core.config import Config as BaseConfig
from diptych.core.points import Fold, PairMethod, Verdict
from diptych.curate import concepts
from diptych.curate.matching import Matcher, Matches, space

__all__ = [
    "Config", "Matcher", "Matches", "MetaClip", "balance", "count", "entry_prob", "inverted_index", "keep_prob", "space",
    "tail_share_to_threshold", "threshold_to_tail_share",
]  # fmt: skip

TOP = 20
"""Entries shown in the report."""

_Int = NDArray[np.int64]
_Float = NDArray[np.float64]


# ---------------------------------------------------------------- the paper's quantities


def inverted_index(matches: Matches) -> NDArray[np.uint32]:
    """Rows (entry id, text id), uint32 `[M, 2]`, in text order, entries ascending within a text."""
    return np.stack([matches.ids, _text_of(matches)], axis=1).astype(np.uint32)


def count(matches: Matches, entries: int) -> _Int:
    """Number of texts that contain each entry, int64 `[E]`; an entry counts once a text."""
    return np.bincount(matches.ids, minlength=entries)


def entry_prob(count_E: NDArray[np.integer[Any]], threshold: float) -> _Float:
    """p[e] = t / max(count[e], t), in (0, 1]; `threshold` is a number of texts > 0, or infinity for no balancing."""
    if threshold == float("inf"):
        return np.ones(len(count_E))
    return np.asarray(threshold / np.maximum(count_E.astype(np.float64), threshold))


def keep_prob(prob_E: _Float, matches: Matches) -> _Float:
    """Probability that each text is kept, float64 `[N]` in [0, 1]; 0 for a text without entries."""
    drop_N = np.ones(len(matches.indptr) - 1)
    some = np.flatnonzero(np.diff(matches.indptr))
    if len(some):
        drop_N[some] = np.multiply.reduceat(1.0 - prob_E[matches.ids], matches.indptr[some])
    return np.asarray(1.0 - drop_N)


def balance(prob_E: _Float, matches: Matches, uniform_M: _Float) -> NDArray[np.bool_]:
    """Which texts are kept, bool `[N]`: those with u < p for at least one of their entries; `uniform_M` is one draw a match."""
    passed = _text_of(matches)[uniform_M < prob_E[matches.ids]]
    kept_N = np.zeros(len(matches.indptr) - 1, dtype=bool)
    kept_N[passed] = True
    return kept_N


def threshold_to_tail_share(count_E: NDArray[np.integer[Any]], threshold: float) -> float:
    """Share of all counts that lies in entries counted less than `threshold` times; 0 if nothing was counted."""
    total = int(count_E.sum())
    return int(count_E[count_E < threshold].sum()) / total if total else 0.0


def tail_share_to_threshold(count_E: NDArray[np.integer[Any]], share: float) -> int:
    """The count at which the share of counts, cumulated from the rarest entry on, is nearest to `share` in [0, 1]."""
    ascending = np.sort(count_E)
    cumulated = np.cumsum(ascending.astype(np.float64)) / max(float(ascending.sum()), 1.0)
    return int(ascending[np.abs(cumulated - share).argmin()])


def _text_of(matches: Matches) -> _Int:
    """The text of each match, `[M]`."""
    return np.repeat(np.arange(len(matches.indptr) - 1), np.diff(matches.indptr))


def _together(matches: Matches, row_N: _Int, rows: int, bits: int) -> Matches:
    """Joins the matches of texts that belong to one row (`row_N`, ascending), each entry once a row; an entry fits `bits` bits."""
    sizes = np.zeros(rows, dtype=np.int64)
    if (np.diff(row_N) > 0).all():
        sizes[row_N], ids = np.diff(matches.indptr), matches.ids
    else:
        both = np.sort(row_N[_text_of(matches)] << bits | matches.ids)
        both = both[np.diff(both, prepend=-1) > 0]
        sizes, ids = np.bincount(both >> bits, minlength=rows), both & ((1 << bits) - 1)
    return Matches(np.concatenate([[0], np.cumsum(sizes)]), ids)


# ---------------------------------------------------------------- the method


class Config(BaseConfig):
    """Parameters of MetaCLIP. Give `threshold` or `tail_share`; `threshold: null` alone keeps every pair that names a concept."""

    method: Literal["metaclip"] = "metaclip"
    threshold: int | None = Field(
        20_000, gt=0, description="t, pairs: a concept counted more often is capped at about t (20,000 for 400M pairs); null: no cap"
    )
    tail_share: float | None = Field(
        None, gt=0, lt=1, description="sets t from the counts instead: the share of all counts that lies in uncapped concepts (paper: 0.06)"
    )
    metadata: str | tuple[str, ...] = Field(
        concepts.BUILTIN,
        description="the concepts: 'builtin' (270,014 entries), a path to .parquet (column `entry`) or .txt (one a line), or a list",
    )
    sources: tuple[str, ...] = Field(
        (), description="match only captions whose source begins with one of these, such as 'alt'; empty: all captions"
    )

    @model_validator(mode="after")
    def _one_rule(self) -> Config:
        if self.tail_share is not None and "threshold" not in self.model_fields_set:
            # A tail share replaces the default threshold, so that the full parameters read back as they were written.
            object.__setattr__(self, "threshold", None)
        if self.threshold is not None and self.tail_share is not None:
            raise ValueError("threshold or tail_share, not both")
        if isinstance(self.metadata, str) and self.metadata != concepts.BUILTIN and not self.metadata.endswith((".parquet", ".txt")):
            raise ValueError("metadata: 'builtin', a path that ends with .parquet or .txt, or a list of concepts")
        return self

    def build(self, seed: int) -> MetaClip:
        """The method; the list of concepts is read, and its matcher built, once a process. ConfigError if it is not there."""
        return MetaClip(self, concepts.load(self.metadata), seed)


class MetaClip(PairMethod):
    """Rejects pairs with the reasons `no concept matched` (score 0) and `balanced away` (score: the probability it had to stay).

    Kept pairs gain the column `keep_prob` (Float32, in (0, 1]): the probability with which balancing keeps the pair.
    Texts are matched once a fold and once for the verdict: at about a million texts a second and core that is cheaper than to store
    the matches.

    A fold's partial, the *tally*, is int64 `[2 + E]`: pairs seen, pairs with an entry, then the pairs with each entry. The state is int64
    `[2, 2 + E]`: the tally of all pairs, and that of the pairs that stay. 16 bytes a concept.
    """

    needs = frozenset({"captions"})

    def __init__(self, config: Config, metadata: concepts.Concepts, seed: int) -> None:
        self.config = config
        self.metadata = metadata
        self.seed = seed

    def folds(self) -> Sequence[Fold]:
        """Counts the entries of all pairs; then, if there is a cap, of the pairs that stay (for the report)."""
        return (_CountAll(self), _CountKept(self)) if self._caps else (_CountAll(self),)

    def apply(self, batch: pl.DataFrame, state: _Int) -> Verdict:
        """The verdict on a batch, by the counts of all pairs."""
        matches = self._match(batch)
        chance_N, kept_N = self._decide(batch["key"], matches, state[0, 2:])
        judged = batch.with_columns(pl.Series("keep_prob", chance_N, dtype=pl.Float32))
        reason = pl.when(pl.Series(np.diff(matches.indptr) == 0)).then(pl.lit("no concept matched")).otherwise(pl.lit("balanced away"))
        rejected = judged.select("key", reason.alias("reason"), score="keep_prob").filter(~kept_N)
        return Verdict(kept=judged.filter(kept_N), rejected=rejected)

    def report(self, state: _Int | None) -> dict[str, Any]:
        """Pairs and concepts before and after, the threshold, the share of the tail, the most frequent concepts."""
        if state is None:
            return {}
        (pairs, matched, *_), (_, kept, *_) = state[:, :2].tolist()
        before_E, after_E = state[:, 2:]
        threshold = self.threshold(before_E)
        return {
            "pairs": pairs,
            "pairs_matched": matched,
            "pairs_kept": kept,
            "threshold": threshold if self._caps else None,
            "entries": len(before_E),
            "entries_left_out": self.metadata.left_out,
            "entries_matched": int((before_E > 0).sum()),
            "entries_head": int((before_E > threshold).sum()),
            "entries_tail": int(((before_E > 0) & (before_E <= threshold)).sum()),
            "tail_share": threshold_to_tail_share(before_E, threshold),
            "top_entries": [
                {"entry": self.metadata.entries[index], "before": int(before_E[index]), "after": int(after_E[index])}
                for index in np.argsort(-before_E, kind="stable")[:TOP].tolist()
                if before_E[index]
            ],
        }

    def threshold(self, count_E: _Int) -> float:
        """t, in pairs: as configured, from the share of the tail, or infinite."""
        if self.config.tail_share is not None:
            return max(1, tail_share_to_threshold(count_E, self.config.tail_share))
        return float("inf") if self.config.threshold is None else self.config.threshold

    @property
    def _caps(self) -> bool:
        return self.config.threshold is not None or self.config.tail_share is not None

    def _match(self, batch: pl.DataFrame) -> Matches:
        """The entries of each pair: of its captions together, each once."""
        captions = batch.select("captions").with_row_index("row").explode("captions").unnest("captions").drop_nulls("text")
        if self.config.sources:
            captions = captions.filter(pl.any_horizontal(pl.col("source").str.starts_with(name) for name in self.config.sources))
        matches = self.metadata.matcher.match(captions["text"].to_list())
        return _together(matches, captions["row"].to_numpy().astype(np.int64), batch.height, len(self.metadata.entries).bit_length())

    def _decide(self, key: pl.Series, matches: Matches, count_E: _Int) -> tuple[_Float, NDArray[np.bool_]]:
        """Probability to stay `[N]`, and whether each pair stays `[N]`."""
        prob_E = entry_prob(count_E, self.threshold(count_E))
        chance_N = keep_prob(prob_E, matches)
        text_M = _text_of(matches)
        open_M = (chance_N < 1)[text_M]  # keys are hashed only where the draw can matter
        uniform_M = np.zeros(len(text_M))
        named, row = np.unique(text_M[open_M], return_inverse=True)
        hashes = chance.key_hashes(key.gather(named))
        uniform_M[open_M] = chance.uniform(self.seed, hashes[row], matches.ids[open_M].astype(np.uint64))
        return chance_N, balance(prob_E, matches, uniform_M)

    def _tally(self, matches: Matches, kept_N: NDArray[np.bool_]) -> _Int:
        count_E = np.bincount(matches.ids[kept_N[_text_of(matches)]], minlength=len(self.metadata.entries))
        return np.concatenate([[len(kept_N), int((kept_N & (np.diff(matches.indptr) > 0)).sum())], count_E])


class _CountAll(Fold):
    """Adds up the entries of all pairs."""

    def __init__(self, method: MetaClip) -> None:
        self.method = method

    def map(self, batch: pl.DataFrame, state: Any) -> _Int:
        """The tally of a batch."""
        del state
        return self.method._tally(self.method._match(batch), np.ones(batch.height, dtype=bool))

    def merge(self, left: _Int, right: _Int) -> _Int:
        """Tallies add up."""
        return left + right

    def finish(self, partial: _Int, state: Any) -> _Int:
        """Until somebody is sent away, all stay."""
        del state
        return np.stack([partial, partial])


class _CountKept(_CountAll):
    """Adds up the entries of the pairs that will stay: the verdict is a function of the counts, so it is known beforehand."""

    def map(self, batch: pl.DataFrame, state: _Int) -> _Int:
        """The tally of a batch's pairs that stay."""
        matches = self.method._match(batch)
        return self.method._tally(matches, self.method._decide(batch["key"], matches, state[0, 2:])[1])

    def finish(self, partial: _Int, state: _Int) -> _Int:
        """The second row becomes the tally of those that stay."""
        return np.stack([state[0], partial])
