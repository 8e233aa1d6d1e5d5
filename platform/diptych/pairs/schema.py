"""The columns of a pair table. One row is one pair; pictures are pointed at, never held."""

from __future__ import annotations

import polars as pl

IMAGE = pl.Struct({"shard": pl.String, "offset": pl.Int64, "size": pl.Int64, "width": pl.Int32, "height": pl.Int32})
CAPTIONS = pl.List(pl.Struct({"text": pl.String, "source": pl.String, "score": pl.Float32}))

PAIRS: dict[str, pl.DataType | type[pl.DataType]] = {"key": pl.String, "image": IMAGE, "captions": CAPTIONS, "split": pl.String}
"""The columns that every pair table has, in this order; methods add more under documented names:
`label` (int), `label_name` (str), `language` (str), `weight` (float), `regions`, `feature.<model>`, `meta.<name>` (of which `meta.source`
names the source of a pool of several)."""

REJECTS: dict[str, pl.DataType | type[pl.DataType]] = {
    "key": pl.String,
    "phase": pl.String,
    "method": pl.String,
    "reason": pl.String,
    "score": pl.Float32,
    "image": IMAGE,
    "captions": CAPTIONS,
    "twin": pl.String,
}
"""A pair that left: which method, why, with what score, where its picture lies (null if it never had one), and, of a copy, whose (a key)."""

CAPTION_SOURCES = ("alt", "human", "tag", "rewrite:", "synthetic:", "translation:")
"""Allowed beginnings of `captions.source`."""

MAX_CAPTION_CHARS = 10_000
MAX_KEY_BYTES = 512
