"""The pieces of work that a pass shares out: each reads tables that are done and leaves a file under a done name.

A piece is a small frozen object that any process can run; run again, it finds its file. A method that groups has its rows routed to buckets
of whole groups, decided on there, and handed back.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from diptych.core.config import Config
from diptych.core.errors import DataError
from diptych.core.points import PairMethod, Verdict
from diptych.engine import features, mapped
from diptych.pairs.dataset import with_twin
from diptych.pairs.schema import REJECTS
from diptych.pairs.shards import ShardReader

FEATURE = "_feature."
PAINTED = "_painted"
"""The scratch column of new pictures, encoded; null where a pair keeps its own."""
LENT = ("feature", "text_feature", "pixels", "group")
"""Columns that a batch has for the method alone."""
PIXEL_ROWS = 1024
"""Pairs whose encoded pictures are held at once, where a method decides on every pair by itself."""


@dataclass(frozen=True)
class Place:
    """What every task of a pass needs: where tables lie, how to reach pictures, whose parameters apply."""

    phase: str
    method: str
    config: Config
    seed: int
    scratch: Path
    reader: ShardReader
    feature: features.FeatureSpec | None
    carried: frozenset[str] = frozenset()
    """The scratch columns of features that a later method reads."""

    @property
    def column(self) -> str:
        """The scratch column that carries this method's features."""
        return FEATURE + (self.feature.name if self.feature else "")

    @property
    def text_column(self) -> str:
        """The scratch column that carries the features of first captions by the same model."""
        return f"{self.column}:text"

    def piece(self, kind: str, index: int) -> Path:
        """Where a finished piece lies."""
        return self.scratch / f"{kind}-{index:05d}{mapped.SUFFIX}"

    def build(self) -> PairMethod:
        """The method itself, built in the process that runs it."""
        method: PairMethod = self.config.build(self.seed)  # type: ignore[attr-defined]
        return method


@dataclass(frozen=True)
class TrainRows:
    """A table's pairs of the split `train`; the table itself when it has no others."""

    work: Path

    def __call__(self, item: tuple[int, Path]) -> Path:
        """Number and table to the table of its train rows."""
        index, table = item
        splits = pl.scan_parquet(table).select(pl.col("split").eq("train").all()).collect().item()
        if splits:
            return table
        return mapped.write(mapped.read(table).filter(pl.col("split") == "train"), self.work / f"train-{index:05d}{mapped.SUFFIX}")


def batch_of(place: Place, frame: pl.DataFrame, method: PairMethod) -> pl.DataFrame:
    """The frame as the method sees it: `feature` and `pixels` added when needed, other scratch columns hidden."""
    wanted = {place.column: "feature"} if "features" in method.needs else {}
    wanted |= {place.text_column: "text_feature"} if "text features" in method.needs else {}
    hidden = [name for name in frame.columns if name == PAINTED or (name.startswith(FEATURE) and name not in wanted)]
    batch = frame.drop(hidden).rename(wanted)
    if "pixels" in method.needs:
        batch = batch.with_columns(pl.Series("pixels", place.reader.read_column(frame["image"]), dtype=pl.Binary))
    return batch


def _decided(place: Place, frame: pl.DataFrame, method: PairMethod, state: Any) -> Verdict:
    """The method's verdict; pictures that it made stand in the scratch column of the rows that are kept."""
    batch = batch_of(place, frame, method)
    verdict = method.apply(batch, state)
    _check(place, frame, verdict.kept, verdict.rejected)
    if not method.paints:
        return verdict
    before = batch.select("key", pl.col("pixels").alias(PAINTED))
    kept = verdict.kept.join(before, on="key", how="left", maintain_order="left")
    own = pl.when(pl.col("pixels") != pl.col(PAINTED)).then(pl.col("pixels"))
    return Verdict(kept.with_columns(own.alias(PAINTED)), verdict.rejected)


def _returned(kept: pl.DataFrame) -> pl.DataFrame:
    """The kept rows without what was lent to the method."""
    return kept.drop([name for name in LENT if name in kept.columns])


def _restore(place: Place, before: pl.DataFrame, kept: pl.DataFrame) -> pl.DataFrame:
    """The kept rows with the scratch columns that are wanted later, in the order they came in."""
    kept = _returned(kept)
    hidden = [name for name in before.columns if name in {PAINTED, *place.carried} and name not in kept.columns]
    order = before.select("key", *hidden).with_row_index("_order")
    return order.join(kept, on="key", how="inner").sort("_order").select(*kept.columns, *hidden)


def _check(place: Place, before: pl.DataFrame, kept: pl.DataFrame, rejected: pl.DataFrame) -> None:
    if kept.height + rejected.height == before.height and pl.concat([kept["key"], rejected["key"]]).n_unique() == before.height:
        return
    raise DataError.at(
        "A method lost or invented pairs", f"{place.phase}: {place.method}", f"{before.height} in, {kept.height} kept, {rejected.height} left",
        "every pair in exactly one of the two", "this is a fault of the method; please report it",
    )  # fmt: skip


def _left(place: Place, before: pl.DataFrame, rejected: pl.DataFrame) -> pl.DataFrame:
    """Rejects with their picture and captions, so that the contact sheet can show them."""
    return (
        with_twin(rejected)
        .select("key", pl.col("reason").cast(pl.String), pl.col("score").cast(pl.Float32), pl.col("twin").cast(pl.String))
        .join(before.select("key", "image", "captions"), on="key", how="left", maintain_order="left")
        .with_columns(phase=pl.lit(place.phase), method=pl.lit(place.method))
        .select(list(REJECTS))
    )


@dataclass(frozen=True)
class WithFeatures:
    """Adds a column of features to a table: those of the pictures, or of every pair's first caption."""

    place: Place
    texts: bool = False

    def __call__(self, item: tuple[int, Path]) -> Path:
        """Number and table to the table with the column."""
        index, table = item
        frame, column = mapped.read(table), self.place.text_column if self.texts else self.place.column
        if column in frame.columns:
            return table
        path = self.place.piece("texts" if self.texts else "features", index)
        if not path.exists():
            spec = self.place.feature
            assert spec is not None, f"{self.place.method} needs features but names no model"
            values = features.of_captions(spec, frame) if self.texts else features.compute(spec, frame, self.place.reader)
            mapped.write(frame.with_columns(pl.Series(column, values, dtype=pl.Array(pl.Float32, values.shape[1]))), path)
        return path


@dataclass(frozen=True)
class FoldTask:
    """Maps one table to its partial result; arrays are kept on disk for a restart."""

    place: Place
    number: int
    state: Any

    def __call__(self, item: tuple[int, Path]) -> Any:
        """Number and table to the partial result."""
        index, table = item
        path = self.place.scratch / f"fold{self.number}-{index:05d}.npz"
        if path.exists():
            with np.load(path, allow_pickle=False) as stored:
                return stored["partial"]
        method = self.place.build()
        part = method.folds()[self.number].map(batch_of(self.place, mapped.read(table), method), self.state)
        if isinstance(part, np.ndarray) and part.dtype != object:
            partial = path.with_suffix(".partial.npz")
            np.savez_compressed(partial, partial=part)  # counts are mostly zeros
            partial.replace(path)
        return part


@dataclass(frozen=True)
class Apply:
    """The verdict on one table."""

    place: Place
    state: Any

    def __call__(self, item: tuple[int, Path]) -> Path:
        """Number and table to the table of what is kept; what left lies beside it."""
        index, table = item
        path = self.place.piece("kept", index)
        if path.exists():
            return path
        frame = mapped.read(table)
        method = self.place.build()
        rows = PIXEL_ROWS if "pixels" in method.needs else max(1, frame.height)
        slices = [frame.slice(start, rows) for start in range(0, max(1, frame.height), rows)]
        verdicts = [_decided(self.place, part, method, self.state) for part in slices]
        kept, rejected = pl.concat([_returned(verdict.kept) for verdict in verdicts]), pl.concat([verdict.rejected for verdict in verdicts])
        if rejected.height:
            mapped.write(_left(self.place, frame, rejected), self.place.piece("left", index))
        return mapped.write(_restore(self.place, frame, kept), path)


@dataclass(frozen=True)
class Route:
    """Shares a table's rows out to the buckets of their groups; a group lies whole in one bucket."""

    place: Place
    state: Any
    buckets: int

    def __call__(self, item: tuple[int, Path]) -> Path:
        """Number and table to its rows by bucket."""
        index, table = item
        path = self.place.piece("route", index)
        if path.exists():
            return path
        frame = mapped.read(table)
        method = self.place.build()
        group_N = method.group(batch_of(self.place, frame, method), self.state)
        assert group_N is not None
        shown = {self.place.column, self.place.text_column}
        frame = frame.drop([name for name in frame.columns if name == PAINTED or (name.startswith(FEATURE) and name not in shown)])
        frame = frame.with_columns(group=pl.Series(group_N, dtype=pl.Int64), _table=pl.lit(index, pl.Int32))
        return mapped.write_parts(frame, group_N % self.buckets, self.buckets, path)


@dataclass(frozen=True)
class Decide:
    """The verdict on a bucket of whole groups, shared out to the tables its rows came from."""

    place: Place
    state: Any
    tables: int

    def __call__(self, bucket: int) -> None:
        """Decides on a bucket, unless that was done or it holds no rows."""
        # Written last: where it is, the bucket is done.
        path = self.place.piece("decided-kept", bucket)
        found = None if path.exists() else mapped.read_part((self.place.piece("route", index) for index in range(self.tables)), bucket)
        if found is None:
            return
        frame = found.sort("group", maintain_order=True)
        method = self.place.build()
        verdict = _decided(self.place, frame.drop("_table"), method, self.state)
        tables = frame.select("key", "_table")
        self._hand_back(_left(self.place, frame, verdict.rejected).join(tables, on="key"), self.place.piece("decided-left", bucket))
        self._hand_back(_returned(verdict.kept).join(tables, on="key"), path)

    def _hand_back(self, frame: pl.DataFrame, path: Path) -> None:
        mapped.write_parts(frame.drop("_table"), frame["_table"].cast(pl.Int64).to_numpy(), self.tables, path)


@dataclass(frozen=True)
class Return:
    """Puts the verdicts of all buckets back into their table, in the table's own order."""

    place: Place
    buckets: int

    def __call__(self, item: tuple[int, Path]) -> Path:
        """Number and table to the table of what is kept; what left lies beside it."""
        index, table = item
        path = self.place.piece("kept", index)
        if path.exists():
            return path
        frame = mapped.read(table)
        kept, left = self._part("decided-kept", index), self._part("decided-left", index)
        if left is not None:
            order = frame.select("key").with_row_index("_order")
            mapped.write(left.join(order, on="key").sort("_order").drop("_order"), self.place.piece("left", index))
        if kept is None:
            kept = frame.clear().drop([name for name in frame.columns if name.startswith((FEATURE, PAINTED))])
        return mapped.write(_restore(self.place, frame, kept), path)

    def _part(self, kind: str, index: int) -> pl.DataFrame | None:
        paths = (self.place.piece(kind, bucket) for bucket in range(self.buckets))
        return mapped.read_part((path for path in paths if path.exists()), index)
