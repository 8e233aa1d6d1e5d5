"""Exact duplicates: of pairs with the very same picture one stays.

A chain of two steps: pictures are digested table by table, into the column `meta.content`; then pairs of one digest are brought together,
whichever shards they lie in. Memory is bounded by a table's slice and by the pairs of one digest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field

from diptych.core.config import Config as BaseConfig
from diptych.core.points import Need, PairMethod, Verdict
from diptych.prune.picture_hashes import content
from diptych.prune.verdicts import first_choice, verdict

COLUMN = "meta.content"
REASON = "same picture"


class Config(BaseConfig):
    """What counts as the same picture. Of copies the pair with the smallest key stays."""

    method: Literal["exact-duplicates"] = "exact-duplicates"
    of: Literal["pixels", "file"] = Field(
        "pixels", description="`pixels`: the decoded picture, whatever file it came in; `file`: the file's bytes, which needs no decoding"
    )
    captions: Literal["any", "same"] = Field("any", description="`same`: copies are pairs that also have the same captions")

    def steps(self) -> Sequence[BaseConfig]:
        """Digest, then compare."""
        return (DigestStep(of=self.of), CompareStep(captions=self.captions))

    def build(self, seed: int) -> PairMethod:
        """The last step, for a pool that has digests already."""
        return CompareStep(captions=self.captions).build(seed)


class DigestStep(BaseConfig):
    """The first step."""

    method: Literal["exact-duplicates"] = "exact-duplicates"
    of: Literal["pixels", "file"]

    def build(self, seed: int) -> Digests:
        """The method; nothing is drawn."""
        del seed
        return Digests(self.of)


class CompareStep(BaseConfig):
    """The second step."""

    method: Literal["exact-duplicates"] = "exact-duplicates"
    captions: Literal["any", "same"] = "any"

    def build(self, seed: int) -> Copies:
        """The method; nothing is drawn."""
        del seed
        return Copies(self.captions)


@dataclass(frozen=True)
class Digests(PairMethod):
    """Adds the column `meta.content`: 63 bits of the picture's SHA-256. Among a billion pictures the chance that any two share one is 5 %."""

    of: Literal["pixels", "file"]
    needs = frozenset[Need]({"captions", "pixels"})

    def apply(self, batch: pl.DataFrame, state: Any) -> Verdict:
        """Keeps all."""
        del state
        values = [content(data, self.of, key) for key, data in zip(batch["key"], batch["pixels"], strict=True)]
        kept = batch.with_columns(pl.Series(COLUMN, values, dtype=pl.Int64))
        return Verdict(kept, batch.head(0).select("key", reason=pl.lit(""), score=pl.lit(None, pl.Float32)))


@dataclass(frozen=True)
class Copies(PairMethod):
    """Rejects all but the first pair, by key, of each digest; a rejected pair's `twin` is that one."""

    captions: Literal["any", "same"]

    def group(self, batch: pl.DataFrame, state: Any) -> NDArray[np.int64]:
        """The digest of every pair's picture."""
        del state
        return batch[COLUMN].to_numpy().astype(np.int64)

    def apply(self, batch: pl.DataFrame, state: Any) -> Verdict:
        """The verdict on whole groups."""
        del state
        same = [COLUMN]
        if self.captions == "same":
            batch = batch.with_columns(_texts=pl.col("captions").list.eval(pl.element().struct.field("text")).list.sort().list.join("\0"))
            same.append("_texts")
        twin = batch.select(first_choice("key", same))["key"]
        copies_N = (twin != batch["key"]).to_numpy()
        return verdict(batch.drop("_texts", strict=False), copies_N, REASON, np.ones(batch.height), twin)

    def report(self, state: Any) -> Mapping[str, Any]:
        """What counts."""
        del state
        return {"captions": self.captions}
