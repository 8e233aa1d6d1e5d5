"""The shipped emoji: four makers' drawings of 1,911 things, with names and tags in ten languages.

Trained on some makers' drawings and measured on another's, a model must have learned what a thing looks like and not how it was drawn.
Pictures and texts have several licences, which the data cards beside them name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from importlib.resources import as_file, files
from typing import Any, Literal, Self, get_args

import polars as pl
from pydantic import Field, model_validator

from diptych.core.chance import key_hash, uniform
from diptych.core.config import Config as BaseConfig
from diptych.core.errors import DataError
from diptych.core.points import RawPair, Source
from diptych.pairs.sources.source_card import SourceCard

Vendor = Literal["noto", "openmoji", "fluent3d", "twemoji"]
Language = Literal["en", "zh", "de", "fr", "es", "ja", "ru", "hi", "pt", "ko"]
Texts = Literal["name", "tags"]

VAL_DRAW = 0x76616C
"""Names the draw of `val`, apart from any seed: the same drawings are held out in every run."""

VENDORS: tuple[Vendor, ...] = get_args(Vendor)
LANGUAGES: tuple[Language, ...] = get_args(Language)
LICENCES: dict[Vendor, str] = {"noto": "Apache-2.0", "openmoji": "CC-BY-SA-4.0", "fluent3d": "MIT", "twemoji": "CC-BY-4.0"}


class Config(BaseConfig):
    """Which makers' drawings to train on and to test on, and which texts to put to them."""

    method: Literal["emoji"] = "emoji"
    train: tuple[Vendor, ...] = Field(default=("noto", "openmoji", "fluent3d"), description="makers whose drawings are the split `train`")
    test: tuple[Vendor, ...] = Field(default=("twemoji",), description="makers whose drawings are the split `test`")
    val: float = Field(default=0.0, ge=0, lt=1, description="share of the training drawings held out as the split `val`, drawn by key")
    captions: tuple[Texts, ...] = Field(
        default=("name", "tags"),
        min_length=1,
        description="`name`: the thing's name (source `human`); `tags`: a caption of all its tags (source `tag`)",
    )
    languages: tuple[Language, ...] = Field(default=("en",), min_length=1, description="languages of the captions, in this order")

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if not (self.train or self.test):
            raise ValueError("train or test must name a maker")
        for name, values in (("train and test", self.train + self.test), ("captions", self.captions), ("languages", self.languages)):
            if len(set(values)) < len(values):
                raise ValueError(f"{name}: each at most once")
        return self

    def build(self) -> Emoji:
        """The source."""
        return Emoji(self)


class Emoji(Source):
    """Pairs with the extra columns `label` (place of the hexcode among all 1,911), `label_name`, `meta.hexcode`, `meta.vendor`, ….

    A `label` means the same thing whichever makers and languages are chosen.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def parts(self) -> Sequence[str]:
        """The makers."""
        return sorted((*self.config.train, *self.config.test))

    def read(self, part: str) -> Iterator[RawPair]:
        """A maker's drawings by hexcode."""
        drawings = dict(read_asset(vendor_path(part)).iter_rows())
        for label, row in enumerate(names().iter_rows(named=True)):
            image = drawings.get(row["hexcode"])
            if image is not None:
                key = f"{part}-{row['hexcode']}"
                yield RawPair(key, image, self._captions(row), _extra(part, label, row), self._split(part, key))

    def report(self) -> Mapping[str, Any]:
        """The card: makers with their licences, and the languages of the names."""
        makers = (*self.config.train, *self.config.test)
        licences = dict.fromkeys(LICENCES[maker] for maker in makers)
        return SourceCard(
            about=f"drawings of 1,911 emoji by {', '.join(makers)}, with their names",
            licence=", ".join([*licences, "names Unicode-3.0 and MIT"]),
            languages=self.config.languages,
            filters="skin tones; makers whose drawings may not be passed on",
        ).report("emoji")

    def _split(self, part: str, key: str) -> str:
        if part not in self.config.train:
            return "test"
        return "val" if float(uniform(VAL_DRAW, key_hash(key))) < self.config.val else "train"

    def _captions(self, row: dict[str, Any]) -> list[tuple[str, str]]:
        found: list[tuple[str, str]] = []
        for language in self.config.languages:
            suffix = "" if language == "en" else f"_{language}"
            if "name" in self.config.captions:
                found.append((row[f"name{suffix}"], "human"))
            if "tags" in self.config.captions and (tags := row.get(f"tags{suffix}")):
                found.append((", ".join(tags), "tag"))
        return found


def _extra(vendor: str, label: int, row: dict[str, Any]) -> dict[str, Any]:
    return {
        "label": label,
        "label_name": row["name"],
        "meta.vendor": vendor,
        "meta.hexcode": row["hexcode"],
        "meta.emoji": row["emoji"],
        "meta.category": row["category"],
        "meta.subcategory": row["subcategory"],
    }


def vendor_path(vendor: str) -> str:
    """Where a maker's drawings lie below `assets`."""
    return f"emoji-openmoji/{vendor}.parquet" if vendor == "openmoji" else f"emoji/{vendor}.parquet"


@lru_cache(maxsize=1)
def names() -> pl.DataFrame:
    """Names and tags of all 1,911, sorted by `hexcode`; the row number is the label."""
    return read_asset("emoji/names.parquet")


def read_asset(name: str) -> pl.DataFrame:
    """A shipped Parquet file. Raises DataError if this copy of Diptych came without it."""
    asset = files("diptych") / "assets" / name
    if not asset.is_file():
        raise DataError.at(
            "These drawings are not part of this copy of Diptych",
            f"assets/{name}",
            "<no such file>",
            "the shipped file",
            "name other makers",
        )
    with as_file(asset) as path:
        return pl.read_parquet(path)
