"""Data sources compared by the lines of their models: accuracy under shift over accuracy without, and what ensembles foretell of mixtures.

Source: Nguyen et al., Quality Not Quantity: On the Interaction between Dataset Design and Robustness of CLIP (NeurIPS 2022), sections 3 to 5.
Models of one source at several sizes lie on a line in probit space; lines are compared at one accuracy, never models at different ones.
Sources are mixed before training by `mixture` (`curate/mixture.py`), after it by averaging logits (`evaluate/ensembles.py`).

Shape legend: N images, C classes, D feature width, K models of an ensemble, M models of a source, R replicates.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, Self, cast

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field, model_validator

from diptych.core.chance import generator
from diptych.core.errors import DataError
from diptych.core.points import Encoder, Metric
from diptych.evaluate.classified import Classified, cosines
from diptych.evaluate.effective_robustness import Line, Space, effective_robustness, expected, fit_line, transformed
from diptych.evaluate.ensembles import Of, combine
from diptych.evaluate.resampling import RESAMPLES, bias_corrected
from diptych.evaluate.rows import Rows
from diptych.evaluate.visual_factors import slug
from diptych.evaluate.zero_shot import Labels, classes

Floats = NDArray[np.float64]
LEAST_MODELS = 3
"""Any two points lie on a line; only the third can deny it."""


class Config(Classified):
    """The testbed. Every source names its models by directory; all must have been trained on as many samples to be compared."""

    directories: ClassVar[tuple[str, ...]] = ("model_directories",)

    method: Literal["quality-not-quantity"] = "quality-not-quantity"
    task: str = Field("lines", pattern=r"^[a-z0-9][a-z0-9-]*$", description="the figures' name between set and metric")
    shifted: tuple[str, ...] = Field(min_length=1, description="the splits under shift")
    sources: dict[str, tuple[str, ...]] = Field(
        min_length=1, description="source or mixture -> directories of its models, at least three with the one at hand"
    )
    own: str | None = Field(None, description="the source that the model at hand belongs to, as its last; null: none")
    reference: str | None = Field(None, description="the source whose line effective robustness is measured from; null: the first")
    ensembles: dict[str, tuple[str, ...]] = Field(
        {}, description="name -> sources: their models, first with first and so on, answer together"
    )
    average: Of = Field("logits", description="what an ensemble averages; logits carry each model's own scale")
    space: Space = Field("probit", description="where lines are fitted")
    read_at: tuple[float, ...] = Field(
        (0.5,), min_length=1, description="accuracies without shift at which the lines are read, in (0, 1); inside the range of the models"
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        known = list(self.sources)
        named = [("own", self.own), ("reference", self.reference)]
        named += [(f"ensembles.{name}", part) for name, parts in self.ensembles.items() for part in parts]
        for where, name in named:
            if name is not None and name not in self.sources:
                raise ValueError(f"{where}: one of the sources {', '.join(known)}, not {name!r}")
        if taken := set(self.ensembles) & set(self.sources):
            raise ValueError(f"ensembles: {', '.join(sorted(taken))} is the name of a source")
        for name in known:
            if self.models_of(name) < LEAST_MODELS:
                raise ValueError(f"sources.{name}: at least {LEAST_MODELS} models make a line, not {self.models_of(name)}")
        for name, parts in self.ensembles.items():
            if len({self.models_of(part) for part in parts}) != 1:
                raise ValueError(f"ensembles.{name}: sources with equally many models")
        if not all(0 < accuracy < 1 for accuracy in self.read_at):
            raise ValueError("read_at: fractions between 0 and 1, not per cent")
        if self.split in self.shifted:
            raise ValueError("shifted: other splits than the one without shift")
        return self

    @property
    def model_directories(self) -> tuple[str, ...]:
        """All directories, for the phase's identity."""
        return tuple(path for paths in self.sources.values() for path in paths)

    def models_of(self, source: str) -> int:
        """How many models a source has."""
        return len(self.sources[source]) + (source == self.own)

    def build(self) -> Testbed:
        """The benchmark."""
        return Testbed(self)


@dataclass(frozen=True)
class Views:
    """The pictures of one shift and of the split that it is held against, restricted to the classes that the shift has.

    Attributes:
        known, moved: the rows without and under shift.
        known_N, moved_N: their class numbers among `class_C`.
        class_C: the classes that compete, as columns of the classifier.
    """

    known: pl.DataFrame
    moved: pl.DataFrame
    known_N: Labels
    moved_N: Labels
    class_C: Labels


@dataclass(frozen=True)
class Points:
    """The models of a source or of an ensemble: whether each picture was answered rightly, float64 `[M, N]`, without and under shift."""

    known_MN: Floats
    moved_MN: Floats

    @cached_property
    def accuracy(self) -> tuple[Floats, Floats]:
        """Accuracy of each model without and under shift, `[M]`."""
        return self.known_MN.mean(axis=1), self.moved_MN.mean(axis=1)

    def line(self, space: Space) -> Line:
        """The line through the models. Raises DataError if all of them have one accuracy without shift."""
        return line_of(*self.accuracy, space, self.known_MN.shape[1], self.moved_MN.shape[1])


def line_of(acc_id: Floats, acc_shift: Floats, space: Space, n_id: int, n_shift: int) -> Line:
    """The least-squares line through models of one source; accuracies are kept within [1/(2n), 1 - 1/(2n)] of their own split first.

    Raises DataError if all models have one accuracy without shift: no line goes through one point.
    """
    if len(set(np.round(acc_id, 12))) < 2:
        raise DataError.at("All models of a source are equally accurate", "accuracy", acc_id.tolist(), "models of different accuracy")
    return fit_line(
        np.clip(acc_id, 1 / (2 * n_id), 1 - 1 / (2 * n_id)), np.clip(acc_shift, 1 / (2 * n_shift), 1 - 1 / (2 * n_shift)), space
    )


class Testbed:
    """The benchmark.

    Metrics, for a source or ensemble <s>, a shift <t> and the model number <i> from 0:

    - `point.<s>.<i>` and `point.<s>.<i>.<t>`: accuracy without shift (among all classes) and under it;
    - `slope.<s>.<t>`, `intercept.<s>.<t>`, `r2.<s>.<t>`: the line; `at<p>.<s>.<t>`: it read at p per cent without shift;
    - `effective_robustness.<s>.<t>`: accuracy beyond the reference's line, mean over the models of <s>.

    Intervals of lines are bootstraps over models, those of points over pictures. A line read outside the range of its models is reported
    with a warning. Where a shift lacks classes, accuracy without shift is that of the same classes.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def run(self, encoder: Encoder, pairs: pl.DataFrame, name: str, seed: int) -> list[Metric]:
        """The rows for the set `name`; the encoder also needs `beside(directory)`: the same pictures under another model.

        Raises DataError without it, for a split without rows, and for models that are all equally accurate.
        """
        config = self.config
        whole, frame = classes(pairs, config.split, name=config.classnames)
        settings = {
            **config.settings(encoder, whole.names),
            "space": config.space,
            "average": config.average,
            "ensembles": list(config.ensembles),
        }
        rows = Rows(name, config.task, frame["key"].to_list(), seed, settings)
        views = {split: self._views(pairs, split) for split in config.shifted}
        asked = {split: self._points(encoder, whole.names, view) for split, view in views.items()}
        metrics = [metric for split in config.shifted for metric in self._of_shift(split, views[split], asked[split], rows)]
        return list({metric.metric: metric for metric in metrics}.values())

    def _views(self, pairs: pl.DataFrame, split: str) -> Views:
        known, known_rows = classes(pairs, self.config.split, name=self.config.classnames)
        moved, moved_rows = classes(pairs, split, name=self.config.classnames)
        class_C = np.unique(moved.label_N)
        inside = np.isin(known.label_N, class_C)
        if not inside.any():
            raise DataError.at("Two splits share no class", split, class_C.tolist(), f"classes of {self.config.split}")
        known_N, moved_N = np.searchsorted(class_C, known.label_N[inside]), np.searchsorted(class_C, moved.label_N)
        return Views(known_rows.filter(inside), moved_rows, known_N, moved_N, class_C)

    def _points(self, encoder: Encoder, names: Sequence[str], view: Views) -> dict[str, Points]:
        """The points of every source, then of every ensemble."""
        config = self.config
        logits = {source: [self._logits(one, names, view) for one in self._encoders(encoder, source)] for source in config.sources}
        for name, parts in config.ensembles.items():
            together = zip(*(logits[part] for part in parts), strict=True)
            logits[name] = [
                (
                    combine([known for known, _ in models], None, config.average),
                    combine([moved for _, moved in models], None, config.average),
                )
                for models in together
            ]
        return {
            name: Points(
                *(np.stack([hits(logit_NC, label_N) for logit_NC in column])
                  for column, label_N in zip(zip(*models, strict=True), (view.known_N, view.moved_N), strict=True))
            )
            for name, models in logits.items()
        }  # fmt: skip

    def _encoders(self, encoder: Encoder, source: str) -> Iterator[Encoder]:
        beside = getattr(encoder, "beside", None)
        if not callable(beside):
            raise DataError.at("The encoder knows no other models", "sources", source, "a model directory as the model at hand")
        yield from (cast(Encoder, beside(path)) for path in self.config.sources[source])
        if source == self.config.own:
            yield encoder

    def _logits(self, encoder: Encoder, names: Sequence[str], view: Views) -> tuple[Floats, Floats]:
        weight_DC = self.config.classifier(encoder, names)[:, view.class_C]
        known_NC, moved_NC = (
            encoder.logit_scale * cosines(encoder.images(frame), weight_DC).astype(np.float64) for frame in (view.known, view.moved)
        )
        return known_NC, moved_NC

    def _of_shift(self, split: str, view: Views, points: Mapping[str, Points], rows: Rows) -> Iterator[Metric]:
        config = self.config
        reference = config.reference or next(iter(config.sources))
        lines = {name: found.line(config.space) for name, found in points.items()}
        known_rows = replace(rows, keys=view.known["key"].to_list())
        moved_rows = replace(rows, keys=view.moved["key"].to_list())
        every = len(view.known) == len(rows.keys)
        for name, found in points.items():
            for index in range(len(found.known_MN)):
                place = {"source": name, "model": index}
                if every:
                    yield replace(known_rows, settings={**rows.settings, **place}).mean(
                        f"point.{slug(name)}.{index}", found.known_MN[index]
                    )
                shift = {**place, "split": split, "known": float(found.accuracy[0][index])}
                own = replace(moved_rows, settings={**rows.settings, **shift})
                yield own.mean(f"point.{slug(name)}.{index}.{slug(split)}", found.moved_MN[index])
            yield from self._of_line(name, split, found, lines[name], (reference, lines[reference]), rows)

    def _of_line(self, name: str, split: str, points: Points, line: Line, reference: tuple[str, Line], rows: Rows) -> Iterator[Metric]:
        config = self.config
        acc_id, acc_shift = points.accuracy
        n = points.known_MN.shape[1], points.moved_MN.shape[1]
        space = config.space
        low, high = float(acc_id.min()), float(acc_id.max())
        if outside := [accuracy for accuracy in config.read_at if not low <= accuracy <= high]:
            warnings.warn(f"{name}: the line is read at {outside}, outside its models' range {low:.3f} to {high:.3f}", stacklevel=2)
        drawn = resampled_lines(acc_id, acc_shift, space, n, rows.seed)
        settings = {**rows.settings, "source": name, "split": split, "models": len(acc_id), "range": [low, high]}

        def figure(metric: str, value: float, replicates: Sequence[float], **more: Any) -> Metric:
            bounds = bias_corrected(value, np.asarray(replicates, np.float64))
            return Metric(rows.set, rows.task, f"{metric}.{slug(name)}.{slug(split)}", value, len(acc_id), *bounds, {**settings, **more})

        yield figure("slope", line.slope, [one.slope for one in drawn])
        yield figure("intercept", line.intercept, [one.intercept for one in drawn])
        yield figure("r2", line.r**2, [one.r**2 for one in drawn])
        for accuracy in config.read_at:
            read = [float(expected(one, accuracy, space)) for one in drawn]
            yield figure(f"at{100 * accuracy:g}".replace(".", "_"), float(expected(line, accuracy, space)), read)
        beyond_M = effective_robustness(reference[1], np.clip(acc_id, 1 / (2 * n[0]), 1 - 1 / (2 * n[0])), acc_shift, space)
        rng = generator(rows.seed, "effective robustness", name, split)
        means = beyond_M[rng.integers(0, len(beyond_M), (RESAMPLES, len(beyond_M)))].mean(axis=1)
        yield figure("effective_robustness", float(beyond_M.mean()), means.tolist(), reference=reference[0])


def hits(logit_NC: Floats, label_N: Labels) -> Floats:
    """1 where the largest logit is the label's, else 0; among equal ones the lower class number is the answer."""
    return np.asarray(logit_NC.argmax(axis=1) == label_N, np.float64)


def resampled_lines(
    acc_id: Floats, acc_shift: Floats, space: Space, n: tuple[int, int], seed: int, resamples: int = RESAMPLES
) -> list[Line]:
    """Lines through models drawn with replacement. Draws of equally accurate models, which have no line, are left out."""
    draw_RM = generator(seed, "models").integers(0, len(acc_id), (resamples, len(acc_id)))
    x_M, y_M = (transformed(acc, space, size) for acc, size in zip((acc_id, acc_shift), n, strict=True))
    x_RM, y_RM = x_M[draw_RM], y_M[draw_RM]
    dx_RM, dy_RM = (v - v.mean(axis=1, keepdims=True) for v in (x_RM, y_RM))
    xx_R, xy_R, yy_R = (dx_RM**2).sum(axis=1), (dx_RM * dy_RM).sum(axis=1), (dy_RM**2).sum(axis=1)
    good = np.flatnonzero(xx_R > 1e-18)
    slope_R = xy_R[good] / xx_R[good]
    intercept_R = y_RM[good].mean(axis=1) - slope_R * x_RM[good].mean(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        r_R = np.where(yy_R[good] > 1e-18, xy_R[good] / np.sqrt(xx_R[good] * yy_R[good]), 0.0)
    return [Line(*map(float, values)) for values in zip(slope_R, intercept_R, r_R, strict=True)]
