"""Picture bytes in uncompressed tars: written once by `ShardWriter`, read by `(shard, offset, size)` through `ShardReader`."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tarfile
import threading
import urllib.parse
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Self

import polars as pl

from diptych.core.errors import DataError
from diptych.pairs.files import guard_space
from diptych.pairs.manifest import ShardEntry
from diptych.pairs.ranges import AHEAD_BYTES, LocalFile, RemoteFile, is_remote, open_range
from diptych.pairs.tar import BLOCK_BYTES, Member, index_tar

__all__ = ["Member", "ShardReader", "ShardWriter", "index_tar", "member_name"]

MEBIBYTE = 1 << 20
RECORD_BYTES = 20 * BLOCK_BYTES
MAX_OPEN = 64
GAP_BYTES = 128 << 10
"""Bytes between two pictures of a store that are read in vain rather than asked around."""


def member_name(key: str, extension: str) -> str:
    """The tar member of a key: percent-encoded, so that no key makes a folder, climbs out of one, or ends at a dot."""
    stem = urllib.parse.quote(key, safe="", errors="surrogatepass").replace(".", "%2E")
    return f"{stem}.{extension}"


class ShardReader:
    """Reads pictures out of shards. Picklable: it carries names, and opens files where it is used, at most 64 at a time.

    Args:
        uris: shard name to absolute path or `scheme://…`.
    """

    def __init__(self, uris: Mapping[str, str]) -> None:
        self.uris = dict(uris)
        self._open: OrderedDict[str, LocalFile | RemoteFile] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"uris": self.uris}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["uris"])  # type: ignore[misc]

    def read(self, shard: str, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` of a shard. Raises DataError: unknown, missing or cut-off shard."""
        file = self._file(shard)
        try:
            data = file.read(offset, size)
        except OSError as error:
            raise DataError.at("A shard cannot be read", self.uris[shard], error, "a readable tar") from error
        if len(data) != size:
            raise DataError.at(
                "A shard is shorter than its index says", self.uris[shard], f"<{len(data)} bytes at {offset}>", f"{size} bytes"
            )
        return data

    def read_column(self, image: pl.Series) -> list[bytes]:
        """The bytes of every row of an `image` column, in its order; read in the order in which they lie. No row may be null.

        From a store, neighbours in a tar come in one request.
        """
        if image.null_count():
            raise DataError.at(
                "A pair has no picture to read", "image", f"<{image.null_count()} null rows>", "a place in a shard in every row"
            )
        fields = image.struct
        shards, offsets, sizes = fields.field("shard").to_list(), fields.field("offset").to_list(), fields.field("size").to_list()
        out: list[bytes] = [b""] * len(shards)
        order = sorted(range(len(shards)), key=lambda row: (shards[row], offsets[row]))
        for rows in self._together(order, shards, offsets, sizes):
            shard, start = shards[rows[0]], offsets[rows[0]]
            data = self.read(shard, start, max(offsets[row] + sizes[row] for row in rows) - start)
            for row in rows:
                out[row] = data[offsets[row] - start : offsets[row] - start + sizes[row]]
        return out

    def _together(self, order: Sequence[int], shards: Sequence[str], offsets: Sequence[int], sizes: Sequence[int]) -> Iterator[list[int]]:
        """The rows to read at once: one by one from a disk; from a store those with small gaps between them, 8 MiB at most."""
        rows: list[int] = []
        for row in order:
            if rows:
                first, last = rows[0], rows[-1]
                near = shards[row] == shards[first] and offsets[row] - offsets[last] - sizes[last] <= GAP_BYTES
                if not (near and offsets[row] + sizes[row] - offsets[first] <= AHEAD_BYTES and is_remote(self.uris.get(shards[row], ""))):
                    yield rows
                    rows = []
            rows.append(row)
        if rows:
            yield rows

    def close(self) -> None:
        """Closes what is open; the reader can be used again."""
        with self._lock:
            self._open.clear()

    def _file(self, shard: str) -> LocalFile | RemoteFile:
        with self._lock:
            file = self._open.pop(shard, None)
            self._open[shard] = file = file or self._opened(shard)
            if len(self._open) > MAX_OPEN:
                self._open.popitem(last=False)
            return file

    def _opened(self, shard: str) -> LocalFile | RemoteFile:
        uri = self.uris.get(shard)
        if uri is None:
            raise DataError.at(
                "A pair points into a shard that the dataset does not have", "image.shard", shard, f"one of {len(self.uris)} shards"
            )
        try:
            return open_range(uri)
        except OSError as error:
            raise DataError.at("A shard is missing or cannot be opened", uri, error, "the tar that the manifest names") from error


class ShardWriter:
    """Packs pictures into tars named `<prefix>-00000.tar`, …; equal input gives equal bytes. A context manager: leaving it closes the file.

    Args:
        folder: where the tars go; made if missing.
        prefix: beginning of the shard names, unique in the dataset.
        shard_size_bytes: a tar is closed before the picture that would take it past this size.
    """

    def __init__(self, folder: Path, prefix: str, shard_size_bytes: int = 256 * MEBIBYTE) -> None:
        self.folder, self.prefix, self.limit = folder, prefix, shard_size_bytes
        self.entries: dict[str, ShardEntry] = {}
        self._file: BinaryIO | None = None
        self._sha = hashlib.sha256()
        self._offset = 0
        folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # a full disk was reported when it was written to; closing flushes again
                self._file.close()
            self._file = None

    @property
    def _name(self) -> str:
        return f"{self.prefix}-{len(self.entries):05d}"

    @property
    def _path(self) -> Path:
        return self.folder / f"{self._name}.tar"

    def add(self, key: str, extension: str, data: bytes) -> dict[str, Any]:
        """Appends one picture; gives its `shard`, `offset`, `size`. Raises ResourceError when the disk is full."""
        return self.add_sample(key, {extension: data})[0]

    def add_sample(self, key: str, files: Mapping[str, bytes]) -> list[dict[str, Any]]:
        """Appends the files of one sample (ending to content), all into one tar; gives the place of each."""
        blocks, places, offset = [], [], 0
        for extension, data in files.items():
            info = tarfile.TarInfo(member_name(key, extension))
            info.size, info.mode = len(data), 0o644
            header = info.tobuf(tarfile.PAX_FORMAT)
            places.append((offset + len(header), len(data)))
            blocks += [header, data, bytes(-len(data) % BLOCK_BYTES)]
            offset += sum(map(len, blocks[-3:]))
        if self._offset and self._offset + offset > self.limit:
            self._close()
        start = self._offset
        self._write(b"".join(blocks))
        return [{"shard": self._name, "offset": start + place, "size": size} for place, size in places]

    def done(self) -> dict[str, ShardEntry]:
        """Closes the last tar; gives all shards by name, with absolute paths."""
        self._close()
        return self.entries

    def _write(self, data: bytes) -> None:
        with guard_space(self._path, len(data)):
            if self._file is None:
                self._file = self._path.open("wb")
            self._file.write(data)
        self._sha.update(data)
        self._offset += len(data)

    def _close(self) -> None:
        if self._file is None:
            return
        self._write(bytes(2 * BLOCK_BYTES + -(self._offset + 2 * BLOCK_BYTES) % RECORD_BYTES))
        with guard_space(self._path, self._offset):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        self.entries[self._name] = ShardEntry(
            uri=str(self._path.absolute()), size_bytes=self._offset, sha256=f"sha256:{self._sha.hexdigest()}"
        )
        self._file, self._sha, self._offset = None, hashlib.sha256(), 0
