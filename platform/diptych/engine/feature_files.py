"""Feature matrices on disk: written block by block, memory-mapped when read, named by what made them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import polars as pl
from numpy.typing import NDArray

import diptych
from diptych.core import digest
from diptych.pairs import files
from diptych.pairs.dataset import PairDataset
from diptych.pairs.ranges import is_remote

CODE = ("pairs/decode.py", "models", "engine/features.py", "evaluate/encode.py")
"""What turns encoded pictures and texts into features: its digest is part of every name, so that features of older code are never mixed in."""


@cache
def code() -> str:
    """The digest of the code that makes features."""
    package = Path(diptych.__file__).parent
    places = [package / name for name in CODE]
    return digest.of_plain([digest.of_tree(place) if place.is_dir() else digest.of_file(place) for place in places])


def of_pictures(dataset: PairDataset, pairs: pl.DataFrame) -> str:
    """The name of a selection of pictures: their keys and places in order, and the shards they lie in. Labels and captions do not count."""
    used = set(pairs["image"].struct.field("shard").unique().to_list())
    shards = [[name, entry.size_bytes, entry.sha256 or _state(entry.uri)] for name, entry in sorted(dataset.shards.items()) if name in used]
    rows = pairs.select("key", pl.col("image").struct.unnest()).write_csv(include_header=False).encode()
    return digest.of_plain([shards, digest.of_bytes(rows)])


def _state(uri: str) -> list[Any]:
    """What is known of a shard that was not hashed."""
    return [uri] if is_remote(uri) else [uri, Path(uri).stat().st_mtime_ns]


def path(folder: Path, name: str) -> Path:
    """The file of a digest."""
    return folder / f"{name.removeprefix('sha256:')}.npy"


def read(file: Path) -> NDArray[np.float32]:
    """Features `[N, D]`: float32 are mapped and read as they are used, float16 are widened in memory."""
    stored: NDArray[Any] = np.load(file, mmap_mode="r", allow_pickle=False)
    return np.asarray(stored).astype(np.float32, copy=False)


def write(out: Sequence[Path], blocks: Iterable[Sequence[NDArray[np.float32]]], rows: int, dtype: type[np.float32 | np.float16]) -> None:
    """Writes several matrices of `rows` rows at once, from blocks that hold some rows of each: no matrix is ever whole in memory.

    All files appear at the end; on any error none does. Raises ResourceError when the disk is full.
    """
    partials = [files.partial_of(file) for file in out]
    done = 0
    try:
        with ExitStack() as stack:
            for file in out:
                file.parent.mkdir(parents=True, exist_ok=True)
            targets = [stack.enter_context(partial.open("wb")) for partial in partials]
            for block in blocks:
                for file, target, part in zip(out, targets, block, strict=True):
                    with files.guard_space(file, part.nbytes):
                        _append(target, part.astype(dtype, copy=False), rows)
                done += len(block[0])
            assert done == rows, f"{done} rows were made, {rows} asked for"
        for partial, file in zip(partials, out, strict=True):
            partial.replace(file)
    finally:
        for partial in partials:
            partial.unlink(missing_ok=True)


def _append(target: BinaryIO, part: NDArray[Any], rows: int) -> None:
    """Adds rows to a NumPy file; the first ones bring its header."""
    if not target.tell():
        header = {"descr": np.lib.format.dtype_to_descr(part.dtype), "fortran_order": False, "shape": (rows, part.shape[1])}
        np.lib.format.write_array_header_1_0(target, header)
    target.write(np.ascontiguousarray(part).tobytes())
