"""Mixtures of sources: so many pairs of each, by shares of a fixed total, drawn by key without replacement.

Source: Nguyen et al., Quality Not Quantity: On the Interaction between Dataset Design and Robustness of CLIP (NeurIPS 2022), section 4:
mixtures are compared at one total, for a larger one would also be a mixture of more.
Shape legend: N pairs in a batch, S sources.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field, model_validator

from diptych.core.chance import key_hash, key_hashes, uniform
from diptych.core.config import Config as BaseConfig
from diptych.core.errors import DataError
from diptych.core.points import Fold, PairMethod, Verdict

Floats = NDArray[np.float64]

NOT_DRAWN, NOT_MIXED = "not drawn", "source not in the mixture"


class Config(BaseConfig):
    """Shares by source; they need not add up to 1. `total: null` takes as many pairs as the scarcest source allows at these shares."""

    method: Literal["mixture"] = "mixture"
    shares: dict[str, float] = Field(min_length=1, description="source -> its share of the mixture, above 0; other sources leave")
    total: int | None = Field(None, ge=1, description="pairs of the mixture; null: as many as the shares allow")
    column: str = Field("meta.source", min_length=1, description="the column that names a pair's source")

    @model_validator(mode="after")
    def _shares_are_shares(self) -> Self:
        if not all(0 < share < float("inf") for share in self.shares.values()):
            raise ValueError("shares: numbers above 0; leave a source out to take none of it")
        if self.total is not None and self.total < len(self.shares):
            raise ValueError(f"total: at least one pair a source, {len(self.shares)}")
        return self

    def build(self, seed: int) -> Mixture:
        """The method; `seed` names the draws, of every source its own. A smaller total of one seed lies inside a larger one."""
        return Mixture(self, seed)


def quotas(shares: Mapping[str, float], total: int) -> dict[str, int]:
    """Whole numbers of pairs by source that add up to `total`, by largest remainder; among equal remainders the first name goes first."""
    whole = sum(shares.values())
    exact = {name: total * share / whole for name, share in shares.items()}
    counts = {name: int(value) for name, value in exact.items()}
    short = total - sum(counts.values())
    for name in sorted(exact, key=lambda name: (counts[name] - exact[name], name))[:short]:
        counts[name] += 1
    return counts


@dataclass(frozen=True)
class Drawn:
    """The smallest draws of every source, float64, and how many pairs it has."""

    rows: dict[str, int]
    smallest: dict[str, Floats]


@dataclass(frozen=True)
class Mixed:
    """The finished state: the largest draw that still belongs to the mixture, the pairs taken and the pairs there were, by source."""

    threshold: dict[str, float]
    taken: dict[str, int]
    rows: dict[str, int]


class Count(Fold):
    """Counts the pairs of each source: a Python integer a source."""

    def __init__(self, method: Mixture) -> None:
        self.method = method

    def map(self, batch: pl.DataFrame, state: Any) -> dict[str, int]:
        """The batch's counts. Raises DataError without the column that names sources."""
        del state
        found = self.method.sources(batch).value_counts()
        return {str(name): int(count) for name, count in found.iter_rows() if name is not None}

    def merge(self, left: dict[str, int], right: dict[str, int]) -> dict[str, int]:
        """Counts add up."""
        return {name: left.get(name, 0) + right.get(name, 0) for name in sorted({*left, *right})}

    def finish(self, partial: dict[str, int], state: Any) -> dict[str, int]:
        """The counts. Raises DataError if they do not allow the mixture."""
        del state
        self.method.quotas(partial)
        return partial


class Draw(Fold):
    """Finds every source's threshold among its draws. Holds `8 bytes * quota` a source, twice while two partials merge."""

    def __init__(self, method: Mixture) -> None:
        self.method = method

    def map(self, batch: pl.DataFrame, state: dict[str, int]) -> Drawn:
        """The batch's smallest draws by source."""
        quota = self.method.quotas(state)
        source_N, draw_N = self.method.sources(batch).to_numpy(), self.method.draws(batch)
        return Drawn(state, {name: _smallest(draw_N[source_N == name], count) for name, count in quota.items()})

    def merge(self, left: Drawn, right: Drawn) -> Drawn:
        """The smallest of both."""
        quota = self.method.quotas(left.rows)
        return Drawn(
            left.rows,
            {name: _smallest(np.concatenate([left.smallest[name], right.smallest[name]]), count) for name, count in quota.items()},
        )

    def finish(self, partial: Drawn, state: Any) -> Mixed:
        """The largest draw that stays, of every source."""
        del state
        return Mixed(
            {name: float(draw_S.max()) for name, draw_S in partial.smallest.items()},
            {name: len(draw_S) for name, draw_S in partial.smallest.items()},
            partial.rows,
        )


@dataclass(frozen=True)
class Mixture(PairMethod):
    """Keeps the pairs of smallest draw of each source, exactly its quota; a rejected pair's score is its draw."""

    config: Config
    seed: int

    def folds(self) -> Sequence[Fold]:
        """Counts, then draws."""
        return [Count(self), Draw(self)]

    def state_bytes(self, rows: int, width: int) -> int:
        """Most memory of the state: two sets of draws of the mixture."""
        del width
        return 16 * min(rows, self.config.total or rows)

    def quotas(self, rows: Mapping[str, int]) -> dict[str, int]:
        """Pairs to take of each source. Raises DataError if a source has fewer, naming the largest total that there can be."""
        shares = self.config.shares
        most = {name: rows.get(name, 0) * sum(shares.values()) / share for name, share in shares.items()}
        scarcest = min(most, key=lambda name: (most[name], name))
        total = self.config.total if self.config.total is not None else int(most[scarcest] + 1e-9)
        counts = quotas(shares, total)
        # Rounding up may ask one pair more of the scarcest source than it has.
        while self.config.total is None and total and any(counts[name] > rows.get(name, 0) for name in counts):
            total -= 1
            counts = quotas(shares, total)
        for name, count in counts.items():
            if count > rows.get(name, 0) or not count:
                raise DataError.at(
                    "A source has too few pairs for its share", f"shares.{name}", f"{count:,} of {rows.get(name, 0):,} pairs",
                    f"one to all of a source's pairs; the sources are {', '.join(f'{key} ({value:,})' for key, value in rows.items()) or 'none'}",
                    f"lower total to {int(most[scarcest]):,}, or change the shares",
                )  # fmt: skip
        return counts

    def sources(self, batch: pl.DataFrame) -> pl.Series:
        """The batch's sources. Raises DataError without their column."""
        if self.config.column not in batch.columns:
            raise DataError.at("The pairs do not name their source", "column", self.config.column, f"one of {', '.join(batch.columns)}",
                               "read them with the source `sources`")  # fmt: skip
        return batch[self.config.column].cast(pl.String)

    def draws(self, batch: pl.DataFrame) -> Floats:
        """A uniform draw `[N]` in [0, 1) a pair, from the seed, its source and its key."""
        sources = self.sources(batch)
        names = sources.unique().drop_nulls().to_list()
        source_N = sources.fill_null("").replace_strict(["", *names], [0, *map(key_hash, names)], return_dtype=pl.UInt64).to_numpy()
        return uniform(self.seed, source_N, key_hashes(batch["key"]))

    def apply(self, batch: pl.DataFrame, state: Mixed) -> Verdict:
        """The verdict on a batch."""
        judged = batch.select(
            "key",
            mixed=self.sources(batch).is_in(list(state.threshold)).fill_null(value=False),
            limit=self.sources(batch).replace_strict(
                list(state.threshold), list(state.threshold.values()), default=-1.0, return_dtype=pl.Float64
            ),
            score=pl.Series(self.draws(batch)),
        )
        stays = (judged["score"] <= judged["limit"]) & judged["mixed"]
        rejected = judged.filter(~stays).select(
            "key", reason=pl.when("mixed").then(pl.lit(NOT_DRAWN)).otherwise(pl.lit(NOT_MIXED)), score=pl.col("score").cast(pl.Float32)
        )
        return Verdict(kept=batch.filter(stays), rejected=rejected)

    def report(self, state: Mixed | None) -> Mapping[str, Any]:
        """Pairs there were and pairs taken, by source."""
        return {} if state is None else {"pairs": dict(state.rows), "taken": dict(state.taken)}


def _smallest(draw_N: Floats, count: int) -> Floats:
    return np.partition(draw_N, count - 1)[:count] if len(draw_N) > count else draw_N
