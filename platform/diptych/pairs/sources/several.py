"""Several sources as one pool: every pair carries the name of its source, every source its card.

    data:
      source: sources
      sources:
        web:   {data: {source: webdataset, path: web/*.tar}, splits: [train], card: {licence: CC-BY-4.0, about: captions of web pages}}
        album: {data: {source: folder, path: album, table: album.csv}, splits: {train: train, test: album-test}}

The column `meta.source` names the source; `mixture` (`curate/mixture.py`) draws from it. Keys get the source's name in front, so that
two sources may use the same; pairs that are the same picture are for `exact-duplicates` to find.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from diptych.core import catalogue
from diptych.core.config import Config as BaseConfig
from diptych.core.errors import ConfigError
from diptych.core.points import RawPair, Source
from diptych.pairs.sources.placed import PlacedPair
from diptych.pairs.sources.source_card import SourceCard

COLUMN = "meta.source"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


class Member(BaseConfig):
    """One source of the pool."""

    data: dict[str, Any] = Field(description="the source as the `data` key of a workflow would have it: {source: NAME, …}")
    splits: tuple[str, ...] | dict[str, str] | None = Field(
        None, description="splits that are taken, or split -> its name in the pool; null: all, under their own names"
    )
    card: SourceCard = Field(SourceCard(), description="what is known of the source")

    def split_of(self, split: str) -> str | None:
        """The pool's name of a split; None: its pairs are not taken."""
        match self.splits:
            case None:
                return split
            case dict():
                return self.splits.get(split)
            case _:
                return split if split in self.splits else None


class Config(BaseConfig):
    """A pool of several sources."""

    method: Literal["sources"] = "sources"
    sources: dict[str, Member] = Field(min_length=1, description="name -> {data: {source: …}, splits: …, card: …}")

    @model_validator(mode="after")
    def _members_are_sources(self) -> Self:
        for name in self.sources:
            if not NAME.fullmatch(name):
                raise ValueError(f"sources: a name of letters, digits, - _ and ., not {name!r}")
        _ = self.members
        return self

    @cached_property
    def members(self) -> Mapping[str, BaseConfig]:
        """The sources' own configurations, checked. Raises ConfigError with the key path below this one."""
        return {name: _configured(member.data, f"sources.{name}.data") for name, member in self.sources.items()}

    def build(self) -> Several:
        """The source."""
        return Several(self)


def _configured(data: Mapping[str, Any], where: str) -> BaseConfig:
    name = data.get("source")
    if not isinstance(name, str) or name == "sources":
        raise ConfigError.at("A source of the pool is not named", f"{where}.source", name, "the name of a source that is not a pool itself")
    row = catalogue.find(name, "ingest", f"{where}.source")
    return catalogue.config_class(row).parse({"method": name} | {key: value for key, value in data.items() if key != "source"}, where)


class Several(Source):
    """The pairs of all sources. A part is `<source>/<part of that source>`; what a source yields of other splits is passed over."""

    def __init__(self, config: Config) -> None:
        self.config = config

    @cached_property
    def _built(self) -> dict[str, Source]:
        return {name: member.build() for name, member in self.config.members.items()}  # type: ignore[attr-defined]

    def parts(self) -> Sequence[str]:
        """The parts of all sources."""
        return sorted(f"{name}/{part}" for name, source in self._built.items() for part in source.parts())

    def read(self, part: str) -> Iterator[RawPair]:
        """The pairs of one part that belong to a split that is taken; broken ones are yielded with their fault."""
        name, _, own = part.partition("/")
        member = self.config.sources[name]
        for pair in self._built[name].read(own):
            split = member.split_of(pair.split)
            if split is not None:
                named = replace(pair, key=f"{name}/{pair.key}", split=split, extra={**pair.extra, COLUMN: name})
                # Tars of two sources may share a name; in the pool's manifest they must not.
                yield replace(named, shard=f"{name}~{named.shard}") if isinstance(named, PlacedPair) else named

    def report(self) -> Mapping[str, Any]:
        """`sources`: every source's card, its settings and what it says of itself, by name; a card given in the workflow goes before its own."""
        return {"sources": {name: self._said(name, member) for name, member in self.config.sources.items()}}

    def _said(self, name: str, member: Member) -> dict[str, Any]:
        own = dict(self._built[name].report())
        cards = [said.get("card", {}) for said in own.pop("sources", {}).values()]
        card = member.card.plain() if member.card != SourceCard() or not cards else cards[0]
        return {**own, "card": card, "data": dict(member.data)}
