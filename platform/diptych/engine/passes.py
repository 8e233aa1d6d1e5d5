"""Passes over pairs: runs a phase's methods shard by shard, on Ray Data or in process, with bounded memory.

A phase is a chain of methods. Each method runs as: its folds (map a table, merge in table order), then its verdict on
every table; a method that groups first has its rows routed to buckets of whole groups and back. Every finished
piece is a file under a done name, so that a restart repeats only what was in flight.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl

from diptych.core import digest
from diptych.core.config import Config
from diptych.core.errors import ConfigError
from diptych.core.points import Fold, PairMethod
from diptych.engine import features, mapped
from diptych.engine.pieces import FEATURE, PAINTED, Apply, Decide, FoldTask, Place, Return, Route, TrainRows, WithFeatures, batch_of
from diptych.engine.progress import Progress
from diptych.engine.session import Session
from diptych.pairs.dataset import PairDataset
from diptych.pairs.image import EXTENSIONS, verify
from diptych.pairs.manifest import PhaseRecord, ShardEntry
from diptych.pairs.shards import ShardWriter
from diptych.pairs.write import DatasetWriter

BUCKET_BYTES = 96 * 2**20


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
    tables = list(session.map(TrainRows(work), list(enumerate(source.tables())))) if configs else source.tables()
    reports: dict[str, Any] = {}
    places: list[Place] = []
    for position, config in enumerate(configs):
        name = str(config.plain().get("method", phase))
        spec = feature_specs.get(str(getattr(config, "features", "")))
        places.append(Place(phase, name, config, seed, work / f"{position}-{name}", source.reader(), spec))
    for position, place in enumerate(places):
        later = {column for other in places[position + 1 :] for column in (other.column, other.text_column)}
        stage = Stage(replace(place, carried=frozenset(later)), tables, session, progress, (position, len(configs)))
        tables, reports[f"{position}-{place.method}"] = stage.run()
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


@dataclass
class Stage:
    """One method of a phase over all tables."""

    place: Place
    tables: Sequence[Path]
    session: Session
    progress: Progress
    position: tuple[int, int]

    def run(self) -> tuple[list[Path], dict[str, Any]]:
        """The tables after the method, and its report. A stage that is done is those alone: what led to them is deleted."""
        place, done = self.place, self.place.scratch / "report.json"
        kept = [place.piece("kept", index) for index in range(len(self.tables))]
        if done.exists():
            return kept, json.loads(done.read_text())
        place.scratch.mkdir(parents=True, exist_ok=True)
        came, method = self.tables, place.build()
        if "features" in method.needs:
            self.tables = self._each(WithFeatures(place), self.tables, "features")
        if "text features" in method.needs:
            self.tables = self._each(WithFeatures(place, texts=True), self.tables, "text features")
        state: Any = None
        for number, fold in enumerate(method.folds()):
            state = self._fold(number, fold, state)
        first = mapped.read(self.tables[0]).head(1) if self.tables else None
        if first is not None and method.group(batch_of(place, first, method), state) is not None:
            self._grouped(state)
        else:
            self._each(Apply(place, state), self.tables, "deciding")
        report = {**method.report(state), **_tally(method, kept)}
        mapped.at_once(done, lambda partial: partial.write_text(json.dumps(report)))
        stays = {"kept", "left", "report"}
        mapped.remove([path for path in place.scratch.iterdir() if path.stem.rpartition("-")[0] not in stays and path != done])
        mapped.remove([path for path in came if path.stem.startswith("kept-")])
        return kept, json.loads(done.read_text())

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
        for done, part in enumerate(self.session.map(FoldTask(self.place, number, state), items), start=1):
            merged = part if merged is None else fold.merge(merged, part)
            self._tick(done, len(items), f"fold {number + 1}")
        return fold.finish(merged, state) if items else state

    def _grouped(self, state: Any) -> None:
        buckets = max(1, -(-sum(map(mapped.size_bytes, self.tables)) // BUCKET_BYTES))
        decided = self.place.scratch / "decided.done"
        if not decided.exists():
            self._each(Route(self.place, state, buckets), self.tables, "routing")
            list(self.session.map(Decide(self.place, state, len(self.tables)), range(buckets)))
            decided.touch()
        # At once, and not when the stage is done: what is deleted before it reached the disk costs nothing.
        mapped.remove(list(self.place.scratch.glob("route-*")))
        self._each(Return(self.place, buckets), self.tables, "deciding")


def _tally(method: PairMethod, tables: Sequence[Path]) -> dict[str, int]:
    """The method's counts over all tables; nothing is read for a method that counts nothing."""
    if type(method).tally is PairMethod.tally:
        return {}
    total: Counter[str] = Counter()
    for table in tables:
        total.update(method.tally(mapped.read(table).lazy()))
    return dict(sorted(total.items()))
