"""Sets of pairs, and what happened between two of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from diptych.core.errors import DataError
from diptych.pairs.algebra import diff, intersect, subtract, union
from diptych.pairs.dataset import PairDataset
from diptych.pairs.manifest import PhaseRecord
from diptych.pairs.schema import REJECTS
from diptych.pairs.shards import ShardWriter
from diptych.pairs.write import DatasetWriter

from .conftest import picture

Make = Callable[..., PairDataset]


def keys(dataset: PairDataset) -> list[str]:
    return dataset.read()["key"].to_list()


def left(dataset: PairDataset) -> list[tuple[str, str]]:
    return dataset.rejects().select("key", "reason").rows()


def derive(source: PairDataset, out: Path, frame: pl.DataFrame, rejected: pl.DataFrame | None = None) -> PairDataset:
    shards = source.manifest.shards
    with DatasetWriter(out, PhaseRecord(phase="prune"), [source.digest], shards, pairs_in=None, shards_root=source.root) as writer:
        writer.add(frame, rejected)
        return writer.finish()


def test_union_intersection_difference(make: Make, tmp_path: Path) -> None:
    a, b = make("a", ["x", "y"], seed=1, label=[1, 2]), make("b", ["y", "z"], seed=2)
    both = union(a, b, tmp_path / "union")
    assert keys(both) == ["x", "y", "z"]
    assert left(both) == [("y", "in both")]
    assert both.manifest.ledger.pairs_in == 4
    assert both.manifest.parents == (a.digest, b.digest)
    assert both.reader().read_column(both.read()["image"]) == [picture((1, 0, 7)), picture((1, 1, 7)), picture((2, 1, 7))]
    assert both.read(["label"])["label"].to_list() == [1, 2, None]
    common = intersect(a, b, tmp_path / "common")
    assert (keys(common), left(common)) == (["y"], [("x", "not in the other")])
    rest = subtract(a, b, tmp_path / "rest")
    assert (keys(rest), left(rest)) == (["x"], [("y", "in the other")])
    assert rest.reader().read_column(rest.read()["image"]) == [picture((1, 0, 7))]
    assert rest.reader().read_column(rest.rejects()["image"]) == [picture((1, 1, 7))]


def test_union_of_shards_of_one_name(make: Make, tmp_path: Path) -> None:
    a = make("a", ["x"], seed=1)
    with (
        DatasetWriter(tmp_path / "b", PhaseRecord(phase="ingest"), pairs_in=1) as writer,
        ShardWriter(writer.shards_folder, "images-1") as shards,
    ):
        place = shards.add("z", "png", picture((9, 9, 9)))
        writer.add_shards(shards.done())
        image = pl.Series("image", [{**place, "width": 12, "height": 8}], dtype=REJECTS["image"])
        writer.add(a.read().with_columns(image, key=pl.lit("z")), None)
        b = writer.finish()
    assert set(a.manifest.shards) == set(b.manifest.shards)
    both = union(a, b, tmp_path / "union")
    assert len(both.manifest.shards) == 2
    assert both.reader().read_column(both.read()["image"]) == [picture((1, 0, 7)), picture((9, 9, 9))]


def test_union_with_itself_shares_shards(make: Make, tmp_path: Path) -> None:
    a = make("a", ["x"])
    again = union(a, a, tmp_path / "union")
    assert list(again.manifest.shards) == list(a.manifest.shards)
    assert left(again) == [("x", "in both")]


def test_union_of_columns_of_other_types(make: Make, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="disagree about a column"):
        union(make("a", ["x"], seed=1, label=[1]), make("b", ["y"], seed=2, label=["one"]), tmp_path / "union")


def test_who_left_arrived_changed(make: Make, tmp_path: Path) -> None:
    a = make("a", ["stays", "leaves", "rewritten", "relabelled"], label=[0, 1, 2, 3])
    frame = a.read()
    rejected = frame.filter(pl.col("key") == "leaves").select(
        "key",
        phase=pl.lit("prune"),
        method=pl.lit("m"),
        reason=pl.lit("near copy"),
        score=pl.lit(0.9, pl.Float32),
        image="image",
        captions="captions",
    )
    new = pl.lit([{"text": "new", "source": "rewrite:x", "score": None}], dtype=frame.schema["captions"])
    kept = frame.filter(pl.col("key") != "leaves").with_columns(
        captions=pl.when(pl.col("key") == "rewritten").then(new).otherwise("captions"),
        label=pl.when(pl.col("key") == "relabelled").then(9).otherwise("label"),
        weight=pl.when(pl.col("key") == "relabelled").then(0.5),
        key=pl.col("key"),
    )
    arrival = kept.head(1).with_columns(key=pl.lit("arrives"))
    b = derive(a, tmp_path / "deeper/b", pl.concat([kept, arrival]), rejected)
    found = diff(a, b)
    assert found.select("key", "change", "columns", "method", "reason").rows() == [
        ("leaves", "left", [], "m", "near copy"),
        ("arrives", "arrived", [], None, None),
        ("relabelled", "changed", ["label", "weight"], None, None),
        ("rewritten", "changed", ["captions"], None, None),
    ]
    assert found["score"][0] == pytest.approx(0.9)
    assert diff(a, a).is_empty()
    c = derive(b, tmp_path / "c", b.read())
    assert diff(a, c)["reason"][0] is None
    assert diff(a, c, between=[b])["reason"][0] == "near copy"


def test_a_picture_packed_anew_has_not_changed(make: Make, tmp_path: Path) -> None:
    a = make("a", ["x", "y"], seed=1)
    images = a.reader().read_column(a.read()["image"])
    with (
        DatasetWriter(tmp_path / "b", PhaseRecord(phase="ingest"), pairs_in=2) as writer,
        ShardWriter(writer.shards_folder, "other") as shards,
    ):
        first = bytearray(images[0])
        first[-5] ^= 1
        places = [shards.add("y", "png", images[1]), shards.add("x", "png", bytes(first))]
        writer.add_shards(shards.done())
        image = pl.Series("image", [{**place, "width": 12, "height": 8} for place in reversed(places)], dtype=REJECTS["image"])
        writer.add(a.read().with_columns(image), None)
        b = writer.finish()
    assert diff(a, b).select("key", "change", "columns").rows() == [("x", "changed", ["image"])]
