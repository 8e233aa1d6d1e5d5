"""A pair dataset in other people's formats. Each export is written under another name and appears whole or not at all, in a store file by file."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl

from diptych.core.errors import ConfigError, DataError, nearest
from diptych.pairs import files
from diptych.pairs.dataset import PairDataset
from diptych.pairs.image import extension_of
from diptych.pairs.ranges import insist
from diptych.pairs.schema import PAIRS
from diptych.pairs.shards import MEBIBYTE, ShardWriter

BATCH_ROWS = 256


def export(dataset: PairDataset, out: Path, to: str, shard_size_bytes: int = 256 * MEBIBYTE) -> list[Path]:
    """Writes the dataset to the folder `out`; gives the files written, sorted.

    Args:
        to: `webdataset`, `parquet` or `hf`.
        shard_size_bytes: size at which a tar is closed (`webdataset`).

    Raises ConfigError for another format or if something lies in `out`, DataError if a shard is damaged, ResourceError if the disk is full.
    """
    if to not in FORMATS:
        raise ConfigError.at("There is no export of this kind", "to", to, f"one of {', '.join(FORMATS)}", nearest(to, FORMATS))
    out = out.parent.resolve() / out.name
    files.insist_free(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = files.partial_of(out)
    partial.mkdir()
    try:
        with files.guard_space(partial / to, sum(shard.size_bytes for shard in dataset.shards.values())):
            FORMATS[to](dataset, partial, shard_size_bytes)
        files.publish(partial, out)
    finally:
        files.remove(partial)
    return sorted(path for path in out.rglob("*") if path.is_file())


def export_to_store(dataset: PairDataset, uri: str, to: str, shard_size_bytes: int = 256 * MEBIBYTE) -> list[str]:
    """Writes the dataset below a URI such as `s3://bucket/folder`, by way of the local temporary folder; gives the URIs, sorted.

    A store renames nothing: a file appears whole, the export file by file. Files of the same names are replaced, so that a repeated call
    finishes what one that failed began. Nothing is ever deleted.

    Raises ConfigError for another format or if other files lie there, DataError if a shard is damaged or the store fails, ResourceError if
    the disk is full.
    """
    import fsspec

    system, base = fsspec.core.url_to_fs(uri.rstrip("/"))
    with tempfile.TemporaryDirectory(prefix="diptych-export-") as scratch:
        root = Path(scratch).resolve() / "export"
        written = {f"{base}/{path.relative_to(root).as_posix()}": path for path in export(dataset, root, to, shard_size_bytes)}
        try:
            strangers = sorted({str(name) for name in insist(lambda: _below(system, base))} - set(written))
            if strangers:
                raise ConfigError.at("Other files lie where the export goes", "OUT", uri, "an empty place",
                                     f"{len(strangers)} such as {strangers[0]}: name another place, or remove them")  # fmt: skip
            for name, path in written.items():
                insist(partial(system.put_file, str(path), name))
        except OSError as error:
            raise DataError.at(
                "An export did not reach its store", "OUT", uri, f"<{error}>", "give the same command again: it finishes"
            ) from error
    return [system.unstrip_protocol(name) for name in written]


def _below(system: Any, base: str) -> list[str]:
    """The files below a folder of a store, as they are now; none when it is not there."""
    system.invalidate_cache()
    try:
        return list(system.find(base))
    except FileNotFoundError:
        return []


def _to_webdataset(dataset: PairDataset, folder: Path, shard_size_bytes: int) -> None:
    """Tars `<split>-00000.tar` of `<key>.<picture>`, `.txt` (first caption) and `.json` (all the rest); in the order of the dataset."""
    writers: dict[str, ShardWriter] = {}
    try:
        for row, image in _rows(dataset):
            split = row["split"]
            writer = writers.get(split) or writers.setdefault(split, ShardWriter(folder, split.replace("/", "%2F"), shard_size_bytes))
            rest = {name: value for name, value in row.items() if name != "image"}
            sample = {extension_of(image): image, "txt": _first_caption(row).encode(), "json": _json(rest)}
            if isinstance(row.get("label"), int):
                sample["cls"] = str(row["label"]).encode()
            writer.add_sample(row["key"], sample)
        for writer in writers.values():
            writer.done()
    finally:
        for writer in writers.values():
            writer.__exit__()


def _to_parquet(dataset: PairDataset, folder: Path, _: int) -> None:
    """One file a table: the columns of the dataset with `image` as bytes, and `width` and `height`; row groups of 256."""
    import pyarrow.parquet as pq

    for index in range(len(dataset.tables())):
        writer = None
        for frame in _slices(dataset, index):
            table = frame.to_arrow(compat_level=pl.CompatLevel.oldest())
            writer = writer or pq.ParquetWriter(folder / f"pairs-{index:05d}.parquet", table.schema, compression="zstd")
            writer.write_table(table)
        if writer is not None:
            writer.close()


def _to_hf(dataset: PairDataset, folder: Path, _: int) -> None:
    """A dictionary of splits as 🤗 Datasets saves it, with pictures of its type `Image`."""
    import datasets

    cache = folder / ".cache"
    splits = {}
    for split in dataset.read(["split"])["split"].unique().sort().to_list():
        features = _features(dataset, datasets)
        splits[split] = datasets.Dataset.from_generator(
            _examples, features=features, cache_dir=str(cache), gen_kwargs={"root": str(dataset.root), "split": split}
        )
    datasets.DatasetDict(splits).save_to_disk(str(folder))
    del splits
    files.remove(cache)


def _features(dataset: PairDataset, datasets: Any) -> Any:
    schema = dataset.scan().drop("image").head(0).collect().to_arrow(compat_level=pl.CompatLevel.oldest()).schema
    return datasets.Features({**datasets.Features.from_arrow_schema(schema), "image": datasets.Image()})


def _examples(root: str, split: str) -> Iterator[dict[str, Any]]:
    for row, image in _rows(PairDataset.open(root)):
        if row["split"] == split:
            yield {**row, "image": {"bytes": image, "path": None}}


FORMATS: dict[str, Callable[[PairDataset, Path, int], None]] = {"webdataset": _to_webdataset, "parquet": _to_parquet, "hf": _to_hf}


def _rows(dataset: PairDataset) -> Iterator[tuple[dict[str, Any], bytes]]:
    reader = dataset.reader()
    for index in range(len(dataset.tables())):
        for frame in dataset.table(index).iter_slices(BATCH_ROWS):
            yield from zip(frame.iter_rows(named=True), reader.read_column(frame["image"]), strict=True)


def _slices(dataset: PairDataset, index: int) -> Iterator[pl.DataFrame]:
    reader = dataset.reader()
    for frame in dataset.table(index).iter_slices(BATCH_ROWS):
        sizes = [pl.col("image").struct.field(name).alias(name) for name in ("width", "height")]
        image = pl.Series("image", reader.read_column(frame["image"]), dtype=pl.Binary)
        others = [name for name in frame.columns if name not in PAIRS]
        yield frame.with_columns(sizes).with_columns(image).select([*PAIRS, "width", "height", *others])


def _first_caption(row: dict[str, Any]) -> str:
    return next((str(caption["text"]) for caption in row["captions"]), "")


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(_finite(value), ensure_ascii=False, default=str).encode()


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    match value:
        case dict():
            return {name: _finite(item) for name, item in value.items()}
        case list():
            return [_finite(item) for item in value]
        case float():
            return value if math.isfinite(value) else None
    return value
