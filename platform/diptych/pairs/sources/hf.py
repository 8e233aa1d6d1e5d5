"""A data set that 🤗 Datasets saved to disk (`save_to_disk`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from diptych.core.config import Config as BaseConfig
from diptych.core.errors import DataError
from diptych.core.points import RawPair, Source
from diptych.pairs.sources.parquet import BATCH_ROWS, as_bytes, text
from diptych.pairs.sources.paths import captions_of, scalars

PART_ROWS = 10_000


class Config(BaseConfig):
    """Where the data set lies and what its columns mean. Further plain columns are kept: documented names as they are, others as `meta.`."""

    method: Literal["hf"] = "hf"
    path: str = Field(description="the folder that `save_to_disk` wrote: one split or a dictionary of splits")
    key: str | None = Field(default="key", description="column of keys; null, or where it is missing: split and row number")
    image: str = Field(default="image", description="column of pictures")
    captions: tuple[str, ...] = Field(
        default=("captions", "caption", "text"), min_length=1, description="columns of captions; those that exist are used"
    )
    caption_source: Literal["alt", "human", "tag"] = Field(default="alt", description="what captions are that do not say it")
    split: str = Field(default="train", min_length=1, description="split of a data set that has none")

    def build(self) -> HuggingFace:
        """The source."""
        return HuggingFace(self)


class HuggingFace(Source):
    """Pairs of a saved data set, 10,000 rows a part. Class labels also give the column `label_name`."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config}  # a worker opens the data set itself

    @cached_property
    def _splits(self) -> dict[str, Any]:
        from datasets import DatasetDict, load_from_disk

        path = Path(self.config.path).absolute()
        try:
            loaded = load_from_disk(str(path), keep_in_memory=False)
        except (OSError, ValueError) as error:
            raise DataError.at("This is no data set that 🤗 Datasets saved", path, error, "a folder written by `save_to_disk`") from error
        splits = dict(loaded) if isinstance(loaded, DatasetDict) else {self.config.split: loaded}
        for name, split in splits.items():
            if self.config.image not in split.column_names or not set(self.config.captions) & set(split.column_names):
                expected = f"{self.config.image!r} and one of {', '.join(self.config.captions)}"
                raise DataError.at(
                    "The data set lacks columns", f"{path}, split {name}", split.column_names, expected, "set `image` and `captions`"
                )
        return splits

    def parts(self) -> Sequence[str]:
        """`<split>/<run of rows>`, sorted."""
        return sorted(f"{name}/{index:05d}" for name, split in self._splits.items() for index in range(-(-len(split) // PART_ROWS)))

    def read(self, part: str) -> Iterator[RawPair]:
        """The pairs of one run of rows."""
        name, _, number = part.rpartition("/")
        split = self._splits[name]
        first = int(number) * PART_ROWS
        last = min(first + PART_ROWS, len(split))
        for start in range(first, last, BATCH_ROWS):
            table = split.with_format("arrow")[start : min(start + BATCH_ROWS, last)]
            for row, values in enumerate(as_bytes(table).to_pylist(), start):
                yield self._pair(name, row, values, split.features)

    def _pair(self, split: str, row: int, values: dict[str, Any], features: Any) -> RawPair:
        key = values.get(self.config.key) if self.config.key else None
        image = values[self.config.image]
        image = image.get("bytes") if isinstance(image, dict) else image
        captions = [
            caption for name in self.config.captions if name in values for caption in captions_of(values[name], self.config.caption_source)
        ]
        own_split = values.get("split")
        extra = scalars(values, (self.config.key or "", self.config.image, *self.config.captions, "split"))
        names = getattr(features.get("label"), "names", None)
        if names and isinstance(values.get("label"), int) and 0 <= values["label"] < len(names):
            extra["label_name"] = names[values["label"]]
        return RawPair(
            key=text(key) if key is not None else f"{split}-{row:08d}",
            image=image if isinstance(image, bytes) else None,
            captions=captions,
            extra=extra,
            split=text(own_split) if own_split else split,
        )
