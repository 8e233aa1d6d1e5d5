"""Keeps figures by what their articles say: size, licence, language, panels, kind of article, length of the caption.

Source: BIOMEDICA (CVPR 2025), serialisation: a record stays if its caption is text and both sides are longer than 20 pixels; the
classes of licences are those of PubMed Central's open-access lists.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import polars as pl
from pydantic import Field, model_validator

from diptych.core.config import Config as BaseConfig
from diptych.core.errors import DataError
from diptych.core.points import PairMethod, Verdict

LicenceClass = Literal["commercial", "noncommercial", "other"]
CLASS, LANGUAGE, PANELS, KIND = "meta.licence_class", "language", "meta.panels", "meta.kind"


class Config(BaseConfig):
    """What a pair must be to stay; null asks nothing. Captions count as long as the longest of the pair."""

    method: Literal["figure-filter"] = "figure-filter"
    min_side: int = Field(21, ge=1, description="shorter side of the picture, pixels; BIOMEDICA keeps what is larger than 20")
    min_words: int = Field(1, ge=0, description="words of the caption, at least")
    max_words: int | None = Field(None, ge=1, description="words of the caption, at most")
    licences: tuple[LicenceClass, ...] | None = Field(
        None, min_length=1, description="classes of licences that stay, of `meta.licence_class`"
    )
    languages: tuple[str, ...] | None = Field(None, min_length=1, description="languages that stay, of `language`, e.g. `en`")
    panels: Literal["single", "compound"] | None = Field(None, description="figures of one panel, or of several, of `meta.panels`")
    kinds: tuple[str, ...] | None = Field(
        None, min_length=1, description="kinds of articles that stay, of `meta.kind`, e.g. `research-article`"
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max_words is not None and self.max_words < self.min_words:
            raise ValueError("max_words lies below min_words")
        return self

    def build(self, seed: int) -> FigureFilter:
        """The method; nothing is drawn."""
        del seed
        return FigureFilter(self)


@dataclass(frozen=True)
class FigureFilter(PairMethod):
    """Rejects a pair for the first reason that holds, in the order of the parameters; the score is the figure that was judged, or null."""

    config: Config

    def apply(self, batch: pl.DataFrame, state: Any) -> Verdict:
        """The verdict on a batch. Raises DataError if a column that is asked for is missing."""
        del state
        rules = self._rules()
        self._require(batch)
        reason = pl.coalesce(pl.when(broken).then(pl.lit(name)) for name, (broken, _) in rules.items())
        score = pl.coalesce(pl.when(broken).then(value.cast(pl.Float32)) for broken, value in rules.values())
        judged = batch.select("key", reason=reason, score=pl.when(reason.is_not_null()).then(score))
        stays = judged["reason"].is_null()
        return Verdict(kept=batch.filter(stays), rejected=judged.filter(~stays))

    def report(self, state: Any) -> Mapping[str, Any]:
        """What was asked for."""
        del state
        return {name: value for name, value in self.config.plain().items() if value is not None and name != "method"}

    def _rules(self) -> dict[str, tuple[pl.Expr, pl.Expr]]:
        """Reason -> when it holds, and the figure that is judged. A null value is not what was asked for."""
        config, none = self.config, pl.lit(None, pl.Float32)
        side = pl.min_horizontal(pl.col("image").struct.field("width"), pl.col("image").struct.field("height"))
        words = pl.col("captions").list.eval(pl.element().struct.field("text").str.count_matches(r"\S+")).list.max().fill_null(0)
        rules = {"picture too small": (side < config.min_side, side), "caption too short": (words < config.min_words, words)}
        if config.max_words is not None:
            rules["caption too long"] = (words > config.max_words, words)
        chosen = {"licence": (CLASS, config.licences), "language": (LANGUAGE, config.languages), "kind of article": (KIND, config.kinds)}
        for what, (column, values) in chosen.items():
            if values is not None:
                rules[f"{what} not asked for"] = (~pl.col(column).is_in(list(values)).fill_null(False), none)
        if config.panels is not None:
            compound = pl.col(PANELS).fill_null(1) > 1
            wrong = compound if config.panels == "single" else ~compound
            rules["compound figure" if config.panels == "single" else "single figure"] = (wrong, pl.col(PANELS))
        return rules

    def _require(self, batch: pl.DataFrame) -> None:
        config = self.config
        asked = {CLASS: config.licences, LANGUAGE: config.languages, KIND: config.kinds, PANELS: config.panels}
        if missing := [column for column, value in asked.items() if value is not None and column not in batch.columns]:
            raise DataError.at(
                "The pairs lack a column to filter by",
                missing[0],
                batch.columns,
                "columns of a source of articles",
                "leave the parameter out",
            )
