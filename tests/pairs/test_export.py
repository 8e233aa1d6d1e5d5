"""What goes out comes back in."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from diptych.core.errors import ConfigError, DataError
from diptych.core.points import Source
from diptych.pairs.dataset import PairDataset
from diptych.pairs.export import export
from diptych.pairs.ingest import ingest_all
from diptych.pairs.sources import hf, parquet, webdataset

Make = Callable[..., PairDataset]
KEYS = ["a", "b.c/d", "schön"]


@pytest.mark.parametrize("to", ["webdataset", "parquet", "hf"])
def test_round_trip(make: Make, tmp_path: Path, to: str) -> None:
    dataset = make("d", KEYS, label=[1, 2, 3], **{"meta.note": ["x", None, "z"]})
    out = tmp_path / "exported"
    written = export(dataset, out, to)
    assert written
    assert all(path.is_relative_to(out.resolve()) for path in written)
    sources: dict[str, Callable[[], Source]] = {
        "webdataset": lambda: webdataset.Config(
            path=f"{out}/*.tar", text=(), json_captions=("captions",), json_columns=("meta.note",)
        ).build(),
        "parquet": lambda: parquet.Config(path=f"{out}/*.parquet").build(),
        "hf": lambda: hf.Config(path=str(out)).build(),
    }
    again = ingest_all(sources[to](), tmp_path / "again")
    names = ["captions", "split", "label", "meta.note"]
    assert again.read(names).equals(dataset.read(names), null_equal=True)
    assert again.reader().read_column(again.read()["image"]) == dataset.reader().read_column(dataset.read()["image"])
    if to != "webdataset":
        assert again.read()["key"].to_list() == KEYS
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "d", "exported"]


def test_webdataset_is_what_others_expect(make: Make, tmp_path: Path) -> None:
    export(make("d", ["a", "b"], label=[1, 2]), tmp_path / "out", "webdataset", shard_size_bytes=4096)
    names = []
    for path in sorted((tmp_path / "out").iterdir()):
        with tarfile.open(path) as tar:
            names.append(tar.getnames())
            content = json.loads(tar.extractfile(tar.getmembers()[2]).read())  # type: ignore[union-attr]
    assert names == [["a.png", "a.txt", "a.json", "a.cls"], ["b.png", "b.txt", "b.json", "b.cls"]]
    assert content["key"] == "b"
    assert content["captions"][0] == {"text": "a picture of b", "source": "alt", "score": None}


def test_read_by_webdataset_itself(make: Make, tmp_path: Path) -> None:
    webdataset_library = pytest.importorskip("webdataset")
    dataset = make("d", ["a", "b"])
    export(dataset, tmp_path / "out", "webdataset")
    samples = list(webdataset_library.WebDataset(str(tmp_path / "out" / "train-00000.tar"), shardshuffle=False))
    assert [sample["txt"].decode() for sample in samples] == ["a picture of a", "a picture of b"]
    assert [sample["png"] for sample in samples] == dataset.reader().read_column(dataset.read()["image"])


def test_numbers_that_json_has_not(make: Make, tmp_path: Path) -> None:
    export(make("d", ["a"], weight=[float("nan")]), tmp_path / "out", "webdataset")
    with tarfile.open(tmp_path / "out" / "train-00000.tar") as tar:
        text = tar.extractfile("a.json").read().decode()  # type: ignore[union-attr]
    assert json.loads(text, parse_constant=pytest.fail)["weight"] is None


def test_parquet_holds_bytes(make: Make, tmp_path: Path) -> None:
    dataset = make("d", KEYS)
    export(dataset, tmp_path / "out", "parquet")
    frame = pl.read_parquet(tmp_path / "out" / "pairs-00000.parquet")
    assert frame["image"].to_list() == dataset.reader().read_column(dataset.read()["image"])
    assert frame.columns == ["key", "image", "captions", "split", "width", "height"]


def test_a_failure_leaves_nothing(make: Make, tmp_path: Path) -> None:
    dataset = make("d", ["a"])
    next((dataset.root / "shards").iterdir()).write_bytes(b"")
    for to in ("webdataset", "parquet"):
        with pytest.raises(DataError, match="shorter than its index"):
            export(dataset, tmp_path / "out", to)
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_what_lies_there_is_never_replaced(make: Make, tmp_path: Path) -> None:
    dataset, out = make("d", ["a"]), tmp_path / "out"
    out.mkdir()
    assert len(export(dataset, out, "webdataset")) == 1, "an empty folder is free"
    with pytest.raises(ConfigError, match=r"(?s)Something lies where the output goes.*train-00000\.tar"):
        export(dataset, out, "parquet")
    with pytest.raises(ConfigError, match="a file"):
        export(dataset, out / "train-00000.tar", "parquet")
    assert [path.name for path in out.iterdir()] == ["train-00000.tar"]


def test_unknown_format(make: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'parquet'"):
        export(make("d", ["a"]), tmp_path / "out", "parkett")
