"""From what a user writes to the files it means: globs, numbered ranges in braces, several of them, local or remote."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from diptych.core.errors import DataError
from diptych.pairs.ranges import insist, is_remote

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MAGIC = re.compile(r"[*?\[]")
DOCUMENTED = frozenset({"label", "label_name", "language", "weight", "regions"})


def expand(patterns: Sequence[str]) -> list[str]:
    """The files that patterns mean, sorted, each once; local ones absolute. `{000..012}` counts, `*`, `?`, `[…]` and `**` match names.

    Raises DataError for a pattern, or a number of a range, that means no file, and for a store that does not answer.
    """
    found: set[str] = set()
    for name in (name for pattern in patterns for name in _counted(pattern)):
        files = _matches(name)
        if not files:
            raise DataError.at("No file of this name", "path", name, "at least one file", "relative paths start at the project's folder")
        found.update(files)
    return sorted(found)


def local_files(pattern: str) -> list[Path]:
    """The local files that a pattern means, those below a folder included; none for a remote one or one that means nothing yet."""
    if is_remote(pattern):
        return []
    if Path(pattern).is_dir():
        return sorted(path for path in Path(pattern).rglob("*") if path.is_file())
    names = {name for counted in _counted(pattern) for name in _matches(counted) if Path(name).is_file()}
    return sorted(map(Path, names))


def short_names(files: Sequence[str]) -> dict[str, str]:
    """A name a file: the stem, with as many folders before it as it takes to tell all apart. Independent of where the files lie."""
    parts = {file: PurePosixPath(file.split("://")[-1]).with_suffix("").parts for file in files}
    for depth in range(1, max(len(own) for own in parts.values()) + 1):
        names = {file: "/".join(own[-depth:]) for file, own in parts.items()}
        if len(set(names.values())) == len(files):
            return names
    return {file: file for file in files}


def extra_name(column: str) -> str:
    """The name that a user's column gets in the pair table: a documented one stays, any other goes under `meta.`."""
    return column if column in DOCUMENTED or column.startswith("meta.") else f"meta.{column}"


def captions_of(value: object, source: str) -> list[tuple[object, str]]:
    """`(text, source)` pairs from a text, a list of them, or structs with `text` and maybe `source`. Nothing is checked here."""
    if isinstance(value, list | tuple):
        return [caption for item in value for caption in captions_of(item, source)]
    if isinstance(value, Mapping):
        own = value.get("source")
        own = own.decode(errors="replace") if isinstance(own, bytes) else own
        return [(value.get("text"), own if isinstance(own, str) and own else source)]
    return [(value, source)]


def scalars(row: Mapping[str, Any], leave: Sequence[str]) -> dict[str, Any]:
    """The plain columns of a row (numbers, truth values, texts) under their names in the pair table."""
    plain = {name: value for name, value in row.items() if name not in leave and isinstance(value, str | bytes | int | float | bool)}
    return {extra_name(name): value.decode(errors="replace") if isinstance(value, bytes) else value for name, value in plain.items()}


def _counted(pattern: str) -> Iterator[str]:
    match = _RANGE.search(pattern)
    if match is None:
        yield pattern
        return
    first, last = match.groups()
    width = len(first) if first.startswith("0") else 0
    for number in range(int(first), int(last) + 1):
        yield from _counted(pattern[: match.start()] + str(number).zfill(width) + pattern[match.end() :])


def _matches(name: str) -> list[str]:
    if is_remote(name):
        import fsspec

        system, path = fsspec.core.url_to_fs(name)
        if not _MAGIC.search(path):
            return [name]
        try:
            return [system.unstrip_protocol(file) for file in insist(lambda: system.glob(path))]
        except OSError as error:
            raise DataError.at(
                "A store cannot be asked for its files", "path", name, f"<{error}>", "check its address and credentials"
            ) from error
    if _MAGIC.search(name):
        return [str(Path(file).absolute()) for file in glob.glob(name, recursive=True) if Path(file).is_file()]  # noqa: PTH207 - absolute patterns
    return [str(Path(name).absolute())] if Path(name).is_file() else []
