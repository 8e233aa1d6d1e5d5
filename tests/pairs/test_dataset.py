"""A damaged dataset is found when it is opened, with everything that is wrong."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from diptych.core.errors import DataError
from diptych.pairs.dataset import PairDataset

Make = Callable[..., PairDataset]


def edit(dataset: PairDataset, change: Callable[[dict[str, object]], object]) -> None:
    path = dataset.root / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_no_dataset(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match="no pair dataset here"):
            PairDataset.open(place)


def test_truncated_manifest(make: Make) -> None:
    path = make("d", ["a"]).root / "manifest.json"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="cut off or not JSON"):
        PairDataset.open(path.parent)


def test_manifest_of_another_kind(make: Make) -> None:
    dataset = make("d", ["a"])
    edit(dataset, lambda data: data.update(format=2, colour="red"))
    with pytest.raises(DataError, match="not one of a pair dataset") as caught:
        PairDataset.open(dataset.root)
    assert len(caught.value.problems) == 2


def test_ledger_is_checked_on_opening(make: Make) -> None:
    dataset = make("d", ["a"])
    edit(dataset, lambda data: data["ledger"].update(pairs_in=9))  # type: ignore[attr-defined]
    with pytest.raises(DataError, match="does not add up"):
        PairDataset.open(dataset.root)


def test_row_counts_must_agree(make: Make) -> None:
    dataset = make("d", ["a"])
    edit(dataset, lambda data: data.update(rows=7))
    with pytest.raises(DataError, match="contradicts itself"):
        PairDataset.open(dataset.root)


def test_changed_table(make: Make) -> None:
    dataset = make("d", ["a"])
    table = dataset.tables()[0]
    content = bytearray(table.read_bytes())
    content[len(content) // 2] ^= 0xFF
    table.write_bytes(content)
    PairDataset.open(dataset.root)
    with pytest.raises(DataError, match="as the manifest says"):
        PairDataset.open(dataset.root, verify=True)


def test_all_damage_is_reported_at_once(make: Make) -> None:
    dataset = make("d", ["a"])
    dataset.tables()[0].write_bytes(b"PAR1")
    next(dataset.root.glob("shards/*.tar")).unlink()
    with pytest.raises(DataError) as caught:
        PairDataset.open(dataset.root)
    assert len(caught.value.problems) == 2
    assert "move both together" in str(caught.value)


def test_cut_off_shard(make: Make) -> None:
    dataset = make("d", ["a"])
    shard = next(dataset.root.glob("shards/*.tar"))
    shard.write_bytes(shard.read_bytes()[:520])
    with pytest.raises(DataError, match="520 bytes"):
        PairDataset.open(dataset.root)
    with pytest.raises(DataError, match="shorter than its index"):
        dataset.reader().read_column(dataset.read()["image"])


def test_changed_shard(make: Make) -> None:
    dataset = make("d", ["a"])
    dataset.verify_shards()
    shard = next(dataset.root.glob("shards/*.tar"))
    content = bytearray(shard.read_bytes())
    content[600] ^= 0xFF
    shard.write_bytes(content)
    with pytest.raises(DataError, match="not what they were"):
        dataset.verify_shards()


def test_unknown_column(make: Make) -> None:
    with pytest.raises(DataError, match="no such column"):
        make("d", ["a"]).read(["key", "colour"])


def test_dataset_travels_to_workers(make: Make) -> None:
    dataset = make("d", ["a", "b"], label=[1, 2])
    again = pickle.loads(pickle.dumps(dataset))
    assert again.digest == dataset.digest
    assert again.read(["label"])["label"].to_list() == [1, 2]


def test_opened_through_a_link(make: Make, tmp_path: Path) -> None:
    dataset = make("deep/d", ["a"])
    (tmp_path / "link").symlink_to(dataset.root)
    linked = PairDataset.open(tmp_path / "link")
    assert linked.reader().read_column(linked.read()["image"]) == dataset.reader().read_column(dataset.read()["image"])
