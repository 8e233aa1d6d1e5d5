"""Parquet files that hold picture bytes and captions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, Literal

from pydantic import Field

from diptych.core.config import Config as BaseConfig
from diptych.core.errors import DataError
from diptych.core.points import RawPair, Source
from diptych.pairs.ranges import Stream, open_range
from diptych.pairs.sources.paths import captions_of, expand, scalars, short_names

BATCH_ROWS = 128


class Config(BaseConfig):
    """Which files to read, and what their columns mean. Further plain columns are kept: documented names as they are, others as `meta.`."""

    method: Literal["parquet"] = "parquet"
    path: str | tuple[str, ...] = Field(description="Parquet files: paths, globs, ranges such as `{00..31}`, or URIs")
    key: str | None = Field(
        default="key", description="column of keys (text or integer); null, or where it is missing: file name and row number"
    )
    image: str = Field(default="image", description="column of pictures: binary, or a struct with `bytes`")
    captions: tuple[str, ...] = Field(
        default=("captions", "caption", "text"), min_length=1,
        description="columns of captions, those that exist are used: a text, a list of texts, or a list of structs with `text` and `source`",
    )  # fmt: skip
    caption_source: Literal["alt", "human", "tag"] = Field(default="alt", description="what captions are that do not say it")
    split: str = Field(default="train", min_length=1, description="split of pairs whose file has no column `split`")

    def build(self) -> Parquet:
        """The source."""
        return Parquet(self)


class Parquet(Source):
    """Pairs of Parquet files, read in batches of 128 rows."""

    def __init__(self, config: Config) -> None:
        self.config = config

    @cached_property
    def _files(self) -> dict[str, str]:
        patterns = (self.config.path,) if isinstance(self.config.path, str) else self.config.path
        return {name: file for file, name in short_names(expand(patterns)).items()}

    def parts(self) -> Sequence[str]:
        """The files, by the shortest names that tell them apart, sorted."""
        return sorted(self._files)

    def read(self, part: str) -> Iterator[RawPair]:
        """The rows of one file. Raises DataError if it is not Parquet, is damaged, or lacks the columns."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        uri = self._files[part]
        try:
            table = pq.ParquetFile(Stream(open_range(uri)))
            self._check(uri, table.schema_arrow.names)
            row = 0
            for batch in table.iter_batches(BATCH_ROWS):
                for values in as_bytes(batch).to_pylist():
                    yield self._pair(part, row, values)
                    row += 1
        except pa.ArrowException as error:
            raise DataError.at("A file cannot be read as Parquet", uri, error, "a whole Parquet file") from error
        except OSError as error:
            raise DataError.at("A file cannot be read to its end", uri, error, "a Parquet file", "give the same command again") from error

    def _check(self, uri: str, columns: Sequence[str]) -> None:
        if self.config.image not in columns:
            raise DataError.at(
                "There is no column of pictures", uri, columns, f"a column {self.config.image!r}", "set `image` to the column's name"
            )
        if not set(self.config.captions) & set(columns):
            raise DataError.at(
                "There is no column of captions", uri, columns, f"one of {', '.join(self.config.captions)}", "set `captions`"
            )

    def _pair(self, part: str, row: int, values: dict[str, Any]) -> RawPair:
        key = values.get(self.config.key) if self.config.key else None
        captions = [
            caption for name in self.config.captions if name in values for caption in captions_of(values[name], self.config.caption_source)
        ]
        image = values[self.config.image]
        image = image.get("bytes") if isinstance(image, dict) else image
        split = values.get("split")
        own = (self.config.key or "", self.config.image, *self.config.captions, "split")
        return RawPair(
            key=text(key) if key is not None else f"{part}-{row:08d}",
            image=image if isinstance(image, bytes) else None,
            captions=captions,
            extra=scalars(values, own),
            split=text(split) if split else self.config.split,
        )


def text(value: object) -> str:
    """A key or split as text; bytes that are not UTF-8 give lone surrogates, which ingest turns away."""
    return value.decode(errors="surrogateescape") if isinstance(value, bytes) else str(value)


def as_bytes(batch: Any) -> Any:
    """The batch with all texts as bytes: Arrow does not check UTF-8, and one bad row must not spoil the batch."""
    import pyarrow as pa

    schema = pa.schema([field.with_type(_as_bytes_type(field.type)) for field in batch.schema])
    return batch if schema == batch.schema else batch.cast(schema)


def _as_bytes_type(kind: Any) -> Any:
    import pyarrow as pa

    types = pa.types
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return pa.large_binary()
    if types.is_dictionary(kind):
        return _as_bytes_type(kind.value_type)
    if types.is_list(kind) or types.is_large_list(kind):
        return pa.large_list(_as_bytes_type(kind.value_type))
    if types.is_struct(kind):
        return pa.struct([field.with_type(_as_bytes_type(field.type)) for field in kind])
    return kind
