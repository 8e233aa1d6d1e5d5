"""Writing so that a reader sees all of a thing or nothing of it, and a full disk says how full it is."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diptych.core.errors import ResourceError

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@contextmanager
def guard_space(path: Path, needed_bytes: int) -> Iterator[None]:
    """Turns "no space left", "quota exceeded" and "file too large" into a ResourceError with needed and free bytes."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        folder = next(place for place in path.absolute().parents if place.exists())
        free = shutil.disk_usage(folder).free
        got = f"<{free:,} bytes free, {needed_bytes:,} needed for the next write: {os.strerror(error.errno or 0)}>"
        raise ResourceError.at(
            "The disk is full", path, got, "room for the dataset", "free space, or write elsewhere; nothing was kept"
        ) from error


def write_durably(path: Path, data: bytes) -> None:
    """Writes a file and waits until the disk has it. Raises ResourceError when the disk is full."""
    with guard_space(path, len(data)), path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def partial_of(out: Path) -> Path:
    """A fresh name beside `out` to write under: no two writers share it, and no reader takes it for a dataset."""
    return out.with_name(f"{out.name}.partial-{os.getpid()}-{secrets.token_hex(4)}")


def publish(partial: Path, out: Path) -> None:
    """Gives a finished folder its name. What stood there before is moved away first and deleted after."""
    sync_folder(partial)
    old = out.with_name(f"{out.name}.old-{os.getpid()}-{secrets.token_hex(4)}")
    replaced = out.exists()
    if replaced:
        out.rename(old)
    try:
        partial.rename(out)
    except BaseException:
        if replaced:
            old.rename(out)
        raise
    sync_folder(out.parent)
    if replaced:
        remove(old)


def remove(path: Path) -> None:
    """Deletes a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Waits until the disk knows the names in a folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
