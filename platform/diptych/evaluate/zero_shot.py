"""Zero-shot classification: class names in prompt templates, averaged in embedding space, against image features.

Source: Radford et al., Learning Transferable Visual Models From Natural Language Supervision (2021), sections 3.1.3 and 3.1.4.

Shape legend: N images, C classes, T templates, D feature width.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field, field_validator

from diptych.core import digest
from diptych.core.chance import key_hashes
from diptych.core.config import Config as BaseConfig
from diptych.core.errors import DataError
from diptych.core.points import Encoder, Metric
from diptych.evaluate.intervals import interval
from diptych.evaluate.ranks import chunks, target_rank
from diptych.evaluate.rows import Rows, of_split, preprocessing
from diptych.evaluate.templates import TemplateSet, fill, resolve

Real = TypeVar("Real", np.float32, np.float64)
Labels = NDArray[np.int64]

TASK = "zero-shot"
WORST_CLASS_LEAST = 10
LEAST_HELD = 20
"""Held-back rows below which a better order of the classes may be chance."""


class Config(BaseConfig):
    """Zero-shot classification of the pairs that carry a label."""

    method: Literal["zero-shot"] = "zero-shot"
    split: str = Field("test", min_length=1, description="the split to classify")
    templates: TemplateSet | tuple[str, ...] = Field(
        "plain", description="a set of prompt templates by name (`set`: the evaluation set's own), or the templates, each with {}"
    )
    classnames: str = Field("label_name", description="the column of class names; `label` numbers them")
    classes: tuple[str, ...] | None = Field(
        None, min_length=1, description="all class names, that of label 0 first; null: those that the pairs have, by rising label"
    )
    ensemble: Literal["embedding", "none"] = Field(
        "embedding", description="`embedding` averages a class's prompts; `none` lets each template classify alone and averages the figures"
    )
    logit_scale: float | None = Field(None, gt=0, description="replaces the checkpoint's logit scale in the log loss")
    topk: tuple[int, ...] = Field((1, 5), min_length=1, description="k of the top-k accuracies")
    task: str = Field(
        TASK, pattern=r"^[a-z0-9][a-z0-9-]*$", description="the figures' name between set and metric, where one set is classified twice"
    )
    check_order: bool = Field(True, description="warn where predictions fit the labels far better under a re-ordering of the classes")

    @field_validator("templates")
    @classmethod
    def _renders(cls, templates: TemplateSet | tuple[str, ...]) -> TemplateSet | tuple[str, ...]:
        if not isinstance(templates, str) and (
            not templates or len(set(templates)) < len(templates) or any("{}" not in t for t in templates)
        ):
            raise ValueError("at least one template, each once and each with {} for the class name")
        return templates

    @field_validator("topk")
    @classmethod
    def _increasing(cls, topk: tuple[int, ...]) -> tuple[int, ...]:
        if list(topk) != sorted(set(topk)) or topk[0] < 1:
            raise ValueError("increasing numbers >= 1")
        return topk

    def build(self) -> ZeroShot:
        """The benchmark."""
        return ZeroShot(self)


# ---------------------------------------------------------------- the mathematics


def normalise(feature_xD: NDArray[Real]) -> NDArray[Real]:
    """Divides by the norm over the last axis, `[..., D]`; the dtype stays. A zero vector gives NaN, as in the original."""
    with np.errstate(invalid="ignore"):
        return np.asarray(feature_xD / np.linalg.norm(feature_xD, axis=-1, keepdims=True), dtype=feature_xD.dtype)


def classifier(template_emb_CTD: NDArray[Real]) -> NDArray[Real]:
    """The zero-shot weights `[D, C]`: prompts normalised, averaged over the templates, normalised again (section 3.1.4)."""
    return normalise(normalise(template_emb_CTD).mean(axis=1)).T


def logits(image_ND: NDArray[Real], classifier_DC: NDArray[Real], scale: float = 100.0) -> NDArray[Real]:
    """`scale * image @ classifier`, `[N, C]`; both sides are taken as they are."""
    return np.asarray(scale * (image_ND @ classifier_DC), dtype=image_ND.dtype)


def top_k_accuracy(logit_NC: NDArray[Any], label_N: Labels, k: int) -> float:
    """The share of rows whose label is among the k highest logits; among equal logits the lower class number stands first."""
    return float((target_rank(logit_NC, label_N) < k).mean())


def mean_per_class(hit_N: NDArray[Any], label_N: Labels) -> float:
    """The mean over the classes that occur of the share of hits in each (balanced accuracy)."""
    return float((hit_N * class_weights(label_N)).mean())


def class_weights(label_N: Labels) -> NDArray[np.float64]:
    """Weights `[N]` with mean 1 that give every occurring class the same say: `N / (classes * size of the row's class)`."""
    _, inverse, count = np.unique(label_N, return_inverse=True, return_counts=True)
    return np.asarray(len(label_N) / (len(count) * count[inverse]))


def log_loss(logit_NC: NDArray[Any], label_N: Labels) -> NDArray[np.float64]:
    """`-log softmax` at the label, in nats, float64 `[N]`."""
    shifted = logit_NC.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    own = shifted[np.arange(len(label_N)), label_N]
    return np.asarray(np.log(np.exp(shifted, out=shifted).sum(axis=1)) - own)


# ---------------------------------------------------------------- classes of a set


class Classes(NamedTuple):
    """The ordered classes of a set: `names[c]` is the name of class c; `label_N` holds class numbers in [0, C), a row each."""

    names: list[str]
    label_N: Labels


def classes(
    pairs: pl.DataFrame, split: str, label: str = "label", name: str = "label_name", names: Sequence[str] | None = None
) -> tuple[Classes, pl.DataFrame]:
    """Reads the classes from all of `pairs` and the rows of `split`; labels that skip numbers are closed up in their order.

    With `names`, these are the classes, a label is a place among them, and the column of names is not looked at.

    Raises:
        DataError: a column is missing or holds nulls, the split has no rows, a label is out of range or has two names, or two share one.
    """
    if names is not None:
        return _listed(pairs, split, label, names)
    _require_columns(pairs, label, name)
    rows = of_split(pairs, split)
    table = (
        pairs.select(pl.col(label).cast(pl.Int64), pl.col(name).cast(pl.String))
        .filter(pl.col(label).is_not_null())
        .unique()
        .sort(label, name)
    )
    if rows[label].null_count() or table[name].null_count():
        raise DataError.at("A pair has no class", f"{label}, {name}", None, "a number and a name on every row of the split")
    _refuse_doubles(table, label, "A label has more than one class name")
    _refuse_doubles(table, name, "Two labels share a class name")
    number = table[label].to_numpy()
    if number[0] < 0:
        raise DataError.at("A label is out of range", label, int(number[0]), "numbers from 0")
    return Classes(table[name].to_list(), np.searchsorted(number, rows[label].to_numpy()).astype(np.int64)), rows


def _listed(pairs: pl.DataFrame, split: str, label: str, names: Sequence[str]) -> tuple[Classes, pl.DataFrame]:
    """The rows of a split whose labels are places in a list of names."""
    _require_columns(pairs, label)
    rows = of_split(pairs, split)
    outside = rows.filter(pl.col(label).is_between(0, len(names) - 1).not_().fill_null(True))
    if len(outside):
        fix = "give every class a name in the order of the labels, and every pair a label that counts from 0"
        raise DataError.at("A label is out of range", label, outside.select("key", label).head(4).rows(), f"0 to {len(names) - 1}", fix)
    return Classes(list(names), rows[label].to_numpy().astype(np.int64)), rows


def _require_columns(pairs: pl.DataFrame, *columns: str) -> None:
    if missing := [column for column in columns if column not in pairs.columns]:
        fix = "zero-shot needs a labelled set: add the column at ingest, or measure retrieval instead"
        raise DataError.at(f"The set has no column {missing[0]!r}", missing[0], pairs.columns, "a label and a class name a pair", fix)


def _refuse_doubles(table: pl.DataFrame, column: str, headline: str) -> None:
    doubled = table.filter(pl.col(column).is_duplicated())
    if len(doubled):
        raise DataError.at(headline, column, doubled.head(4).rows(), "one name a label and one label a name")


class Order(NamedTuple):
    """Accuracy on held-back rows with the classes as given and after the best re-ordering learnt from the other rows."""

    as_given: float
    reordered: float

    @property
    def suspect(self) -> bool:
        """Whether names and labels seem to be in different orders."""
        return self.reordered > 2 * self.as_given and self.reordered > self.as_given + 0.2


def class_order(predicted_N: Labels, label_N: Labels, keys: Sequence[str]) -> Order:
    """Detects a class list in the wrong order: maps each predicted class to the label it most often meets on one half of the rows (halves
    by key), and scores the mapping on the other half. A set with one row a class, or with few rows at all, teaches nothing and is never
    suspect.
    """
    held = (key_hashes(keys) & np.uint64(1)).astype(bool)
    if held.sum() < LEAST_HELD or held.all():
        return Order(0.0, 0.0)
    pair, count = np.unique(np.stack([predicted_N[~held], label_N[~held]]), axis=1, return_counts=True)
    meets = np.full(max(predicted_N.max(), label_N.max()) + 1, -1, np.int64)
    rising = np.argsort(count, kind="stable")
    meets[pair[0, rising]] = pair[1, rising]
    return Order(float((predicted_N == label_N)[held].mean()), float((meets[predicted_N] == label_N)[held].mean()))


# ---------------------------------------------------------------- the benchmark


class _Scores(NamedTuple):
    """Of one classifier: the label's rank, the log loss and the predicted class, `[N]` each."""

    rank_N: Labels
    loss_N: NDArray[np.float64]
    predicted_N: Labels


class ZeroShot:
    """The benchmark.

    Metrics: `acc<k>` for every k below the number of classes, `mean_per_class`, `log_loss` in nats, and, where every class has at
    least 10 examples, `worst_class`: the accuracy of the class that does worst, without per-example values.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.templates = resolve(config.templates)

    def run(self, encoder: Encoder, pairs: pl.DataFrame, name: str, seed: int) -> list[Metric]:
        """The rows for the set `name`; `pairs` carries `label`, the class-name column and `split`.

        Classes are read from all rows, so a class that the split lacks still competes. Raises DataError (see `classes`).
        """
        config = self.config
        known, rows = classes(pairs, config.split, name=config.classnames, names=config.classes)
        weight_TDC = self.weights(encoder, known.names)
        image_ND = encoder.images(rows)
        scale = encoder.logit_scale if config.logit_scale is None else config.logit_scale
        scores = [_scores(image_ND, weight_DC, known.label_N, scale) for weight_DC in weight_TDC]
        keys = rows["key"].to_list()
        if config.check_order:
            _warn_of_order(class_order(scores[0].predicted_N, known.label_N, keys), name)
        return self._metrics(scores, known, Rows(name, self.config.task, keys, seed, self.settings(encoder, known.names)))

    def weights(self, encoder: Encoder, names: Sequence[str]) -> NDArray[np.float32]:
        """The classifiers `[1, D, C]` (ensemble) or `[T, D, C]` (a template each). All prompts are encoded in one call."""
        prompts = [fill(template, name) for name in names for template in self.templates]
        text_CTD = encoder.texts(prompts).reshape(len(names), len(self.templates), -1)
        if self.config.ensemble == "embedding":
            return classifier(text_CTD)[None]
        return np.stack([classifier(text_CTD[:, [template]]) for template in range(len(self.templates))])

    def settings(self, encoder: Encoder, names: Sequence[str]) -> dict[str, Any]:
        """What must be equal for two rows to be comparable."""
        config = self.config
        return {
            "split": config.split,
            "templates": digest.of_plain(list(self.templates)),
            "classes": len(names),
            "classnames": digest.of_plain(list(names)),
            "ensemble": config.ensemble,
            **({} if config.logit_scale is None else {"logit_scale": config.logit_scale}),
            **preprocessing(encoder),
        }

    def _metrics(self, scores: Sequence[_Scores], known: Classes, rows: Rows) -> list[Metric]:
        def hits(k: int) -> NDArray[np.float64]:
            return np.asarray(np.mean([score.rank_N < k for score in scores], axis=0))

        return [
            *(rows.mean(f"acc{k}", hits(k)) for k in self.config.topk if k < len(known.names)),
            rows.mean("mean_per_class", hits(1), class_weights(known.label_N)),
            rows.mean("log_loss", np.mean([score.loss_N for score in scores], axis=0)),
            *_worst_class(hits(1), known.label_N, rows),
        ]


def _worst_class(hit_N: NDArray[np.float64], label_N: Labels, rows: Rows) -> list[Metric]:
    """The accuracy of the worst class with its bootstrap interval within the class; nothing where a class is too small to judge."""
    count_C = np.bincount(label_N)
    if count_C[count_C > 0].min() < WORST_CLASS_LEAST:
        return []
    accuracy_C = np.where(count_C > 0, np.bincount(label_N, weights=hit_N) / np.maximum(count_C, 1), np.inf)
    worst = int(accuracy_C.argmin())
    low, high = interval(hit_N[label_N == worst], rows.seed)
    return [Metric(rows.set, rows.task, "worst_class", float(accuracy_C[worst]), int(count_C[worst]), low, high, rows.settings)]


def _scores(image_ND: NDArray[np.float32], weight_DC: NDArray[np.float32], label_N: Labels, scale: float) -> _Scores:
    parts = [
        (target_rank(logit_NC, label_N[part]), log_loss(logit_NC, label_N[part]), logit_NC.argmax(axis=1))
        for part in chunks(len(image_ND), weight_DC.shape[1])
        for logit_NC in [logits(image_ND[part], weight_DC, scale)]
    ]
    return _Scores(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _warn_of_order(order: Order, name: str) -> None:
    if order.suspect:
        message = (
            f"{name}: accuracy is {order.as_given:.1%}, but {order.reordered:.1%} once the classes are re-ordered; "
            "labels and class names seem to be in different orders"
        )
        warnings.warn(message, stacklevel=3)
