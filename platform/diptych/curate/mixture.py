"""Mixtures of sources: so many pairs of each, by shares of a fixed total, drawn by key without replacement.

Source: Nguyen et al., Quality Not Quantity: On the Interaction between Dataset Design and Robustness of CLIP (NeurIPS 2022), section 4:
mixtures are compared at one total, for a larger one would also be a mixture of more.
Shape legend: N pairs in a batch, S sources.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import polars as pl
from pydantic import Field, model_validator

from diptych.core.config import Config as BaseConfig
from diptych.core.errors import DataError
from diptych.core.points import Fold, PairMethod, Verdict
from diptych.pairs.quotas import Count, Draw, Taken, strata

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
class Mixture(PairMethod):
    """Keeps the pairs of smallest draw of each source, exactly its quota; a rejected pair's score is its draw."""

    config: Config
    seed: int

    def folds(self) -> Sequence[Fold]:
        """Counts, then draws."""
        return [Count(self.config.column, self.quotas), Draw(self.config.column, self.quotas, self.seed)]

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

    def apply(self, batch: pl.DataFrame, state: Taken) -> Verdict:
        """The verdict on a batch."""
        stays, draw_N = state.stays(batch, self.config.column, self.seed)
        mixed = strata(batch, self.config.column).is_in(list(self.config.shares)).fill_null(value=False)
        reason = pl.when(mixed).then(pl.lit(NOT_DRAWN)).otherwise(pl.lit(NOT_MIXED))
        rejected = batch.select("key", reason=reason, score=pl.Series(draw_N, dtype=pl.Float32)).filter(~stays)
        return Verdict(kept=batch.filter(stays), rejected=rejected)

    def report(self, state: Taken | None) -> Mapping[str, Any]:
        """Pairs there were and pairs taken, by source."""
        return {} if state is None else {"pairs": dict(state.rows), "taken": dict(state.taken)}
