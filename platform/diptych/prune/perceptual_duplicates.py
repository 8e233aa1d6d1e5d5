"""Perceptual duplicates: of pairs whose pictures' hashes differ in a few bits one stays.

A chain of `radius + 2` steps. The first hashes every picture, into the column `meta.<hash>` (64 bits; null for a flat picture, which has no
copies). Then the hash is cut into `radius + 1` bands: two hashes within the radius agree in one band at least, so each band in turn brings
the pairs of equal value together and compares within. Nothing is missed, and no step holds more than the pairs of one bucket.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field

from diptych.core.chance import key_hashes
from diptych.core.config import Config as BaseConfig
from diptych.core.points import Need, PairMethod, Verdict
from diptych.prune.picture_hashes import BITS, Kind, band_bounds, band_of, nearest_in_runs, perceptual
from diptych.prune.verdicts import verdict

REASON = "alike picture"
Keep = Literal["largest", "first"]


class Config(BaseConfig):
    """The hash and the distance. Each further bit of the radius costs a pass and makes groups larger: 3 is quick, 7 is not."""

    method: Literal["perceptual-duplicates"] = "perceptual-duplicates"
    hash: Kind = Field("phash", description="`phash`: low frequencies; `dhash`: differences of neighbours")
    radius: int = Field(3, ge=0, le=7, description="most bits, of 64, in which two hashes may differ")
    keep: Keep = Field("largest", description="which stays: the picture with the most pixels (then by key), or the first by key")

    def steps(self) -> Sequence[BaseConfig]:
        """Hash, then compare band by band."""
        bands = range(self.radius + 1)
        return (HashStep(hash=self.hash), *(BandStep(hash=self.hash, radius=self.radius, band=band, keep=self.keep) for band in bands))

    def build(self, seed: int) -> PairMethod:
        """The first step; the whole chain is `steps`."""
        return HashStep(hash=self.hash).build(seed)


class HashStep(BaseConfig):
    """The first step."""

    method: Literal["perceptual-duplicates"] = "perceptual-duplicates"
    hash: Kind

    def build(self, seed: int) -> Hashes:
        """The method; nothing is drawn."""
        del seed
        return Hashes(self.hash)


class BandStep(BaseConfig):
    """A comparing step."""

    method: Literal["perceptual-duplicates"] = "perceptual-duplicates"
    hash: Kind
    radius: int
    band: int
    keep: Keep

    def build(self, seed: int) -> Band:
        """The method; nothing is drawn."""
        del seed
        return Band(self)


@dataclass(frozen=True)
class Hashes(PairMethod):
    """Adds the column `meta.<hash>` (UInt64). Keeps all."""

    hash: Kind
    needs = frozenset[Need]({"captions", "pixels"})

    def apply(self, batch: pl.DataFrame, state: Any) -> Verdict:
        """Keeps all."""
        del state
        values = [perceptual(data, self.hash, key) for key, data in zip(batch["key"], batch["pixels"], strict=True)]
        kept = batch.with_columns(pl.Series(column_of(self.hash), values, dtype=pl.UInt64))
        return Verdict(kept, batch.head(0).select("key", reason=pl.lit(""), score=pl.lit(None, pl.Float32), twin=pl.lit(None, pl.String)))


@dataclass(frozen=True)
class Band(PairMethod):
    """Rejects a pair if one before it, among those of the same band that are still there, is within the radius.

    A rejected pair's score is the share of equal bits, its `twin` the nearest before it.
    """

    config: BandStep

    def group(self, batch: pl.DataFrame, state: Any) -> NDArray[np.int64]:
        """The band's value; flat pictures go by their key, so that they do not all lie in one group."""
        del state
        hashes = batch[column_of(self.config.hash)]
        value_N = band_of(hashes.fill_null(0).to_numpy(), self.config.radius, self.config.band)
        _, bits = band_bounds(self.config.radius)[self.config.band]
        flat_N = (key_hashes(batch["key"]) >> np.uint64(2)).astype(np.int64)
        return np.where(hashes.is_null().to_numpy(), flat_N | np.int64(1 << min(bits, 61)), value_N)

    def apply(self, batch: pl.DataFrame, state: Any) -> Verdict:
        """The verdict on whole groups."""
        del state
        column = column_of(self.config.hash)
        image = pl.col("image").struct
        pixels = (image.field("width").cast(pl.Int64) * image.field("height")) if self.config.keep == "largest" else pl.lit(0)
        order = batch.select("key", hash=pl.col(column), band="group", pixels=-pixels).with_row_index("row").drop_nulls("hash")
        order = order.filter(pl.col("band").is_duplicated()).sort("band", "pixels", "key")
        copy_N, score_N = np.zeros(batch.height, dtype=bool), np.zeros(batch.height)
        twin_N = np.full(batch.height, -1)
        row_M = order["row"].to_numpy().astype(np.int64)
        before_M, distance_M = nearest_in_runs(order["hash"].to_numpy(), order["band"].to_numpy(), self.config.radius)
        found = before_M >= 0
        copy_N[row_M[found]] = True
        score_N[row_M[found]] = 1 - distance_M[found] / BITS
        twin_N[row_M[found]] = row_M[before_M[found]]
        return verdict(batch, copy_N, REASON, score_N, batch["key"].gather(np.maximum(twin_N, 0)).rename("twin"))

    def report(self, state: Any) -> Mapping[str, Any]:
        """Which band, of which bits."""
        del state
        first, bits = band_bounds(self.config.radius)[self.config.band]
        return {"band": self.config.band, "bits": [first, first + bits]}


def column_of(kind: Kind) -> str:
    """The column that holds the hashes."""
    return f"meta.{kind}"
