"""What an experiment is: the workflow file, checked whole before anything starts."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from diptych.core import digest
from diptych.core.config import Config, headline
from diptych.core.errors import ConfigError, Problem, nearest, shorten
from diptych.pairs.ingest import IngestConfig
from diptych.train.config import TrainConfig
from diptych.workflow import methods, yaml
from diptych.workflow import sets as evaluation_sets
from diptych.workflow.methods import Checks
from diptych.workflow.sets import EvaluationSet

PHASES = ("ingest", "curate", "prune", "caption", "train", "compress", "evaluate")
PAIR_PHASES = ("curate", "prune", "caption")

KEYS: Mapping[str, tuple[str, ...]] = {
    "ingest": ("seed", "data"),
    "curate": ("seed", "curate"),
    "prune": ("seed", "prune"),
    "caption": ("seed", "caption"),
    "train": ("seed", "train"),
    "compress": ("seed", "compress"),
    "evaluate": ("seed", "evaluate"),
}
"""The top-level keys of the workflow file that each phase depends on (the same list stands in `dvc.yaml`)."""


class TrainSection(TrainConfig):
    """The `train` key: the loop's settings, and what is trained with what on how many workers."""

    model: str = Field(default="vit-nano-64", description="architecture or directory, as `open_clip` names it")
    init: Literal["random"] | str = Field(default="random", description="`random`, or a model directory to start from")
    objective: dict[str, Any] = Field(default={"method": "clip"}, description="an objective and its parameters")
    optimizer: dict[str, Any] = Field(default={"method": "adamw"}, description="an optimizer and its parameters")
    batch_growth: dict[str, Any] | None = Field(
        default=None, description="what lets the batch grow, and its parameters; batch_size is then a micro-batch's, and a step is one"
    )
    workers: int = Field(default=1, ge=1, le=4096, description="data-parallel processes; with min_workers the most of them")
    min_workers: int | None = Field(
        default=None,
        ge=1,
        le=4096,
        description="elastic: train with as few where there are no more, take more in as they come; null: fixed",
    )

    @property
    def least_workers(self) -> int:
        """The processes without which training does not start."""
        return self.min_workers or self.workers

    @model_validator(mode="after")
    def _divides(self) -> TrainSection:
        if self.least_workers > self.workers:
            raise ValueError(f"min_workers {self.min_workers} is more than workers {self.workers}")
        for workers in range(self.least_workers, self.workers + 1):
            if self.batch_size % (workers * self.accumulate):
                elastic = (
                    ""
                    if self.min_workers is None
                    else f", which elastic training may come to: {self.least_workers} to {self.workers} workers"
                )
                raise ValueError(
                    f"batch_size {self.batch_size} does not divide by workers x accumulate = {workers * self.accumulate}{elastic}"
                )
        return self


class Range(Config):
    """A continuous axis of a sweep."""

    min: float
    max: float
    log: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if not self.min < self.max or (self.log and self.min <= 0):
            raise ValueError("needs min < max, and min > 0 on a logarithmic axis")
        return self


class SweepConfig(Config):
    """A sweep over any value of the workflow; an axis is a list of choices or a range `{min, max, log}`."""

    space: dict[str, tuple[Any, ...] | Range] = Field(min_length=1, description="key path -> choices or range")
    metric: str = Field(description="`<set>/<task>/<metric>` of the evaluation")
    mode: Literal["max", "min"] = "max"
    search: Literal["grid", "random", "optuna"] = "grid"
    scheduler: Literal["none", "asha"] = Field(default="none", description="early stopping; needs training axes")
    trials: int | None = Field(default=None, ge=1, le=100_000, description="settings tried; a grid tries all")
    choose_on: Literal["train", "val", "test"] = Field(default="val", description="the split that the winner is chosen on")
    pareto: dict[str, Literal["max", "min"]] | None = Field(
        default=None,
        description="two figures or axes (of numbers) and their better sides: the settings that no other beats in both are marked",
    )

    @model_validator(mode="after")
    def _sensible(self) -> SweepConfig:
        ranges = [key for key, axis in self.space.items() if isinstance(axis, Range)]
        if self.search == "grid" and ranges:
            raise ValueError(f"a grid needs lists of choices, but {', '.join(ranges)} is a range; use search: random or optuna")
        if self.search != "grid" and self.trials is None:
            raise ValueError(f"search: {self.search} needs trials")
        if self.pareto is not None and len(self.pareto) != 2:
            raise ValueError("pareto needs exactly two figures or axes")
        if self.scheduler == "asha" and not any(key.startswith("train.") for key in self.space):
            raise ValueError("scheduler: asha stops trainings early, but no axis begins with train.")
        return self


class EvaluateSection(Config):
    """The `evaluate` key."""

    benchmarks: tuple[dict[str, Any], ...] = Field(default=(), description="benchmarks with their parameters")
    sets: dict[str, Any] | None = Field(default=None, description="further sets by name: {data: …, benchmarks: …}")
    sweep: SweepConfig | None = None


class _Skeleton(Config):
    """The workflow file before methods are looked up. Every phase is written down, an empty one as `[]`: DVC locks each key."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")
    about: str = ""
    seed: int = Field(ge=0, lt=2**63, examples=["0"])
    data: dict[str, Any] = Field(examples=["{source: folder, path: photos}"])
    curate: tuple[dict[str, Any], ...] = Field(examples=["[]"])
    prune: tuple[dict[str, Any], ...] = Field(examples=["[]"])
    caption: tuple[dict[str, Any], ...] = Field(examples=["[]"])
    train: TrainSection = Field(examples=["{epochs: 8, batch_size: 256}"])
    compress: tuple[dict[str, Any], ...] = Field(examples=["[]"])
    evaluate: EvaluateSection = Field(examples=["{}"])


@dataclass(frozen=True)
class Workflow:
    """A checked workflow. `raw` is the file's own data with overrides applied; the rest are built configurations."""

    name: str
    path: Path
    seed: int
    raw: Mapping[str, Any]
    overrides: tuple[str, ...]
    source: Config
    ingest: IngestConfig
    curate: tuple[Config, ...]
    prune: tuple[Config, ...]
    caption: tuple[Config, ...]
    train: TrainSection
    objective: Config
    optimizer: Config
    batch_growth: Config | None
    compress: tuple[Config, ...]
    benchmarks: tuple[Config, ...]
    sets: tuple[EvaluationSet, ...]
    sweep: SweepConfig | None

    def methods(self, phase: str) -> tuple[Config, ...]:
        """The method configurations of a phase that is a list of methods."""
        found: tuple[Config, ...] = getattr(self, phase)
        return found

    def params(self, phase: str) -> dict[str, Any]:
        """The resolved parameters of one phase, defaults filled in: what its identity rests on."""
        match phase:
            case "ingest":
                values: Any = {"source": self.source.plain(), "ingest": self.ingest.plain(), "files": methods.source_files(self.source)}
            case "train":
                values = {**self.train.plain(), "objective": self.objective.plain(), "optimizer": self.optimizer.plain()}
                values |= {"batch_growth": None if self.batch_growth is None else self.batch_growth.plain()}
            case "evaluate":
                values = {"benchmarks": [c.plain() for c in self.benchmarks], "sweep": self.sweep.plain() if self.sweep else None}
                values |= {"sets": {one.name: one.plain() for one in self.sets}} if self.sets else {}
            case _:
                values = [config.plain() for config in self.methods(phase)]
        models = self.models(phase)
        return {"seed": self.seed, phase: values, **({"models": models} if models else {})}

    def models(self, phase: str) -> dict[str, str]:
        """The model directories that a phase's parameters name, with the digests of what lies in them. DVC does not know these."""
        match phase:
            case "train":
                named = [self.train.init, self.train.model, *named_directories(self.objective)]
            case "caption":
                named = [path for config in self.caption for path in named_directories(config)]
            case "compress":
                named = [path for config in self.compress for path in named_directories(config)]
            case "evaluate":
                every = [*self.benchmarks, *(config for one in self.sets for config in one.benchmarks)]
                named = [path for config in every for path in named_directories(config)]
            case _:
                named = []
        folders = {name: Path(name.removeprefix("local-dir:")) for name in named if "/" in name or name == "."}
        return {name: digest.of_tree(folder) for name, folder in sorted(folders.items()) if folder.is_dir()}

    @property
    def digest(self) -> str:
        """The digest of all resolved parameters."""
        return digest.of_plain([self.params(phase) for phase in PHASES])


def named_directories(config: Config) -> list[str]:
    """The model directories that a method's parameters name."""
    values = [getattr(config, name) for name in config.directories]
    return [path for value in values for path in ((value,) if isinstance(value, str) else value or ())]


def load(path: Path, overrides: Sequence[str] = ()) -> Workflow:
    """Reads and checks a workflow file with `key.path=value` overrides. Raises ConfigError with every problem at once."""
    raw = yaml.read(path)
    apply_overrides(raw, overrides)
    return check(raw, path, tuple(overrides))


def check(raw: Mapping[str, Any], path: Path, overrides: tuple[str, ...] = ()) -> Workflow:
    """Checks workflow data: shapes, then every method's parameters, then what must hold between them."""
    checks = Checks()
    attempt = checks.attempt
    skeleton = attempt(lambda: _Skeleton.parse(dict(raw)))
    data = dict(raw.get("data") or {}) if isinstance(raw.get("data"), Mapping) else {}
    source = attempt(lambda: methods.source(data, "data")) if data else None
    ingest = attempt(lambda: methods.ingest(data, "data"))
    lists = {phase: checks.methods(raw.get(phase), phase, phase) for phase in (*PAIR_PHASES, "compress")}
    evaluate, train = raw.get("evaluate"), raw.get("train")
    evaluate = evaluate if isinstance(evaluate, Mapping) else {}
    benchmarks = checks.methods(evaluate.get("benchmarks"), "evaluate", "evaluate.benchmarks")
    sets = evaluation_sets.check(evaluate.get("sets"), benchmarks, "evaluate.sets", checks)
    train = train if isinstance(train, Mapping) else {}
    objective = attempt(lambda: methods.method(train.get("objective", {"method": "clip"}), "objective", "train.objective"))
    optimizer = attempt(lambda: methods.method(train.get("optimizer", {"method": "adamw"}), "optimizer", "train.optimizer"))
    growth = train.get("batch_growth")
    batch_growth = None if growth is None else attempt(lambda: methods.method(growth, "batch-size", "train.batch_growth"))
    attempt(lambda: check_model(train.get("model"), "train.model"))
    checks.refuse()
    assert skeleton is not None
    assert source is not None
    assert ingest is not None
    assert objective is not None
    assert optimizer is not None
    workflow = Workflow(
        name=skeleton.name, path=path, seed=skeleton.seed, raw=raw, overrides=overrides, source=source, ingest=ingest,
        curate=lists["curate"], prune=lists["prune"], caption=lists["caption"], train=skeleton.train, objective=objective,
        optimizer=optimizer, batch_growth=batch_growth, compress=lists["compress"], benchmarks=benchmarks, sets=sets, sweep=skeleton.evaluate.sweep,
    )  # fmt: skip
    _check_optimizer(workflow)
    _check_sweep(workflow)
    return workflow


def check_model(name: Any, where: str) -> None:
    """Refuses a model name that is neither an architecture, nor one of open_clip's list, nor a directory. Raises ConfigError."""
    from diptych.models import clip

    if name is None or not isinstance(name, str) or name.startswith(("local-dir:", "open_clip:")) or "/" in name:
        return
    if name not in clip.names():
        raise ConfigError(headline(1), [Problem(where, shorten(name), "an architecture of ours or of open_clip, or a directory",
                                                nearest(name, clip.names()))])  # fmt: skip


def _check_optimizer(workflow: Workflow) -> None:
    """Refuses what an optimizer cannot do together with the rest of the training."""
    train, optimizer, growth = workflow.train, workflow.optimizer, workflow.batch_growth
    name, problems = optimizer.plain()["method"], []
    if growth is not None:
        if getattr(optimizer, "curvature", "none") != "none" or getattr(optimizer, "counts_updates", False):
            problems.append(Problem("train.batch_growth", f"{name} under it", "an optimizer that does not count updates, such as adamw"))
        largest = getattr(growth, "max_batch_size", None)
        if largest is not None and largest < 2 * train.batch_size:
            expected = f"at least {2 * train.batch_size}: an update takes two micro-batches of train.batch_size or more"
            problems.append(Problem("train.batch_growth.max_batch_size", str(largest), expected))
    if getattr(optimizer, "adapter", "none") != "none":
        if train.init == "random":
            problems.append(Problem("train.init", "random", "a model directory: an adapter opens on the model it was trained on"))
        if train.ema is not None:
            problems.append(Problem("train.ema", str(train.ema), "null: averaged weights are no longer those of an adapter"))
    if problems:
        raise ConfigError(headline(len(problems)), problems)


def _check_sweep(workflow: Workflow) -> None:
    if workflow.sweep is None:
        return
    problems = []
    for key, axis in workflow.sweep.space.items():
        choices = [axis.min] if isinstance(axis, Range) else axis[:1]
        trial = copy.deepcopy(dict(workflow.raw))
        trial["evaluate"] = {**trial["evaluate"], "sweep": None}
        try:
            set_value(trial, key.split("."), choices[0], key)
            check(trial, workflow.path)
        except ConfigError as error:
            problems += [Problem(f"evaluate.sweep.space.{key}", p.got, p.expected, p.fix) for p in error.problems]
    if problems:
        raise ConfigError(headline(len(problems)), problems)


def apply_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> None:
    """Sets `a.b.c=value` pairs in place; a list is entered by index or by a method's name. Values are YAML."""
    problems = []
    for item in overrides:
        path, equals, text = item.partition("=")
        if not equals or not path:
            problems.append(Problem(item, "no `=`" if path else "no key", "key.path=value", "e.g. train.optimizer.lr=3e-4"))
            continue
        try:
            set_value(raw, path.split("."), yaml.parse(text, path), path)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(headline(len(problems)), problems)


def set_value(node: Any, parts: Sequence[str], value: Any, where: str) -> None:
    """Sets one value inside nested mappings and lists; missing mappings on the way are made, list entries are not."""
    *way, last = parts
    for part in way:
        step = _step(node, part, where)
        if isinstance(node, dict) and node.get(step) is None:
            node[step] = {}
        node = node[step]
    node[_step(node, last, where)] = value


def _step(node: Any, part: str, where: str) -> str | int:
    """The key or index by which a part of a key path enters a mapping or a list."""
    if isinstance(node, list):
        return _index(node, part, where)
    if not isinstance(node, dict):
        raise ConfigError.at(headline(1), where, node, "a mapping or a list to enter")
    return part


def _index(entries: list[Any], part: str, where: str) -> int:
    if part.isdigit() and int(part) < len(entries):
        return int(part)
    names = [entry.get("method") for entry in entries if isinstance(entry, dict)]
    if part in names:
        return names.index(part)
    raise ConfigError.at(headline(1), where, part, f"an index below {len(entries)} or one of {', '.join(map(str, names)) or 'no methods'}",
                         nearest(part, [name for name in names if name]))  # fmt: skip


def check_resources(workflow: Workflow, cores: int | None = None) -> None:
    """Refuses more workers than the local machine has cores: they would fight for them, or wait for ever."""
    available = cores or os.cpu_count() or 1
    if workflow.train.least_workers > available:
        from diptych.core.errors import ResourceError

        raise ResourceError.at("More workers than cores", "train.workers", workflow.train.least_workers, f"at most {available} on this machine",
                               f"set train.workers={available}, or submit to a cluster: diptych submit … --address …")  # fmt: skip
