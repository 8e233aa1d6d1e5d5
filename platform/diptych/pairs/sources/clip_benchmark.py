"""Evaluation sets in CLIP_benchmark's WebDataset layout, used where they lie: tars are indexed, pictures are pointed at and never copied.

    FOLDER/classnames.txt                            a class name a line; a label is the number of its line, from 0
    FOLDER/zeroshot_classification_templates.txt     a prompt a line, {c} for the class name
    FOLDER/dataset_type.txt                          `classification` (as without the file) or `retrieval`
    FOLDER/SPLIT/nshards.txt                         how many tars there are: 0.tar, 1.tar, …
    FOLDER/SPLIT/0.tar                               NAME.jpg (.png, .webp) with NAME.cls, or NAME.txt with a caption a line

A label becomes `label` and `label_name`, the class name is the pair's caption; names and templates travel as the dataset's card.
"""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from diptych.core.config import Config as BaseConfig
from diptych.core.errors import DataError, DiptychError
from diptych.core.points import RawPair, Source
from diptych.pairs.card import KEY, Card
from diptych.pairs.ranges import is_remote, open_range
from diptych.pairs.sources.placed import PlacedPair
from diptych.pairs.sources.webdataset import Config as TarConfig

CLASSES, TEMPLATES, TYPE, SHARDS = "classnames.txt", "zeroshot_classification_templates.txt", "dataset_type.txt", "nshards.txt"
IMAGES = ("webp", "png", "jpg", "jpeg")
KINDS = ("classification", "retrieval")
PLACE = "c"
OUT_OF_RANGE = "label out of range"


class Config(BaseConfig):
    """Which set, and which of its splits."""

    method: Literal["clip-benchmark"] = "clip-benchmark"
    path: str = Field(min_length=1, description="the set's folder, or a URI such as `s3://bucket/wds_cifar10`")
    splits: tuple[str, ...] = Field(default=("test",), min_length=1, description="the splits to read, folders of the set")
    duplicate_names: bool = Field(default=False, description="allow two classes of one name; they are refused otherwise")
    checksum: bool = Field(default=True, description="hash the tars, so that pictures changed in place are noticed")

    def build(self) -> ClipBenchmark:
        """The source."""
        return ClipBenchmark(self)


class ClipBenchmark(Source):
    """Pairs of one evaluation set, keyed `<split>/<tar>/<name>`."""

    def __init__(self, config: Config) -> None:
        self.config = config

    @cached_property
    def kind(self) -> str:
        """`classification` or `retrieval`. Raises DataError for anything else that `dataset_type.txt` says."""
        said = (_lines(self._uri(TYPE)) or [KINDS[0]])[0].strip().lower()
        if said not in KINDS:
            raise DataError.at("This kind of evaluation set is not read", self._uri(TYPE), said, f"one of {', '.join(KINDS)}")
        return said

    @cached_property
    def card(self) -> Card:
        """Class names and templates. Raises DataError if names are missing, or a template does not render, with its line."""
        if self.kind == "retrieval":
            return Card()
        names = [line.strip() for line in _lines(self._uri(CLASSES)) or []]
        if not names:
            fix = "write a class name a line, in the order of the labels; a retrieval set says so in dataset_type.txt"
            raise DataError.at("A classification set has no class names", self._uri(CLASSES), "nothing", "a class name a line", fix)
        templates = enumerate(_lines(self._uri(TEMPLATES)) or [], start=1)
        prompts = tuple(template(line.strip(), f"{self._uri(TEMPLATES)}:{number}") for number, line in templates)
        return Card(classes=tuple(names), templates=prompts, duplicate_names=self.config.duplicate_names)

    def report(self) -> Mapping[str, Any]:
        """The set's card."""
        return {KEY: self.card.plain()}

    def parts(self) -> Sequence[str]:
        """`<split>/<number of the tar>`, sorted. Raises DataError if `nshards.txt` is missing or contradicts the folder."""
        return sorted(f"{split}/{number}" for split in self.config.splits for number in range(self._count(split)))

    def read(self, part: str) -> Iterator[RawPair]:
        """The samples of one tar, in its order. Raises DataError if the tar is missing."""
        split = part.rpartition("/")[0]
        tar = TarConfig(path=self._uri(f"{part}.tar"), image=IMAGES, text=("txt",), split=split, checksum=self.config.checksum).build()
        (name,) = tar.parts()
        for raw in tar.read(name):
            yield self._pair(raw, part)

    def _pair(self, raw: RawPair, part: str) -> RawPair:
        key = f"{part}/{raw.key}"
        pair = replace(raw, key=key, shard=part) if isinstance(raw, PlacedPair) else replace(raw, key=key)
        if self.kind == "retrieval":
            return replace(pair, captions=[(line, "human") for text, _ in raw.captions for line in _captions(text)], extra={})
        if pair.fault:
            return pair
        label = raw.extra.get("label")
        if label is None:
            return replace(pair, fault="no class")
        if not 0 <= label < len(self.card.classes):
            return replace(pair, fault=OUT_OF_RANGE)
        name = self.card.classes[label]
        return replace(pair, captions=[(name, "tag")], extra={"label": label, "label_name": name})

    def _count(self, split: str) -> int:
        where = self._uri(f"{split}/{SHARDS}")
        said = "".join(_lines(where) or ["nothing"]).strip()
        if not said.isdecimal() or int(said) < 1:
            raise DataError.at("A split does not say how many tars it has", where, said, "a number from 1", self._hint(split))
        folder = Path(self.config.path) / split
        there = len([path for path in folder.glob("*.tar") if path.stem.isdecimal()]) if not is_remote(self.config.path) else int(said)
        if there != int(said):
            fix = f"mend {SHARDS}, or bring the missing tars"
            raise DataError.at("A split has another number of tars than it says", where, int(said), f"{there}, as {folder} holds", fix)
        return int(said)

    def _hint(self, split: str) -> str:
        folder = Path(self.config.path)
        known = sorted(path.parent.name for path in folder.glob(f"*/{SHARDS}")) if not is_remote(self.config.path) else []
        return f"splits of this set: {', '.join(known)}" if known and split not in known else f"write the number of tars into {SHARDS}"

    def _uri(self, name: str) -> str:
        base = self.config.path if is_remote(self.config.path) else str(Path(self.config.path).absolute())
        return f"{base.rstrip('/')}/{name}"


def template(line: str, where: str) -> str:
    """A template of ours (`{}` for the class name) from one of CLIP_benchmark's (`{c}`, doubled braces for braces themselves).

    Raises DataError for a line without a place for the class name, with another place, or with a `{}` that is meant as text.
    """
    fix = "write {c} where the class name goes, e.g. a photo of a {c}."
    try:
        pieces = list(string.Formatter().parse(line))
    except ValueError as error:
        raise DataError.at("A template does not render", where, line, f"a prompt with {{c}} ({error})", fix) from None
    places = [(name, spec, conversion) for _, name, spec, conversion in pieces if name is not None]
    marked = "".join(text + ("\0" if name is not None else "") for text, name, *_ in pieces)
    if not places or any(place != (PLACE, "", None) for place in places) or "{}" in marked:
        raise DataError.at("A template does not render", where, line, "a prompt with {c} for the class name and no other place", fix)
    return marked.replace("\0", "{}")


def _captions(text: object) -> list[object]:
    """The lines of a caption file; bytes that are no text stay whole, for ingest to refuse."""
    if not isinstance(text, bytes):
        return [text]
    try:
        return list(text.decode().splitlines())
    except UnicodeDecodeError:
        return [text]


def _lines(uri: str) -> list[str] | None:
    """The lines of a small text file, or None if there is none. Raises DataError for one that is not UTF-8."""
    try:
        file = open_range(uri)
        return file.read(0, file.size).decode().splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except DiptychError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        raise DataError.at("A file of the set cannot be read", uri, error, "a UTF-8 text file") from error
