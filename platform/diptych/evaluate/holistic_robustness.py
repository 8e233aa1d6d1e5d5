"""Robustness from many sides: visual factors, shape bias, calibration, out-of-distribution detection, corruptions, effective robustness.

Source: Tu, Deng & Gedeon, Toward a Holistic Evaluation of Robustness in CLIP Models (TPAMI 2025). An evaluation protocol whose parts are
standard definitions: see `visual_factors`, `calibration`, `ood`, `effective_robustness` and `corruptions`; correspondence is here. Retrieval
is a benchmark of its own; large multimodal models are not measured.

Shape legend: N images, C classes, G groups of classes, D feature width, P Q points of two views, R replicates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray
from pydantic import Field, model_validator

from diptych.core.config import Config as BaseConfig
from diptych.core.errors import DataError
from diptych.core.points import Encoder, Metric
from diptych.evaluate import calibration, corruption_robustness, ood, resampling
from diptych.evaluate.classified import Classified, cosines
from diptych.evaluate.corruptions import NAMES, SEVERITIES, Name
from diptych.evaluate.effective_robustness import Space, effective_robustness, fit_line
from diptych.evaluate.rows import Rows, of_split
from diptych.evaluate.visual_factors import by_factor, class_numbers, coarse, cues, factor_masks, group_numbers, slug
from diptych.evaluate.zero_shot import Labels, classes, log_loss

Floats = NDArray[np.float64]

TASK = "robustness"
SCORES: tuple[ood.Score, ...] = ("mcm", "msp", "max_logit", "energy", "negative_entropy")


# ---------------------------------------------------------------- correspondence


def correspond(feature_PD: NDArray[Any], feature_QD: NDArray[Any]) -> Labels:
    """For each point of one view the point of the other with the highest cosine, int64 `[P]`; the first among equals."""
    unit_P, unit_Q = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (feature_PD, feature_QD))
    return np.asarray((unit_P @ unit_Q.T).argmax(axis=1), np.int64)


def correspondence_error(place_Px: NDArray[Any], place_Qx: NDArray[Any], match_P: Labels) -> Floats:
    """The distance between each point and its match, `[P]`, in the unit of the coordinates (3D or pixels, in one frame of reference)."""
    return np.asarray(np.linalg.norm(place_Px - place_Qx[match_P], axis=1))


def correspondence_recall(error_P: Floats, thresholds: ArrayLike) -> Floats:
    """The share of points whose error is below each threshold."""
    return np.asarray((error_P[:, None] < np.asarray(thresholds)).mean(axis=0))


# ---------------------------------------------------------------- configuration


class CalibrationPart(BaseConfig):
    """Calibration before and after temperature scaling."""

    validation: str = Field("val", min_length=1, description="the split that the temperature is fitted on; no figure is reported on it")
    shifted: tuple[str, ...] = Field((), description="further splits to report on, with the same temperature")
    bins: int = Field(calibration.BINS, ge=1, description="bins of the calibration errors")


class OutOfDistributionPart(BaseConfig):
    """Detection of pictures that belong to no class."""

    splits: tuple[str, ...] = Field(min_length=1, description="splits of such pictures; their labels, if any, are not read")
    scores: tuple[ood.Score, ...] = Field(SCORES, min_length=1, description="which scores")


class CueConflictPart(BaseConfig):
    """Shape bias on pictures with the shape of one class and the texture of another."""

    split: str = Field("test", min_length=1, description="the split of such pictures")
    shape: str = Field("meta.shape", description="the column with the class name that the shape stands for")
    texture: str = Field("meta.texture", description="the column with the class name that the texture stands for")
    groups: dict[str, tuple[str, ...]] = Field({}, description="coarse class -> class names, where the columns name coarse classes")


class EffectiveRobustnessPart(BaseConfig):
    """Accuracy under shift beyond that of baseline models with equal accuracy."""

    shifted: tuple[str, ...] = Field(min_length=1, description="the shifted splits")
    baselines: tuple[tuple[float, float], ...] = Field(
        min_length=2, description="(accuracy on the split, accuracy under shift) of each baseline model"
    )
    space: Space = Field("logit", description="where the line is fitted")


class CorruptionPart(BaseConfig):
    """Accuracy under common corruptions; see `corruption-robustness`."""

    corruptions: tuple[Name, ...] = Field(NAMES, min_length=1, description="which corruptions")
    severities: tuple[int, ...] = Field(SEVERITIES, min_length=1, description="which severities, from 1 to 5")
    pictures: int | None = Field(None, ge=1, description="use this many pairs, drawn by key, instead of the whole split")


class Config(Classified):
    """One report on the robustness of a zero-shot classifier; every part is optional, one is needed."""

    method: Literal["holistic-robustness"] = "holistic-robustness"
    task: str = Field(TASK, pattern=r"^[a-z0-9][a-z0-9-]*$", description="the figures' name between set and metric")
    own_classes: bool = Field(
        False, description="classify each split among the classes that occur in it; the logits of others are dropped before softmax"
    )
    factors: tuple[str, ...] = Field((), description="columns of visual factors: booleans, names, numbers, or lists of names")
    calibration: CalibrationPart | None = Field(None, description="calibration before and after temperature scaling")
    ood: OutOfDistributionPart | None = Field(None, description="detection of pictures that belong to no class")
    cue_conflict: CueConflictPart | None = Field(None, description="shape bias on pictures whose cues conflict")
    effective_robustness: EffectiveRobustnessPart | None = Field(None, description="accuracy under shift beyond that of baseline models")
    corruptions: CorruptionPart | None = Field(None, description="accuracy under common corruptions")

    @model_validator(mode="after")
    def _something_apart(self) -> Config:
        if not any([self.factors, self.calibration, self.ood, self.cue_conflict, self.effective_robustness, self.corruptions]):
            raise ValueError("at least one of factors, calibration, ood, cue_conflict, effective_robustness, corruptions")
        if self.calibration and self.calibration.validation in (self.split, *self.calibration.shifted):
            raise ValueError("a temperature is not reported on the split that it was fitted on")
        if self.ood and self.split in self.ood.splits:
            raise ValueError("the split to classify cannot be out of distribution")
        if self.corruptions:
            self.of_corruptions(self.corruptions)
        return self

    def of_corruptions(self, part: CorruptionPart) -> corruption_robustness.Config:
        """The configuration of `corruption-robustness` for the same classifier."""
        return corruption_robustness.Config(split=self.split, templates=self.templates, classnames=self.classnames, **dict(part))

    def build(self) -> HolisticRobustness:
        """The benchmark."""
        return HolisticRobustness(self)


# ---------------------------------------------------------------- the benchmark


@dataclass(frozen=True)
class _Scored:
    """Pictures as the classifier sees them, `class_C` being the classes that it chose among.

    `label_N` holds columns of `cosine_NC`; it is empty where labels are not read.
    """

    frame: pl.DataFrame
    cosine_NC: NDArray[np.float32]
    class_C: Labels
    label_N: Labels
    logit_scale: float

    @property
    def logit_NC(self) -> Floats:
        """The logits as the model scales them."""
        return self.logit_scale * self.cosine_NC.astype(np.float64)

    @property
    def correct_N(self) -> Floats:
        """1 where the prediction is the label, else 0; among equal cosines the lower class number is predicted."""
        return np.asarray(self.cosine_NC.argmax(axis=1) == self.label_N, np.float64)


class _Splits:
    """Scores the splits of a set against one list of classes, each once."""

    def __init__(self, config: Config, encoder: Encoder, pairs: pl.DataFrame) -> None:
        self.config, self.encoder, self.pairs = config, encoder, pairs
        outside = config.ood.splits if config.ood else ()
        self.labelled_pairs = pairs.filter(~pl.col("split").is_in(outside))
        self.names = classes(self.labelled_pairs, config.split, name=config.classnames)[0].names
        self.weight_DC = config.classifier(encoder, self.names)
        self._held: dict[str, _Scored] = {}

    def labelled(self, split: str) -> _Scored:
        if split not in self._held:
            known, frame = classes(self.labelled_pairs, split, name=self.config.classnames)
            scored = replace(self.unlabelled(frame), label_N=known.label_N)
            self._held[split] = _restricted(scored) if self.config.own_classes else scored
        return self._held[split]

    def unlabelled(self, frame: pl.DataFrame) -> _Scored:
        cosine_NC = cosines(self.encoder.images(frame), self.weight_DC)
        return _Scored(frame, cosine_NC, np.arange(len(self.names)), np.empty(0, np.int64), self.encoder.logit_scale)


def _restricted(scored: _Scored) -> _Scored:
    """Only the classes that occur, renumbered in their order."""
    present, label_N = np.unique(scored.label_N, return_inverse=True)
    return replace(scored, cosine_NC=scored.cosine_NC[:, present], class_C=scored.class_C[present], label_N=label_N)


class HolisticRobustness:
    """The benchmark.

    Metrics, with the part that gives them:
    - always: `acc1`, on `split`;
    - factors: `acc1.<factor>`, `error_ratio.<factor>`; a factor without images has NaN and n = 0;
    - calibration: `temperature`, and a split `acc1.<split>` and `<figure>.<split>.before|after` with the figures `ece`, `ece_mass` (bins of
      equal mass), `mce`, `log_loss` in nats and `brier`;
    - ood: `auroc|fpr95|aupr_in|aupr_out.<score>.<split>`;
    - cue_conflict: `shape_bias`, `cue_accuracy`;
    - effective_robustness: `effective_robustness.<split>`, in accuracy;
    - corruptions: the rows of `corruption-robustness`, under its own task.
    Rows that are not means over examples (ratios, ECE, areas) have bootstrap intervals but no per-example values.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def run(self, encoder: Encoder, pairs: pl.DataFrame, name: str, seed: int) -> list[Metric]:
        """The rows for the set `name`. Raises DataError for splits, columns or classes that are not there, or that share a name."""
        config = self.config
        splits = _Splits(config, encoder, pairs)
        settings = {**config.settings(encoder, splits.names), "own_classes": config.own_classes}
        rows = Rows(name, config.task, [], seed, settings)
        metrics = [_rows_of(rows, config.split, splits).mean("acc1", splits.labelled(config.split).correct_N)]
        metrics += self._factors(splits, rows) if config.factors else []
        metrics += _calibration(config.calibration, config.split, splits, rows) if config.calibration else []
        metrics += _detection(config.ood, config.split, splits, rows) if config.ood else []
        metrics += _cue_conflict(config.cue_conflict, splits, rows) if config.cue_conflict else []
        metrics += _effective(config.effective_robustness, config.split, splits, rows) if config.effective_robustness else []
        if config.corruptions:
            metrics += config.of_corruptions(config.corruptions).build().run(encoder, splits.labelled_pairs, name, seed)
        return _distinct(metrics)

    def _factors(self, splits: _Splits, rows: Rows) -> Iterator[Metric]:
        scored = splits.labelled(self.config.split)
        masks = factor_masks(splits.labelled_pairs, scored.frame, self.config.factors)
        mask_NF = np.stack(list(masks.values()), axis=1)
        own = _rows_of(rows, self.config.split, splits)
        for (factor, mask_N), ratio in zip(masks.items(), by_factor(mask_NF, scored.correct_N).error_ratio, strict=True):
            yield _factor_accuracy(own, factor, mask_N, scored.correct_N)
            yield _error_ratio(own, factor, mask_N, scored.correct_N, float(ratio))


def _rows_of(rows: Rows, split: str, splits: _Splits) -> Rows:
    return replace(rows, keys=splits.labelled(split).frame["key"].to_list(), settings={**rows.settings, "split": split})


def _distinct(metrics: list[Metric]) -> list[Metric]:
    """The rows as they are. Raises DataError where a factor and a split, or two splits, would give rows of one name."""
    names = [f"{row.task}/{row.metric}" for row in metrics]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise DataError.at(
            "Two figures have one name", "evaluate", doubled[:5], "factors and splits whose names differ", "rename a column or a split"
        )
    return metrics


def _figure(rows: Rows, metric: str, value: float, n: int, bounds: tuple[float, float], **settings: Any) -> Metric:
    return Metric(rows.set, rows.task, metric, value, n, *bounds, {**rows.settings, **settings})


# ---------------------------------------------------------------- its parts: factors


def _factor_accuracy(rows: Rows, factor: str, mask_N: NDArray[np.bool_], correct_N: Floats) -> Metric:
    if not mask_N.any():
        return _figure(rows, f"acc1.{factor}", np.nan, 0, (np.nan, np.nan))
    return replace(rows, keys=[key for key, has in zip(rows.keys, mask_N, strict=True) if has]).mean(f"acc1.{factor}", correct_N[mask_N])


def _error_ratio(rows: Rows, factor: str, mask_N: NDArray[np.bool_], correct_N: Floats, ratio: float) -> Metric:
    wrong_N = 1 - correct_N
    error_R, size_R, wrong_R = resampling.sums(np.stack([wrong_N * mask_N, mask_N, wrong_N], axis=1), rows.seed).T
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio_R = (error_R / size_R) / (wrong_R / len(mask_N))
    return _figure(rows, f"error_ratio.{factor}", ratio, int(mask_N.sum()), resampling.bias_corrected(ratio, ratio_R))


# ---------------------------------------------------------------- its parts: calibration


def _calibration(part: CalibrationPart, split: str, splits: _Splits, rows: Rows) -> Iterator[Metric]:
    fitting = splits.labelled(part.validation)
    temperature = calibration.fit_temperature(fitting.logit_NC, fitting.label_N)
    bounds = calibration.temperature_interval(fitting.logit_NC, fitting.label_N, temperature, rows.seed)
    settings = {**rows.settings, "validation": part.validation, "bins": part.bins}
    yield _figure(rows, "temperature", temperature, len(fitting.label_N), bounds, split=part.validation)
    for measured in dict.fromkeys((split, *part.shifted)):
        scored = splits.labelled(measured)
        own = replace(_rows_of(rows, measured, splits), settings={**settings, "split": measured})
        yield own.mean(f"acc1.{slug(measured)}", scored.correct_N)
        for when, divisor in (("before", 1.0), ("after", temperature)):
            yield from _calibration_rows(own, f"{slug(measured)}.{when}", scored.logit_NC / divisor, scored, part.bins)


def _calibration_rows(rows: Rows, suffix: str, logit_NC: Floats, scored: _Scored, bins: int) -> Iterator[Metric]:
    prob_NC, correct_N, n = calibration.softmax(logit_NC), scored.correct_N, len(scored.label_N)
    confidence_N = prob_NC.max(axis=1)
    width_N, mass_N = calibration.equal_width(confidence_N, bins), calibration.equal_mass(confidence_N, bins)
    width, mass = (calibration.gap_intervals(confidence_N, correct_N, bin_N, rows.seed) for bin_N in (width_N, mass_N))
    yield _figure(rows, f"ece.{suffix}", calibration.expected_error(confidence_N, correct_N, width_N), n, width.expected)
    yield _figure(rows, f"ece_mass.{suffix}", calibration.expected_error(confidence_N, correct_N, mass_N), n, mass.expected)
    yield _figure(rows, f"mce.{suffix}", calibration.maximum_error(confidence_N, correct_N, width_N), n, width.maximum)
    yield rows.mean(f"log_loss.{suffix}", log_loss(logit_NC, scored.label_N))
    yield rows.mean(f"brier.{suffix}", calibration.brier(prob_NC, scored.label_N))


# ---------------------------------------------------------------- its parts: detection, cues, effective robustness


def _detection(part: OutOfDistributionPart, split: str, splits: _Splits, rows: Rows) -> Iterator[Metric]:
    known = splits.labelled(split)
    own = _rows_of(rows, split, splits)
    for outside in part.splits:
        other = splits.unlabelled(of_split(splits.pairs, outside))
        for name in part.scores:
            id_N = ood.score(name, known.cosine_NC, known.logit_scale)
            out_M = ood.score(name, other.cosine_NC[:, known.class_C], other.logit_scale)
            bounds = ood.separation_intervals(id_N, out_M, rows.seed)
            for figure, value, interval in zip(ood.Separation._fields, ood.separation(id_N, out_M), bounds, strict=True):
                yield _figure(own, f"{figure}.{name}.{slug(outside)}", value, len(id_N) + len(out_M), interval, outside=outside)


def _cue_conflict(part: CueConflictPart, splits: _Splits, rows: Rows) -> list[Metric]:
    frame = of_split(splits.labelled_pairs, part.split)
    names = list(part.groups) or splits.names
    shape_N, texture_N = (class_numbers(frame, column, names) for column in (part.shape, part.texture))
    conflict = np.flatnonzero(shape_N != texture_N)
    if not len(conflict):
        raise DataError.at(
            "No picture has a conflict of cues", f"{part.shape}, {part.texture}", part.split, "pictures whose shape and texture differ"
        )
    scored = splits.unlabelled(frame[conflict])
    prob_NG = calibration.softmax(scored.logit_NC)
    if part.groups:
        prob_NG = coarse(prob_NG, group_numbers(part.groups, splits.names), len(names))
    found = cues(prob_NG.argmax(axis=1), shape_N[conflict], texture_N[conflict])
    settings = {"split": part.split, "groups": {name: list(members) for name, members in part.groups.items()}}
    own = replace(rows, keys=scored.frame["key"].to_list(), settings={**rows.settings, **settings})
    shape_R, texture_R = resampling.sums(np.stack([found.shape_n, found.texture_n], axis=1), rows.seed).T
    with np.errstate(invalid="ignore"):
        bounds = resampling.bias_corrected(found.shape_bias, shape_R / (shape_R + texture_R))
    return [
        _figure(own, "shape_bias", found.shape_bias, int((found.shape_n | found.texture_n).sum()), bounds),
        own.mean("cue_accuracy", np.asarray(found.shape_n | found.texture_n, np.float64)),
    ]


def _effective(part: EffectiveRobustnessPart, split: str, splits: _Splits, rows: Rows) -> Iterator[Metric]:
    base_id, base_ood = np.array(part.baselines).T
    known = splits.labelled(split).correct_N
    line = fit_line(base_id, base_ood, part.space, len(known))
    known_R = resampling.sums(known[:, None], rows.seed, "id")[:, 0] / len(known)
    for shifted in part.shifted:
        moved = splits.labelled(shifted).correct_N
        moved_R = resampling.sums(moved[:, None], rows.seed, "ood")[:, 0] / len(moved)
        value = float(effective_robustness(line, known.mean(), moved.mean(), part.space, len(known)))
        bounds = resampling.bias_corrected(value, effective_robustness(line, known_R, moved_R, part.space, len(known)))
        settings = {"baselines": [list(pair) for pair in part.baselines], "space": part.space, "split": shifted}
        yield _figure(rows, f"effective_robustness.{slug(shifted)}", value, len(moved), bounds, **settings)
