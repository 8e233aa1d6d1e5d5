"""A pair dataset on disk, as a reader sees it: a folder with a manifest, pair tables, reject tables, and shards that may lie elsewhere."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from diptych.core import digest
from diptych.core.errors import DataError, Problem
from diptych.pairs.manifest import FileEntry, Manifest, ShardEntry
from diptych.pairs.ranges import is_remote
from diptych.pairs.schema import PAIRS, REJECTS
from diptych.pairs.shards import ShardReader


class PairDataset:
    """An opened pair dataset. Nothing is read until it is asked for; nothing is ever written.

    Attributes:
        root: the dataset's folder, absolute.
        manifest: what it says about itself.
        digest: its name, `sha256:<hex>`.
    """

    def __init__(self, root: Path, manifest: Manifest) -> None:
        self.root, self.manifest, self.digest = root, manifest, manifest.digest

    @classmethod
    def open(cls, root: str | Path, verify: bool = False) -> PairDataset:
        """Opens a dataset and checks that its files are there and have the sizes that the manifest says.

        Raises DataError with all that is wrong: no or a damaged manifest, a table or a local shard that is missing or of another size.
        With `verify`, tables are also hashed. Remote shards are not asked for.
        """
        folder = Path(root).resolve()
        dataset = cls(folder, Manifest.load(folder))
        found = [problem for entry in dataset._files() for problem in _file_problems(folder / entry.name, entry, verify)]
        for shard in dataset.shards.values():
            found += _shard_problems(shard)
        if found:
            raise DataError(f"The pair dataset {folder} is damaged: {len(found)} problem{'s' if len(found) > 1 else ''}", found)
        return dataset

    def __len__(self) -> int:
        return self.manifest.rows

    def __repr__(self) -> str:
        return f"PairDataset({str(self.root)!r}, {len(self)} pairs, {digest.short(self.digest)})"

    @property
    def shards(self) -> dict[str, ShardEntry]:
        """The shards by name, with absolute paths or URIs."""
        return {name: entry.model_copy(update={"uri": absolute_uri(entry.uri, self.root)}) for name, entry in self.manifest.shards.items()}

    def tables(self) -> list[Path]:
        """The pair tables, in order."""
        return [self.root / entry.name for entry in self.manifest.tables]

    def table(self, index: int) -> pl.DataFrame:
        """One pair table."""
        return _read([self.tables()[index]]).collect()

    def scan(self) -> pl.LazyFrame:
        """All pairs, lazily, in order; of no table, an empty frame of the schema."""
        return _read(self.tables()) if self.manifest.tables else pl.LazyFrame(schema=PAIRS)

    def read(self, columns: Sequence[str] | None = None) -> pl.DataFrame:
        """All pairs in memory; `columns` picks some. Raises DataError for a column that is not there."""
        names = list(self.scan().collect_schema().names())
        missing = sorted(set(columns or ()) - set(names))
        if missing:
            raise DataError.at("The dataset has no such column", self.root, missing, f"some of {', '.join(names)}")
        return self.scan().select(columns if columns is not None else names).collect()

    def rejects(self) -> pl.DataFrame:
        """The pairs that left in the phase that made this dataset: key, phase, method, reason, score, image, captions, twin."""
        paths = [self.root / entry.name for entry in self.manifest.rejects]
        return with_twin(_read(paths).collect()) if paths else pl.DataFrame(schema=REJECTS)

    def reader(self) -> ShardReader:
        """A reader of the pictures; picklable."""
        return ShardReader({name: entry.uri for name, entry in self.shards.items()})

    def verify_shards(self) -> None:
        """Hashes every local shard that has a checksum. Raises DataError with all that differ."""
        found = []
        for name, shard in self.shards.items():
            if shard.sha256 is None or is_remote(shard.uri):
                continue
            actual = digest.of_file(Path(shard.uri))
            if actual != shard.sha256:
                found.append(
                    Problem(shard.uri, actual, f"{shard.sha256}, as the manifest says of {name}", "the shard was changed after ingest")
                )
        if found:
            raise DataError(f"{len(found)} shards of {self.root} are not what they were", found)

    def _files(self) -> Sequence[FileEntry]:
        return (*self.manifest.tables, *self.manifest.rejects)


def with_twin(rejects: pl.DataFrame) -> pl.DataFrame:
    """Rejects with the column `twin`, null where the table was written without it."""
    return rejects if "twin" in rejects.columns else rejects.with_columns(twin=pl.lit(None, pl.String))


def absolute_uri(uri: str, root: Path) -> str:
    """A shard's URI as it can be opened: `root` is what a relative one is relative to."""
    return uri if is_remote(uri) else os.path.normpath(root / uri)


def _read(paths: Sequence[Path]) -> pl.LazyFrame:
    return pl.scan_parquet(list(paths), glob=False)


def _file_problems(path: Path, entry: FileEntry, verify: bool) -> list[Problem]:
    expected = f"{entry.size_bytes} bytes, as the manifest says"
    try:
        size = path.stat().st_size
    except OSError as error:
        return [Problem(str(path), f"<{error.strerror}>", expected, "run the phase again")]
    if size != entry.size_bytes:
        return [Problem(str(path), f"{size} bytes", expected, "run the phase again")]
    if verify and (actual := digest.of_file(path)) != entry.sha256:
        return [Problem(str(path), actual, f"{entry.sha256}, as the manifest says", "run the phase again")]
    return []


def _shard_problems(shard: ShardEntry) -> list[Problem]:
    if is_remote(shard.uri):
        return []
    try:
        size = Path(shard.uri).stat().st_size
    except OSError as error:
        fix = "shards are found relative to the dataset: move both together, or run ingest again"
        return [Problem(shard.uri, f"<{error.strerror}>", f"a shard of {shard.size_bytes} bytes", fix)]
    if size != shard.size_bytes:
        return [Problem(shard.uri, f"{size} bytes", f"a shard of {shard.size_bytes} bytes", "the shard was changed after ingest")]
    return []
