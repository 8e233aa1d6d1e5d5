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
INDEX = ".npy"
"""What lies beside a table in parts: the first row of every part and the end of the last, int64 `[P + 1]`."""


def write(frame: pl.DataFrame, path: Path) -> Path:
    """Writes a table under its name at once, or not at all; returns `path`."""
    # By polars: pyarrow would write every string that the rows' strings once lay among, and not these alone. In one piece: a file has one
    # dictionary a column.
    whole, newest = frame.rechunk(), pl.CompatLevel.newest()
    return at_once(path, lambda partial: whole.write_ipc(partial, compression="uncompressed", compat_level=newest))


def write_parts(frame: pl.DataFrame, part_N: NDArray[np.int64], parts: int, path: Path) -> Path:
    """Writes a table part by part: row n lies in part `part_N[n]` of `[0, parts)`, behind those that came before it."""
    start_P = np.concatenate([[0], np.bincount(part_N, minlength=parts).cumsum()]).astype(np.int64)
    assert len(start_P) == parts + 1, "a part beyond the last"
    np.save(path.with_suffix(INDEX), start_P)
    return write(frame[np.argsort(part_N, kind="stable")], path)


def read(path: Path) -> pl.DataFrame:
    """A table of a phase or of a pair dataset. Columns that are not looked at cost nothing where the file is a phase's own."""
    return _frame(_mapped(path)) if path.suffix == SUFFIX else pl.read_parquet(path)


def read_part(paths: Iterable[Path], part: int) -> pl.DataFrame | None:
    """The rows that all files hold in this part, in the order of the files; None if none does."""
    import pyarrow as pa

    found = []
    for path in paths:
        start, end = np.load(path.with_suffix(INDEX), mmap_mode="r", allow_pickle=False)[part : part + 2].tolist()
        if start < end:
            found.append(_mapped(path).slice(start, end - start))
    return _frame(pa.concat_tables(found)) if found else None


def size_bytes(path: Path) -> int:
    """About how much memory a table takes: what its columns of fixed width do, and 200 bytes a row for the others."""
    lazy = pl.scan_parquet(path) if path.suffix != SUFFIX else read(path).lazy()
    width = sum(4 * kind.shape[0] for kind in lazy.collect_schema().values() if isinstance(kind, pl.Array))
    return int(lazy.select(pl.len()).collect().item()) * (width + 200)


def remove(paths: Sequence[Path]) -> None:
    """Deletes files of a phase that no later step reads."""
    for path in paths:
        path.unlink(missing_ok=True)


def _mapped(path: Path) -> pa.Table:
    import pyarrow as pa

    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_file(source).read_all()


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
