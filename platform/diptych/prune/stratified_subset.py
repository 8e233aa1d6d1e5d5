"""A subset with so many pairs of every class, source, label or language, drawn by key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import polars as pl
from pydantic import Field

from diptych.core.config import Config as BaseConfig
from diptych.core.errors import DataError
from diptych.core.points import Fold, PairMethod, Verdict
from diptych.pairs.quotas import Count, Draw, Taken, strata

NOT_DRAWN, NO_STRATUM = "not drawn", "no stratum"


class Config(BaseConfig):
    """A quota for every value of a column; `quotas` overrules `count` for the values that it names."""

    method: Literal["stratified-subset"] = "stratified-subset"
    column: str = Field(min_length=1, description="the column whose values are the strata, e.g. `label`, `meta.source`, `language`")
    count: int = Field(ge=0, description="pairs of each stratum")
    quotas: dict[str, int] = Field({}, description="value -> pairs, where it is another number; 0 takes none")
    short: Literal["keep", "refuse"] = Field("keep", description="a stratum with fewer pairs: keep all it has, or refuse the run")

    def build(self, seed: int) -> StratifiedSubset:
        """The method; `seed` names the draws, so that a smaller quota of one seed lies inside a larger one."""
        return StratifiedSubset(self, seed)


@dataclass(frozen=True)
class StratifiedSubset(PairMethod):
    """Keeps the pairs of smallest draw of every stratum. Rejected are the others (score: the draw), and pairs without a value."""

    config: Config
    seed: int

    def folds(self) -> Sequence[Fold]:
        """Counts, then draws."""
        return [Count(self.config.column, self.quotas), Draw(self.config.column, self.quotas, self.seed)]

    def state_bytes(self, rows: int, width: int) -> int:
        """Most memory of the state: two sets of draws, at most one a pair."""
        del width
        return 16 * rows

    def quotas(self, rows: Mapping[str, int]) -> dict[str, int]:
        """Pairs to take by stratum. Raises DataError if a quota names no stratum, or with `short: refuse` cannot be met."""
        config = self.config
        if unknown := sorted(set(config.quotas) - set(rows)):
            raise DataError.at("A quota names no stratum", f"quotas.{unknown[0]}", unknown, f"some of {', '.join(sorted(rows)) or 'none'}")
        wanted = {name: config.quotas.get(name, config.count) for name in rows}
        scarce = {name: (rows[name], count) for name, count in wanted.items() if rows[name] < count}
        if config.short == "refuse" and scarce:
            name, (there, count) = min(scarce.items(), key=lambda item: (item[1][0], item[0]))
            raise DataError.at(
                f"{len(scarce)} strata have fewer pairs than their quota", f"{config.column} = {name}", there, f"{count} pairs or more",
                "lower count, or keep all of a short stratum with short: keep",
            )  # fmt: skip
        return wanted

    def apply(self, batch: pl.DataFrame, state: Taken) -> Verdict:
        """The verdict on a batch."""
        stays, draw_N = state.stays(batch, self.config.column, self.seed)
        known = strata(batch, self.config.column).is_not_null()
        reason = pl.when(known).then(pl.lit(NOT_DRAWN)).otherwise(pl.lit(NO_STRATUM))
        rejected = batch.select("key", reason=reason, score=pl.Series(draw_N, dtype=pl.Float32)).filter(~stays)
        return Verdict(kept=batch.filter(stays), rejected=rejected)

    def report(self, state: Taken | None) -> Mapping[str, Any]:
        """How many strata there are, the least and the most pairs taken of one, and those that had fewer than their quota."""
        if state is None or not state.rows:
            return {}
        taken = {name: state.taken.get(name, 0) for name in state.rows}
        short = [name for name, count in self.quotas(state.rows).items() if taken[name] < count]
        return {
            "strata": len(taken),
            "fewest": min(taken.values()),
            "most": max(taken.values()),
            "short": len(short),
            "short_first": short[:20],
        }
