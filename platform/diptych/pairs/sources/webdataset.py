"""WebDataset tars, used where they lie: the tars are indexed, pictures are pointed at and never copied.

A sample is a run of members that share a name up to its first dot (`0001.jpg`, `0001.txt`, `0001.json`, `0001.cls`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import Field

from diptych.core import digest
from diptych.core.config import Config as BaseConfig
from diptych.core.errors import DataError
from diptych.core.points import RawPair, Source
from diptych.pairs.manifest import ShardEntry
from diptych.pairs.ranges import RangeFile, ReadAhead, is_remote, open_range
from diptych.pairs.sources.paths import captions_of, expand, extra_name, short_names
from diptych.pairs.sources.placed import PlacedPair
from diptych.pairs.tar import Member, index_tar

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
MAX_SIDECAR_BYTES = 1 << 20


class Config(BaseConfig):
    """Which tars to use, and what their members mean."""

    method: Literal["webdataset"] = "webdataset"
    path: str | tuple[str, ...] = Field(
        description="tars: paths, globs, ranges such as `{00000..00331}`, or URIs such as `s3://bucket/*.tar`"
    )
    image: tuple[str, ...] = Field(default=IMAGES, min_length=1, description="endings of pictures")
    text: tuple[str, ...] = Field(default=("txt", "text", "caption"), description="endings of captions")
    json_captions: tuple[str, ...] = Field(default=(), description="keys of the `.json` member that hold further captions")
    json_columns: tuple[str, ...] = Field(default=(), description="keys of the `.json` member to keep as columns, under `meta.`")
    caption_source: Literal["alt", "human", "tag"] = Field(default="alt", description="what the captions are")
    keys: Literal["name", "shard/name"] = Field(
        default="name", description="`name`: the sample's; `shard/name`: for tars that all count from zero, where names repeat"
    )
    split: str = Field(default="train", min_length=1, description="split of all pairs")
    checksum: bool = Field(default=False, description="also hash the tars, which reads them whole")

    def build(self) -> WebDataset:
        """The source."""
        return WebDataset(self)


class WebDataset(Source):
    """Pairs of tars in place. `.cls` becomes the column `label`."""

    def __init__(self, config: Config) -> None:
        self.config = config

    @cached_property
    def _files(self) -> dict[str, str]:
        """Tars by the name that they have as shards."""
        patterns = (self.config.path,) if isinstance(self.config.path, str) else self.config.path
        return {name: file for file, name in short_names(expand(patterns)).items()}

    def parts(self) -> Sequence[str]:
        """The shard names, sorted. Raises DataError if a pattern means no file."""
        return sorted(self._files)

    def read(self, part: str) -> Iterator[RawPair]:
        """The samples of one tar, in its order. Raises DataError if the tar cannot be opened or read."""
        uri = self._files[part]
        try:
            file: RangeFile = open_range(uri)
            entry = ShardEntry(uri=uri, size_bytes=file.size, sha256=self._checksum(uri))
        except OSError as error:
            raise DataError.at("A tar cannot be opened", uri, error, "a readable tar") from error
        if is_remote(uri):
            file = ReadAhead(file)
        try:
            for position, (name, members) in enumerate(groupby(index_tar(file), key=_sample)):
                key = name or f"{part}@{position}"
                yield self._pair(f"{part}/{key}" if self.config.keys == "shard/name" else key, list(members), part, file, entry)
        except OSError as error:
            raise DataError.at("A tar cannot be read to its end", uri, error, "a readable tar", "give the same command again") from error

    def _checksum(self, uri: str) -> str | None:
        return digest.of_file(Path(uri)) if self.config.checksum and not is_remote(uri) else None

    def _pair(self, key: str, members: list[Member], shard: str, file: RangeFile, entry: ShardEntry) -> RawPair:
        by_ending: dict[str, Member] = {}
        fault = next((member.fault for member in members if member.fault), None)
        for member in members:
            if by_ending.setdefault(_ending(member), member) is not member:
                fault = fault or "two members of one name"
        captions, extra, sidecar_fault = self._sidecars(by_ending, file) if fault is None else ([], {}, None)
        fault = fault or sidecar_fault
        image = next((by_ending[ending] for ending in self.config.image if ending in by_ending), None)
        if image is None or fault:
            return RawPair(key, None, captions, extra, self.config.split, fault or "no image")

        def load(size: int, image: Member = image) -> bytes:
            try:
                return file.read(image.offset, min(size, image.size))
            except OSError as error:
                raise DataError.at("A picture cannot be read", entry.uri, error, "a readable tar", "give the same command again") from error

        return PlacedPair(key, None, captions, extra, self.config.split, None, shard, image.offset, image.size, entry, load)

    def _sidecars(self, members: dict[str, Member], file: RangeFile) -> tuple[list[tuple[object, str]], dict[str, Any], str | None]:
        """Captions, columns, and what is wrong with the sidecars."""
        read = [ending for ending in (*self.config.text, "json", "cls") if ending in members]
        if any(members[ending].size > MAX_SIDECAR_BYTES for ending in read):
            return [], {}, "sidecar too large"
        content = {ending: file.read(members[ending].offset, members[ending].size) for ending in read}
        captions: list[tuple[object, str]] = [
            (content[ending], self.config.caption_source) for ending in self.config.text if ending in content
        ]
        extra: dict[str, Any] = {}
        if "cls" in content:
            try:
                extra["label"] = int(content["cls"])
            except ValueError:
                return captions, extra, "class is not a number"
        if "json" in content and (self.config.json_captions or self.config.json_columns):
            try:
                data = json.loads(content["json"])
            except (ValueError, RecursionError):
                return captions, extra, "sidecar is not JSON"
            if not isinstance(data, dict):
                return captions, extra, "sidecar is not a JSON object"
            for name in self.config.json_captions:
                if name in data:
                    captions += captions_of(data[name], self.config.caption_source)
            extra |= {extra_name(name): data.get(name) for name in self.config.json_columns}
        return captions, extra, None


def _sample(member: Member) -> str:
    """The member's name up to the first dot of its last part."""
    path = PurePosixPath(member.name)
    stem = path.name.partition(".")[0]
    return str(path.parent / stem) if stem else member.name


def _ending(member: Member) -> str:
    return PurePosixPath(member.name).name.partition(".")[2].lower()
