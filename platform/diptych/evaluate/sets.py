"""Is an evaluation set fit to measure with? What makes figures wrong is refused; what a reader of the figures must know is flagged.

Shape legend: N examples, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

from diptych.core.errors import DataError, Problem
from diptych.evaluate import zero_shot
from diptych.evaluate.templates import fill

SHOWN = 5


def check_classes(pairs: pl.DataFrame, split: str, names: Sequence[str] | None = None, duplicates: bool = False) -> list[str]:
    """Checks the labels of a split against the class names, `names` (the label is the place) or the column `label_name`.

    Returns what to flag, a sentence each that says what to do: classes without an example, classes with a single one.

    Raises DataError for labels out of range, blank names, and two classes of one name unless `duplicates` allows them.
    """
    if names is not None:
        _check_names(names, duplicates)
    known, _ = zero_shot.classes(pairs, split, names=names)
    count_C = np.bincount(known.label_N, minlength=len(known.names))
    return [*_empty(known.names, count_C, split), *_single(known.names, count_C, split)]


def check_templates(templates: Sequence[str]) -> None:
    """Raises DataError for a template that cannot tell classes apart (no {} for the name), or that stands twice."""
    fix = "put {} where the class name goes (in CLIP_benchmark's files {c}), and write every template once"
    problems = [
        Problem(f"template {number}", repr(template), "a prompt that differs from class to class", fix)
        for number, template in enumerate(templates, start=1)
        if fill(template, "a") == fill(template, "b")
    ]
    problems += [
        Problem(f"template {number}", repr(template), "each template once: the second would count double", fix)
        for number, template in enumerate(templates, start=1)
        if template in templates[: number - 1]
    ]
    if problems:
        raise DataError("Prompt templates of the set cannot be used", problems)


def check_rejected(rejected: pl.DataFrame, kept: int, refused: Sequence[str] = ()) -> list[str]:
    """Looks at what left at ingest: examples that leave change every figure.

    Args:
        rejected: the dataset's rejects.
        kept: pairs that stayed.
        refused: reasons for which a set is refused altogether, with DataError.
    """
    by_reason = rejected.group_by("reason").agg(pl.len(), pl.col("key").head(SHOWN)).sort("len", "reason", descending=[True, False])
    problems = [
        Problem(", ".join(keys), f"{count:,} examples with {reason}", "labels from 0 to the number of class names less one",
                "name every class in the order of the labels, or mend the labels")
        for reason, count, keys in by_reason.iter_rows() if reason in refused
    ]  # fmt: skip
    if problems:
        raise DataError("Labels and class names of the set do not fit", problems)
    return [
        f"{count:,} of {kept + len(rejected):,} examples could not be used ({reason}), e.g. {keys[0]}: figures are over the others; mend them"
        for reason, count, keys in by_reason.iter_rows()
    ]


def near_copies_flag(copied_N: NDArray[np.bool_]) -> list[str]:
    """What to say of examples that have a near copy among the training pairs; nothing where none has."""
    found = int(copied_N.sum())
    if not found:
        return []
    share = found / len(copied_N)
    return [
        f"{found:,} of {len(copied_N):,} pictures ({share:.1%}) have a near copy among the training pairs: take them out of training, or read"
        " figures as if on seen pictures"
    ]


def _check_names(names: Sequence[str], duplicates: bool) -> None:
    fix = "give every class a name of its own, or say duplicate_names: true"
    blank = [place for place, name in enumerate(names) if not name.strip()]
    if blank:
        raise DataError.at(
            "A class has no name", f"class {blank[0]}", names[blank[0]], "a name", "write one class name a line, no blank lines"
        )
    first: dict[str, int] = {}
    doubled = [(name, first[name], place) for place, name in enumerate(names) if first.setdefault(name, place) != place]
    if doubled and not duplicates:
        problems = [Problem(f"classes {a} and {b}", repr(name), "each name once", fix) for name, a, b in doubled[:SHOWN]]
        raise DataError("Two classes share a name, and no text can tell them apart", problems)


def _empty(names: Sequence[str], count_C: NDArray[np.int64], split: str) -> list[str]:
    empty = [name for name, count in zip(names, count_C, strict=True) if count == 0]
    if not empty:
        return []
    return [
        f"{len(empty):,} of {len(names):,} classes have no example in the split {split} ({_few(empty)}): they compete and are never right;"
        " bring examples, or take their names out and number the labels anew"
    ]


def _single(names: Sequence[str], count_C: NDArray[np.int64], split: str) -> list[str]:
    single = [name for name, count in zip(names, count_C, strict=True) if count == 1]
    if not single:
        return []
    return [
        f"{len(single):,} of {len(names):,} classes have a single example in the split {split} ({_few(single)}): per-class figures rest on it;"
        " bring more, or read acc1 rather than mean_per_class"
    ]


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
