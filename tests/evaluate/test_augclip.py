from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from diptych.core.errors import ConfigError, DataError
from diptych.evaluate.augclip import Config, aug_clip, directional, edits, ideal_edit, modification, separate


def unit(feature):
    return feature / np.linalg.norm(feature, axis=-1, keepdims=True)


@pytest.fixture
def lists():
    rng = np.random.default_rng(0)
    return unit(rng.standard_normal((5, 8)) + 1), unit(rng.standard_normal((7, 8)) - 0.5), unit(rng.standard_normal(8) + 1)


@pytest.mark.parametrize(("solver", "c"), [("svm", 1.0), ("svm", 100.0), ("logreg", 1.0)])
def test_the_ideal_lies_on_the_plane_or_behind_it(lists, solver, c):
    source, target, image = lists
    plane = separate(source, target, solver, c)
    assert plane.accuracy == 1
    margin = plane.margin(image)
    assert margin < 0
    assert plane.margin(ideal_edit(plane, image, "project")) == pytest.approx(0, abs=1e-12)
    assert plane.margin(ideal_edit(plane, image, "reflect")) == pytest.approx(-margin)
    # No shorter step reaches the plane: the step is along its normal.
    step = modification(plane, image)
    assert abs(step @ plane.weight_D) == pytest.approx(np.linalg.norm(step) * np.linalg.norm(plane.weight_D))


def test_logistic_regression_is_at_the_minimum_of_its_objective(lists):
    source, target, _ = lists
    plane = separate(source, target, "logreg", 3.0)
    feature, label = np.concatenate([source, target]), np.repeat([-1, 1], [5, 7])
    pull = label / (1 + np.exp(label * (feature @ plane.weight_D + plane.bias)))
    assert pull.sum() == pytest.approx(0, abs=1e-5)
    assert plane.weight_D == pytest.approx(3.0 * pull @ feature, abs=1e-5)


def test_equal_lists_with_every_dual_at_c_take_the_middle_of_the_open_interval():
    source, target = np.array([[1.0, 0], [0.8, 0.6]]), np.array([[0, 1.0], [-0.6, 0.8]])
    plane = separate(source, target, "svm", 0.01)
    assert plane.weight_D == pytest.approx(0.01 * (target.sum(0) - source.sum(0)))
    # Every point is inside its margin, which bounds the intercept from both sides and no more.
    least, most = -1 - (source @ plane.weight_D).min(), 1 - (target @ plane.weight_D).max()
    assert least < most
    assert plane.bias == pytest.approx((least + most) / 2)


def test_no_plane_says_why(lists):
    source, target, image = lists
    for plane in (separate(source, source), separate(source[:0], target), separate(source, source, "logreg")):
        assert plane.fault
        assert np.isnan(aug_clip(target, ideal_edit(plane, image))).all()
    assert not separate(source, target).fault
    with pytest.raises(ConfigError, match="regularisation"):
        separate(source, target, c=0)


def test_nothing_changed_has_no_direction(lists):
    source, target, image = lists
    found = directional(np.stack([image, image + 1e-8, target[0]]), image, source[0], target[0])
    assert found[:2].tolist() == [0, 0]
    assert found[2] == pytest.approx(unit(target[0] - image) @ unit(target[0] - source[0]))
    assert directional(target, image, source[0], source[0]).tolist() == [0] * 7


# ---------------------------------------------------------------- the benchmark


COLOURS, SHAPES, GROUNDS = ("red", "green", "blue"), ("disc", "square", "cross"), ("white", "grey", "black")
AXES = {word: axis for axis, word in enumerate((*COLOURS, *SHAPES, *GROUNDS))}


def embed(words):
    """A world in which a text or picture is the sum of what it names, and pictures lie apart from texts."""
    vector = np.zeros(len(AXES) + 1)
    for word in words.split():
        vector[AXES.get(word, -1)] += 1 if word in AXES else 0.7
    return vector


@pytest.fixture
def world(table_encoder):
    """Red things made blue: rightly, with everything else changed too, or not at all. Pictures hold the word `picture`."""
    rows, image_of = [], {}
    for shape in range(3):
        for ground in range(3):
            number = 3 * shape + ground
            told = f"{SHAPES[shape]} {GROUNDS[ground]}"
            other = f"{SHAPES[(shape + 1) % 3]} {GROUNDS[(ground + 1) % 3]}"
            image_of[f"s{number}"] = embed(f"red {told} picture")
            rows.append({"key": f"s{number}", "split": "train"})
            for kind, content in (("ideal", f"blue {told}"), ("over", f"blue {other}"), ("none", f"red {told}")):
                image_of[f"{kind}{number}"] = embed(f"{content} picture")
                texts = {"meta.source_text": "red", "meta.target_text": "blue", "meta.source_key": f"s{number}", "meta.edit": kind}
                lists = {"meta.source_attributes": f"red {told}; red {SHAPES[shape]};red {GROUNDS[ground]} ; {told}"}
                lists["meta.target_attributes"] = f"blue {told};blue {SHAPES[shape]};blue {GROUNDS[ground]}"
                rows.append({"key": f"{kind}{number}", "split": "test", **texts, **lists})
    return table_encoder(image_of, embed), pl.DataFrame(rows)


@pytest.mark.parametrize("solver", ["svm", "logreg"])
def test_benchmark(world, solver):
    encoder, pairs = world
    rows = {row.metric: row for row in Config(solver=solver, c=100.0).build().run(encoder, pairs, "s", seed=0)}
    assert len(rows) == 3 * 5 + 3
    assert {row.n for row in rows.values()} == {9}
    assert rows["plane"].value == rows["separated"].value == rows["source_side"].value == 1
    # The target text cannot tell an over-edit from the ideal, nor the source picture an unchanged one; AugCLIP can.
    assert rows["project_beats_over"].value == rows["reflect_beats_over"].value == 1
    assert rows["clip_beats_over"].value < 1
    assert rows["image_beats_none"].value == 0
    assert rows["reflect_beats_none"].value == rows["reflect_beats_all"].value == 1
    assert rows["reflect_beats_all"].keys[0] == "s0|blue"


def test_scores_are_those_of_the_functions(world):
    encoder, pairs = world
    config = Config(c=100.0)
    rows, groups = edits(pairs, config)
    scored = config.build().scores(encoder, pairs, rows, groups)
    group = groups[4]
    assert group.source == ("red square grey", "red square", "red grey", "square grey", "red")
    assert group.target[-1] == "blue"
    plane = separate(encoder.texts(group.source), encoder.texts(group.target), "svm", 100.0)
    [source] = encoder.images(pairs.filter(pl.col("key") == "s4"))
    picture = encoder.images(pairs.filter(pl.col("key") == "over4"))
    assert scored.score["reflect"][group.row_of["over"]] == pytest.approx(
        aug_clip(picture, ideal_edit(plane, source, "reflect"))[0], abs=1e-6
    )
    assert scored.margins[4] == pytest.approx(plane.margin(source), abs=1e-6)


def test_lists_of_strings_and_the_order_of_rows_give_the_same(world):
    encoder, pairs = world
    run = Config(c=100.0).build().run
    expected = {row.metric: row.value for row in run(encoder, pairs, "s", seed=0)}
    listed = pairs.with_columns(pl.col("meta.source_attributes", "meta.target_attributes").str.split(";"))
    assert {row.metric: row.value for row in run(encoder, listed.reverse(), "s", seed=0)} == expected


def test_a_group_without_a_plane_loses_and_is_counted(world):
    encoder, pairs = world
    flat = (pl.col("meta.source_key") == "s0") & (pl.col("split") == "test")
    same = [
        pl.when(flat).then(pl.lit("red")).otherwise(pl.col(name)).alias(name)
        for name in ("meta.source_attributes", "meta.target_attributes")
    ]
    text = pl.when(flat).then(pl.lit("red")).otherwise(pl.col("meta.target_text")).alias("meta.target_text")
    rows = {row.metric: row for row in Config(c=100.0).build().run(encoder, pairs.with_columns(*same, text), "s", seed=0)}
    assert rows["plane"].value == pytest.approx(8 / 9)
    assert rows["separated"].n == 8
    assert rows["reflect_beats_over"].per_example.tolist() == [0] + [1] * 8


def test_what_does_not_describe_edits_is_refused(world):
    _, pairs = world
    config = Config()
    with pytest.raises(DataError, match="does not describe edits") as error:
        edits(pairs.drop("meta.edit"), config)
    assert "meta.edit" in str(error.value)
    with pytest.raises(DataError, match="two edits of one kind"):
        edits(pairs.with_columns(pl.lit("over").alias("meta.edit")), config)
    with pytest.raises(DataError, match="no source picture"):
        edits(pairs.filter(pl.col("key") != "s3"), config)
    with pytest.raises(DataError, match="not described"):
        edits(pairs.with_columns(pl.lit(None, dtype=pl.String).alias("meta.source_text")), config)
    with pytest.raises(DataError, match="disagree"):
        edits(
            pairs.with_columns(
                pl.when(pl.col("key") == "over2")
                .then(pl.lit("x"))
                .otherwise(pl.col("meta.source_attributes"))
                .alias("meta.source_attributes")
            ),
            config,
        )
    with pytest.raises(DataError, match="No group can be ranked"):
        edits(pairs, Config(preferred="chosen"))
