"""Labels by clusters: the same however pairs are cut, what stays and what leaves, what is balanced, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from diptych.core.errors import ConfigError, DataError
from diptych.curate import clustering
from diptych.curate.biomedica import BALANCED, NOT_KEPT, BiomedicaConcepts, Config, balanced, majority, stays

KINDS = ("scan", "plot", "table")


def pool(rows: int, shares: tuple[float, ...] = (0.2, 0.5, 0.3)) -> pl.DataFrame:
    """Pairs in three well separated clumps; `meta.kind` names the clump, one in twenty times wrongly."""
    draw = np.random.default_rng(0)
    kind_N = draw.choice(len(KINDS), rows, p=shares)
    feature_ND = (np.eye(3, 6)[kind_N] + draw.normal(0, 0.05, (rows, 6))).astype(np.float32)
    feature_ND /= np.linalg.norm(feature_ND, axis=1, keepdims=True)
    said_N = np.where(draw.random(rows) < 0.05, (kind_N + 1) % 3, kind_N)
    return pl.DataFrame(
        {
            "key": [f"k{row}" for row in range(rows)],
            "captions": [[{"text": "t", "source": "alt", "score": None}]] * rows,
            "meta.kind": [KINDS[kind] for kind in said_N],
            "truth": [KINDS[kind] for kind in kind_N],
            "feature": pl.Series(feature_ND, dtype=pl.Array(pl.Float32, 6)),
        }
    )


def state_of(method: BiomedicaConcepts, parts: list[pl.DataFrame]) -> Any:
    state: Any = None
    for fold in method.folds():
        merged = fold.map(parts[0], state)
        for part in parts[1:]:
            merged = fold.merge(merged, fold.map(part, state))
        state = fold.finish(merged, state)
    return state


def method(**values: Any) -> BiomedicaConcepts:
    return Config.parse({"clusters": 6, "components": 3, "looked_at": 10, "expert": "meta.kind", **values}).build(3)


def test_filtering_keeps_what_the_looks_found() -> None:
    frame, made = pool(600), method(keep=["scan"])
    state = state_of(made, [frame])
    verdict = made.apply(frame, state)
    assert verdict.kept["truth"].to_list() == ["scan"] * (frame["truth"] == "scan").sum()
    assert verdict.kept["meta.concepts"].unique().to_list() == ["scan"]
    assert verdict.rejected["reason"].unique().to_list() == [NOT_KEPT]
    assert verdict.kept.height + verdict.rejected.height == frame.height
    scan = made.report(state)["labels"]["scan"]
    assert scan["pairs"] == verdict.kept.height
    assert scan["purity"] == pytest.approx((verdict.kept["meta.kind"] == "scan").mean())
    assert scan["recall"] == pytest.approx((verdict.kept["meta.kind"] == "scan").sum() / (frame["meta.kind"] == "scan").sum())


def test_the_cut_and_the_order_do_not_matter() -> None:
    frame = pool(600)
    pieces = [frame[:100], frame[100:101], frame[101:]]
    made = method(keep=["scan", "plot"], balance=True, sample=200)
    whole, cut = state_of(made, [frame]), state_of(made, pieces)
    assert np.array_equal(whole.clusters.center_KC, cut.clusters.center_KC)
    assert (whole.labels, whole.size_K.tolist(), whole.agreement) == (cut.labels, cut.size_K.tolist(), cut.agreement)
    kept = made.apply(frame, whole).kept["key"].to_list()
    assert kept == [key for piece in pieces for key in made.apply(piece, cut).kept["key"]]
    assert sorted(made.apply(frame[::-1], whole).kept["key"]) == sorted(kept)


def test_balancing_caps_at_the_median() -> None:
    frame, made = pool(3000), method(balance=True)
    verdict = made.apply(frame, state_of(made, [frame]))
    before, after = (dict(f["truth"].value_counts().iter_rows()) for f in (frame, verdict.kept))
    assert after["scan"] == before["scan"]
    assert after["table"] == before["table"]
    assert after["plot"] == pytest.approx(before["table"], rel=0.1)
    assert verdict.rejected["reason"].unique().to_list() == [BALANCED]
    assert verdict.rejected["score"].n_unique() == 1


def test_a_cluster_of_two_labels_counts_for_its_rarer_one() -> None:
    share_K = balanced(np.array([100, 300, 1000, 0]), [("a", "b"), ("b",), ("c",), ("d",)])
    assert share_K.tolist() == [1.0, 1.0, 0.3, 1.0]  # a 100, b 300, c 1,000: the median is 300
    assert balanced(np.array([5]), [()]).tolist() == [1.0]


@pytest.mark.parametrize(
    ("labels", "keep", "drop", "expected"),
    [
        ((), None, (), True),
        ((), ("a",), (), False),
        (("a", "b"), ("a",), ("b",), True),
        (("b",), None, ("b",), False),
        (("c",), None, ("b",), True),
    ],
)
def test_which_labels_stay(labels: tuple[str, ...], keep: tuple[str, ...] | None, drop: tuple[str, ...], expected: bool) -> None:
    assert stays(labels, keep, drop) is expected


def test_a_majority_is_more_than_half() -> None:
    assert majority([("a", "b"), ("a",), ("b",), ("a",)]) == ("a",)
    assert majority([]) == ()


def test_annotations_of_people(tmp_path: Path) -> None:
    frame = pool(300)
    plain = method(expert=None)
    numbered = plain.apply(frame, state_of(plain, [frame])).kept
    assert "meta.concepts" not in numbered.columns
    first = int(numbered.filter(pl.col("truth") == "scan")["meta.cluster"][0])
    path = tmp_path / "labels.json"
    path.write_text(json.dumps({first: ["microscopy", "clinical"]}))
    labelled = method(expert=None, annotations=str(path), keep=["clinical"])
    kept = labelled.apply(frame, state_of(labelled, [frame])).kept
    assert kept["key"].to_list() == numbered.filter(pl.col("meta.cluster") == first)["key"].to_list()
    assert kept["meta.concepts"].unique().to_list() == ["clinical; microscopy"]
    path.write_text('{"99": ["a"]}')
    with pytest.raises(DataError, match="other clusters"):
        state_of(labelled, [frame])
    path.write_text("[]")
    with pytest.raises(DataError, match="cannot be read"):
        state_of(labelled, [frame])


def test_lists_of_labels_and_other_columns() -> None:
    frame = pool(300).with_columns(many=pl.concat_list("meta.kind", pl.lit("figure")), none=pl.lit(None), number=pl.lit(1))
    state = state_of(method(expert="many"), [frame])
    assert all("figure" in labels for labels in state.labels)
    assert set(state_of(method(expert="none"), [frame]).labels) == {()}
    with pytest.raises(DataError, match="holds no labels"):
        state_of(method(expert="number"), [frame])
    with pytest.raises(DataError, match="labels are too many"):
        state_of(method(expert="key", clusters=2), [pool(1500)])


def test_refusals() -> None:
    for values in ({"keep": ["a"]}, {"balance": True}, {"expert": "a", "annotations": "b"}, {"clusters": 10, "sample": 5}):
        with pytest.raises(ConfigError):
            Config.parse(values)
    with pytest.raises(DataError, match="Fewer pairs than clusters"):
        state_of(method(), [pool(4)])
    with pytest.raises(DataError, match="no features"):
        clustering.features_of(pool(4).drop("feature"))


def test_axes_come_by_falling_variance_and_explain_the_rows() -> None:
    draw = np.random.default_rng(1)
    feature_ND = draw.normal(size=(200, 5)) * [5, 1, 3, 0.1, 2]
    axes = clustering.principal_axes(feature_ND, 5)
    assert (np.diff(axes.variance_C) < 0).all()
    np.testing.assert_allclose(axes.project(feature_ND) @ axes.component_CD + axes.mean_D, feature_ND)
    assert (axes.component_CD[np.arange(5), np.abs(axes.component_CD).argmax(axis=1)] > 0).all()
