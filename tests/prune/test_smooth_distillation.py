from __future__ import annotations

import io
from typing import Any

import numpy as np
import polars as pl
import pytest
from PIL import Image

from diptych.core.errors import ConfigError, DataError
from diptych.core.points import Verdict
from diptych.pairs.decode import decode_square
from diptych.prune.smooth_distillation import LR, Config, SmoothDistillation, read_pictures

TINY: dict[str, Any] = {
    "size_px": 8, "channels": 1, "width": 3, "depth": 1, "experts": 1, "max_start": 2, "expert_epochs": 1, "steps": 2, "iterations": 3,
    "augment": ("crop",), "expert": {"epochs": 3, "batch_size": 8, "lr": 0.05}, "pixel_lr": 50.0,
}  # fmt: skip


def png(label: int, number: int) -> bytes:
    """A bright half: left for class 0, right for class 1."""
    grey = np.random.default_rng(number).integers(0, 60, (8, 8))
    grey[:, 4 * label : 4 * label + 4] += 150
    file = io.BytesIO()
    Image.fromarray(grey.astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def table(rows: int = 12) -> pl.DataFrame:
    labels = [number % 2 for number in range(rows)]
    pixels = [png(label, number) for number, label in enumerate(labels)]
    captions = [[{"text": f"class {label}"}] for label in labels]
    return pl.DataFrame({"key": [f"p{number:02d}" for number in range(rows)], "pixels": pixels, "label": labels, "captions": captions})


def method(seed: int = 0, **fields: Any) -> SmoothDistillation:
    return Config.parse({**TINY, **fields}).build(seed)


def decided(frames: list[pl.DataFrame], chosen: SmoothDistillation) -> Verdict:
    (fold,) = chosen.folds()
    partial = fold.map(frames[0], None)
    for frame in frames[1:]:
        partial = fold.merge(partial, fold.map(frame, None))
    state = fold.finish(partial, None)
    verdicts = [chosen.apply(frame, state) for frame in frames]
    return Verdict(pl.concat([verdict.kept for verdict in verdicts]), pl.concat([verdict.rejected for verdict in verdicts]))


def test_a_picture_a_class_is_left_and_it_is_a_learnt_one() -> None:
    frame = table()
    verdict = decided([frame], method())
    kept = verdict.kept
    assert sorted(kept["label"]) == [0, 1]
    assert set(verdict.rejected["reason"]) == {"distilled"}
    assert sorted([*kept["key"], *verdict.rejected["key"]]) == frame["key"].to_list()
    before = dict(frame.select("key", "pixels").iter_rows())
    for key, data in kept.select("key", "pixels").iter_rows():
        assert decode_square(data, 8, 1).shape == (1, 8, 8)
        assert not np.array_equal(decode_square(data, 8, 1), decode_square(before[key], 8, 1))
    assert kept["captions"].to_list() == [[{"text": f"class {label}"}] for label in kept["label"]]
    assert kept.schema[LR] == pl.Float32
    assert kept[LR].n_unique() == 1
    assert kept[LR][0] > 0


def test_nothing_depends_on_order_or_shards_but_on_the_seed() -> None:
    frame = table()
    whole = decided([frame], method()).kept.sort("key")
    cut = decided([frame[7:], frame[:3].reverse(), frame[3:7]], method()).kept.sort("key")
    assert cut.equals(whole)
    assert not decided([frame], method(seed=1)).kept.sort("key").equals(whole)


@pytest.mark.parametrize("init", ["random", "representative"])
def test_without_iterations_the_pictures_stay(init: str) -> None:
    frame = table()
    kept = decided([frame], method(init=init, iterations=0, per_class=2)).kept
    assert kept["label"].value_counts().sort("label")["count"].to_list() == [2, 2]
    before = dict(frame.select("key", "pixels").iter_rows())
    for key, data in kept.select("key", "pixels").iter_rows():
        assert np.abs(decode_square(data, 8, 1).astype(int) - decode_square(before[key], 8, 1)).max() <= 1


def test_each_part_of_the_method_has_an_effect() -> None:
    def outcome(**fields: Any) -> list[bytes]:
        return decided([table()], method(init="random", **fields)).kept.sort("key")["pixels"].to_list()

    whole = outcome(middle="none")
    for fields in ({"balance": False}, {"perturb": 0.0}, {"augment": ()}):
        assert outcome(middle="none", **fields) != whole, fields
    two = {"expert_epochs": 2, "expert": {"epochs": 4, "batch_size": 8, "lr": 0.05}}
    assert outcome(middle="equal", **two) != outcome(middle="none", **two)


def test_distilling_lowers_the_matching_loss() -> None:
    chosen = method(init="random", iterations=30, max_start=1, perturb=0.0, augment=(), expert={"epochs": 3, "batch_size": 12, "lr": 0.05})
    (fold,) = chosen.folds()
    report = chosen.report(fold.finish(fold.map(table(), None), None))
    assert report["pictures"] == 2
    assert report["loss_last"] < report["loss_first"]


def test_pairs_without_a_label_leave_with_that_reason() -> None:
    frame = table().with_columns(label=pl.when(pl.col("key") == "p03").then(None).otherwise(pl.col("label")))
    rejected = decided([frame], method(iterations=0, init="random")).rejected
    assert rejected.filter(pl.col("key") == "p03")["reason"].to_list() == ["no label"]


def test_coloured_pictures() -> None:
    found = read_pictures(table(), 8, 3)
    assert found.image_NCHW.shape == (12, 3, 8, 8)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_start": 4}, "behind the expert's 3 epochs"),
        ({"expert_epochs": 3, "max_start": 1}, "cannot match 3 epochs"),
        ({"depth": 4}, "halvings leave nothing"),
        ({"augment": ["flip", "flip"]}, "at most once"),
        ({"per_class": 0}, "per_class"),
    ],
)
def test_settings_that_cannot_work_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config.parse({**TINY, **fields})


def test_sets_that_cannot_be_distilled_are_refused() -> None:
    with pytest.raises(DataError, match="needs classes"):
        decided([table().drop("label")], method())
    with pytest.raises(DataError, match="too little"):
        decided([table()], method(per_class=7))
    with pytest.raises(DataError, match="too little"):
        decided([table().filter(pl.col("label") == 0)], method())
