"""Tables on their way through a phase: Arrow files that are mapped into memory, whole or a part at a time.

A phase reads every table several times and nobody reads it afterwards, so nothing is packed: most of its bytes are features, which zstd
makes no smaller. To read such a file costs what is touched of it. A file in parts holds the rows of one table for every bucket, or of one
bucket for every table; a shuffle is as many files as there are tables and buckets, not as their product.

Shape legend: N rows, P parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pyarrow as pa

SUFFIX = ".arrow"
STARTS = b"diptych.starts"
"""Key of the index in a schema's metadata: the first row of every part and the end of the last, int64 `[P + 1]`."""


def write(frame: pl.DataFrame, path: Path) -> Path:
    """Writes a table under its name at once, or not at all; returns `path`."""
    return _write(_arrow(frame), path)


def write_parts(frame: pl.DataFrame, part_N: NDArray[np.int64], parts: int, path: Path) -> Path:
    """Writes a table part by part: row n lies in part `part_N[n]` of `[0, parts)`, behind those that came before it."""
    start_P = np.concatenate([[0], np.bincount(part_N, minlength=parts).cumsum()]).astype(np.int64)
    assert len(start_P) == parts + 1, "a part beyond the last"
    ordered = _arrow(frame[np.argsort(part_N, kind="stable")])
    return _write(ordered.replace_schema_metadata({STARTS: start_P.tobytes()}), path)


def read(path: Path) -> pl.DataFrame:
    """A table of a phase or of a pair dataset. Columns that are not looked at cost nothing where the file is a phase's own."""
    if path.suffix != SUFFIX:
        return pl.read_parquet(path)
    import pyarrow as pa

    with pa.memory_map(str(path)) as source:
        return _frame(pa.ipc.open_file(source).read_all())


def read_part(paths: Iterable[Path], part: int) -> pl.DataFrame | None:
    """The rows that all files hold in this part, in the order of the files; None if none does."""
    import pyarrow as pa

    found: list[pa.RecordBatch] = []
    for path in paths:
        with pa.memory_map(str(path)) as source:
            file = pa.ipc.open_file(source)
            start_P = np.frombuffer(file.schema.metadata[STARTS], dtype=np.int64)
            if start_P[part] < start_P[part + 1]:
                found.append(file.get_batch(0).slice(start_P[part], start_P[part + 1] - start_P[part]))
    return _frame(pa.Table.from_batches([batch.replace_schema_metadata(None) for batch in found])) if found else None


def size_bytes(path: Path) -> int:
    """About how much memory a table takes: what its columns of fixed width do, and 200 bytes a row for the others."""
    lazy = pl.scan_parquet(path) if path.suffix != SUFFIX else read(path).lazy()
    width = sum(4 * kind.shape[0] for kind in lazy.collect_schema().values() if isinstance(kind, pl.Array))
    return int(lazy.select(pl.len()).collect().item()) * (width + 200)


def remove(paths: Sequence[Path]) -> None:
    """Deletes files of a phase that no later step reads."""
    for path in paths:
        path.unlink(missing_ok=True)


def _arrow(frame: pl.DataFrame) -> pa.Table:
    # In one piece: a file has one dictionary a column, and its parts are slices of one batch.
    return frame.rechunk().to_arrow(compat_level=pl.CompatLevel.newest())


def _frame(table: pa.Table) -> pl.DataFrame:
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)
    return frame


def at_once(path: Path, write: Callable[[Path], object]) -> Path:
    """Lets `write` make a file beside `path`, then gives it that name; returns `path`."""
    partial = path.with_suffix(".partial")
    write(partial)
    partial.replace(path)
    return path


def _write(table: pa.Table, path: Path) -> Path:
    import pyarrow as pa

    def whole(partial: Path) -> None:
        with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, table.schema) as file:
            file.write_table(table)

    return at_once(path, whole)
