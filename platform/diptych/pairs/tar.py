"""Finds the members of a tar without reading their content: what makes WebDataset shards usable where they lie."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from diptych.pairs.ranges import RangeFile, ReadAhead, is_remote, open_range

BLOCK_BYTES = 512
MAX_EXTENSION_BYTES = 1 << 20
_ZERO = bytes(BLOCK_BYTES)
_REGULAR, _LONG_NAME, _LONG_LINK = (b"0", b"\0", b"7"), b"L", b"K"
_FOREIGN = {b"1": "hard link", b"2": "symbolic link", b"3": "device", b"4": "device", b"6": "named pipe", b"S": "sparse file"}


@dataclass(frozen=True)
class Member:
    """A file in a tar: `size` bytes from `offset`. With a `fault` (a reason) it must not be used."""

    name: str
    offset: int
    size: int
    fault: str | None = None


@dataclass
class _Header:
    name: bytes
    size: int
    kind: bytes


def index_tar(source: Path | str | RangeFile) -> Iterator[Member]:
    """The regular files of a tar (ustar, pax, GNU long names), in order; folders are passed over. `source` is a path, a URI or an open file.

    Links, devices, sparse files, absolute names and names with `..` come with a `fault`. A tar that is cut off or corrupt gives one last
    member with a fault, at the place from which nothing can be read any more. Raises OSError if the file cannot be opened.
    """
    if not isinstance(source, Path | str):
        return _walk(source)
    file = open_range(str(source))
    return _walk(ReadAhead(file) if is_remote(str(source)) else file)


def _walk(file: RangeFile) -> Iterator[Member]:
    position, end, name, size = 0, file.size, None, None
    while True:
        block = file.read(position, BLOCK_BYTES)
        if block == _ZERO:
            return
        if len(block) < BLOCK_BYTES:  # a tar without its closing blocks was cut between two members, or after all of them
            yield Member("", position, 0, "truncated tar")
            return
        header = _parse(block)
        if header is None:
            yield Member("", position, 0, "corrupt tar header")
            return
        data = position + BLOCK_BYTES
        length = header.size if header.kind in (b"x", b"g", _LONG_NAME, _LONG_LINK) or size is None else size
        position = data + length + -length % BLOCK_BYTES
        if data + length > end:
            yield Member((name or header.name).decode(errors="replace"), data, max(end - data, 0), "truncated tar")
            return
        if header.kind in (b"x", _LONG_NAME, _LONG_LINK, b"g"):
            if length > MAX_EXTENSION_BYTES:
                yield Member("", data, 0, "corrupt tar header")
                return
            if header.kind == b"x":
                name, size = _pax(file.read(data, length), name, size)
            elif header.kind == _LONG_NAME:
                name = file.read(data, length).rstrip(b"\0")
            continue
        if header.kind != b"5":
            yield _member(name or header.name, data, length, header.kind)
        name, size = None, None


def _member(raw: bytes, offset: int, size: int, kind: bytes) -> Member:
    if kind not in _REGULAR:
        return Member(raw.decode(errors="replace"), offset, size, f"tar member is a {_FOREIGN.get(kind, 'file of unknown type')}")
    try:
        name = raw.decode()
    except UnicodeDecodeError:
        return Member(raw.decode(errors="replace"), offset, size, "tar member name is not UTF-8")
    if name.startswith("/"):
        return Member(name, offset, size, "tar member name is absolute")
    if ".." in name.split("/"):
        return Member(name, offset, size, "tar member name leaves the tar")
    return Member(name.removeprefix("./"), offset, size)


def _parse(block: bytes) -> _Header | None:
    """A header block's fields, or None if its checksum is wrong: the sum of its bytes with the checksum's own taken as spaces."""
    try:
        size, checksum = _number(block[124:136]), _number(block[148:156])
    except ValueError:
        return None
    if size < 0 or checksum != sum(block) - sum(block[148:156]) + 8 * 0x20:
        return None
    name = block[:100].split(b"\0", 1)[0]
    prefix = block[345:500].split(b"\0", 1)[0] if block[257:263] == b"ustar\0" else b""
    return _Header(prefix + b"/" + name if prefix else name, size, block[156:157])


def _number(field: bytes) -> int:
    """Octal text, or base 256 behind a set top bit (GNU, for sizes from 8 GiB)."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    return int(field.rstrip(b"\0 ").strip() or b"0", 8)


def _pax(data: bytes, name: bytes | None, size: int | None) -> tuple[bytes | None, int | None]:
    """`path` and `size` of a pax record block (`<length> <key>=<value>\\n`…); what is malformed ends the list."""
    while data:
        digits, _, _ = data.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) < 10 else 0
        if length <= len(digits) or length > len(data):
            break
        key, _, value = data[len(digits) + 1 : length - 1].partition(b"=")
        if key == b"path":
            name = value
        elif key == b"size" and value.isdigit():
            size = int(value)
        data = data[length:]
    return name, size
