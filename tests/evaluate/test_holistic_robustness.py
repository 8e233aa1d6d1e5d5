from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from diptych.core.errors import ConfigError, DataError
from diptych.evaluate import calibration as cal
from diptych.evaluate import ood
from diptych.evaluate.effective_robustness import effective_robustness, fit_line
from diptych.evaluate.holistic_robustness import Config, correspond, correspondence_error, correspondence_recall
from diptych.evaluate.intervals import interval

NAMES = ["cat", "dog", "owl", "cow"]
SIZES = {"val": 160, "test": 200, "noisy": 200, "far": 90, "near": 80, "cue": 60}


@pytest.fixture(scope="module")
def world():
    """Splits around the vectors of four classes: validation, test, a noisier one, two without a class, and one that mixes two classes."""
    rng = np.random.default_rng(0)
    vector = np.linalg.qr(rng.standard_normal((12, 12)))[0]
    split = np.repeat(list(SIZES), list(SIZES.values()))
    label = rng.integers(0, 4, len(split))
    label[split == "noisy"] %= 3
    other = (label + rng.integers(1, 4, len(split))) % 4
    centre = vector[label].copy()
    centre[split == "far"] = 0
    centre[split == "near"] = 0.9 * vector[label[split == "near"]] + vector[5]
    centre[split == "cue"] = 0.6 * vector[label[split == "cue"]] + 0.4 * vector[other[split == "cue"]]
    noise = np.select([split == "noisy", split == "cue"], [0.55, 0.15], 0.35)
    feature = centre + noise[:, None] * rng.standard_normal((len(split), 12))
    name = np.array(NAMES)
    inside = ~np.isin(split, ["far", "near"])
    texture = np.where(rng.random(len(split)) < 0.8, other, label)
    return feature, vector, {
        "label": [int(c) if known else None for c, known in zip(label, inside, strict=True)],
        "label_name": [str(name[c]) if known else None for c, known in zip(label, inside, strict=True)],
        "split": split.tolist(),
        "meta.size": np.where(rng.random(len(split)) < 0.4, "small", "large").tolist(),
        "meta.never": np.where(split == "val", "x", None).tolist(),
        "meta.shape": name[label].tolist(),
        "meta.texture": name[texture].tolist(),
    }  # fmt: skip


@pytest.fixture
def measured(world, table_encoder, pairs_of):
    feature, vector, columns = world
    keys = [f"k{row}" for row in range(len(feature))]
    encoder = table_encoder(dict(zip(keys, feature, strict=True)), lambda text: vector[NAMES.index(text)], logit_scale=60.0)
    pairs = pairs_of(keys, [["x"]] * len(keys), **{name: values for name, values in columns.items() if name != "split"})
    return encoder, pairs.with_columns(split=pl.Series(columns["split"]))


def run(measured, seed=0, **values):
    return {row.metric: row for row in Config.parse({"templates": ["{}"], **values}).build().run(*measured, "zoo", seed)}


def scored(measured, split):
    encoder, pairs = measured
    rows = pairs.filter(pl.col("split") == split)
    return encoder.images(rows) @ encoder.texts(NAMES).T, rows


def test_factors_average_back_to_the_whole_and_an_empty_one_is_nan(measured):
    rows = run(measured, factors=["meta.size", "meta.never"])
    assert set(rows) == {"acc1", *(f"{what}.{f}" for what in ("acc1", "error_ratio") for f in ("size.small", "size.large", "never.x"))}
    small, large = rows["acc1.size.small"], rows["acc1.size.large"]
    assert small.n + large.n == rows["acc1"].n == 200
    assert (small.value * small.n + large.value * large.n) / 200 == pytest.approx(rows["acc1"].value, abs=1e-15)
    assert small.n == len(small.keys) == len(small.per_example)
    assert (small.low, small.high) == interval(small.per_example, 0)
    ratio = rows["error_ratio.size.small"]
    assert ratio.value == pytest.approx((1 - small.value) / (1 - rows["acc1"].value))
    assert ratio.low < ratio.value < ratio.high
    assert ratio.per_example is None
    for metric in ("acc1.never.x", "error_ratio.never.x"):
        assert rows[metric].n == 0
        assert np.isnan([rows[metric].value, rows[metric].low, rows[metric].high]).all()


def test_one_temperature_from_validation_serves_every_split(measured):
    rows = run(measured, calibration={"shifted": ["noisy"], "bins": 10})
    cosine, frame = scored(measured, "val")
    temperature = cal.fit_temperature(60.0 * cosine.astype(np.float64), frame["label"].to_numpy())
    assert rows["temperature"].value == pytest.approx(temperature, rel=1e-6)
    assert temperature > 1.5
    assert rows["temperature"].n == 160
    assert rows["temperature"].low < temperature < rows["temperature"].high
    for split in ("test", "noisy"):
        cosine, frame = scored(measured, split)
        label = frame["label"].to_numpy()
        assert rows[f"acc1.{split}"].value == pytest.approx((cosine.argmax(1) == label).mean())
        for when, divisor in (("before", 1), ("after", temperature)):
            prob = cal.softmax(60.0 * cosine.astype(np.float64), divisor)
            ece = cal.expected_error(prob.max(1), prob.argmax(1) == label, cal.equal_width(prob.max(1), 10))
            assert rows[f"ece.{split}.{when}"].value == pytest.approx(ece)
            assert rows[f"log_loss.{split}.{when}"].value == pytest.approx(-np.log(prob[np.arange(len(label)), label]).mean(), rel=1e-6)
            assert rows[f"brier.{split}.{when}"].value == pytest.approx(cal.brier(prob, label).mean())
            assert rows[f"mce.{split}.{when}"].value >= rows[f"ece.{split}.{when}"].value
            assert rows[f"ece_mass.{split}.{when}"].n == len(label)
        assert rows[f"ece.{split}.after"].value < 0.8 * rows[f"ece.{split}.before"].value
        assert rows[f"log_loss.{split}.before"].settings["split"] == split
    assert rows["log_loss.test.after"].value < rows["log_loss.test.before"].value
    assert not any(".val." in metric for metric in rows)


def test_detection_tells_far_from_near(measured):
    rows = run(measured, ood={"splits": ["far", "near"]})
    assert len(rows) == 1 + 4 * 5 * 2
    inside, outside = (ood.score("energy", scored(measured, split)[0], 60.0) for split in ("test", "far"))
    found = ood.separation(inside, outside)
    for figure, value in found._asdict().items():
        row = rows[f"{figure}.energy.far"]
        assert row.value == pytest.approx(value)
        assert row.low <= row.value <= row.high
        assert row.n == 290
    assert rows["auroc.mcm.far"].value > 0.8
    assert rows["auroc.mcm.far"].value > rows["auroc.mcm.near"].value
    assert set(run(measured, ood={"splits": ["far"], "scores": ["msp"]})) == {
        "acc1", *(f"{figure}.msp.far" for figure in ("auroc", "fpr95", "aupr_in", "aupr_out")),
    }  # fmt: skip


def test_cue_conflict_counts_images_whose_cues_differ(measured):
    rows = run(measured, cue_conflict={"split": "cue"})
    cosine, frame = scored(measured, "cue")
    predicted = np.array(NAMES)[cosine.argmax(1)]
    shape, texture = frame["meta.shape"].to_numpy(), frame["meta.texture"].to_numpy()
    conflict = shape != texture
    by_shape, by_texture = ((predicted == cue)[conflict].sum() for cue in (shape, texture))
    assert rows["shape_bias"].value == pytest.approx(by_shape / (by_shape + by_texture))
    assert rows["cue_accuracy"].value == pytest.approx((by_shape + by_texture) / conflict.sum())
    assert rows["cue_accuracy"].n == conflict.sum() < 60
    assert rows["shape_bias"].n == by_shape + by_texture
    assert rows["shape_bias"].low < rows["shape_bias"].value < rows["shape_bias"].high
    assert rows["shape_bias"].per_example is None


def test_coarse_cues_take_the_mean_over_their_classes(measured):
    encoder, pairs = measured
    group_of = {"cat": "pet", "dog": "pet", "owl": "farm", "cow": "farm"}
    coarse = pairs.with_columns(pl.col("meta.shape", "meta.texture").replace(group_of))
    part = {"split": "cue", "groups": {"pet": ["cat", "dog"], "farm": ["owl", "cow"]}}
    rows = run((encoder, coarse), cue_conflict=part)
    assert rows["cue_accuracy"].value == 1  # two groups: every prediction follows one of two that differ
    assert rows["cue_accuracy"].n < 60
    with pytest.raises(DataError, match="names no class"):
        run(measured, cue_conflict=part)
    with pytest.raises(DataError, match="No picture has a conflict"):
        run((encoder, coarse.with_columns(pl.lit("pet").alias("meta.shape"), pl.lit("pet").alias("meta.texture"))), cue_conflict=part)


def test_effective_robustness_is_measured_from_the_baselines(measured):
    baselines = [[0.4, 0.3], [0.6, 0.45], [0.8, 0.7], [0.9, 0.8]]
    rows = run(measured, effective_robustness={"shifted": ["noisy"], "baselines": baselines})
    shifted = run(measured, split="noisy", factors=["meta.size"])["acc1"].value
    line = fit_line(*np.array(baselines).T, "logit", 200)
    row = rows["effective_robustness.noisy"]
    assert row.value == pytest.approx(float(effective_robustness(line, rows["acc1"].value, shifted, "logit", 200)))
    assert row.low < row.value < row.high
    assert row.settings["split"] == "noisy"


def test_own_classes_leave_the_logits_of_others_out(measured):
    part = {"calibration": {"shifted": ["noisy"]}, "ood": {"splits": ["far"], "scores": ["mcm"]}}
    every, own = run(measured, **part), run(measured, own_classes=True, **part)
    cosine, frame = scored(measured, "noisy")
    assert sorted(frame["label"].unique()) == [0, 1, 2]
    assert own["acc1.noisy"].value == pytest.approx((cosine[:, :3].argmax(1) == frame["label"].to_numpy()).mean())
    assert own["acc1.noisy"].value > every["acc1.noisy"].value
    prob = cal.softmax(60.0 * cosine[:, :3].astype(np.float64))
    assert own["brier.noisy.before"].value == pytest.approx(cal.brier(prob, frame["label"].to_numpy()).mean())
    assert own["auroc.mcm.far"].value == every["auroc.mcm.far"].value  # the test split has all classes
    assert own["acc1"].settings != every["acc1"].settings
    fewer = run(measured, split="noisy", own_classes=True, ood={"splits": ["far"], "scores": ["mcm"]})
    inside, outside = (ood.mcm(scored(measured, split)[0][:, :3]) for split in ("noisy", "far"))
    assert fewer["auroc.mcm.far"].value == pytest.approx(ood.separation(inside, outside).auroc)


def test_pictures_without_a_class_may_carry_labels_that_nobody_reads(measured):
    encoder, pairs = measured
    labelled = pairs.with_columns(
        label=pl.when(pl.col("split") == "far").then(9).otherwise(pl.col("label")),
        label_name=pl.when(pl.col("split") == "far").then(pl.lit("hen")).otherwise(pl.col("label_name")),
    )
    part = {"ood": {"splits": ["far"], "scores": ["mcm"]}}
    assert run((encoder, labelled), **part)["auroc.mcm.far"].value == run(measured, **part)["auroc.mcm.far"].value


def test_corruptions_come_as_rows_of_their_own_task(measured):
    encoder, pairs = measured
    plain = encoder.images

    def images(frame, transform=None):
        return plain(frame) if transform is None else plain(frame.with_columns(key=pl.lit("k0")))

    encoder.images = images
    config = Config.parse({"templates": ["{}"], "corruptions": {"corruptions": ["fog"], "severities": [1, 3]}})
    found = {f"{row.task}/{row.metric}" for row in config.build().run(encoder, pairs, "zoo", 0)}
    assert found == {"robustness/acc1", *(f"corruption/{m}" for m in ("acc1", "acc1.fog.1", "acc1.fog.3", "acc1.fog", "mean_acc1"))}


def test_the_same_seed_gives_the_same_rows(measured):
    part = {"factors": ["meta.size"], "calibration": {}, "ood": {"splits": ["far"]}, "cue_conflict": {"split": "cue"}}
    first, second, other = (run(measured, seed, **part) for seed in (1, 1, 2))
    assert {m: (r.value, r.low, r.high) for m, r in first.items()} == {m: (r.value, r.low, r.high) for m, r in second.items()}
    assert {m: r.value for m, r in first.items()} == {m: r.value for m, r in other.items()}
    assert first["auroc.mcm.far"].low != other["auroc.mcm.far"].low


@pytest.mark.parametrize(
    ("data", "word"),
    [
        ({}, "at least one of"),
        ({"calibration": {"validation": "test"}}, "fitted on"),
        ({"calibration": {"shifted": ["val"]}}, "fitted on"),
        ({"ood": {"splits": []}}, "ood.splits"),
        ({"ood": {"splits": ["test"]}}, "out of distribution"),
        ({"ood": {"splits": ["far"], "scores": ["mcn"]}}, "mcm"),
        ({"effective_robustness": {"shifted": ["x"], "baselines": [[0.1, 0.2]]}}, "baselines"),
        ({"corruptions": {"severities": [9]}}, "severities"),
        ({"factors": ["a"], "templates": ["photo"]}, "templates"),
    ],
)
def test_configurations_that_cannot_be_meant(data, word):
    with pytest.raises(ConfigError, match=word):
        Config.parse(data)


def test_what_the_set_lacks_is_named(measured):
    for values, word in [
        ({"factors": ["meta.colour"]}, "meta.colour"),
        ({"calibration": {"validation": "valid"}}, "valid"),
        ({"ood": {"splits": ["farther"]}}, "farther"),
        ({"cue_conflict": {"split": "cue", "shape": "meta.form"}}, "meta.form"),
    ]:
        with pytest.raises(DataError, match=word):
            run(measured, **values)


def test_figures_of_one_name_are_refused(measured):
    encoder, pairs = measured
    named = pairs.with_columns(noisy=pl.lit(value=True))
    with pytest.raises(DataError, match=r"acc1\.noisy"):
        run((encoder, named), factors=["noisy"], calibration={"shifted": ["noisy"]})


def test_correspondence_finds_the_same_point_in_the_other_view():
    rng = np.random.default_rng(0)
    feature, place, order = rng.standard_normal((30, 8)), rng.standard_normal((30, 3)), rng.permutation(30)
    match = correspond(feature, 5 * feature[order])
    assert (order[match] == np.arange(30)).all()
    error = correspondence_error(place, place[order] + [0.3, 0, 0.4], match)
    assert error == pytest.approx(0.5)
    assert correspondence_recall(error, [0.4, 0.6]).tolist() == [0, 1]
    assert correspondence_recall(np.array([0.0, 1.0, 2.0]), [0.5, 1.0, 1.5]) == pytest.approx([1 / 3, 1 / 3, 2 / 3])
