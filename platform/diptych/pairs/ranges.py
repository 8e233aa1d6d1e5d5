"""Files read by range, local or on whatever fsspec knows (`s3://`, `gs://`, `memory://`, …).

Where a store lies and who asks, fsspec's libraries read from the environment (S3: `AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`, …).
"""

from __future__ import annotations

import errno
import io
import os
import time
from collections.abc import Callable
from typing import Protocol, TypeVar

AHEAD_BYTES = 8 << 20
WAITS_S = (0.5, 2.0, 8.0)
"""Seconds before a remote request is made again. The libraries below try a few times by themselves, within seconds, each time."""

FINAL = frozenset({errno.ENOENT, errno.EACCES, errno.EPERM, errno.EINVAL, errno.EISDIR, errno.ENOTDIR})
"""Answers that no waiting changes."""

Answer = TypeVar("Answer")


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
    """One request a read, made again when it fails. The size is asked for when it is first needed."""

    def __init__(self, uri: str) -> None:
        import fsspec

        self._system, self._path = fsspec.core.url_to_fs(uri)

    @property
    def size(self) -> int:
        """Length in bytes."""
        return insist(lambda: int(self._system.size(self._path)))

    def read(self, offset: int, size: int) -> bytes:
        """See RangeFile."""
        return insist(lambda: bytes(self._system.cat_file(self._path, start=offset, end=offset + size)))


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
            wanted = min(max(size, AHEAD_BYTES), self.size - offset) if size else 0
            self._block = self._file.read(offset, wanted) if wanted else b""
            if len(self._block) < wanted:  # must not pass for a tar that was cut off: its pairs would be lost
                raise OSError(errno.EIO, f"{len(self._block)} bytes came of {wanted} at {offset}")
        return self._block[offset - self._start : offset - self._start + size]


class Stream(io.RawIOBase):
    """A file that is read by range, as libraries want a file: `read`, `seek`, `tell`. For one thread."""

    def __init__(self, file: RangeFile) -> None:
        self._file, self._at, self._size = file, 0, file.size

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """The place of the next byte."""
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """The new place, from the start, from here or from the end."""
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        """Raises OSError if a remote answer is too short, which must not pass for the end."""
        wanted = max(0, min(self._size - self._at, size if size >= 0 else self._size))
        data = self._file.read(self._at, wanted) if wanted else b""
        if len(data) < wanted:
            raise OSError(errno.EIO, f"{len(data)} bytes came of {wanted} at {self._at}")
        self._at += len(data)
        return data


def insist(work: Callable[[], Answer], sleep: Callable[[float], None] = time.sleep) -> Answer:
    """What a remote request gives, made again after growing waits when it fails. Raises OSError, whatever the library raised."""
    for wait_s in WAITS_S:
        try:
            return work()
        except Exception as error:
            if isinstance(error, OSError) and error.errno in FINAL:
                raise
        sleep(wait_s)
    try:
        return work()
    except OSError:
        raise
    except Exception as error:  # botocore and aiohttp have errors of their own for a server that is not there
        raise OSError(errno.EIO, f"{type(error).__name__}: {error}") from error


def is_remote(uri: str) -> bool:
    """True for `scheme://…`; everything else is a local path."""
    return "://" in uri


def open_range(uri: str) -> LocalFile | RemoteFile:
    """Opens a local path or a URI. Raises OSError."""
    return RemoteFile(uri) if is_remote(uri) else LocalFile(uri)
