"""Adapters measured the same way: so many labelled pictures a class, so many draws of them, one held-out split.

Every draw of shots comes from `(seed of the draw, key)`, so that adapters see the same pictures, and more shots hold the fewer ones.

Shape legend: N pictures, C classes, D feature width, E width of the second encoder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field, field_validator

from diptych.core import catalogue, digest
from diptych.core.chance import key_hashes, uniform
from diptych.core.errors import ConfigError, DataError
from diptych.core.points import Adapter, Encoder, Examples, Metric, Support
from diptych.evaluate import zero_shot
from diptych.evaluate.classified import Classified
from diptych.evaluate.intervals import mean_over_seeds
from diptych.evaluate.rows import Rows, of_split
from diptych.evaluate.views import Crops

PHASE = "adapter"
Labels = NDArray[np.int64]


class Config(Classified):
    """Adapters on a labelled set, by shots and draws."""

    method: Literal["few-shot"] = "few-shot"
    adapters: tuple[dict[str, Any], ...] = Field(min_length=1, description="the adapters with their parameters, e.g. {method: gda}")
    shots: tuple[int, ...] = Field((1, 2, 4, 8, 16), min_length=1, description="labelled pictures a class; 0 for methods without labels")
    draws: tuple[int, ...] = Field((1, 2, 3), min_length=1, description="seeds of the draws of shots")
    shots_from: str = Field("train", min_length=1, description="the split that shots, or unlabelled pictures, are taken from")
    validation: str | None = Field("val", description="the split that hyper-parameters are chosen on; null for none")
    views: int = Field(1, ge=1, le=100, description="augmented views of each shot; 1: the picture as it is evaluated")
    stream: int = Field(32, ge=1, description="pictures an update of an online adapter")
    auxiliary: str | None = Field(None, description="a second encoder for methods that need one: a model, or `pixels`")

    @field_validator("adapters")
    @classmethod
    def _known(cls, adapters: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
        return tuple(_config(adapter, f"adapters.{position}").plain() for position, adapter in enumerate(adapters))

    @field_validator("shots", "draws")
    @classmethod
    def _distinct(cls, numbers: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(numbers)) < len(numbers) or min(numbers) < 0:
            raise ValueError("numbers >= 0, each once")
        return numbers

    def build(self) -> FewShot:
        """The benchmark."""
        return FewShot(self)


def _config(adapter: dict[str, Any], where: str) -> Any:
    row = catalogue.find(str(adapter.get("method")), PHASE, f"{where}.method")
    return catalogue.config_class(row).parse(adapter, where)


@dataclass(frozen=True)
class Pictures:
    """A split as adapters see it."""

    keys: Sequence[str]
    examples: Examples

    @property
    def label_N(self) -> Labels:
        """Class numbers `[N]`."""
        assert self.examples.label_N is not None, "every split is read with its labels"
        return self.examples.label_N

    def take(self, rows: Labels) -> Examples:
        """Some rows, with every array that there is."""
        parts = {name: value for name, value in vars(self.examples).items() if value is not None}
        return Examples(**{name: value[rows] for name, value in parts.items()})


class FewShot:
    """The benchmark.

    Metrics of the task `<adapter>-<shots>shot`: `acc1` and `mean_per_class`. One row a draw (`seed` is the draw), and one over all draws
    without `seed`: the mean, with a t interval over draws where they differ, else the bootstrap over examples.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def run(self, encoder: Encoder, pairs: pl.DataFrame, name: str, seed: int) -> list[Metric]:
        """The rows for the set `name`.

        Raises DataError for a split that is missing or lacks labels, a class with fewer pictures than shots, or an adapter whose needs
        the configuration does not serve.
        """
        config = self.config
        known, _ = zero_shot.classes(pairs, config.split, name=config.classnames)
        weight_CD = np.ascontiguousarray(config.classifier(encoder, known.names).T)
        test = self._pictures(encoder, pairs, config.split)
        pool = self._pictures(encoder, pairs, config.shots_from)
        validation = self._pictures(encoder, pairs, config.validation) if config.validation else None
        support = Support(weight_CD, encoder.logit_scale, validation=validation.examples if validation else None)
        views = self._views(encoder, pairs)
        metrics: list[Metric] = []
        for adapter in config.adapters:
            for shots in config.shots:
                rows = Rows(name, f"{adapter['method']}-{shots}shot", test.keys, seed, self._settings(encoder, known.names, adapter))
                scored = [self._hits(adapter, replace(support, seed=draw), pool, views, test, shots, draw) for draw in config.draws]
                metrics += summarised(rows, scored, test.label_N, str(adapter["method"]), shots)
        return metrics

    def _hits(
        self, parameters: dict[str, Any], support: Support, pool: Pictures, views: Sequence[Pictures], test: Pictures, shots: int, draw: int
    ) -> tuple[int, NDArray[np.float64]]:
        adapter: Adapter = _config(parameters, "adapters").build()
        self._check(adapter, parameters, shots)
        if shots:
            rows = draw_shots(pool.keys, pool.label_N, len(support.text_CD), shots, draw)
            support = replace(support, labelled=_stacked([view.take(rows) for view in views or [pool]]))
        if "unlabelled" in adapter.needs:
            support = replace(support, unlabelled=replace(pool.examples, label_N=None))
        adapter = adapter.fit(support)
        predicted_N = np.concatenate([score_NC.argmax(axis=1) for score_NC in self._scores(adapter, test)])
        return draw, (predicted_N == test.label_N).astype(np.float64)

    def _scores(self, adapter: Adapter, test: Pictures) -> Iterator[NDArray[np.float32]]:
        """Scores of the test pictures, all at once, or as a stream in the order of their keys for an online adapter."""
        unseen = Pictures(test.keys, replace(test.examples, label_N=None))
        update = getattr(adapter, "update", None)
        if update is None:
            yield adapter.predict(unseen.examples)
            return
        for start in range(0, len(test.keys), self.config.stream):
            batch = unseen.take(np.arange(start, min(start + self.config.stream, len(test.keys))))
            yield adapter.predict(batch)
            update(batch)

    def _check(self, adapter: Adapter, parameters: dict[str, Any], shots: int) -> None:
        config, name = self.config, parameters["method"]
        served = {"labelled": shots > 0, "validation": config.validation is not None, "auxiliary": config.auxiliary is not None}
        fixes = {"labelled": "give shots > 0", "validation": "name a split", "auxiliary": "name an encoder, or `pixels`"}
        for need in sorted(adapter.needs):
            if not served.get(need, True):
                key = "shots" if need == "labelled" else need
                raise ConfigError.at(f"{name} cannot work without {need}", f"evaluate.benchmarks.few-shot.{key}", None, need, fixes[need])

    def _pictures(self, encoder: Encoder, pairs: pl.DataFrame, split: str, transform: Any = None) -> Pictures:
        """A split in the order of its keys."""
        found, _ = zero_shot.classes(pairs, split, name=self.config.classnames)
        frame = of_split(pairs, split)
        order = np.argsort(np.asarray(frame["key"].to_list(), dtype=object), kind="stable")
        frame = frame[order]
        examples = Examples(
            np.asarray(encoder.images(frame, transform) if transform else encoder.images(frame)),
            found.label_N[order],
            np.arange(len(frame)),
            self._captions(encoder, frame),
            self._auxiliary(encoder, frame),
        )
        return Pictures(frame["key"].to_list(), examples)

    def _views(self, encoder: Encoder, pairs: pl.DataFrame) -> list[Pictures]:
        if self.config.views == 1:
            return []
        return [self._pictures(encoder, pairs, self.config.shots_from, Crops(view)) for view in range(self.config.views)]

    def _captions(self, encoder: Encoder, frame: pl.DataFrame) -> NDArray[np.float32] | None:
        if not any("captions" in _config(adapter, "adapters").build().needs for adapter in self.config.adapters):
            return None
        texts = [captions[0]["text"] if captions else None for captions in frame["captions"].to_list()]
        if None in texts:
            raise DataError.at("A picture has no caption", "captions", frame["key"][texts.index(None)], "a caption a picture")
        return np.asarray(encoder.texts([str(text) for text in texts]))

    def _auxiliary(self, encoder: Encoder, frame: pl.DataFrame) -> NDArray[np.float32] | None:
        name = self.config.auxiliary
        if name is None:
            return None
        second = getattr(encoder, "auxiliary", None)
        if second is None:
            raise DataError.at("This encoder has no second one beside it", "auxiliary", name, "an encoder over a pair dataset")
        return np.asarray(second(frame, name))

    def _settings(self, encoder: Encoder, names: Sequence[str], adapter: dict[str, Any]) -> dict[str, Any]:
        config = self.config
        chosen = {"shots_from": config.shots_from, "validation": config.validation, "views": config.views, "draws": list(config.draws)}
        return {**config.settings(encoder, names), **chosen, "adapter": digest.of_plain(adapter)}


def draw_shots(keys: Sequence[str], label_N: Labels, classes: int, shots: int, draw: int) -> Labels:
    """Rows of `shots` pictures of each of `classes` classes, int64 `[classes * shots]` by class, drawn by `(draw, key)`.

    More shots of one draw hold the fewer ones. Raises DataError for a class that has not as many.
    """
    count_C = np.bincount(label_N, minlength=classes)
    if count_C.min() < shots:
        least = int(count_C.argmin())
        raise DataError.at(
            "A class has too few pictures for its shots", "shots", shots, f"at most {count_C.min()}: so many has class {least}",
            "ask for fewer shots, or name another split in shots_from",
        )  # fmt: skip
    order = np.lexsort((uniform(draw, key_hashes(keys)), label_N))
    first_C = np.concatenate([[0], np.cumsum(count_C)[:-1]])
    return np.asarray(order[(first_C[:, None] + np.arange(shots)).ravel()])


def summarised(rows: Rows, scored: Sequence[tuple[int, NDArray[np.float64]]], label_N: Labels, method: str, shots: int) -> list[Metric]:
    """A row a draw and metric, and one over all draws; `scored` holds each draw with its hits `[N]`."""
    weight_N = zero_shot.class_weights(label_N)
    metrics: list[Metric] = []
    for metric, weights in (("acc1", None), ("mean_per_class", weight_N)):
        single = [replace(rows.mean(metric, hit_N, weights), method=method, shots=shots, seed=draw) for draw, hit_N in scored]
        whole = rows.mean(metric, np.mean([hit_N for _, hit_N in scored], axis=0), weights)
        if len({each.value for each in single}) > 1:
            estimate = mean_over_seeds([each.value for each in single])
            whole = replace(whole, low=estimate.low, high=estimate.high)
        metrics += [replace(whole, method=method, shots=shots), *single]
    return metrics


def _stacked(views: Sequence[Examples]) -> Examples:
    """Views below each other; rows of one picture keep its number."""
    present = [name for name, value in vars(views[0]).items() if value is not None]
    return Examples(**{name: np.concatenate([getattr(view, name) for view in views]) for name in present})
