"""The shipped emoji: whole, within their size, and the same labels whichever makers are asked for."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import pytest

from diptych.core.errors import ConfigError, DataError
from diptych.pairs.image import probe
from diptych.pairs.ingest import ingest_all
from diptych.pairs.sources.emoji import LICENCES, VENDORS, Config, names, read_asset, vendor_path

ASSETS = Path(str(files("diptych") / "assets"))


def test_assets_are_whole_and_small() -> None:
    assert names().height == 1911
    assert names()["hexcode"].is_sorted()
    assert names()["hexcode"].is_unique().all()
    rows = {vendor: read_asset(vendor_path(vendor)) for vendor in VENDORS}
    assert {vendor: table.height for vendor, table in rows.items()} == {"noto": 1911, "openmoji": 1911, "fluent3d": 1852, "twemoji": 1911}
    for table in rows.values():
        assert set(table["hexcode"]) <= set(names()["hexcode"])
        info = probe(table["image"][17])
        assert (info.width, info.height, info.format, info.mode) == (64, 64, "WEBP", "RGBA")
    size = sum(path.stat().st_size for folder in ("emoji", "emoji-openmoji") for path in (ASSETS / folder).iterdir())
    assert size <= 12_000_000


def test_licences_lie_beside_the_drawings() -> None:
    for vendor in VENDORS:
        folder = (ASSETS / vendor_path(vendor)).parent
        assert LICENCES[vendor].split("-")[0] in (folder / f"LICENSE-{vendor}.md").read_text()
        assert (folder / "DATA_CARD.md").exists()
    assert [path.name for path in (ASSETS / "emoji-openmoji").glob("*.parquet")] == ["openmoji.parquet"]
    assert "UNICODE LICENSE V3" in (ASSETS / "emoji" / "LICENSE-names.md").read_text()


def test_every_language_is_complete() -> None:
    for column in names().columns:
        if column.startswith("name"):
            assert names()[column].null_count() == 0
            assert names()[column].str.len_chars().min() >= 1


def test_splits_labels_and_captions(tmp_path: Path) -> None:
    dataset = ingest_all(Config(train=("fluent3d",), test=("twemoji",), languages=("en", "de")).build(), tmp_path / "out")
    frame = dataset.read()
    assert frame.group_by("split").len().sort("split").rows() == [("test", 1911), ("train", 1852)]
    assert dataset.manifest.ledger.left == ()
    seedling = {row["split"]: row for row in frame.iter_rows(named=True) if row["meta.hexcode"] == "1F331"}
    assert seedling["train"]["label"] == seedling["test"]["label"] == names()["hexcode"].to_list().index("1F331")
    assert seedling["train"]["key"] == "fluent3d-1F331"
    assert seedling["test"]["label_name"] == "seedling"
    captions = [(caption["text"], caption["source"]) for caption in seedling["test"]["captions"]]
    assert captions == [
        ("seedling", "human"),
        ("plant, sapling, sprout, young", "tag"),
        ("Spross", "human"),
        ("junge pflanze, spross", "tag"),
    ]


def test_a_copy_without_some_drawings() -> None:
    with pytest.raises(DataError, match="not part of this copy"):
        read_asset("emoji/apple.parquet")


def test_wrong_configurations() -> None:
    for data in (
        {"train": ["noto"], "test": ["noto"]},
        {"train": [], "test": []},
        {"train": ["apple"]},
        {"languages": []},
        {"captions": ["name", "name"]},
    ):
        with pytest.raises(ConfigError):
            Config.parse({"method": "emoji", **data})


def test_held_out_drawings_are_drawn_by_key_from_the_training_makers_alone() -> None:
    pairs = {raw.key: raw.split for maker in ("noto", "twemoji") for raw in Config(train=("noto",), val=0.1).build().read(maker)}
    held_out = {key for key, split in pairs.items() if split == "val"}
    assert 130 < len(held_out) < 260
    assert all(key.startswith("noto") for key in held_out)
    fewer = {raw.key for raw in Config(train=("noto",), val=0.05).build().read("noto") if raw.split == "val"}
    assert fewer < held_out, "a smaller share holds out some of the same"
