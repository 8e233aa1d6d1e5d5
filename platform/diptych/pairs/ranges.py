"""Files read by range, local or on whatever fsspec knows (`s3://`, `gs://`, `memory://`, …)."""

from __future__ import annotations

import os
from typing import Protocol

AHEAD_BYTES = 8 << 20


class RangeFile(Protocol):
    """A file of known size that is read piece by piece, from any thread."""

    @property
    def size(self) -> int:
        """Length in bytes."""
        ...

    def read(self, offset: int, size: int) -> bytes:
        """At most `size` bytes from `offset`; fewer only at the end of the file. Raises OSError."""
        ...


class LocalFile:
    """An open file that closes with its last reference: a thread may still read what a cache has let go."""

    def __init__(self, path: str) -> None:
        self._descriptor = -1
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.size = os.fstat(self._descriptor).st_size

    def read(self, offset: int, size: int) -> bytes:
        """See RangeFile."""
        data = os.pread(self._descriptor, size, offset)
        while len(data) < size and (more := os.pread(self._descriptor, size - len(data), offset + len(data))):
            data += more
        return data

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)


class RemoteFile:
    """One request a read. The size is asked for when it is first needed."""

    def __init__(self, uri: str) -> None:
        import fsspec

        self._system, self._path = fsspec.core.url_to_fs(uri)

    @property
    def size(self) -> int:
        """Length in bytes."""
        return int(self._system.size(self._path))

    def read(self, offset: int, size: int) -> bytes:
        """See RangeFile."""
        return bytes(self._system.cat_file(self._path, start=offset, end=offset + size))


class ReadAhead:
    """A remote file read in order in few requests: each asks for 8 MiB from where it is needed. For one thread."""

    def __init__(self, file: RangeFile) -> None:
        self._file, self._start, self._block = file, 0, b""
        self.size = file.size

    def read(self, offset: int, size: int) -> bytes:
        """See RangeFile."""
        size = min(size, max(self.size - offset, 0))
        if not self._start <= offset <= offset + size <= self._start + len(self._block):
            self._start = offset
            self._block = self._file.read(offset, min(max(size, AHEAD_BYTES), self.size - offset)) if size else b""
        return self._block[offset - self._start : offset - self._start + size]


def is_remote(uri: str) -> bool:
    """True for `scheme://…`; everything else is a local path."""
    return "://" in uri


def open_range(uri: str) -> LocalFile | RemoteFile:
    """Opens a local path or a URI. Raises OSError."""
    return RemoteFile(uri) if is_remote(uri) else LocalFile(uri)
