"""Article packages: a tar (gzipped or not) or a folder with an article's XML and the files of its figures.

Nothing is unpacked to disk, links are not followed, and a name can only mean a file of its own package.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pydantic import Field

from diptych.core.config import Config
from diptych.pairs.image import Fault
from diptych.pairs.tar import index_tar

ARCHIVES = (".tar.gz", ".tgz", ".tar")
ARTICLES = (".nxml", ".xml")
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".gif", ".bmp")
"""Endings that a reference without one may have, the best first: where there is a GIF beside a JPEG it is the thumbnail."""

GZIP = b"\x1f\x8b"
MEBIBYTE = 1 << 20
_CHUNK_BYTES = 1 << 20


class PackageLimits(Config):
    """What a package may cost before it is given up."""

    max_package_mebibytes: int = Field(default=512, gt=0, description="an archive, unpacked, MiB")
    max_xml_mebibytes: int = Field(default=32, gt=0, description="the XML of an article, MiB")
    max_file_mebibytes: int = Field(default=64, gt=0, description="the file of a figure, MiB")


@dataclass(frozen=True)
class Package:
    """The files of a package by their names, folders with `/` between.

    Attributes:
        articles: the names of the XML files of its articles.
        size: the length of a file in bytes; None if it is none of the package's.
        load: the content of a file. Raises Fault.
    """

    articles: tuple[str, ...]
    size: Callable[[str], int | None]
    load: Callable[[str], bytes]

    def read(self, name: str, limit_bytes: int) -> bytes:
        """A file of the package. Raises Fault if it is larger than the limit or cannot be read."""
        if (self.size(name) or 0) > limit_bytes:
            raise Fault("too many bytes")
        return self.load(name)

    def find(self, href: str, article: str) -> str | None:
        """The file that a figure of the article `article` refers to: by its name, with an ending put on, or without its folder."""
        folder, place = PurePosixPath(article).parent, PurePosixPath(href)
        if place.is_absolute() or ".." in place.parts or not place.name:
            return None
        bases = dict.fromkeys((folder / place, folder / place.name))
        return next((name for base in bases for name in _spellings(base) if self.size(name) is not None), None)


def _spellings(base: PurePosixPath) -> Iterator[str]:
    """A reference as it stands, then with the endings that it may lack, then with those that it may have had instead."""
    if base.suffix.lower() in PICTURES:
        yield str(base)
    for ending in PICTURES:
        yield f"{base}{ending}"
        yield f"{base}{ending.upper()}"
    if base.suffix.lower() in PICTURES:
        for ending in PICTURES:
            yield str(base.with_suffix(ending))


def is_archive(name: str) -> bool:
    """Whether a file's name is that of a tar."""
    return name.lower().endswith(ARCHIVES)


def open_package(path: Path, limits: PackageLimits) -> Package:
    """A package; `path` is a tar, or the XML of an article beside its files.

    Raises Fault: `missing package`, `package cannot be read`, `truncated package`, `package too large`, `package without article`.
    """
    try:
        if path.is_dir():
            raise Fault("package without article")
        if is_archive(path.name):
            return _archive(path, limits)
        return _beside(path)
    except FileNotFoundError:
        raise Fault("missing package") from None
    except OSError:
        raise Fault("package cannot be read") from None


def _archive(path: Path, limits: PackageLimits) -> Package:
    data = _unpacked(path, limits.max_package_mebibytes * MEBIBYTE)
    places: dict[str, tuple[int, int]] = {}
    for member in index_tar(_Bytes(data)):
        if member.fault in ("truncated tar", "corrupt tar header"):
            # An archive that ends at a member's end only lacks its closing blocks.
            if member.fault == "truncated tar" and not member.name and member.offset == len(data):
                break
            raise Fault("truncated package" if member.fault == "truncated tar" else "package cannot be read")
        if member.fault is None:
            places[member.name] = (member.offset, member.size)

    for ending in ARTICLES:  # where there are `.nxml` files, an `.xml` is something else
        if articles := tuple(sorted(name for name in places if name.lower().endswith(ending))):
            break
    else:
        raise Fault("package without article")

    def size(name: str) -> int | None:
        return places[name][1] if name in places else None

    def load(name: str) -> bytes:
        offset, length = places[name]
        return data[offset : offset + length]

    return Package(articles, size, load)


def _unpacked(path: Path, limit_bytes: int) -> bytes:
    """The tar's bytes, at most `limit_bytes`, however small the file is that claims to hold them."""
    with path.open("rb") as file:
        head = file.read(len(GZIP))
        file.seek(0)
        if head != GZIP:
            data = file.read(limit_bytes + 1)
            if len(data) > limit_bytes:
                raise Fault("package too large")
            return data
        out = bytearray()
        inflate = zlib.decompressobj(wbits=31)
        rest = file.read(_CHUNK_BYTES)
        while rest:
            try:
                out += inflate.decompress(rest, limit_bytes + 1 - len(out))
            except zlib.error:
                raise Fault("package cannot be read") from None
            if len(out) > limit_bytes:
                raise Fault("package too large")
            if inflate.eof:  # gzip files may follow one another
                rest = (inflate.unused_data or file.read(_CHUNK_BYTES)).lstrip(b"\0")
                inflate = zlib.decompressobj(wbits=31) if rest else inflate
            else:
                rest = inflate.unconsumed_tail or file.read(_CHUNK_BYTES)
    if not inflate.eof:
        raise Fault("truncated package")
    return bytes(out)


class _Bytes:
    """Bytes as a file that is read by range."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.size = len(data)

    def read(self, offset: int, size: int) -> bytes:
        """See RangeFile."""
        return self._data[offset : offset + size]


def _beside(path: Path) -> Package:
    """The article of a file, and the files in its folder; a link that leads out of the folder is no file of it. Raises OSError."""
    root = path.parent.resolve(strict=True)
    path.stat()

    def size(name: str) -> int | None:
        try:
            file = (root / name).resolve()
            return file.stat().st_size if file.is_relative_to(root) and file.is_file() else None
        except (OSError, ValueError):  # such as a name that is too long
            return None

    def load(name: str) -> bytes:
        try:
            return (root / name).read_bytes()
        except OSError:
            raise Fault("file cannot be read") from None

    return Package((path.name,), size, load)
