from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from diptych.core.errors import ConfigError
from diptych.pairs.export import export
from diptych.pairs.ingest import ingest_all
from diptych.pairs.sources.several import Config
from diptych.workflow.methods import source_files

HALF: dict[str, Any] = {"source": "digits", "pool": "target", "train": 100, "pool_rows": 0, "val_rows": 0}


def config(**sources: dict[str, Any]) -> Config:
    return Config.parse({"method": "sources", "sources": sources})


def test_pairs_carry_their_source_and_the_manifest_their_cards(tmp_path: Path) -> None:
    clean = {"data": {**HALF, "part": [0, 2]}, "card": {"licence": "CC-BY-4.0", "languages": ["en"]}}
    moved = {"data": {**HALF, "part": [1, 2], "shift": "pixel"}, "splits": {"train": "train"}}
    dataset = ingest_all(config(clean=clean, moved=moved).build(), tmp_path / "pool")
    rows = dataset.read()
    counts = Counter(zip(rows["split"], rows["meta.source"], strict=True))
    assert counts == {("train", "clean"): 50, ("train", "moved"): 50, ("test", "clean"): 1697}
    assert all(key.startswith(f"{source}/") for key, source in zip(rows["key"], rows["meta.source"], strict=True))
    cards = dataset.manifest.phase.report["sources"]
    assert cards["clean"]["card"]["licence"] == "CC-BY-4.0"
    assert cards["moved"]["data"]["shift"] == "pixel"


def test_splits_may_be_renamed_or_chosen() -> None:
    source = config(a={"data": HALF, "splits": ["test"]}, b={"data": {**HALF, "shift": "pixel"}, "splits": {"test": "shifted"}}).build()
    splits = {pair.split for part in source.parts() for pair in source.read(part)}
    assert splits == {"test", "shifted"}


def test_tars_of_one_name_do_not_mix(tmp_path: Path, make: Any) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        export(make(f"set-{name}", ["x"], seed=seed), tmp_path / name, "webdataset")
    tars = {name: {"data": {"source": "webdataset", "path": str(tmp_path / name / "*.tar")}} for name in ("a", "b")}
    dataset = ingest_all(config(**tars).build(), tmp_path / "pool")
    rows = dataset.read()
    assert rows["key"].to_list() == ["a/x", "b/x"]
    images = [dataset.reader().read(image["shard"], image["offset"], image["size"]) for image in rows["image"]]
    assert images[0] != images[1]


def test_files_of_members_count(tmp_path: Path, make: Any) -> None:
    export(make("set", ["x"]), tmp_path / "a", "webdataset")
    path = next((tmp_path / "a").glob("*.tar"))
    pool = config(a={"data": {"source": "webdataset", "path": str(path)}})
    before = source_files(pool)
    path.write_bytes(path.read_bytes() + bytes(512))
    assert before
    assert source_files(pool) != before
    assert source_files(config(a={"data": HALF})) == ""


@pytest.mark.parametrize(
    ("sources", "where"),
    [
        ({"a": {"data": {"source": "digitz"}}}, "sources.a.data.source"),
        ({"a": {"data": {}}}, "sources.a.data.source"),
        ({"a": {"data": {"source": "sources", "sources": {}}}}, "sources.a.data.source"),
        ({"a": {"data": {"source": "digits", "trian": 3}}}, "sources.a.data.trian"),
        ({"a b": {"data": {"source": "digits"}}}, "letters"),
        ({}, "sources"),
    ],
)
def test_wrong_configurations(sources: dict[str, Any], where: str) -> None:
    with pytest.raises(ConfigError, match=where):
        config(**sources)
