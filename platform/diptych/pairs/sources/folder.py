"""A folder of pictures with a CSV, TSV or JSON Lines table that names them."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from diptych.core.config import Config as BaseConfig
from diptych.core.errors import DataError
from diptych.core.points import RawPair, Source
from diptych.pairs.sources.paths import captions_of, scalars

PART_ROWS = 10_000
MAX_FILE_BYTES = 1 << 28
MAX_FIELD_CHARS = 1 << 24
CSV, JSONL = (".csv", ".tsv"), (".jsonl", ".ndjson")
MOST_NAMED = 8
"""Tables that an error names."""

_FAULT = "\0fault"  # no table has a column of this name
# Numbers as a program writes them. `007` and digits that a float cannot hold are names, and stay text.
_WHOLE = re.compile(r"-?(0|[1-9]\d{0,17})")
_DECIMAL = re.compile(r"-?(0|[1-9]\d{0,14})(\.\d+)?([eE][+-]?\d{1,3})?")


class Config(BaseConfig):
    """Where the pictures lie and what the table's columns mean.

    Further columns are kept under `meta.NAME`; `label`, `label_name`, `language` and `weight` keep their names. Where every value of a
    column of a CSV or TSV table is a number, it is a column of numbers.
    """

    method: Literal["folder"] = "folder"
    path: str = Field(description="the folder")
    table: str = Field(
        default="captions.csv",
        description="the table, relative to the folder; ends in .csv, .tsv, .jsonl or .ndjson; further columns are kept, as `meta.NAME`",
    )
    file: str = Field(default="file", description="column of picture files, relative to the folder")
    captions: tuple[str, ...] = Field(default=("caption",), min_length=1, description="columns of captions")
    key: str | None = Field(default=None, description="column of keys; null: the file's name")
    caption_source: Literal["alt", "human", "tag"] = Field(default="alt", description="what the captions are")
    split: str = Field(default="train", min_length=1, description="split of pairs whose table has no column `split`")

    def build(self) -> Folder:
        """The source."""
        return Folder(self)


class Folder(Source):
    """Pairs of a folder, 10,000 table rows a part. A picture outside the folder is never opened."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.root = Path(config.path).absolute()

    @cached_property
    def _rows(self) -> list[dict[str, Any]]:
        path = self.root / self.config.table
        if not self.root.is_dir():
            raise DataError.at("There is no folder of pictures here", "path", str(self.root), "a folder with pictures and a table")
        if not path.exists():
            tables = sorted(file.name for file in self.root.iterdir() if file.suffix in (*CSV, *JSONL))
            raise DataError.at("The table that names the pictures is not there", path, "nothing",
                               f"a table with the columns {', '.join((self.config.file, *self.config.captions))}",
                               f"set `table`; the folder holds {', '.join(tables[:MOST_NAMED]) or 'no table'}")  # fmt: skip
        try:
            rows = read_table(path)
        except OSError as error:
            raise DataError.at("The table cannot be read", path, f"<{error.strerror or error}>", "a readable file") from error
        if not rows:
            raise DataError.at("The table names no picture", path, "<no rows>", "a line of column names, then a line a picture")
        missing = [name for name in (self.config.file, *self.config.captions) if not any(name in row for row in rows)]
        if missing:
            known = sorted(rows[0].keys() - {_FAULT})
            odd = len(known) == 1 and path.suffix in CSV and any(sign in known[0] for sign in ";\t,|")
            fix = f"{path.suffix} has another separator than this table" if odd else "set `file` and `captions` to the names of its columns"
            raise DataError.at("The table lacks columns", path, known, f"the columns {', '.join(missing)}", fix)
        if path.suffix in CSV:
            numbers(rows, {_FAULT, self.config.file, self.config.key, *self.config.captions, "split"})
        return rows

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config, "root": self.root}  # a worker reads the table itself

    def parts(self) -> Sequence[str]:
        """Numbers of the table's runs of rows. Raises DataError if the table is missing or lacks the columns."""
        return [f"{index:05d}" for index in range(-(-len(self._rows) // PART_ROWS))]

    def read(self, part: str) -> Iterator[RawPair]:
        """The pairs of one run of rows."""
        start = int(part) * PART_ROWS
        for number, row in enumerate(self._rows[start : start + PART_ROWS], start):
            yield self._pair(number, row)

    def _pair(self, number: int, row: dict[str, Any]) -> RawPair:
        name, own_key = row.get(self.config.file), row.get(self.config.key) if self.config.key else None
        captions = [caption for column in self.config.captions for caption in captions_of(row.get(column), self.config.caption_source)]
        key = str(own_key if own_key not in (None, "") else name or f"row-{number}")
        image, fault = self._image(name) if isinstance(name, str) else (None, "no image")
        fault = row.get(_FAULT, fault)
        extra = scalars(row, (_FAULT, self.config.file, self.config.key or "", *self.config.captions, "split"))
        return RawPair(key, image, captions, extra, str(row.get("split") or self.config.split), fault)

    def _image(self, name: str) -> tuple[bytes | None, str | None]:
        try:
            path = (self.root / name).resolve()
            if not path.is_relative_to(self.root.resolve()):
                return None, "path leaves the folder"
            with path.open("rb") as file:
                return file.read(MAX_FILE_BYTES), None
        except (FileNotFoundError, NotADirectoryError):
            return None, "missing image file"
        except (OSError, ValueError):
            return None, "image file cannot be read"


def read_table(path: Path) -> list[dict[str, Any]]:
    """The rows of a CSV, TSV or JSON Lines file. A broken row holds its fault.

    Bytes that are not UTF-8 come as lone surrogates. Raises OSError, and DataError for another ending.
    """
    if path.suffix in JSONL:
        with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
            return [_json_row(line) for line in file if line.strip()]
    if path.suffix not in CSV:
        raise DataError.at("A table of unknown kind", path, path.suffix, ".csv, .tsv, .jsonl or .ndjson")
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        return _csv_rows(file, path)


def _csv_rows(file: Any, path: Path) -> list[dict[str, Any]]:
    before = csv.field_size_limit(MAX_FIELD_CHARS)
    try:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",", restkey=_FAULT, strict=True)
        return [{**row, _FAULT: "row has too many columns"} if _FAULT in row else row for row in reader]
    except csv.Error as error:
        raise DataError.at("The table is not valid CSV", f"{path}:{reader.line_num}", error, "one row a line, quotes closed") from error
    finally:
        csv.field_size_limit(before)


def numbers(rows: Sequence[dict[str, Any]], leave: Collection[str | None]) -> None:
    """Turns columns of texts that are all numbers into numbers, in place and for the table as a whole; an empty field is no value."""
    for name in {name: None for row in rows for name in row if name not in leave}:
        values: set[str] = {row[name] for row in rows if row.get(name)}
        kind = int if all(map(_WHOLE.fullmatch, values)) else float if all(map(_DECIMAL.fullmatch, values)) else None
        if kind is None or not values:
            continue
        for row in rows:
            if name in row:
                row[name] = kind(row[name]) if row[name] not in (None, "") else None


def _json_row(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return {_FAULT: "row is not JSON"}
    return row if isinstance(row, dict) and _FAULT not in row else {_FAULT: "row is not a JSON object"}
