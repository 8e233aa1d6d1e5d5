"""Writing so that a reader sees all of a thing or nothing of it, and a full disk says how full it is."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diptych.core.errors import ConfigError, DiptychError, ResourceError

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
FULL_WORDS = ("No space left on device", "Disk quota exceeded")
HARDLY_ANY_BYTES = 1 << 16
"""Less than this free counts as full when a library says only that a write failed."""

PARTIAL = re.compile(r".+\.partial(-\d+-[0-9a-f]+)?")
ASIDE = re.compile(r"(?P<out>.+)\.old-\d+-[0-9a-f]+|\.(?P<model>.+)\.[^.]+\.replaced")
"""An output moved away to make room for the next: by `publish`, and by `models.store`."""


@contextmanager
def guard_space(path: Path, needed_bytes: int) -> Iterator[None]:
    """Turns "no space left", "quota exceeded" and "file too large" into a ResourceError with needed and free bytes."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        got = f"<{_free_bytes(path):,} bytes free, {needed_bytes:,} needed for the next write: {os.strerror(error.errno or 0)}>"
        raise ResourceError.at(
            "The disk is full", path, got, "room for the dataset", "free space, or write elsewhere; nothing was kept"
        ) from error


@contextmanager
def full_disk_explained(folder: Path) -> Iterator[None]:
    """Turns whatever a full disk made a library raise while it worked in `folder` into a ResourceError."""
    try:
        yield
    except DiptychError:
        raise
    except Exception as error:
        if not _from_full_disk(error, folder):
            raise
        raise ResourceError.at(
            "The disk is full", folder, f"<{_free_bytes(folder):,} bytes free by now: {error}>", "room for the run",
            "free space, then give the same command: it continues from here",
        ) from error  # fmt: skip


def _from_full_disk(error: BaseException | None, folder: Path) -> bool:
    """By the errno, or by the text of an error that has none, or (torch tells neither) by a failed write where no byte is free."""
    if error is None:
        return False
    known = (isinstance(error, OSError) and error.errno in FULL) or any(words in str(error) for words in FULL_WORDS)
    silent = isinstance(error, OSError | RuntimeError) and _free_bytes(folder) < HARDLY_ANY_BYTES
    return known or silent or _from_full_disk(error.__cause__ or error.__context__, folder)


def _free_bytes(path: Path) -> int:
    place = path.absolute()
    return shutil.disk_usage(next(folder for folder in (place, *place.parents) if folder.exists())).free


def write_durably(path: Path, data: bytes) -> None:
    """Writes a file and waits until the disk has it. Raises ResourceError when the disk is full."""
    with guard_space(path, len(data)), path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def partial_of(out: Path) -> Path:
    """A fresh name beside `out` to write under: no two writers share it, and no reader takes it for a dataset."""
    return out.with_name(f"{out.name}.partial-{os.getpid()}-{secrets.token_hex(4)}")


def insist_free(out: Path) -> None:
    """Raises ConfigError unless `out`, a place that a person named, is not there or an empty folder: what is written there replaces it."""
    if not out.exists() and not out.is_symlink():
        return
    names = sorted(path.name for path in out.iterdir()) if out.is_dir() else None
    if names != []:
        found = "<a file>" if names is None else f"<{', '.join(names[:3])}{' …' if len(names) > 3 else ''}>"
        raise ConfigError.at(
            "Something lies where the output goes", out, found, "a new name, or an empty folder", "name another place, or remove it"
        )


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """An empty folder to fill, which becomes `out` at the end; on any error it is deleted and `out` is as it was."""
    partial = partial_of(out)
    partial.mkdir(parents=True)
    try:
        yield partial
        publish(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


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


def sweep(folder: Path) -> list[str]:
    """Mends what killed writers left in a folder that nobody else writes to; gives the names of what it found.

    An output that was lost between the two renames of `publish` is put back; what was never finished is deleted.
    """
    found = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns, reverse=True) if folder.is_dir() else []
    swept = []
    for path in found:
        aside = ASIDE.fullmatch(path.name)
        out = folder / (aside["out"] or aside["model"]) if aside else None
        if out is not None and not out.exists():
            path.rename(out)
        elif out is not None or PARTIAL.fullmatch(path.name):
            remove(path)
        else:
            continue
        swept.append(path.name)
    return swept


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
