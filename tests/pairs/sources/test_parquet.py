"""Parquet with picture bytes, in the shapes that people write it."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diptych.core.errors import DataError
from diptych.pairs.ingest import IngestConfig, ingest_all
from diptych.pairs.sources.parquet import Config

from ..conftest import picture

RED, BLUE = picture((255, 0, 0)), picture((0, 0, 255))


def test_plain_columns(tmp_path: Path) -> None:
    frame = pl.DataFrame(
        {
            "key": ["a", "b"],
            "image": [RED, BLUE],
            "caption": ["one", "two"],
            "label": [1, 2],
            "width": [3.5, 4.5],
            "split": ["train", "test"],
            "list": [[1], [2]],
        }
    )
    frame.write_parquet(tmp_path / "x.parquet")
    dataset = ingest_all(Config(path=str(tmp_path / "*.parquet")).build(), tmp_path / "out")
    assert dataset.read().columns == ["key", "image", "captions", "split", "label", "meta.width"]
    assert dataset.read(["key", "split", "label", "meta.width"]).rows() == [("a", "train", 1, 3.5), ("b", "test", 2, 4.5)]
    assert dataset.reader().read_column(dataset.read()["image"]) == [RED, BLUE]


def test_structs_lists_and_no_keys(tmp_path: Path) -> None:
    captions = [[{"text": "one", "source": "human"}, {"text": "uno", "source": None}], []]
    pl.DataFrame(
        {"picture": [{"bytes": RED, "path": "r.png"}, {"bytes": BLUE, "path": None}], "captions": captions, "text": ["three", "four"]}
    ).write_parquet(tmp_path / "x.parquet")
    dataset = ingest_all(Config(path=str(tmp_path / "x.parquet"), image="picture", caption_source="tag").build(), tmp_path / "out")
    assert dataset.read()["key"].to_list() == ["x-00000000", "x-00000001"]
    texts = [[(caption["text"], caption["source"]) for caption in captions] for captions in dataset.read()["captions"]]
    assert texts == [[("one", "human"), ("uno", "tag"), ("three", "tag")], [("four", "tag")]]


def test_broken_rows_leave(tmp_path: Path) -> None:
    invalid = pa.Array.from_buffers(pa.binary(), 4, pa.array([b"fine", b"caf\xe9", b"", b"t"], pa.binary()).buffers()).view(pa.string())
    table = pa.table({"key": ["a", "b", "c", "d"], "image": [RED, RED, RED, None], "caption": invalid})
    pq.write_table(table, tmp_path / "x.parquet")
    dataset = ingest_all(Config(path=str(tmp_path / "x.parquet")).build(), tmp_path / "out", config=IngestConfig(max_bad_share=1))
    assert dataset.read()["key"].to_list() == ["a"]
    assert dict(dataset.rejects().select("key", "reason").iter_rows()) == {
        "b": "caption is not valid UTF-8",
        "c": "empty caption",
        "d": "no image",
    }


def test_integer_keys_and_dictionary_columns(tmp_path: Path) -> None:
    table = pa.table({"id": [7, 8], "image": [RED, BLUE], "caption": pa.array(["one", "two"]).dictionary_encode()})
    pq.write_table(table, tmp_path / "x.parquet")
    dataset = ingest_all(Config(path=str(tmp_path / "x.parquet"), key="id").build(), tmp_path / "out")
    assert dataset.read()["key"].to_list() == ["7", "8"]
    assert dataset.read()["captions"][1][0]["text"] == "two"


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    pl.DataFrame({"image": [RED]}).write_parquet(tmp_path / "nocaption.parquet")
    pl.DataFrame({"caption": ["x"]}).write_parquet(tmp_path / "noimage.parquet")
    (tmp_path / "junk.parquet").write_bytes(b"PAR1 but not really")
    whole = (tmp_path / "nocaption.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    for name, message in (
        ("nocaption", "no column of captions"),
        ("noimage", "no column of pictures"),
        ("junk", "as Parquet"),
        ("cut", "as Parquet"),
    ):
        with pytest.raises(DataError, match=message):
            ingest_all(Config(path=str(tmp_path / f"{name}.parquet")).build(), tmp_path / "out")
        assert not (tmp_path / "out").exists()
