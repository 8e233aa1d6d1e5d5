"""What a pair dataset says about itself: files and checksums, where the shards lie, which phase made it, and the ledger."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from diptych.core import digest
from diptych.core.config import Config
from diptych.core.errors import ConfigError, DataError

NAME = "manifest.json"


class FileEntry(Config):
    """A Parquet file of the dataset, named relative to the dataset's folder."""

    name: str
    rows: int = Field(ge=0, description="rows in the file")
    size_bytes: int = Field(ge=0, description="length of the file, bytes")
    sha256: str = Field(description="`sha256:<hex>` of the file")


class ShardEntry(Config):
    """A tar shard. `uri` is relative to the manifest's folder, or absolute (a path or `scheme://…`)."""

    uri: str
    size_bytes: int = Field(ge=0, description="length of the tar, bytes")
    sha256: str | None = Field(default=None, description="`sha256:<hex>`; None for a tar that was indexed in place and not hashed")


class Left(Config):
    """How many pairs one method turned away for one reason."""

    method: str
    reason: str
    count: int = Field(gt=0, description="pairs")


class Ledger(Config):
    """The account of a phase: `pairs_in = kept + sum(left)`, always. Raises DataError where it does not add up."""

    pairs_in: int = Field(ge=0, description="pairs")
    kept: int = Field(ge=0, description="pairs")
    left: tuple[Left, ...] = ()

    @model_validator(mode="after")
    def _balanced(self) -> Self:
        gone = sum(entry.count for entry in self.left)
        if self.pairs_in != self.kept + gone:
            raise DataError.at(
                "The ledger does not add up: pairs were lost or invented",
                "ledger",
                f"<in {self.pairs_in}, kept {self.kept}, left {gone}>",
                "in = kept + left",
            )
        return self

    @property
    def left_total(self) -> int:
        """Pairs that left, for whatever reason."""
        return self.pairs_in - self.kept


class PhaseRecord(Config):
    """The phase that made a dataset.

    Attributes:
        phase: `ingest`, `curate`, `prune`, `caption`, or a verb of the dataset algebra (`union`, …).
        methods: resolved parameters of every method, in order.
        seed: the workflow's seed.
        code: digest of the code that ran.
        version: Diptych's version.
        report: plain figures, a dictionary a method; not part of the dataset's digest.
    """

    phase: str
    methods: tuple[dict[str, Any], ...] = ()
    seed: int = 0
    code: str = ""
    version: str = ""
    report: dict[str, Any] = Field(default_factory=dict)


class Manifest(Config):
    """The content of `manifest.json`."""

    format: Literal[1] = 1
    rows: int = Field(ge=0, description="pairs in the tables")
    columns: dict[str, str] = Field(description="column name to polars type, in the order of the tables")
    tables: tuple[FileEntry, ...] = ()
    rejects: tuple[FileEntry, ...] = ()
    shards: dict[str, ShardEntry] = Field(default_factory=dict)
    parents: tuple[str, ...] = Field(default=(), description="digests of the datasets this one was made from")
    phase: PhaseRecord
    ledger: Ledger

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        counted = sum(entry.rows for entry in self.tables)
        if not self.rows == counted == self.ledger.kept:
            raise DataError.at(
                "The manifest contradicts itself", "rows", f"<{self.rows} rows, {counted} in tables, {self.ledger.kept} kept>", "one number"
            )
        return self

    @cached_property
    def digest(self) -> str:
        """The name of the data: tables, shards, parents and phase; not where it lies, and not what was measured on the way."""
        return digest.of_plain(
            {
                "format": self.format,
                "tables": [entry.sha256 for entry in self.tables],
                "shards": {name: [shard.size_bytes, shard.sha256] for name, shard in self.shards.items()},
                "parents": list(self.parents),
                "phase": self.phase.model_copy(update={"report": {}}).plain(),
            }
        )

    def to_bytes(self) -> bytes:
        """The file's content, indented and in the order of the fields; equal manifests give equal bytes."""
        return (json.dumps(self.plain(), indent=1, ensure_ascii=False) + "\n").encode()

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Reads a dataset's manifest. Raises DataError if it is missing, cut off, or not a manifest."""
        path = folder / NAME
        try:
            data = json.loads(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            fix = "an interrupted write leaves no dataset: run the phase again" if folder.is_dir() else "check the path"
            raise DataError.at("There is no pair dataset here", folder, "<no manifest.json>", "a folder with manifest.json", fix) from None
        except OSError as error:
            raise DataError.at("The manifest cannot be read", path, error, "a readable file") from None
        except ValueError as error:
            raise DataError.at("The manifest is cut off or not JSON", path, error, "JSON", "run the phase again") from None
        try:
            return cls.parse(data, str(path))
        except ConfigError as error:
            raise DataError("The manifest is not one of a pair dataset of format 1", error.problems) from None
