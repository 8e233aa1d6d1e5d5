"""Adapters measured the same way: so many labelled pictures a class, so many draws of them, one held-out split.

Every draw of shots comes from `(seed of the draw, key)`, so that adapters see the same pictures, and more shots hold the fewer ones.

Shape legend: N pictures, C classes, S pictures that an adapter labelled itself.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator

from diptych.core import catalogue, digest
from diptych.core.config import headline
from diptych.core.errors import ConfigError, Problem
from diptych.core.points import Adapter, Encoder, Examples, Metric, Support
from diptych.evaluate import zero_shot
from diptych.evaluate.classified import Classified
from diptych.evaluate.intervals import interval, mean_over_seeds
from diptych.evaluate.pictures import Pictures, Reader, draw_shots, stacked, take
from diptych.evaluate.rows import Rows
from diptych.evaluate.views import Crops

PHASE = "adapter"
NAME = re.compile(r"[a-z0-9][a-z0-9-]*")
Shots = int | Literal["all"]

FIXES = {"labelled": "give shots > 0, or `all`", "validation": "name a split", "auxiliary": "name an encoder, or `pixels`"}


class Config(Classified):
    """Adapters on a labelled set, by shots and draws."""

    method: Literal["few-shot"] = "few-shot"
    adapters: tuple[dict[str, Any], ...] = Field(
        min_length=1, description="the adapters with their parameters, e.g. {method: gda}; `name` tells two of one method apart"
    )
    shots: tuple[Shots, ...] = Field(
        (1, 2, 4, 8, 16), min_length=1, description="labelled pictures a class; 0 for methods without labels; `all`: the whole split"
    )
    draws: tuple[int, ...] = Field((1, 2, 3), min_length=1, description="seeds of the draws of shots")
    shots_from: str = Field("train", min_length=1, description="the split that shots, or unlabelled pictures, are taken from")
    validation: str | None = Field("val", description="the split that hyper-parameters are chosen on; null for none")
    views: int = Field(1, ge=1, le=100, description="augmented views of each shot; 1: the picture as it is evaluated")
    stream: int = Field(32, ge=1, description="pictures an update of an online adapter")
    auxiliary: str | None = Field(None, description="a second encoder for methods that need one: a model, or `pixels`")
    auxiliary_pca: int | None = Field(
        None, ge=1, description="principal axes of the second encoder's features, taken from `shots_from` without labels; null: none"
    )
    support_cosine: bool = Field(False, description="also measure the cosine of the mean shot and the mean test picture")

    @field_validator("adapters")
    @classmethod
    def _known(cls, adapters: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
        return tuple(_named(adapter, f"adapters.{position}") for position, adapter in enumerate(adapters))

    @field_validator("shots", "draws")
    @classmethod
    def _distinct(cls, numbers: tuple[Shots, ...]) -> tuple[Shots, ...]:
        if len(set(numbers)) < len(numbers) or any(number != "all" and number < 0 for number in numbers):
            raise ValueError("numbers >= 0, each once")
        return numbers

    @model_validator(mode="after")
    def _all_served(self) -> Self:
        found = [*self._doubled(), *(problem for adapter in self.adapters for problem in self._unserved(adapter))]
        if self.auxiliary_pca is not None and self.auxiliary is None:
            found.append(Problem("auxiliary_pca", str(self.auxiliary_pca), "a second encoder to take axes of", FIXES["auxiliary"]))
        if found:
            raise ConfigError(headline(len(found)), found)
        return self

    def _doubled(self) -> Iterator[Problem]:
        count = Counter(adapter["name"] for adapter in self.adapters)
        for position, adapter in enumerate(self.adapters):
            if count[adapter["name"]] > 1:
                yield Problem(f"adapters.{position}.name", repr(adapter["name"]), "a name that no other has", "give it a `name` of its own")

    def _unserved(self, adapter: Mapping[str, Any]) -> Iterator[Problem]:
        served = {"labelled": 0 not in self.shots, "validation": self.validation is not None, "auxiliary": self.auxiliary is not None}
        for need in sorted(_build(adapter).needs):
            if not served.get(need, True):
                key = "shots" if need == "labelled" else need
                yield Problem(key, repr(getattr(self, key)), f"what {adapter['name']} cannot work without: {need} pictures", FIXES[need])

    def build(self) -> FewShot:
        """The benchmark."""
        return FewShot(self)


def _named(adapter: dict[str, Any], where: str) -> dict[str, Any]:
    """The adapter's parameters in full, and its name: the method's unless it has one of its own."""
    parameters = _parsed(adapter, where).plain()
    name = adapter.get("name", parameters["method"])
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ConfigError.at("An adapter's name is part of its figures' names", f"{where}.name", name, "small letters, digits and dashes")
    return {**parameters, "name": name}


def _parsed(adapter: Mapping[str, Any], where: str = "adapters") -> Any:
    row = catalogue.find(str(adapter.get("method")), PHASE, f"{where}.method")
    return catalogue.config_class(row).parse(_parameters(adapter), where)


def _parameters(adapter: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in adapter.items() if key != "name"}


def _build(adapter: Mapping[str, Any]) -> Adapter:
    built: Adapter = _parsed(adapter).build()
    return built


@dataclass(frozen=True)
class Splits:
    """What the benchmark works on; `views` of the pool are empty where shots are seen as they are evaluated."""

    test: Pictures
    pool: Pictures
    views: Sequence[Pictures]

    def shots(self, shots: Shots, classes: int, draw: int) -> Examples:
        """The labelled examples of a draw, all views of each."""
        rows = np.arange(len(self.pool.keys)) if shots == "all" else draw_shots(self.pool.keys, self.pool.label_N, classes, shots, draw)
        return stacked([take(view.examples, rows) for view in self.views or [self.pool]])


class Draw(NamedTuple):
    """What came of one draw: its seed, the test pictures' hits `[N]`, and summands of further figures by name."""

    seed: int
    hit_N: NDArray[np.float64]
    further: Mapping[str, NDArray[np.float64]]


class FewShot:
    """The benchmark.

    Metrics of the task `<name of the adapter>-<shots>shot`: `acc1` and `mean_per_class`; `pseudo_label_acc` of an adapter that labels
    pictures itself, over those it chose; `support_cosine` if asked for. One row a draw (`seed` is the draw), and one over all draws
    without `seed`: the mean, with a t interval over draws where they differ, else the bootstrap over examples.

    Adapters see labels of the shots and of the validation split alone, and captions of the shots alone. An online adapter
    (one that has `update`) gets the test split as a stream, in the order of its keys.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def run(self, encoder: Encoder, pairs: pl.DataFrame, name: str, seed: int) -> list[Metric]:
        """The rows for the set `name`.

        Raises DataError for a split that is missing or lacks labels, or a class with fewer pictures than shots.
        """
        config = self.config
        known, _ = zero_shot.classes(pairs, config.split, name=config.classnames)
        reader = self._reader(encoder, pairs)
        splits = Splits(reader.read(config.split), reader.read(config.shots_from), self._views(reader))
        validation = reader.read(config.validation).examples if config.validation else None
        weight_CD = np.ascontiguousarray(config.classifier(encoder, known.names).T)
        support = Support(weight_CD, encoder.logit_scale, validation=validation)
        metrics: list[Metric] = []
        for adapter, shots in itertools.product(config.adapters, config.shots):
            draws = [self._drawn(adapter, replace(support, seed=draw), splits, shots) for draw in config.draws]
            task, settings = f"{adapter['name']}-{shots}shot", self._settings(encoder, known.names, adapter)
            found = summarised(Rows(name, task, splits.test.keys, seed, settings), draws, splits.test.label_N)
            metrics += [replace(row, method=str(adapter["method"]), shots=None if shots == "all" else shots) for row in found]
        return metrics

    def _reader(self, encoder: Encoder, pairs: pl.DataFrame) -> Reader:
        config = self.config
        captions = any("captions" in _build(adapter).needs for adapter in config.adapters)
        captioned = config.shots_from if captions else None
        return Reader(encoder, pairs, config.classnames, captioned, config.auxiliary, config.auxiliary_pca, config.shots_from)

    def _views(self, reader: Reader) -> list[Pictures]:
        if self.config.views == 1:
            return []
        return [reader.read(self.config.shots_from, Crops(view)) for view in range(self.config.views)]

    def _drawn(self, parameters: Mapping[str, Any], support: Support, splits: Splits, shots: Shots) -> Draw:
        adapter = _build(parameters)
        if shots:
            support = replace(support, labelled=splits.shots(shots, len(support.text_CD), support.seed))
        if "unlabelled" in adapter.needs:
            support = replace(support, unlabelled=splits.pool.unlabelled)
        adapter = adapter.fit(support)
        predicted_N = np.concatenate([score_NC.argmax(axis=1) for score_NC in self._scores(adapter, splits.test)])
        hit_N = (predicted_N == splits.test.label_N).astype(np.float64)
        return Draw(support.seed, hit_N, dict(self._further(adapter, support, splits)))

    def _scores(self, adapter: Adapter, test: Pictures) -> Iterator[NDArray[np.float32]]:
        """Scores of the test pictures, all at once, or as a stream in the order of their keys for an online adapter."""
        update = getattr(adapter, "update", None)
        if update is None:
            yield adapter.predict(test.unlabelled)
            return
        for start in range(0, len(test.keys), self.config.stream):
            batch = take(test.unlabelled, np.arange(start, min(start + self.config.stream, len(test.keys))))
            yield adapter.predict(batch)
            update(batch)

    def _further(self, adapter: Adapter, support: Support, splits: Splits) -> Iterator[tuple[str, NDArray[np.float64]]]:
        selection: Any = getattr(adapter, "selection", None)
        if selection is not None:
            yield "pseudo_label_acc", (splits.pool.label_N[selection.row_S] == selection.label_S).astype(np.float64)
        if self.config.support_cosine and support.labelled is not None:
            shot_D, test_D = (examples.feature_ND.mean(axis=0, dtype=np.float64) for examples in (support.labelled, splits.test.examples))
            yield "support_cosine", np.atleast_1d(shot_D @ test_D / (np.linalg.norm(shot_D) * np.linalg.norm(test_D)))

    def _settings(self, encoder: Encoder, names: Sequence[str], adapter: Mapping[str, Any]) -> dict[str, Any]:
        config = self.config
        chosen = {key: getattr(config, key) for key in ("shots_from", "validation", "views", "stream", "auxiliary", "auxiliary_pca")}
        return {
            **config.settings(encoder, names), **chosen, "draws": list(config.draws), "adapter": digest.of_plain(_parameters(adapter)),
        }  # fmt: skip


def summarised(rows: Rows, draws: Sequence[Draw], label_N: NDArray[np.int64]) -> list[Metric]:
    """Of every figure a row over all draws, then one a draw."""
    metrics: list[Metric] = []
    for metric, weight_N in (("acc1", None), ("mean_per_class", zero_shot.class_weights(label_N))):
        single = [replace(rows.mean(metric, draw.hit_N, weight_N), seed=draw.seed) for draw in draws]
        metrics += _over_draws(rows.mean(metric, np.mean([draw.hit_N for draw in draws], axis=0), weight_N), single)
    for metric in draws[0].further:
        single = [_of_draw(rows, metric, draw) for draw in draws]
        whole = replace(single[0], value=float(np.mean([each.value for each in single])), seed=None)
        metrics += _over_draws(whole, single)
    return metrics


def _of_draw(rows: Rows, metric: str, draw: Draw) -> Metric:
    value_S = draw.further[metric]
    low, high = interval(value_S, rows.seed)
    return Metric(rows.set, rows.task, metric, float(value_S.mean()), len(value_S), low, high, rows.settings, seed=draw.seed)


def _over_draws(whole: Metric, single: Sequence[Metric]) -> list[Metric]:
    if len({each.value for each in single}) > 1:
        estimate = mean_over_seeds([each.value for each in single])
        whole = replace(whole, low=estimate.low, high=estimate.high)
    return [whole, *single]
