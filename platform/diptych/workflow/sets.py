"""Evaluation sets beside a workflow's own data: brought in once, checked when they are registered, found again by what they came from."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field

from diptych import __version__
from diptych.core import digest
from diptych.core.config import Config, headline
from diptych.core.errors import ConfigError, DataError, Problem, shorten
from diptych.engine import feature_files, features
from diptych.evaluate import near_copies, sets
from diptych.pairs import files
from diptych.pairs.card import Card
from diptych.pairs.dataset import PairDataset
from diptych.pairs.ingest import IngestConfig, ingest_all
from diptych.pairs.manifest import NAME
from diptych.pairs.sources.clip_benchmark import OUT_OF_RANGE
from diptych.workflow import identity
from diptych.workflow.methods import Checks, ingest, source, source_files

NAMED = r"^[a-z0-9][a-z0-9_.-]{0,63}$"
CLASSIFY = frozenset({"zero-shot", "few-shot", "forgetting", "holistic-robustness", "corruption-robustness", "straggler-sharpness"})


class _Skeleton(Config):
    """A set in a file, before its source and its benchmarks are looked up."""

    data: dict[str, Any] | str = Field(description="a source with its parameters, or the folder of a pair dataset")
    benchmarks: tuple[dict[str, Any], ...] | None = Field(default=None, description="benchmarks of this set; the file's own by default")
    overlap: bool = Field(default=True, description="count near copies among the training pairs, which decodes each of those once, small")


@dataclass(frozen=True)
class EvaluationSet:
    """A set to measure on: where its pairs come from (`source`, or the `folder` of a dataset that is there) and what is measured."""

    name: str
    source: Config | None
    ingest: IngestConfig
    folder: Path | None
    benchmarks: tuple[Config, ...]
    overlap: bool = True

    def plain(self) -> dict[str, Any]:
        """What the set's rows depend on, as plain data."""
        where: dict[str, Any] = {"folder": str(self.folder), "files": identity.of_output(self.folder)} if self.folder else {}
        if self.source:
            where = {"source": self.source.plain(), "ingest": self.ingest.plain(), "files": source_files(self.source)}
        return {**where, "benchmarks": [config.plain() for config in self.benchmarks], "overlap": self.overlap}

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that benchmarks which classify work on."""
        used = [getattr(config, "split", "test") for config in self.benchmarks if config.plain()["method"] in CLASSIFY]
        return tuple(dict.fromkeys(used))


@dataclass(frozen=True)
class Registered:
    """A set that is ready: its pairs, and what a reader of its figures must know, a sentence each."""

    of: EvaluationSet
    dataset: PairDataset
    flags: tuple[str, ...]

    @property
    def name(self) -> str:
        """The set's name in rows."""
        return self.of.name


def check(values: Any, default: Sequence[Config], where: str, checks: Checks) -> tuple[EvaluationSet, ...]:
    """The sets under a key, by name; problems are noted in `checks` with their key paths."""
    if not isinstance(values, Mapping):
        if values is not None:
            checks.problems.append(Problem(where, shorten(values), "a mapping: NAME: {data: …}"))
        return ()
    built = [
        checks.attempt(functools.partial(_one, str(name), value, default, f"{where}.{name}", checks)) for name, value in values.items()
    ]
    return tuple(one for one in built if one is not None)


def _one(name: str, value: Any, default: Sequence[Config], where: str, checks: Checks) -> EvaluationSet:
    if not re.fullmatch(NAMED, name):
        raise ConfigError(headline(1), [Problem(where, shorten(name), "a name of a-z, 0-9, `_`, `.` and `-`: it stands between slashes")])
    skeleton = _Skeleton.parse(value, where)
    own = checks.methods(skeleton.benchmarks, "evaluate", f"{where}.benchmarks")
    benchmarks = tuple(default) if skeleton.benchmarks is None else own
    if not benchmarks and not checks.problems:
        raise ConfigError(
            headline(1), [Problem(f"{where}.benchmarks", "nothing", "at least one benchmark", "add some here or for all sets")]
        )
    if isinstance(skeleton.data, str):
        folder = Path(skeleton.data).absolute()
        if not (folder / NAME).is_file():
            expected = f"the folder of a pair dataset, with {NAME}"
            raise ConfigError(headline(1), [Problem(f"{where}.data", shorten(skeleton.data), expected, "or a mapping with a source")])
        return EvaluationSet(name, None, IngestConfig(), folder, benchmarks, skeleton.overlap)
    # Headers alone are looked at here: every picture is decoded when it is measured on, and a broken one stops that with its name.
    data = {"check": "header", **skeleton.data}
    return EvaluationSet(name, source(data, f"{where}.data"), ingest(data, f"{where}.data"), None, benchmarks, skeleton.overlap)


# ---------------------------------------------------------------- registering


def register(one: EvaluationSet, cache: Path, training: PairDataset | None = None) -> Registered:
    """Brings a set in, unless the same files came in before, and checks it.

    `training` are the pairs that models were trained on; pictures of the set with a near copy among them are counted.
    Raises DataError for a set that cannot give right figures, with what to do.
    """
    dataset = _dataset(one, cache)
    card, pairs = Card.of(dataset), dataset.read()
    with _about(one.name):
        rejected = dataset.rejects().filter(pl.col("phase") == "ingest")
        flags = sets.check_rejected(rejected, len(pairs), (OUT_OF_RANGE,))
        removed = dataset.manifest.phase.report.get("captions_removed", {})
        flags += [f"{count:,} captions were taken off their pairs ({reason})" for reason, count in removed.items()]
        sets.check_templates(card.templates)
        for split in one.splits:
            flags += sets.check_classes(pairs, split, card.classes or None, card.duplicate_names)
    if training is not None and one.overlap:
        evaluated = pairs.filter(pl.col("split").is_in(_splits(one)))
        flags += sets.near_copies_flag(copied(dataset, evaluated, training, cache))
    return Registered(one, dataset, tuple(flags))


def _splits(one: EvaluationSet) -> list[str]:
    return sorted({getattr(config, "split", "test") for config in one.benchmarks})


@contextmanager
def _about(name: str) -> Iterator[None]:
    """Names the set in complaints raised inside."""
    try:
        yield
    except DataError as error:
        problems = [Problem(f"set {name}: {p.where}", p.got, p.expected, p.fix) for p in error.problems]
        raise DataError(error.headline, problems) from None


def _dataset(one: EvaluationSet, cache: Path) -> PairDataset:
    """The set's pairs: the folder that it names, or what ingest made of its source, kept under a digest of parameters, files and code."""
    if one.folder is not None:
        return PairDataset.open(one.folder, verify=True)
    assert one.source is not None
    made_from = [one.source.plain(), one.ingest.plain(), source_files(one.source), identity.code("ingest")]
    folder = cache / "sets" / f"{one.name}-{digest.short(digest.of_plain(made_from))}"
    if folder.exists():
        return PairDataset.open(folder)
    with files.full_disk_explained(cache):
        return ingest_all(
            one.source.build(),  # type: ignore[attr-defined]
            folder.absolute(),
            config=one.ingest,
            code=identity.code("ingest"),
            version=__version__,
            methods=(one.source.plain(),),
        )


def copied(dataset: PairDataset, pairs: pl.DataFrame, training: PairDataset, cache: Path) -> NDArray[np.bool_]:
    """Which pictures of a set have a near copy among training pairs (their split `train`); bool `[n]`. Fingerprints are kept in `cache`."""
    seen = training.read().filter(pl.col("split") == "train")
    if pairs.is_empty() or seen.is_empty():
        return np.zeros(len(pairs), np.bool_)
    return near_copies.near_copies(_fingerprints(dataset, pairs, cache), _fingerprints(training, seen, cache))


def _fingerprints(dataset: PairDataset, pairs: pl.DataFrame, cache: Path) -> near_copies.Fingerprints:
    code = digest.of_file(Path(near_copies.__file__))
    name = digest.of_plain([code, feature_files.code(), feature_files.of_pictures(dataset, pairs)])
    path = (cache / "fingerprints" / name.removeprefix("sha256:")).with_suffix(".npz")
    if not path.exists():
        blocks = [near_copies.fingerprints(block) for block in features.pictures(pairs, dataset.reader(), near_copies.SIDE_PX)]
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = files.partial_of(path)
        with partial.open("wb") as file:
            np.savez(file, *(np.concatenate(parts) for parts in zip(*blocks, strict=True)))
        partial.replace(path)
    with np.load(path, allow_pickle=False) as stored:
        return near_copies.Fingerprints(stored["arr_0"], stored["arr_1"])
