"""Shards are tars like any other, and pictures come back out of them byte for byte."""

from __future__ import annotations

import gc
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from diptych.core.errors import DataError
from diptych.pairs import shards as module
from diptych.pairs.schema import IMAGE
from diptych.pairs.shards import ShardReader, ShardWriter, member_name

KEYS = ["plain", "a/b.c", "../../etc/passwd", "/abs", "schön 🐈", "k" * 512, "."]


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def pack(folder: Path, limit: int = 1 << 20) -> tuple[dict[str, dict[str, object]], dict[str, str]]:
    writer = ShardWriter(folder, "images", limit)
    places = {key: writer.add(key, "png", key.encode() * 7) for key in KEYS}
    return places, {name: entry.uri for name, entry in writer.done().items()}


def column(places: dict[str, dict[str, object]]) -> pl.Series:
    return pl.Series("image", [{**place, "width": 1, "height": 1} for place in places.values()], dtype=IMAGE)


def test_round_trip(tmp_path: Path) -> None:
    places, uris = pack(tmp_path)
    reader = pickle.loads(pickle.dumps(ShardReader(uris)))
    assert reader.read_column(column(places).reverse()) == [key.encode() * 7 for key in reversed(KEYS)]


def test_tars_are_tars(tmp_path: Path) -> None:
    places, uris = pack(tmp_path)
    with tarfile.open(uris["images-00000"]) as tar:
        members = tar.getmembers()
        assert [member.name for member in members] == [member_name(key, "png") for key in KEYS]
        assert [tar.extractfile(member).read() for member in members] == [key.encode() * 7 for key in KEYS]  # type: ignore[union-attr]
        assert [member.offset_data for member in members] == [place["offset"] for place in places.values()]
        assert {member.mtime for member in members} == {0}
        assert not any(member.name.startswith(("/", "..")) or "/" in member.name for member in members)
    assert Path(uris["images-00000"]).stat().st_size % 10240 == 0


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    first, second = (Path(pack(tmp_path / name)[1]["images-00000"]).read_bytes() for name in "ab")
    assert first == second


def test_shards_are_cut_at_the_limit(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "images", 4096)
    places = [writer.add(str(index), "png", bytes([index]) * 1000) for index in range(5)]
    entries = writer.done()
    assert [place["shard"] for place in places] == ["images-00000", "images-00000", "images-00001", "images-00001", "images-00002"]
    assert sorted(entries) == ["images-00000", "images-00001", "images-00002"]
    assert all(Path(entry.uri).stat().st_size == entry.size_bytes for entry in entries.values())


def test_open_files_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_OPEN", 2)
    places, uris = pack(tmp_path, limit=1)
    assert len(uris) == len(KEYS)
    reader = ShardReader(uris)
    before = open_files()
    for _ in range(3):
        reader.read_column(column(places))
    gc.collect()
    assert open_files() <= before + 2
    reader.close()
    assert open_files() <= before


def test_threads_share_a_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_OPEN", 2)
    places, uris = pack(tmp_path, limit=1)
    reader = ShardReader(uris)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: reader.read_column(column(places)), range(400)))
    assert all(result == [key.encode() * 7 for key in KEYS] for result in results)


def test_remote_shards(tmp_path: Path) -> None:
    import fsspec

    places, uris = pack(tmp_path)
    fsspec.filesystem("memory").pipe("/bucket/x.tar", Path(uris["images-00000"]).read_bytes())
    reader = ShardReader({"images-00000": "memory://bucket/x.tar"})
    assert reader.read_column(column(places)) == [key.encode() * 7 for key in KEYS]
    with pytest.raises(DataError, match="cannot be read"):
        ShardReader({"s": "memory://bucket/none.tar"}).read("s", 0, 1)


def test_faults_are_named(tmp_path: Path) -> None:
    _, uris = pack(tmp_path)
    reader = ShardReader({**uris, "gone": str(tmp_path / "gone.tar")})
    with pytest.raises(DataError, match="does not have"):
        reader.read("other", 0, 1)
    with pytest.raises(DataError, match="missing or cannot be opened"):
        reader.read("gone", 0, 1)
    with pytest.raises(DataError, match="shorter than its index"):
        reader.read("images-00000", 0, 1 << 30)
    with pytest.raises(DataError, match="no picture to read"):
        reader.read_column(pl.Series("image", [None], dtype=IMAGE))


def test_neighbours_in_a_store_are_read_together_and_others_not(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    tar = bytes(range(256)) * 64
    fsspec.filesystem("memory").pipe("/bucket/many.tar", tar)
    reader = ShardReader({"m": "memory://bucket/many.tar"})
    asked: list[tuple[int, int]] = []

    def read(shard: str, offset: int, size: int, own: Any = reader.read) -> bytes:
        asked.append((offset, size))
        return bytes(own(shard, offset, size))

    monkeypatch.setattr(reader, "read", read)
    monkeypatch.setattr(module, "GAP_BYTES", 100)
    monkeypatch.setattr(module, "AHEAD_BYTES", 1000)
    places = [(700, 10), (0, 50), (150, 30), (150, 30), (281, 10), (1300, 600), (710, 600), (1400, 20)]
    column = pl.Series(
        "image", [{"shard": "m", "offset": offset, "size": size, "width": 1, "height": 1} for offset, size in places], dtype=IMAGE
    )
    assert reader.read_column(column) == [tar[offset : offset + size] for offset, size in places]
    assert asked == [(0, 180), (281, 10), (700, 610), (1300, 600)]
