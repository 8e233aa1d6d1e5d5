"""What adapters ask of their support before they learn from it: the parts are there, rows match, labels are classes of the set.

Shape legend: N rows, D feature width, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from diptych.core.errors import DataError
from diptych.core.points import Examples, Support

Floats = NDArray[np.floating[Any]]
Labels = NDArray[np.int64]

PARTS = {
    "labelled": "evaluate with shots > 0, or on a set whose split for shots has labels",
    "validation": "name a validation split, or fix the method's hyper-parameters",
    "unlabelled": "name a split whose pictures may be seen without their labels",
}


class Labelled(NamedTuple):
    """Image features `[N, D]` and their class numbers `[N]`."""

    feature_ND: Floats
    label_N: Labels


def labelled(support: Support, method: str, *, every_class: bool = False) -> Labelled:
    """The few shots. Raises DataError if there are none or they do not fit the classes; `every_class` refuses a class without any."""
    found = checked(support.labelled, support, method, "labelled")
    if every_class:
        refuse_empty(found.label_N, len(support.text_CD), method)
    return found


def validation(support: Support, method: str) -> Labelled | None:
    """The examples to choose hyper-parameters on, or None if there are none. Raises DataError as `labelled` does."""
    return None if support.validation is None else checked(support.validation, support, method, "validation")


def unlabelled(support: Support, method: str) -> Floats:
    """Features `[N, D]` of the target without labels. Raises DataError if there are none."""
    if support.unlabelled is None or not len(support.unlabelled.feature_ND):
        raise missing(method, "unlabelled")
    return features(support.unlabelled, support.text_CD.shape[1], f"{method}: unlabelled")


def checked(examples: Examples | None, support: Support, method: str, part: str) -> Labelled:
    """One part of the support with its labels. Raises DataError if it is missing, empty, unlabelled, or not of these classes."""
    if examples is None or not len(examples.feature_ND):
        raise missing(method, part)
    where = f"{method}: {part}"
    feature_ND = features(examples, support.text_CD.shape[1], where)
    if examples.label_N is None or len(examples.label_N) != len(feature_ND):
        got = "no labels" if examples.label_N is None else f"{len(examples.label_N)} labels"
        raise DataError.at("Features and labels do not match", where, got, f"{len(feature_ND)} labels, one a row")
    classes = len(support.text_CD)
    label_N = np.asarray(examples.label_N, np.int64)
    if label_N.min() < 0 or label_N.max() >= classes:
        raise DataError.at("A label is no class of the set", where, [int(label_N.min()), int(label_N.max())], f"0 to {classes - 1}")
    return Labelled(feature_ND, label_N)


def features(examples: Examples, width: int, where: str = "test") -> Floats:
    """The image features `[N, D]`. Raises DataError unless they are `width` wide and finite."""
    feature_ND = np.asarray(examples.feature_ND)
    if feature_ND.ndim != 2 or feature_ND.shape[1] != width:
        raise DataError.at("Image and text features do not match", where, list(feature_ND.shape), f"rows of {width} values")
    refuse_not_finite(feature_ND, where)
    return feature_ND


def refuse_not_finite(feature_ND: Floats, where: str) -> None:
    """Raises DataError that names the first row with a NaN or an infinity: it would spread to every score, or stop a fit unseen."""
    wrong_N = np.flatnonzero(~np.isfinite(feature_ND).all(axis=1))
    if wrong_N.size:
        raise DataError.at(
            "Features are not numbers", where, f"row {wrong_N[0]} and {wrong_N.size - 1} more", "finite values", "encode them again"
        )


def refuse_empty(label_N: Labels, classes: int, method: str) -> None:
    """Raises DataError that names the classes without an example: a score for them would be made up."""
    empty = np.flatnonzero(np.bincount(label_N, minlength=classes) == 0)
    if empty.size:
        raise DataError.at(
            "A class has no labelled example", f"{method}: labelled", f"no row of class {_few(empty.tolist())}",
            f"at least one of each of {classes} classes", "raise shots, or leave these classes out of the set",
        )  # fmt: skip


def missing(method: str, part: str) -> DataError:
    """The error for a part of the support that a method cannot do without."""
    error = DataError.at(f"{method} has nothing to learn from", f"{method}: {part}", "nothing", f"{part} examples", PARTS.get(part, ""))
    assert isinstance(error, DataError)
    return error


def accuracy(score_NC: Floats, label_N: Labels) -> float:
    """Share of rows whose largest score is that of their label; of equal scores the lowest class counts."""
    return float(np.mean(score_NC.argmax(axis=1) == label_N))


def _few(numbers: Sequence[int], shown: int = 10) -> str:
    more = f" and {len(numbers) - shown} more" if len(numbers) > shown else ""
    return ", ".join(map(str, numbers[:shown])) + more
