"""Writing a pair dataset: all of it under another name, then one rename. What cannot be finished leaves nothing behind."""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import polars as pl

from diptych.core import digest
from diptych.core.errors import DataError
from diptych.pairs import files
from diptych.pairs.dataset import PairDataset, absolute_uri, with_twin
from diptych.pairs.keys import KeyIndex
from diptych.pairs.manifest import NAME, FileEntry, Ledger, Left, Manifest, PhaseRecord, ShardEntry
from diptych.pairs.ranges import is_remote
from diptych.pairs.schema import CAPTION_SOURCES, MAX_KEY_BYTES, PAIRS, REJECTS

ROW_GROUP_ROWS = 65_536
SHARDS = "shards"

Schema = dict[str, pl.DataType]


class DatasetWriter:
    """Writes a pair dataset to `out`, which is replaced if it exists. A context manager.

    On any exception, and when `finish` was not called, what was written is removed and `out` is as it was.

    Args:
        out: the dataset's folder.
        phase: what made the dataset; may be replaced until `finish`.
        parents: digests of the datasets it is made from.
        shards: the shards its rows point into; relative paths are relative to `shards_root`.
        pairs_in: pairs that came into the phase; `None` at ingest, where it is what was added.
        shards_root: usually the parent's `root`.
    """

    def __init__(
        self,
        out: Path,
        phase: PhaseRecord,
        parents: Sequence[str] = (),
        shards: Mapping[str, ShardEntry] | None = None,
        *,
        pairs_in: int | None,
        shards_root: Path | None = None,
    ) -> None:
        self.out = out.parent.resolve() / out.name
        self.phase, self.parents, self.pairs_in = phase, tuple(parents), pairs_in
        self.folder = files.partial_of(self.out)
        self.keys = KeyIndex()
        self.left: Counter[tuple[str, str]] = Counter()
        self.kept = 0
        self._shards: dict[str, ShardEntry] = {}
        self._tables: list[FileEntry] = []
        self._schemas: list[Schema] = []
        self._rejects: list[FileEntry] = []
        self._finished = False
        self.add_shards(shards or {}, shards_root)

    @property
    def shards_folder(self) -> Path:
        """Where ingest puts the shards that belong to this dataset."""
        return self.folder / SHARDS

    def __enter__(self) -> Self:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.folder.mkdir()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._finished:
            files.remove(self.folder)

    def add_shards(self, shards: Mapping[str, ShardEntry], root: Path | None = None) -> None:
        """Adds shards; their paths become relative to `out`. Raises DataError for a name that means two shards."""
        for name, shard in shards.items():
            entry = shard.model_copy(update={"uri": self._relative(shard.uri, root)})
            if self._shards.setdefault(name, entry) != entry:
                raise DataError.at("Two shards have one name", f"shard {name}", [self._shards[name].uri, entry.uri], "one shard a name")

    def known(self, keys: pl.Series) -> pl.Series:
        """Boolean, a row a key: True where an earlier `add` kept a pair of that key. Exact."""
        suspects = self.keys.suspects(keys)
        if suspects.any():
            wanted = keys.filter(suspects).unique()
            earlier = [pl.scan_parquet(self.folder / entry.name, glob=False).select("key") for entry in self._tables]
            taken = pl.concat(earlier).filter(pl.col("key").is_in(wanted.implode())).collect()["key"]
            suspects &= keys.is_in(taken.implode())
        return suspects

    def add(self, kept: pl.DataFrame, rejected: pl.DataFrame | None = None) -> None:
        """Writes one table of pairs and one of rejects; an empty one is not written, and files are numbered in the order of writing.

        Columns are put in order: the schema's, then others by name. Raises DataError if a column of the schema is missing or of another
        type, if a key is null, too long or taken, or a caption source is unknown; ResourceError if the disk is full.
        """
        if kept.height:
            frame = conform(kept, PAIRS, extras=True)
            _check_rows(frame)
            self._check_keys(frame["key"])
            self._tables.append(self._write(f"pairs-{len(self._tables):05d}.parquet", frame))
            self._schemas.append(dict(frame.schema))
            self.keys.add(frame["key"])
            self.kept += frame.height
        if rejected is not None and rejected.height:
            frame = conform(with_twin(rejected), REJECTS, extras=False)
            self._rejects.append(self._write(f"rejects-{len(self._rejects):05d}.parquet", frame))
            for method, reason, count in frame.group_by("method", "reason").len().iter_rows():
                self.left[method, reason] += count

    def finish(self) -> PairDataset:
        """Settles columns and ledger, writes the manifest, and gives the dataset its name.

        Raises DataError if pairs were lost or invented, or if tables disagree about a column's type.
        """
        schema = self._settle()
        left = tuple(Left(method=method, reason=reason, count=self.left[method, reason]) for method, reason in sorted(self.left))
        pairs_in = self.kept + self.left.total() if self.pairs_in is None else self.pairs_in
        manifest = Manifest(
            rows=self.kept,
            columns={name: str(kind) for name, kind in schema.items()},
            tables=tuple(self._tables),
            rejects=tuple(self._rejects),
            shards=dict(sorted(self._shards.items())),
            parents=self.parents,
            phase=self.phase,
            ledger=Ledger(pairs_in=pairs_in, kept=self.kept, left=left),
        )
        files.write_durably(self.folder / NAME, manifest.to_bytes())
        files.publish(self.folder, self.out)
        self._finished = True
        return PairDataset.open(self.out)

    def _relative(self, uri: str, root: Path | None) -> str:
        """A local path seen from `out`; what lies in the partial folder will lie in `out`."""
        if is_remote(uri):
            return uri
        if root is None and not Path(uri).is_absolute():
            raise DataError.at("It is unknown what a shard's path is relative to", "shards_root", uri, "the folder of the parent dataset")
        path = Path(absolute_uri(uri, (root or self.out).resolve()))
        path = path.parent.resolve() / path.name
        base = self.folder if path.is_relative_to(self.folder) else self.out
        return Path(os.path.relpath(path, base)).as_posix()

    def _check_keys(self, keys: pl.Series) -> None:
        taken = keys.is_duplicated() | self.known(keys)
        if taken.any():
            examples = keys.filter(taken).unique(maintain_order=True).head(3).to_list()
            raise DataError.at("Keys are not unique", "key", examples, "one pair a key", f"{taken.sum()} rows are concerned")

    def _settle(self) -> Schema:
        """One schema for all tables: those that lack a column of another get it, full of nulls."""
        schema = dict(_common(self._schemas))
        for index, own in enumerate(self._schemas):
            if list(own.items()) != list(schema.items()):
                entry = self._tables[index]
                frame = pl.read_parquet(self.folder / entry.name, glob=False)
                missing = [pl.lit(None, kind).alias(name) for name, kind in schema.items() if name not in own]
                self._tables[index] = self._write(entry.name, frame.with_columns(missing).select(list(schema)).cast(schema))  # type: ignore[arg-type]
        return schema

    def _write(self, name: str, frame: pl.DataFrame) -> FileEntry:
        data = parquet_bytes(frame)
        files.write_durably(self.folder / name, data)
        return FileEntry(name=name, rows=frame.height, size_bytes=len(data), sha256=digest.of_bytes(data))


def parquet_bytes(frame: pl.DataFrame) -> bytes:
    """A frame as Parquet: zstd, statistics; equal frames give equal bytes, however they are chunked."""
    buffer = io.BytesIO()
    frame.rechunk().write_parquet(buffer, compression="zstd", statistics=True, row_group_size=ROW_GROUP_ROWS)
    return buffer.getvalue()


def conform(frame: pl.DataFrame, schema: Mapping[str, pl.DataType | type[pl.DataType]], *, extras: bool) -> pl.DataFrame:
    """The frame with the schema's columns first, in order, and (with `extras`) others after them by name.

    Null columns and columns of the same kind (`Int32` for `Int64`, fields in another order) are cast. Raises DataError for what does
    not fit.
    """
    missing = [name for name in schema if name not in frame.columns]
    if missing:
        raise DataError.at("A pair table lacks columns", "columns", missing, f"all of {', '.join(schema)}")
    others = sorted(set(frame.columns) - set(schema)) if extras else []
    try:
        return frame.select([*schema, *others]).with_columns(pl.col(name).cast(kind, strict=True) for name, kind in schema.items())
    except pl.exceptions.PolarsError as error:
        got = {name: str(kind) for name, kind in frame.schema.items() if name in schema}
        raise DataError.at("A pair table has columns of the wrong type", "columns", f"<{got}: {error}>", str(dict(schema))) from None


def _common(schemas: Sequence[Schema]) -> Schema:
    merged: Schema = {}
    for index, schema in enumerate(schemas):
        for name, kind in schema.items():
            known = merged.setdefault(name, kind)
            if known == pl.Null:
                merged[name] = kind
            elif kind not in (known, pl.Null):
                raise DataError.at(
                    "Tables disagree about a column", f"column {name!r}, table {index}", str(kind), str(known), "give every part one type"
                )
    if not merged:
        return {name: kind() if isinstance(kind, type) else kind for name, kind in PAIRS.items()}
    return {name: merged[name] if merged[name] != pl.Null else pl.String() for name in [*PAIRS, *sorted(set(merged) - set(PAIRS))]}


def _check_rows(frame: pl.DataFrame) -> None:
    key, source = frame["key"], frame["captions"].explode(empty_as_null=False).struct.field("source")
    known = pl.lit(False)
    for word in CAPTION_SOURCES:
        known |= pl.col("source").str.starts_with(word) if word.endswith(":") else pl.col("source") == word
    strange = source.to_frame("source").filter(~known.fill_null(False))["source"].unique()
    long = key.filter(key.str.len_bytes() > MAX_KEY_BYTES)
    nulls = {name: count for name in PAIRS if (count := frame[name].null_count())}
    if nulls:
        raise DataError.at("A pair table has rows without a value", "rows", nulls, "key, image, captions and split in every row")
    if len(long):
        raise DataError.at("A key is too long", "key", long[0], f"at most {MAX_KEY_BYTES} bytes")
    if len(strange):
        raise DataError.at(
            "A caption has a source of no known kind", "captions.source", strange.head(3).to_list(), f"one of {', '.join(CAPTION_SOURCES)}"
        )
