"""The benchmark on a small dual encoder: rows, intervals, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch

from diptych.adapt import path_benchmark as bench
from diptych.adapt.straggler_sharpness import Config
from diptych.core.chance import key_hash
from diptych.core.errors import DataError
from diptych.models import clip

NAMES = ["zero", "one", "two"]
ALPHAS = (0.0, 0.4, 0.7, 1.0)


def pictures(keys: list[str], size: int) -> np.ndarray:
    return np.stack([np.random.default_rng(key_hash(key)).integers(0, 256, (3, size, size), dtype=np.uint8) for key in keys])


def encoder_of(model: clip.DualEncoder) -> SimpleNamespace:
    return SimpleNamespace(model=model, settings={"size": 16}, load_pixels=lambda frame: pictures(frame["key"].to_list(), model.image_size))


@pytest.fixture
def pairs() -> pl.DataFrame:
    rows = range(24)
    return pl.DataFrame(
        {
            "key": [f"k{row}" for row in rows],
            "split": ["test" if row % 2 else "train" for row in rows],
            "label": [row % 3 + 5 for row in rows],
            "label_name": [NAMES[row % 3] for row in rows],
        }
    )


@pytest.fixture
def origin(tmp_path: Path) -> str:
    clip.save(clip.create("digits-16", 0), tmp_path / "origin", {})
    return str(tmp_path / "origin")


def config(origin: str, **more: object) -> Config:
    return Config(origin=origin, alphas=ALPHAS, rho=0.01, steps=2, batches=2, batch_size=4, **more)


def test_the_ends_of_the_path_are_the_two_models_as_zero_shot_classifiers(origin: str, pairs: pl.DataFrame) -> None:
    model = clip.create("digits-16", 1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    metrics = {metric.metric: metric for metric in config(origin).build().run(encoder_of(model), pairs, "digits", 0)}
    rows = pairs.filter(pl.col("split") == "test")
    label_N = torch.tensor(rows["label"].to_list()) - 5
    for alpha, end in ((0, clip.load(Path(origin))), (1, model)):
        with torch.no_grad():
            text_CD = end.encode_text(torch.from_numpy(end.tokenizer.encode_cut([f"a photo of a {name}." for name in NAMES])))
            image_ND = end.encode_image(torch.from_numpy(pictures(rows["key"].to_list(), end.image_size)))
            logit_NC = end.logit_scale.exp() * image_ND @ text_CD.T
        assert metrics[f"loss_alpha_{alpha}"].value == pytest.approx(float(torch.nn.functional.cross_entropy(logit_NC, label_N)), rel=1e-5)
        hit_N = (logit_NC.argmax(1) == label_N).float().numpy()
        assert metrics[f"acc_alpha_{alpha}"].per_example == pytest.approx(hit_N)
    assert metrics["acc_alpha_0.4"].keys == rows["key"].to_list()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_every_layer_has_its_rows_and_every_row_an_interval(origin: str, pairs: pl.DataFrame) -> None:
    model = clip.create("digits-16", 1)
    metrics = config(origin, layers="sharpness").build().run(encoder_of(model), pairs, "digits", 0)
    by_name = {metric.metric: metric for metric in metrics}
    assert len(by_name) == len(metrics)
    layers = set(bench.zero_shot_layers(model))
    assert {"visual.stem", "visual.projection", "visual.transformer.resblocks.0", "head"} <= layers
    for layer in layers:
        assert f"instability_{layer}" in by_name
        for alpha in ("0", "0.4", "0.7", "1"):
            assert 0 <= by_name[f"sharpness_{layer}_alpha_{alpha}"].value <= 1.1 * by_name[f"sharpness_alpha_{alpha}"].value + 1e-6
    assert all(metric.low <= metric.high for metric in metrics)
    assert all(
        metric.low <= metric.value <= metric.high for metric in metrics if metric.metric.startswith(("acc", "loss", "sharpness", "corr"))
    )
    assert set(by_name["instability"].settings["layers_ranked"]) == layers
    assert (by_name["acc_alpha_0"].n, by_name["sharpness_alpha_0"].n) == (12, 8)


def test_two_radii_on_one_set_have_a_task_each_and_the_wider_one_finds_no_less(origin: str, pairs: pl.DataFrame) -> None:
    near = config(origin, layers="none")
    wide = near.model_copy(update={"rho": 0.05, "task": "wide"})
    found = {}
    for each in (near, wide):
        metrics = each.build().run(encoder_of(clip.create("digits-16", 1)), pairs, "digits", 0)
        assert {metric.task for metric in metrics} == {each.task}
        found[each.task] = {metric.metric: metric.value for metric in metrics}
    assert found["wide"]["acc_alpha_0.4"] == found["straggler-sharpness"]["acc_alpha_0.4"]
    assert found["wide"]["sharpness_alpha_1"] > found["straggler-sharpness"]["sharpness_alpha_1"] > 0


def test_the_same_seed_gives_the_same_rows_whatever_the_order_of_the_pairs(origin: str, pairs: pl.DataFrame) -> None:
    model, build = clip.create("digits-16", 1), config(origin, layers="none", pictures=7).build()
    first, again = (build.run(encoder_of(model), frame, "digits", 5) for frame in (pairs, pairs.reverse()))
    assert {key for metric in first for key in metric.keys} == {key for metric in again for key in metric.keys}
    assert [m.value for m in first if m.metric.startswith("acc")] == [m.value for m in again if m.metric.startswith("acc")]
    assert first[0].n == 7


def test_a_tower_with_batch_norms_is_refreshed_at_every_point(tmp_path: Path, pairs: pl.DataFrame) -> None:
    origin, model = clip.create("rn-nano-64", 0), clip.create("rn-nano-64", 1)
    batches = [torch.from_numpy(pictures(["a", "b", "c", "d"], 64))]
    refresh = bench.refresher(origin, batches)
    weights = bench.zero_shot_weights(model, torch.eye(3, model.config["embed_dim"]))
    renewed = refresh(weights)
    assert renewed.keys() == weights.keys()
    changed = {name for name in weights if not torch.equal(weights[name], renewed[name])}
    assert changed
    assert all(name.endswith(("running_mean", "running_var")) for name in changed)
    assert bench.refresher(clip.create("digits-16", 0), batches)(weights) == weights


def test_stored_features_alone_are_not_enough(origin: str, pairs: pl.DataFrame) -> None:
    with pytest.raises(DataError, match="the model and its pictures"):
        config(origin).build().run(SimpleNamespace(model=clip.create("digits-16", 1)), pairs, "digits", 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda frame: frame.drop("label"), "no such column"),
        (lambda frame: frame.with_columns(pl.lit("train").alias("split")), "no labelled pairs"),
        (
            lambda frame: frame.with_columns(pl.when(pl.col("key") == "k1").then(None).otherwise("label").alias("label")),
            "no labelled pairs",
        ),
        (lambda frame: frame.with_columns(pl.lit("same").alias("label_name")), "do not match"),
    ],
)
def test_sets_without_sound_labels_are_refused(origin: str, pairs: pl.DataFrame, change: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        config(origin).build().run(encoder_of(clip.create("digits-16", 1)), change(pairs), "digits", 0)


def test_an_origin_of_another_architecture_is_refused(tmp_path: Path, pairs: pl.DataFrame) -> None:
    clip.save(clip.create("rn-nano-64", 0), tmp_path / "origin", {})
    with pytest.raises(DataError, match="other names"):
        config(str(tmp_path / "origin")).build().run(encoder_of(clip.create("digits-16", 1)), pairs, "digits", 0)


def test_the_bootstrap_is_that_of_means_resampled_together() -> None:
    value_NK = np.random.default_rng(0).standard_normal((200, 1)) @ np.array([[1.0, -2.0]])
    found = bench.bootstrap(value_NK, 0, resamples=1500)
    assert found.shape == (1500, 2)
    assert np.allclose(found[:, 1], -2 * found[:, 0])
    assert found[:, 0].std() == pytest.approx(value_NK[:, 0].std() / np.sqrt(200), rel=0.08)
