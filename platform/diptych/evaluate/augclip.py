"""AugCLIP: how near an edited picture comes to the least change of its source that crosses over to the target's attributes.

A hyperplane separates texts that describe the source from texts that describe the wanted result; the ideal edit is the source's own
embedding, moved straight towards (or through) that plane. Editing too little and editing too much both lead away from it.

Two readings of the ideal stand side by side. `project` is the published wording: the foot of the perpendicular, on the plane itself.
An edit that changes nothing is as near to that as a right one. `reflect` goes as far again, to the mirror image on the target's side.

Source: Kim et al., Augmentation-Driven Metric for Balancing Preservation and Modification in Text-Guided Image Editing
(arXiv 2410.11374; CVPR 2025 under a later title). The solver, C, class weights and the sign of the step are not published: they are options.

Shape legend: S source attributes, T target attributes, E edits, G edits of the whole set, D feature width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field

from diptych.core.config import Config as BaseConfig
from diptych.core.errors import ConfigError, DataError
from diptych.core.points import Encoder, Metric
from diptych.evaluate.rows import Rows, of_split, preprocessing

Floats = NDArray[np.float64]
Solver = Literal["svm", "logreg"]
Mode = Literal["project", "reflect"]

TASK = "augclip"
KAPPA: Mapping[Mode, float] = {"project": 1.0, "reflect": 2.0}
SCORES = ("project", "reflect", "clip", "directional", "image")
COLUMNS = ("source_key", "edit", "source_text", "target_text", "source_attributes", "target_attributes")
MAX_ITERATIONS = 100_000
FLAT = 1e-9
"""A normal vector of unit texts that is shorter than this is rounding, not a direction."""
UNCHANGED = 1e-6
"""float32 embeddings of one picture differ by so little between two batches; a change must be larger to have a direction."""


class Config(BaseConfig):
    """Ranks the edits of a picture, from columns of the edits' rows (the prefix is `columns`, by default `meta.`).

    - `meta.source_key`: the key of the unedited picture, a row of the same table in any split;
    - `meta.edit`: what kind of edit this is, e.g. `ideal`, `over`, `none`, or `chosen` and `rejected`: each at most once a group;
    - `meta.source_text`, `meta.target_text`: the user's own two texts;
    - `meta.source_attributes`, `meta.target_attributes`: short phrases, a list of strings or one string with `separator` between them.

    Edits with equal `source_key` and `target_text` are a group. Rows with a null `source_key` are not edits and are left aside.
    """

    method: Literal["augclip"] = "augclip"
    split: str = Field("test", min_length=1, description="the split whose rows are edits")
    columns: str = Field("meta.", description="what the names of the columns begin with")
    separator: str = Field(";", min_length=1, description="between the attributes where they are one string")
    preferred: str = Field("ideal", min_length=1, description="the kind of edit that should win its group")
    solver: Solver = Field("svm", description="what separates the attributes: a linear soft-margin SVM or logistic regression")
    c: float = Field(
        1.0, gt=0, description="inverse strength of the regularisation; about 100 for lists of few phrases, whose margin is soft at 1"
    )
    template: str = Field("", description="put before every text and attribute")
    task: str = Field(
        TASK, pattern=r"^[a-z0-9][a-z0-9-]*$", description="the figures' name between set and metric, where one set is ranked twice"
    )

    def build(self) -> AugCLIP:
        """The benchmark."""
        return AugCLIP(self)


# ---------------------------------------------------------------- the mathematics


class Plane(NamedTuple):
    """The hyperplane `w x + b = 0`, target attributes on its positive side.

    Attributes:
        weight_D: w, float64, not normalised; NaN if there is no plane.
        bias: b.
        accuracy: the share of attributes on their own side.
        fault: why there is no plane, else empty.
    """

    weight_D: Floats
    bias: float
    accuracy: float
    fault: str = ""

    def margin(self, feature_D: NDArray[Any]) -> float:
        """`f = w x + b`: negative on the source's side."""
        return float(feature_D @ self.weight_D + self.bias)


def separate(source_SD: NDArray[Any], target_TD: NDArray[Any], solver: Solver = "svm", c: float = 1.0) -> Plane:
    """The plane between two lists of L2-normalised attribute embeddings, fitted without class weights.

    Where the SVM leaves the intercept open (lists of equal length, every dual variable at C) it is the middle of what is admissible.
    A list that is empty, or lists that no direction tells apart, give a plane of NaN that says why. Raises ConfigError unless c > 0.
    """
    if c <= 0:
        raise ConfigError.at("The regularisation is not positive", "c", c, "a number > 0")
    width = source_SD.shape[-1]
    if not (len(source_SD) and len(target_TD)):
        return Plane(np.full(width, np.nan), np.nan, np.nan, "a list of attributes is empty")
    feature_AD = np.concatenate([source_SD, target_TD]).astype(np.float64)
    label_A = np.repeat([-1, 1], [len(source_SD), len(target_TD)])
    fitted = _solver(solver, c).fit(feature_AD, label_A)
    weight_D, bias = np.asarray(fitted.coef_[0], dtype=np.float64), float(fitted.intercept_[0])
    if np.linalg.norm(weight_D) < FLAT:
        return Plane(np.full(width, np.nan), np.nan, np.nan, "no direction tells the two lists of attributes apart")
    return Plane(weight_D, bias, float(((feature_AD @ weight_D + bias > 0) == (label_A > 0)).mean()))


def _solver(solver: Solver, c: float) -> Any:
    """libsvm's default tolerance shows in the fourth digit of the score."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.svm import SVC

    if solver == "svm":
        return SVC(kernel="linear", C=c, tol=1e-10)
    return LogisticRegression(C=c, tol=1e-10, max_iter=MAX_ITERATIONS)


def modification(plane: Plane, source_D: NDArray[Any]) -> Floats:
    """v `[D]`: the shortest step from the source's embedding to the plane, `-(f / ||w||^2) w`; whatever side the source is on."""
    return np.asarray(-plane.margin(source_D) / (plane.weight_D @ plane.weight_D) * plane.weight_D)


def ideal_edit(plane: Plane, source_D: NDArray[Any], mode: Mode = "project") -> Floats:
    """`x0 + kappa v` `[D]`, not normalised: on the plane for `project` (kappa 1), as far behind it for `reflect` (kappa 2)."""
    return np.asarray(source_D + KAPPA[mode] * modification(plane, source_D))


def aug_clip(edit_ED: NDArray[Any], ideal_D: NDArray[Any]) -> Floats:
    """AugCLIP `[E]`, in [-1, 1]: the cosine of each edit with the ideal; NaN where there is no plane."""
    return _cosine(edit_ED, ideal_D)


def clip_similarity(edit_ED: NDArray[Any], target_D: NDArray[Any]) -> Floats:
    """The rival that knows only the wanted text: cosine of each edit with it, `[E]`."""
    return _cosine(edit_ED, target_D)


def directional(edit_ED: NDArray[Any], image_D: NDArray[Any], source_D: NDArray[Any], target_D: NDArray[Any]) -> Floats:
    """Directional similarity `[E]`: cosine of the pictures' change with the texts' change; 0 where either did not change.

    All embeddings are L2-normalised: `image_D` of the source picture, `source_D` and `target_D` of the two texts.
    """
    picture_ED, text_D = np.asarray(edit_ED, np.float64) - image_D, np.asarray(target_D, np.float64) - source_D
    changed_E = (np.linalg.norm(picture_ED, axis=-1) > UNCHANGED) & bool(np.linalg.norm(text_D) > UNCHANGED)
    return np.where(changed_E, _cosine(picture_ED, text_D), 0.0)


def image_similarity(edit_ED: NDArray[Any], image_D: NDArray[Any]) -> Floats:
    """The rival that knows only the source picture: cosine of each edit with it, `[E]`."""
    return _cosine(edit_ED, image_D)


def _unit(feature_xD: NDArray[Any]) -> Floats:
    with np.errstate(invalid="ignore"):
        return np.asarray(feature_xD / np.linalg.norm(feature_xD, axis=-1, keepdims=True), dtype=np.float64)


def _cosine(left_ED: NDArray[Any], right_D: NDArray[Any]) -> Floats:
    """NaN where a vector is zero."""
    return np.asarray(_unit(np.asarray(left_ED, np.float64)) @ _unit(np.asarray(right_D, np.float64)))


# ---------------------------------------------------------------- the edits of a set


class Group(NamedTuple):
    """The edits of one picture towards one text.

    Attributes:
        key: `<key of the source picture>|<target text>`.
        source_key, source_text, target_text: as in the columns.
        source, target: the attributes, the user's own text last, each phrase once.
        row_of: kind of edit -> row among all edits.
    """

    key: str
    source_key: str
    source_text: str
    target_text: str
    source: tuple[str, ...]
    target: tuple[str, ...]
    row_of: dict[str, int]


def edits(pairs: pl.DataFrame, config: Config) -> tuple[pl.DataFrame, list[Group]]:
    """The edits of the split and their groups in the order of their first rows.

    Raises DataError if a column is missing or a cell of an edit is null, a source picture is not in the table, a kind occurs twice in
    a group, the rows of a group disagree about texts or attributes, or no group holds the preferred kind beside another.
    """
    names = {name: config.columns + name for name in COLUMNS}
    rows = of_split(pairs, config.split)
    if missing := sorted(set(names.values()) - set(rows.columns)):
        raise DataError.at("The set does not describe edits", "columns", missing, "the columns that the benchmark's Config documents")
    rows = rows.filter(pl.col(names["source_key"]).is_not_null())
    known = set(pairs["key"])
    groups: dict[str, Group] = {}
    for row, (key, *cells) in enumerate(rows.select("key", *names.values()).iter_rows()):
        cell = dict(zip(names, cells, strict=True))
        _check(key, cell, names, known)
        kind, found = cell["edit"], _group(cell, config.separator)
        group = groups.setdefault(found.key, found)
        if kind in group.row_of:
            raise DataError.at("A group has two edits of one kind", f"pair {key!r}, {names['edit']}", kind, "each kind once a group")
        if found[:6] != group[:6]:
            raise DataError.at("The rows of a group disagree", f"pair {key!r}", found[2:6], f"as its group has it: {group[2:6]}")
        group.row_of[kind] = row
    if not any(config.preferred in group.row_of and len(group.row_of) > 1 for group in groups.values()):
        kinds = sorted({kind for group in groups.values() for kind in group.row_of})
        raise DataError.at("No group can be ranked", names["edit"], kinds, f"groups that hold {config.preferred!r} and another kind")
    return rows, list(groups.values())


def _check(key: str, cell: Mapping[str, Any], names: Mapping[str, str], known: set[str]) -> None:
    if empty := [names[name] for name in COLUMNS if cell[name] is None]:
        raise DataError.at("An edit is not described", f"pair {key!r}", empty, "a value in every column")
    if cell["source_key"] not in known:
        raise DataError.at(
            "An edit has no source picture", f"pair {key!r}, {names['source_key']}", cell["source_key"], "the key of a pair of the set"
        )


def _group(cell: Mapping[str, Any], separator: str) -> Group:
    def phrases(side: str) -> tuple[str, ...]:
        held = cell[f"{side}_attributes"]
        phrase = held.split(separator) if isinstance(held, str) else held
        return tuple(dict.fromkeys(filter(None, (text.strip() for text in [*phrase, cell[f"{side}_text"]]))))

    key, source, target = cell["source_key"], cell["source_text"], cell["target_text"]
    return Group(f"{key}|{target}", key, source, target, phrases("source"), phrases("target"), {})


# ---------------------------------------------------------------- the benchmark


class Scored(NamedTuple):
    """Every score of every edit, `[G]` a name of `SCORES`, and how the planes lie: a plane and the source's margin a group."""

    score: dict[str, Floats]
    planes: list[Plane]
    margins: Floats


class AugCLIP:
    """The benchmark. Examples are groups; a figure's share counts strictly higher scores, so that a tie is not a win.

    Metrics, for every score of `SCORES` (both readings of AugCLIP, and its three rivals):
        `<score>_beats_<kind>`: the share of groups in which the preferred edit scores higher than the edit of that kind.
        `<score>_beats_all`: higher than every other edit of its group (no row where there is one other kind only).
    Health of the planes, over all groups:
        `plane`: the share of groups that have one; a group without loses every comparison of AugCLIP.
        `separated`: mean share of attributes on their own side. `source_side`: share of source pictures on the source's side. Both over
        the groups that have a plane, and without a row if none has.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def run(self, encoder: Encoder, pairs: pl.DataFrame, name: str, seed: int) -> list[Metric]:
        """The rows for the set `name`. Raises as `edits` does."""
        rows, groups = edits(pairs, self.config)
        scored = self.scores(encoder, pairs, rows, groups)
        settings = {**self.config.model_dump(exclude={"method", "task"}), **preprocessing(encoder)}

        def of(members: Sequence[Group]) -> Rows:
            return Rows(name, self.config.task, [group.key for group in members], seed, settings)

        ranked = [group for group in groups if self.config.preferred in group.row_of]
        kinds = sorted({kind for group in ranked for kind in group.row_of} - {self.config.preferred})
        rivals = [(f"beats_{kind}", [kind]) for kind in kinds] + ([("beats_all", kinds)] if len(kinds) > 1 else [])
        metrics = []
        for label, against in rivals:
            members = [group for group in ranked if all(kind in group.row_of for kind in against)]
            if members:
                metrics += [of(members).mean(f"{score}_{label}", self._wins(scored.score[score], members, against)) for score in SCORES]
        return metrics + _health(scored, groups, of)

    def scores(self, encoder: Encoder, pairs: pl.DataFrame, rows: pl.DataFrame, groups: Sequence[Group]) -> Scored:
        """Scores all edits. `pairs` holds the source pictures, `rows` the edits, and `groups` are theirs."""
        edit_GD = encoder.images(rows).astype(np.float64)
        image_of, text_of = _sources(encoder, pairs, groups), self._texts(encoder, groups)
        planes = self._planes(groups, text_of)
        score = {name: np.full(len(rows), np.nan) for name in SCORES}
        for group, plane in zip(groups, planes, strict=True):
            at, image_D = list(group.row_of.values()), image_of[group.source_key]
            for name, value_E in _scores(plane, image_D, edit_GD[at], text_of[group.source_text], text_of[group.target_text]).items():
                score[name][at] = value_E
        margins = [plane.margin(image_of[group.source_key]) for group, plane in zip(groups, planes, strict=True)]
        return Scored(score, planes, np.asarray(margins))

    def _texts(self, encoder: Encoder, groups: Sequence[Group]) -> dict[str, Floats]:
        """The embeddings of all texts and attributes, each encoded once."""
        texts = list(
            dict.fromkeys(text for group in groups for text in (*group.source, *group.target, group.source_text, group.target_text))
        )
        return dict(zip(texts, encoder.texts([self.config.template + text for text in texts]).astype(np.float64), strict=True))

    def _planes(self, groups: Sequence[Group], text_of: Mapping[str, Floats]) -> list[Plane]:
        """The plane of every group; groups with equal lists share one."""
        width = len(next(iter(text_of.values())))
        plane_of: dict[tuple[tuple[str, ...], tuple[str, ...]], Plane] = {}
        for lists in dict.fromkeys((group.source, group.target) for group in groups):
            source_SD, target_TD = (np.array([text_of[text] for text in side]).reshape(-1, width) for side in lists)
            plane_of[lists] = separate(source_SD, target_TD, self.config.solver, self.config.c)
        return [plane_of[group.source, group.target] for group in groups]

    def _wins(self, score_G: Floats, members: Sequence[Group], against: Sequence[str]) -> NDArray[np.float64]:
        """1 where the preferred edit scores higher than all those `against`; NaN never does."""
        own = score_G[[group.row_of[self.config.preferred] for group in members]]
        others = np.stack([score_G[[group.row_of[kind] for group in members]] for kind in against])
        return np.asarray((own > others).all(axis=0), dtype=np.float64)


def _sources(encoder: Encoder, pairs: pl.DataFrame, groups: Sequence[Group]) -> dict[str, Floats]:
    """The embeddings of the source pictures by key, each encoded once."""
    rows = pairs.filter(pl.col("key").is_in({group.source_key for group in groups}))
    return dict(zip(rows["key"], encoder.images(rows).astype(np.float64), strict=True))


def _scores(plane: Plane, image_D: Floats, edit_ED: Floats, source_D: Floats, target_D: Floats) -> dict[str, Floats]:
    return {
        "project": aug_clip(edit_ED, ideal_edit(plane, image_D, "project")),
        "reflect": aug_clip(edit_ED, ideal_edit(plane, image_D, "reflect")),
        "clip": clip_similarity(edit_ED, target_D),
        "directional": directional(edit_ED, image_D, source_D, target_D),
        "image": image_similarity(edit_ED, image_D),
    }


def _health(scored: Scored, groups: Sequence[Group], of: Any) -> list[Metric]:
    has_N = np.asarray([not plane.fault for plane in scored.planes])
    metrics = [of(groups).mean("plane", has_N.astype(np.float64))]
    if has_N.any():
        members = [group for group, has in zip(groups, has_N, strict=True) if has]
        accuracy_N = np.asarray([plane.accuracy for plane in scored.planes])
        metrics.append(of(members).mean("separated", accuracy_N[has_N]))
        metrics.append(of(members).mean("source_side", (scored.margins[has_N] < 0).astype(np.float64)))
    return metrics
