"""Passes over pairs: runs a phase's methods shard by shard, on Ray Data or in process, with bounded memory.

A phase is a chain of methods. Each method runs as: its folds (map a table, merge in table order), then its verdict on
every table; a method that groups first has its rows routed to buckets of whole groups and back. Every finished
piece is a file under a done name, so that a restart repeats only what was in flight.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from diptych.core import digest
from diptych.core.config import Config
from diptych.core.errors import ConfigError, DataError
from diptych.core.points import Fold, PairMethod, Verdict
from diptych.engine import features, mapped
from diptych.engine.progress import Progress
from diptych.engine.session import Session
from diptych.pairs.dataset import PairDataset, with_twin
from diptych.pairs.image import EXTENSIONS, verify
from diptych.pairs.manifest import PhaseRecord, ShardEntry
from diptych.pairs.schema import REJECTS
from diptych.pairs.shards import ShardReader, ShardWriter
from diptych.pairs.write import DatasetWriter

BUCKET_BYTES = 96 * 2**20
FEATURE = "_feature."
PAINTED = "_painted"
"""The scratch column of new pictures, encoded; null where a pair keeps its own."""
LENT = ("feature", "text_feature", "pixels", "group")
"""Columns that a batch has for the method alone."""
PIXEL_ROWS = 1024
"""Pairs whose encoded pictures are held at once, where a method decides on every pair by itself."""


@dataclass(frozen=True)
class Place:
    """What every task of a pass needs: where tables lie, how to reach pictures, whose parameters apply."""

    phase: str
    method: str
    config: Config
    seed: int
    scratch: Path
    reader: ShardReader
    feature: features.FeatureSpec | None

    @property
    def column(self) -> str:
        """The scratch column that carries this method's features."""
        return FEATURE + (self.feature.name if self.feature else "")

    @property
    def text_column(self) -> str:
        """The scratch column that carries the features of first captions by the same model."""
        return f"{self.column}:text"

    def piece(self, kind: str, index: int) -> Path:
        """Where a finished piece lies."""
        return self.scratch / f"{kind}-{index:05d}{mapped.SUFFIX}"

    def build(self) -> PairMethod:
        """The method itself, built in the process that runs it."""
        method: PairMethod = self.config.build(self.seed)  # type: ignore[attr-defined]
        return method


def run(
    source: PairDataset,
    configs: Sequence[Config],
    phase: str,
    out: Path,
    *,
    seed: int,
    session: Session,
    scratch: Path,
    code: str,
    version: str,
    progress: Progress,
    feature_specs: Mapping[str, features.FeatureSpec],
) -> PairDataset:
    """Runs a curate, prune or caption phase and writes its pair dataset to `out`.

    Only pairs of the split `train` are shown to methods: what a model is measured on is never curated.
    `scratch` holds finished pieces between restarts and is removed at the end. An empty phase copies no table: it
    links the tables of `source`. Raises what the methods raise, and DataError when a method loses or invents a row.
    """
    work = scratch / digest.short(digest.of_plain([source.digest, phase, seed, code, [config.plain() for config in configs]]))
    methods, configs = tuple(config.plain() for config in configs), steps_of(configs)
    if finished := sum(1 for _ in work.glob("*/*.*")):
        progress.note(f"{phase} continues from {finished:,} finished pieces")
    work.mkdir(parents=True, exist_ok=True)
    _check_painting(configs, phase, seed)
    tables = list(session.map(_TrainRows(work), list(enumerate(source.tables())))) if configs else source.tables()
    reports: dict[str, Any] = {}
    for position, config in enumerate(configs):
        name = str(config.plain().get("method", phase))
        spec = feature_specs.get(str(getattr(config, "features", "")))
        place = Place(phase, name, config, seed, work / f"{position}-{name}", source.reader(), spec)
        stage = Stage(place, tables, session, progress, (position, len(configs)))
        tables, reports[f"{position}-{name}"] = stage.run()
    record = PhaseRecord(phase=phase, methods=methods, seed=seed, code=code, version=version, report=reports)
    dataset = _assemble(source, tables, work, len(configs), record, out)
    shutil.rmtree(work)
    return dataset


def _check_painting(configs: Sequence[Config], phase: str, seed: int) -> None:
    """Refuses a method that looks at pictures behind one that paints: new pictures lie in shards at the end of the phase only."""
    methods: list[PairMethod] = [config.build(seed) for config in configs] if len(configs) > 1 else []  # type: ignore[attr-defined]
    painter = next((place for place, method in enumerate(methods) if method.paints), len(methods))
    for place, method in enumerate(methods[painter + 1 :], start=painter + 1):
        if {"pixels", "features"} & method.needs:
            name, before = (str(configs[at].plain()["method"]) for at in (place, painter))
            raise ConfigError.at(
                "A method cannot see the pictures that another one made", f"{phase}.{place}", name,
                f"a method that needs no pictures behind {before}", "put it before, or into the next phase",
            )  # fmt: skip


def steps_of(configs: Sequence[Config]) -> list[Config]:
    """The configurations to run in turn: a method that is a chain gives its own. (A parameter may be called `steps`, too.)"""
    found = ((config, getattr(config, "steps", None)) for config in configs)
    return [step for config, steps in found for step in (steps() if callable(steps) else (config,))]


def count(configs: Sequence[Config], seed: int) -> int:
    """How often `run` goes over the tables: once for the split, then features, folds and verdicts of every method."""
    methods: list[PairMethod] = [config.build(seed) for config in steps_of(configs)]  # type: ignore[attr-defined]
    each = [
        len(method.needs & {"features", "text features"}) + len(method.folds()) + (1 if type(method).group is PairMethod.group else 3)
        for method in methods
    ]
    return 1 + sum(each) if methods else 0


def _assemble(source: PairDataset, tables: Sequence[Path], work: Path, methods: int, record: PhaseRecord, out: Path) -> PairDataset:
    rejects = sorted(work.glob(f"*/left-*{mapped.SUFFIX}"), key=lambda path: (path.name, path.parent.name)) if methods else []
    by_table: dict[str, list[Path]] = {}
    for path in rejects:
        by_table.setdefault(path.stem.removeprefix("left-"), []).append(path)
    with DatasetWriter(out, record, [source.digest], source.manifest.shards, pairs_in=len(source), shards_root=source.root) as writer:
        for index, table in enumerate(tables):
            frame = _with_held_out(mapped.read(table), source.tables()[index]) if methods else mapped.read(table)
            if PAINTED in frame.columns:
                frame, shards = _packed(frame, writer.shards_folder, f"{record.phase}-{index:05d}")
                writer.add_shards(shards)
            kept = frame.drop([name for name in frame.columns if name.startswith(("_", FEATURE))])
            left = [mapped.read(path) for path in by_table.get(f"{index:05d}", [])]
            writer.add(kept, pl.concat(left) if left else None)
        return writer.finish()


def _packed(frame: pl.DataFrame, folder: Path, prefix: str) -> tuple[pl.DataFrame, Mapping[str, ShardEntry]]:
    """The frame with `image` pointing to its new pictures, which are packed into shards, and those shards."""
    places = frame["image"].to_list()
    with ShardWriter(folder, prefix) as writer:
        for row, (key, data) in enumerate(frame.select("key", PAINTED).iter_rows()):
            if data is not None:
                info = verify(data)
                places[row] = {**writer.add(key, EXTENSIONS[info.format], data), "width": info.width, "height": info.height}
        shards = writer.done()
    return frame.with_columns(pl.Series("image", places, dtype=frame.schema["image"])), shards


def _with_held_out(train: pl.DataFrame, table: Path) -> pl.DataFrame:
    """The table's train rows as the methods left them, and its other rows as they came."""
    held_out = pl.read_parquet(table).filter(pl.col("split") != "train")
    return pl.concat([train, held_out], how="diagonal") if held_out.height else train


@dataclass(frozen=True)
class _TrainRows:
    """A table's pairs of the split `train`; the table itself when it has no others."""

    work: Path

    def __call__(self, item: tuple[int, Path]) -> Path:
        index, table = item
        splits = pl.scan_parquet(table).select(pl.col("split").eq("train").all()).collect().item()
        if splits:
            return table
        return mapped.write(mapped.read(table).filter(pl.col("split") == "train"), self.work / f"train-{index:05d}{mapped.SUFFIX}")


@dataclass
class Stage:
    """One method of a phase over all tables."""

    place: Place
    tables: Sequence[Path]
    session: Session
    progress: Progress
    position: tuple[int, int]

    def run(self) -> tuple[list[Path], dict[str, Any]]:
        """The tables after the method, and its report."""
        place, scratch = self.place, self.place.scratch
        scratch.mkdir(parents=True, exist_ok=True)
        method = place.build()
        if "features" in method.needs:
            self.tables = self._each(_WithFeatures(place), self.tables, "features")
        if "text features" in method.needs:
            self.tables = self._each(_WithFeatures(place, texts=True), self.tables, "text features")
        state: Any = None
        for number, fold in enumerate(method.folds()):
            state = self._fold(number, fold, state)
        first = mapped.read(self.tables[0]).head(1) if self.tables else None
        grouped = first is not None and method.group(_batch(place, first, method), state) is not None
        tables = self._grouped(state) if grouped else self._each(_Apply(place, state), self.tables, "deciding")
        return tables, {**method.report(state), **_tally(method, tables)}

    def _each(self, task: Callable[[tuple[int, Path]], Path], tables: Sequence[Path], what: str) -> list[Path]:
        results = []
        for path in self.session.map(task, list(enumerate(tables))):
            results.append(path)
            self._tick(len(results), len(tables), what)
        return results

    def _tick(self, done: int, total: int, what: str) -> None:
        index, count = self.position
        self.progress.update(index + done / max(total, 1), count, f"{self.place.method}: {what}, table {done} of {total}")

    def _fold(self, number: int, fold: Fold, state: Any) -> Any:
        merged: Any = None
        items = list(enumerate(self.tables))
        for done, part in enumerate(self.session.map(_FoldTask(self.place, number, state), items), start=1):
            merged = part if merged is None else fold.merge(merged, part)
            self._tick(done, len(items), f"fold {number + 1}")
        return fold.finish(merged, state) if items else state

    def _grouped(self, state: Any) -> list[Path]:
        place, buckets = self.place, max(1, -(-sum(map(mapped.size_bytes, self.tables)) // BUCKET_BYTES))
        kept = [place.piece("kept", index) for index in range(len(self.tables))]
        if not all(path.exists() for path in kept):
            self._each(_Route(place, state, buckets), self.tables, "routing")
            list(self.session.map(_Decide(place, state, len(self.tables)), range(buckets)))
            self._each(_Return(place, buckets), self.tables, "deciding")
        for shuffled in ("route", "decided-kept", "decided-left"):
            mapped.remove(sorted(place.scratch.glob(f"{shuffled}-*{mapped.SUFFIX}")))
        return kept


def _tally(method: PairMethod, tables: Sequence[Path]) -> dict[str, int]:
    """The method's counts over all tables; nothing is read for a method that counts nothing."""
    if type(method).tally is PairMethod.tally:
        return {}
    total: Counter[str] = Counter()
    for table in tables:
        total.update(method.tally(mapped.read(table).lazy()))
    return dict(sorted(total.items()))


def _batch(place: Place, frame: pl.DataFrame, method: PairMethod) -> pl.DataFrame:
    """The frame as the method sees it: `feature` and `pixels` added when needed, other scratch columns hidden."""
    wanted = {place.column: "feature"} if "features" in method.needs else {}
    wanted |= {place.text_column: "text_feature"} if "text features" in method.needs else {}
    hidden = [name for name in frame.columns if name == PAINTED or (name.startswith(FEATURE) and name not in wanted)]
    batch = frame.drop(hidden).rename(wanted)
    if "pixels" in method.needs:
        batch = batch.with_columns(pl.Series("pixels", place.reader.read_column(frame["image"]), dtype=pl.Binary))
    return batch


def _decided(place: Place, frame: pl.DataFrame, method: PairMethod, state: Any) -> Verdict:
    """The method's verdict; pictures that it made stand in the scratch column of the rows that are kept."""
    batch = _batch(place, frame, method)
    verdict = method.apply(batch, state)
    _check(place, frame, verdict.kept, verdict.rejected)
    if not method.paints:
        return verdict
    before = batch.select("key", pl.col("pixels").alias(PAINTED))
    kept = verdict.kept.join(before, on="key", how="left", maintain_order="left")
    own = pl.when(pl.col("pixels") != pl.col(PAINTED)).then(pl.col("pixels"))
    return Verdict(kept.with_columns(own.alias(PAINTED)), verdict.rejected)


def _returned(kept: pl.DataFrame) -> pl.DataFrame:
    """The kept rows without what was lent to the method."""
    return kept.drop([name for name in LENT if name in kept.columns])


def _restore(place: Place, before: pl.DataFrame, kept: pl.DataFrame) -> pl.DataFrame:
    """The kept rows with their scratch columns back, in the order they came in."""
    kept = _returned(kept)
    hidden = [name for name in before.columns if name.startswith((FEATURE, PAINTED)) and name not in kept.columns]
    order = before.select("key", *hidden).with_row_index("_order")
    return order.join(kept, on="key", how="inner").sort("_order").select(*kept.columns, *hidden)


def _check(place: Place, before: pl.DataFrame, kept: pl.DataFrame, rejected: pl.DataFrame) -> None:
    if kept.height + rejected.height == before.height and pl.concat([kept["key"], rejected["key"]]).n_unique() == before.height:
        return
    raise DataError.at(
        "A method lost or invented pairs", f"{place.phase}: {place.method}", f"{before.height} in, {kept.height} kept, {rejected.height} left",
        "every pair in exactly one of the two", "this is a fault of the method; please report it",
    )  # fmt: skip


def _left(place: Place, before: pl.DataFrame, rejected: pl.DataFrame) -> pl.DataFrame:
    """Rejects with their picture and captions, so that the contact sheet can show them."""
    return (
        with_twin(rejected)
        .select("key", pl.col("reason").cast(pl.String), pl.col("score").cast(pl.Float32), pl.col("twin").cast(pl.String))
        .join(before.select("key", "image", "captions"), on="key", how="left", maintain_order="left")
        .with_columns(phase=pl.lit(place.phase), method=pl.lit(place.method))
        .select(list(REJECTS))
    )


@dataclass(frozen=True)
class _WithFeatures:
    """Adds a column of features to a table: those of the pictures, or of every pair's first caption."""

    place: Place
    texts: bool = False

    def __call__(self, item: tuple[int, Path]) -> Path:
        index, table = item
        frame, column = mapped.read(table), self.place.text_column if self.texts else self.place.column
        if column in frame.columns:
            return table
        path = self.place.piece("texts" if self.texts else "features", index)
        if not path.exists():
            spec = self.place.feature
            assert spec is not None, f"{self.place.method} needs features but names no model"
            values = features.of_captions(spec, frame) if self.texts else features.compute(spec, frame, self.place.reader)
            mapped.write(frame.with_columns(pl.Series(column, values, dtype=pl.Array(pl.Float32, values.shape[1]))), path)
        return path


@dataclass(frozen=True)
class _FoldTask:
    """Maps one table to its partial result; arrays are kept on disk for a restart."""

    place: Place
    number: int
    state: Any

    def __call__(self, item: tuple[int, Path]) -> Any:
        index, table = item
        path = self.place.scratch / f"fold{self.number}-{index:05d}.npz"
        if path.exists():
            with np.load(path, allow_pickle=False) as stored:
                return stored["partial"]
        method = self.place.build()
        part = method.folds()[self.number].map(_batch(self.place, mapped.read(table), method), self.state)
        if isinstance(part, np.ndarray) and part.dtype != object:
            partial = path.with_suffix(".partial.npz")
            np.savez_compressed(partial, partial=part)  # counts are mostly zeros
            partial.replace(path)
        return part


@dataclass(frozen=True)
class _Apply:
    """The verdict on one table."""

    place: Place
    state: Any

    def __call__(self, item: tuple[int, Path]) -> Path:
        index, table = item
        path = self.place.piece("kept", index)
        if path.exists():
            return path
        frame = mapped.read(table)
        method = self.place.build()
        rows = PIXEL_ROWS if "pixels" in method.needs else max(1, frame.height)
        slices = [frame.slice(start, rows) for start in range(0, max(1, frame.height), rows)]
        verdicts = [_decided(self.place, part, method, self.state) for part in slices]
        kept, rejected = pl.concat([_returned(verdict.kept) for verdict in verdicts]), pl.concat([verdict.rejected for verdict in verdicts])
        if rejected.height:
            mapped.write(_left(self.place, frame, rejected), self.place.piece("left", index))
        return mapped.write(_restore(self.place, frame, kept), path)


@dataclass(frozen=True)
class _Route:
    """Shares a table's rows out to the buckets of their groups; a group lies whole in one bucket."""

    place: Place
    state: Any
    buckets: int

    def __call__(self, item: tuple[int, Path]) -> Path:
        index, table = item
        path = self.place.piece("route", index)
        if path.exists():
            return path
        frame = mapped.read(table)
        method = self.place.build()
        group_N = method.group(_batch(self.place, frame, method), self.state)
        assert group_N is not None
        frame = frame.with_columns(group=pl.Series(group_N, dtype=pl.Int64), _table=pl.lit(index, pl.Int32))
        return mapped.write_parts(frame, group_N % self.buckets, self.buckets, path)


@dataclass(frozen=True)
class _Decide:
    """The verdict on a bucket of whole groups, shared out to the tables its rows came from."""

    place: Place
    state: Any
    tables: int

    def __call__(self, bucket: int) -> None:
        # Written last: where it is, the bucket is done.
        path = self.place.piece("decided-kept", bucket)
        found = None if path.exists() else mapped.read_part((self.place.piece("route", index) for index in range(self.tables)), bucket)
        if found is None:
            return
        frame = found.sort("group", maintain_order=True)
        method = self.place.build()
        verdict = _decided(self.place, frame.drop("_table"), method, self.state)
        tables = frame.select("key", "_table")
        self._hand_back(_left(self.place, frame, verdict.rejected).join(tables, on="key"), self.place.piece("decided-left", bucket))
        self._hand_back(_returned(verdict.kept).join(tables, on="key"), path)

    def _hand_back(self, frame: pl.DataFrame, path: Path) -> None:
        mapped.write_parts(frame.drop("_table"), frame["_table"].cast(pl.Int64).to_numpy(), self.tables, path)


@dataclass(frozen=True)
class _Return:
    """Puts the verdicts of all buckets back into their table, in the table's own order."""

    place: Place
    buckets: int

    def __call__(self, item: tuple[int, Path]) -> Path:
        index, table = item
        path = self.place.piece("kept", index)
        if path.exists():
            return path
        frame = mapped.read(table)
        kept, left = self._part("decided-kept", index), self._part("decided-left", index)
        if left is not None:
            order = frame.select("key").with_row_index("_order")
            mapped.write(left.join(order, on="key").sort("_order").drop("_order"), self.place.piece("left", index))
        return mapped.write(_restore(self.place, frame, kept) if kept is not None else frame.clear(), path)

    def _part(self, kind: str, index: int) -> pl.DataFrame | None:
        paths = (self.place.piece(kind, bucket) for bucket in range(self.buckets))
        return mapped.read_part((path for path in paths if path.exists()), index)
