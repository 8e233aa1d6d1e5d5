"""The basic filter: captions of some length, pictures of some size and no extreme shape. No picture is opened.

Source: Gadre et al., DataComp (NeurIPS 2023), section 4.2 and appendix: more than two words and five characters, a smaller side of at
least 200 pixels, an aspect ratio of at most three. Their language part is `language-filter`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import polars as pl
from pydantic import Field

from diptych.core.config import Config as BaseConfig
from diptych.core.points import PairMethod, Verdict

SHORT, SMALL, EXTREME = "caption too short", "picture too small", "picture too narrow"


class Config(BaseConfig):
    """Least lengths and sizes; a pair stays with those of its captions that are long enough. The defaults are DataComp's."""

    method: Literal["basic-filter"] = "basic-filter"
    words: int = Field(3, ge=0, description="least words of a caption, parted by white space")
    characters: int = Field(6, ge=0, description="least characters of a caption, white space at its ends left out")
    side_px: int = Field(200, ge=0, description="least length of the shorter side, pixels")
    aspect: float = Field(3.0, ge=1, description="largest ratio of the longer to the shorter side")

    def build(self, seed: int) -> BasicFilter:
        """The method; nothing is drawn."""
        del seed
        return BasicFilter(self)


@dataclass(frozen=True)
class BasicFilter(PairMethod):
    """Rejects, in this order of reasons: small pictures (score: the shorter side), narrow ones (the ratio), short captions (most words)."""

    config: Config

    def apply(self, batch: pl.DataFrame, state: Any) -> Verdict:
        """The verdict on a batch."""
        del state
        config = self.config
        text = pl.element().struct.field("text").str.strip_chars()
        words = text.str.split_by_whitespace() if hasattr(text.str, "split_by_whitespace") else text.str.extract_all(r"\S+")
        long = (words.list.len() >= config.words) & (text.str.len_chars() >= config.characters)
        width, height = pl.col("image").struct.field("width"), pl.col("image").struct.field("height")
        side, ratio = pl.min_horizontal(width, height), pl.max_horizontal(width, height) / pl.min_horizontal(width, height)
        judged = batch.select(
            "key",
            captions=pl.col("captions").list.filter(long),
            most=pl.col("captions").list.eval(words.list.len()).list.max().cast(pl.Float32),
            side=side.cast(pl.Float32),
            ratio=ratio.cast(pl.Float32),
        ).with_columns(
            reason=pl.when(pl.col("side") < config.side_px).then(pl.lit(SMALL))
            .when(pl.col("ratio") > config.aspect).then(pl.lit(EXTREME))
            .when(pl.col("captions").list.len() == 0).then(pl.lit(SHORT)),
        )  # fmt: skip
        score = pl.when(pl.col("reason") == SMALL).then("side").when(pl.col("reason") == EXTREME).then("ratio").otherwise("most")
        rejected = judged.filter(pl.col("reason").is_not_null()).select("key", "reason", score=score)
        kept = batch.with_columns(judged["captions"]).filter(judged["reason"].is_null())
        return Verdict(kept=kept, rejected=rejected)

    def report(self, state: Any) -> Mapping[str, Any]:
        """The limits."""
        del state
        return {name: value for name, value in self.config.plain().items() if name != "method"}
