"""The list of concepts that texts are matched against: the shipped one, a file, or a few words in the workflow itself.

The shipped list (`assets/concepts.parquet`) holds 270,014 entries: the lemmas of WordNet 3.1, then frequent English words and pairs
of words that WordNet lacks. A process reads a list and builds its matcher once, whatever number of tables it works on.

Source: "Demystifying CLIP Data" (ICLR 2024), section 3.1 (metadata construction).
"""

from __future__ import annotations

import string
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.resources import files
from pathlib import Path

import polars as pl

from diptych.core import digest
from diptych.core.errors import ConfigError, DataError
from diptych.curate.matching import Matcher

BUILTIN = "builtin"


@dataclass(frozen=True)
class Concepts:
    """A list of distinct entries; the position of an entry is its id.

    Attributes:
        left_out: how many strings of the source are not in the list: empty, a single ASCII punctuation mark, or there before.
    """

    entries: tuple[str, ...]
    left_out: int

    @classmethod
    def of(cls, raw: Iterable[str]) -> Concepts:
        """Cleans a raw list as the paper builds its own; the first of equal entries gives the id. DataError if nothing is left."""
        every = list(raw)
        entries = tuple(entry for entry in dict.fromkeys(every) if entry and not (len(entry) == 1 and entry in string.punctuation))
        if not entries:
            raise DataError.at("The list of concepts is empty", "metadata", every[:5], "at least one word")
        return cls(entries, len(every) - len(entries))

    @cached_property
    def matcher(self) -> Matcher:
        """The matcher over the entries."""
        return Matcher(self.entries)


def load(metadata: str | tuple[str, ...]) -> Concepts:
    """The concepts of a setting: `"builtin"`, a path to `.parquet` (column `entry`) or `.txt` (UTF-8, an entry a line), or the entries.

    Held in memory (two lists a process) under the digest of the content, so that every task of a process shares one matcher.
    A path must be readable where the task runs.

    Raises:
        ConfigError: there is no such file.
        DataError: the file is not such a list.
    """
    if not isinstance(metadata, str):
        return _inline(metadata)
    path = Path(str(files("diptych") / "assets" / "concepts.parquet")) if metadata == BUILTIN else Path(metadata)
    if not path.is_file():
        raise ConfigError.at("The list of concepts is not there", "metadata", metadata, "'builtin', or the path of a .parquet or .txt file")
    return _file(path, digest.of_file(path))


@lru_cache(maxsize=2)
def _inline(entries: tuple[str, ...]) -> Concepts:
    return Concepts.of(entries)


@lru_cache(maxsize=2)
def _file(path: Path, content: str) -> Concepts:
    del content  # part of the name under which the list is held: a file that changed is another list
    return Concepts.of(_read_parquet(path) if path.suffix == ".parquet" else _read_text(path))


def _read_parquet(path: Path) -> list[str]:
    schema = pl.read_parquet_schema(path)
    if schema.get("entry") != pl.String:
        raise DataError.at("The list of concepts has no entries", path, dict(schema), "a string column `entry`")
    return [entry for entry in pl.read_parquet(path, columns=["entry"])["entry"].to_list() if entry is not None]


def _read_text(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError.at("The list of concepts is not text", path, str(error), "UTF-8, an entry a line") from None
    return [entry for line in lines if (entry := line.strip(" \t\r"))]
