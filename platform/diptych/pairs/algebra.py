"""Sets of pairs: two datasets united, intersected, subtracted; and who left, arrived or changed between them.

Pairs are told apart by their keys. Results are derived datasets that point into the shards of both; no picture is copied.
The keys of one dataset are held in memory; tables are taken one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import polars as pl

from diptych.core import digest
from diptych.pairs.dataset import PairDataset
from diptych.pairs.manifest import PhaseRecord, ShardEntry
from diptych.pairs.schema import REJECTS
from diptych.pairs.write import DatasetWriter

CHANGES = ("left", "arrived", "changed")


def union(a: PairDataset, b: PairDataset, out: Path, version: str = "") -> PairDataset:
    """All pairs of `a`, then those of `b` whose key `a` has not; the others of `b` leave with the reason `in both`."""
    shards, renamed = _joint_shards(a, b)
    seen = a.read(["key"])["key"].implode()
    with _writer("union", out, a, b, shards, len(a) + len(b), version) as writer:
        for table in _tables(a):
            writer.add(table)
        for table in _tables(b):
            moved = table.with_columns(_renamed(renamed))
            new = ~moved["key"].is_in(seen)
            writer.add(moved.filter(new), _left(moved.filter(~new), "union", "in both"))
        return writer.finish()


def intersect(a: PairDataset, b: PairDataset, out: Path, version: str = "") -> PairDataset:
    """The pairs of `a`, as they are there, whose key `b` has too; the others leave with the reason `not in the other`."""
    return _chosen("intersect", "not in the other", lambda keys, other: keys.is_in(other), a, b, out, version)


def subtract(a: PairDataset, b: PairDataset, out: Path, version: str = "") -> PairDataset:
    """The pairs of `a` whose key `b` has not; the others leave with the reason `in the other`."""
    return _chosen("subtract", "in the other", lambda keys, other: ~keys.is_in(other), a, b, out, version)


def diff(a: PairDataset, b: PairDataset, between: Sequence[PairDataset] = ()) -> pl.DataFrame:
    """Who `left`, `arrived` or `changed` on the way from `a` to `b`, sorted by change and key.

    Columns: `key`, `change`, `columns` (names of what changed), and for those that left `phase`, `method`, `reason`, `score`, `twin` if `b` or one of
    the datasets `between` turned them away. A picture that was packed anew with the same bytes has not changed.
    """
    one, two = a.read(), b.read()
    gone = one.join(two, on="key", how="anti").select("key", change=pl.lit("left"))
    new = two.join(one, on="key", how="anti").select("key", change=pl.lit("arrived"))
    why = pl.concat([dataset.rejects().select("key", "phase", "method", "reason", "score", "twin") for dataset in (*between, b)])
    why = why.unique("key", keep="last", maintain_order=True)
    moves = pl.concat([gone, new]).with_columns(columns=pl.lit([], pl.List(pl.String)))
    found = pl.concat([moves, _changed(a, b, one, two)]).join(why, on="key", how="left")
    return _blank_reasons(found).sort(pl.col("change").cast(pl.Enum(CHANGES)), "key")


def _blank_reasons(found: pl.DataFrame) -> pl.DataFrame:
    """A reason belongs to those that left; another pair of the same key may have been turned away as a duplicate."""
    names = ("phase", "method", "reason", "score", "twin")
    return found.with_columns(pl.when(pl.col("change") == "left").then(pl.col(name)).otherwise(None).alias(name) for name in names)


def _changed(a: PairDataset, b: PairDataset, one: pl.DataFrame, two: pl.DataFrame) -> pl.DataFrame:
    both = one.select("key").join(two.select("key"), on="key", maintain_order="left")
    left = both.join(one, on="key", how="left", maintain_order="left")
    right = both.join(two, on="key", how="left", maintain_order="left")
    names = sorted((set(one.columns) | set(two.columns)) - {"key", "image"})
    masks = {name: _unequal(left, right, name) for name in names}
    masks["image"] = _other_picture(a, b, left["image"], right["image"])
    flags = [pl.when(pl.Series(name, mask)).then(pl.lit(name)) for name, mask in sorted(masks.items())]
    columns = pl.concat_list(flags).list.drop_nulls()
    return both.with_columns(change=pl.lit("changed"), columns=columns).filter(pl.col("columns").list.len() > 0)


def _unequal(left: pl.DataFrame, right: pl.DataFrame, name: str) -> pl.Series:
    """True where a column differs; a column that only one of them has differs wherever it is not null."""
    if name not in left.columns or name not in right.columns:
        return (left if name in left.columns else right)[name].is_not_null()
    one, two = left[name], right[name]
    if one.dtype != two.dtype:
        return pl.Series([x != y for x, y in zip(one.to_list(), two.to_list(), strict=True)], dtype=pl.Boolean)
    return one.ne_missing(two)


def _other_picture(a: PairDataset, b: PairDataset, left: pl.Series, right: pl.Series) -> pl.Series:
    """True where the bytes differ; they are read only where place and size do not tell."""
    shards = {name: entry.uri for name, entry in a.shards.items()}, {name: entry.uri for name, entry in b.shards.items()}
    readers = a.reader(), b.reader()
    answers = []
    for one, two in zip(left.to_list(), right.to_list(), strict=True):
        places = [(uris[image["shard"]], image["offset"], image["size"]) for uris, image in zip(shards, (one, two), strict=True)]
        if places[0] == places[1] or one["size"] != two["size"]:
            answers.append(places[0] != places[1])
        else:
            contents = [
                reader.read(image["shard"], image["offset"], image["size"]) for reader, image in zip(readers, (one, two), strict=True)
            ]
            answers.append(contents[0] != contents[1])
    return pl.Series(answers, dtype=pl.Boolean)


def _chosen(
    verb: str, reason: str, choose: Callable[[pl.Series, pl.Series], pl.Series], a: PairDataset, b: PairDataset, out: Path, version: str
) -> PairDataset:
    other = b.read(["key"])["key"].implode()
    with _writer(verb, out, a, b, a.shards, len(a), version) as writer:
        for table in _tables(a):
            stays = choose(table["key"], other)
            writer.add(table.filter(stays), _left(table.filter(~stays), verb, reason))
        return writer.finish()


def _writer(
    verb: str, out: Path, a: PairDataset, b: PairDataset, shards: dict[str, ShardEntry], pairs_in: int, version: str
) -> DatasetWriter:
    record = PhaseRecord(phase=verb, methods=({"method": verb},), version=version)
    return DatasetWriter(out, record, (a.digest, b.digest), shards, pairs_in=pairs_in)


def _tables(dataset: PairDataset) -> Iterator[pl.DataFrame]:
    return (dataset.table(index) for index in range(len(dataset.tables())))


def _left(rows: pl.DataFrame, verb: str, reason: str) -> pl.DataFrame:
    named = rows.with_columns(
        phase=pl.lit(verb), method=pl.lit(verb), reason=pl.lit(reason), score=pl.lit(None, pl.Float32), twin=pl.lit(None, pl.String)
    )
    return named.select(list(REJECTS))


def _joint_shards(a: PairDataset, b: PairDataset) -> tuple[dict[str, ShardEntry], dict[str, str]]:
    """The shards of both, and new names for those of `b` whose name means another tar in `a`."""
    joint, renamed = dict(a.shards), {}
    for name, entry in b.shards.items():
        known = joint.get(name)
        if known is None or known == entry or (known.sha256 is not None and known.sha256 == entry.sha256):
            joint.setdefault(name, entry)
        else:
            renamed[name] = f"{name}~{digest.short(b.digest)}"
            joint[renamed[name]] = entry
    return joint, renamed


def _renamed(names: dict[str, str]) -> list[pl.Expr]:
    if not names:
        return []
    return [pl.col("image").struct.with_fields(pl.field("shard").replace(names))]
