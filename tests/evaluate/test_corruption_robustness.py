from __future__ import annotations

import numpy as np
import pytest

from diptych.core.errors import ConfigError, DataError
from diptych.evaluate.corruption_robustness import Config
from diptych.evaluate.corruptions import corrupt

COLOURS = {"red": (200, 60, 60), "green": (60, 190, 70), "blue": (60, 70, 210), "grey": (125, 125, 125)}


class ColourEncoder:
    """Sees a picture's mean colour and how rough it is; a prompt is the colour that it names. Remembers which transforms it was given."""

    logit_scale = 10.0

    def __init__(self, image_of):
        self.image_of = image_of
        self.asked = []

    def images(self, pairs, transform=None):
        self.asked.append(transform.tag if transform else "")
        image = np.stack([self.image_of[key] for key in pairs["key"]])
        image = transform(pairs["key"].to_list(), image) if transform else image
        return unit(image.reshape(len(image), -1, 3).mean(axis=1) - 120)

    def texts(self, texts):
        return unit(np.array([np.array(COLOURS[text]) - 120 for text in texts]))


def unit(x):
    x = np.column_stack([x, np.full(len(x), 3.0)])
    return np.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), np.float32)


@pytest.fixture
def tinted(pairs_of):
    rng = np.random.default_rng(0)
    keys = [f"p{number}" for number in range(24)]
    label = np.arange(24) % 4
    image_of = {
        key: np.clip(np.array(list(COLOURS.values())[c]) + rng.integers(-40, 40, (16, 16, 3)), 0, 255).astype(np.uint8)
        for key, c in zip(keys, label, strict=True)
    }
    pairs = pairs_of(keys, [["x"]] * 24, label=label.tolist(), label_name=[list(COLOURS)[c] for c in label])
    return ColourEncoder(image_of), pairs


def config(**values):
    return Config(templates=("{}",), **values)


def test_rows_are_accuracies_of_the_corrupted_pictures(tinted):
    encoder, pairs = tinted
    rows = {r.metric: r for r in config(corruptions=("fog", "shot_noise"), severities=(1, 5)).build().run(encoder, pairs, "tints", 2)}
    assert list(rows) == [
        "acc1", "acc1.fog.1", "acc1.fog.5", "acc1.fog", "acc1.shot_noise.1", "acc1.shot_noise.5", "acc1.shot_noise",
        "mean_acc1",
    ]  # fmt: skip
    changed = {key: corrupt(image, "fog", 5, key) for key, image in encoder.image_of.items()}
    score = ColourEncoder(changed).images(pairs) @ encoder.texts(list(COLOURS)).T
    hit = score.argmax(axis=1) == pairs["label"].to_numpy()
    assert rows["acc1"].value == 1
    assert 0 < hit.mean() < 1
    assert rows["acc1.fog.5"].per_example.tolist() == hit.tolist()
    assert rows["acc1.fog"].value == pytest.approx((rows["acc1.fog.1"].value + hit.mean()) / 2)
    assert rows["mean_acc1"].value == pytest.approx((rows["acc1.fog"].value + rows["acc1.shot_noise"].value) / 2)
    assert all(row.low <= row.value <= row.high and row.n == 24 and row.task == "corruption" for row in rows.values())


def test_everything_by_default_and_each_combination_once(tinted):
    encoder, pairs = tinted
    rows = config(pictures=4).build().run(encoder, pairs, "tints", 0)
    assert len(rows) == 1 + 15 * 6 + 1
    assert len(encoder.asked) == len(set(encoder.asked)) == 1 + 75


def test_neither_order_nor_the_runs_seed_changes_a_picture(tinted):
    encoder, pairs = tinted
    few = config(corruptions=("gaussian_noise",), severities=(5,), pictures=10)
    first, other = (few.build().run(encoder, frame, "tints", seed)[-1] for frame, seed in ((pairs, 0), (pairs.reverse(), 1)))
    assert dict(zip(first.keys, first.per_example, strict=True)) == dict(zip(other.keys, other.per_example, strict=True))
    assert first.n == 10
    drawn = config(corruptions=("gaussian_noise",), severities=(5,), pictures=10, draw=7).build().run(encoder, pairs, "tints", 0)[-1]
    assert drawn.settings != first.settings


@pytest.mark.parametrize(
    "data",
    [
        {"corruptions": []},
        {"corruptions": ["rain"]},
        {"corruptions": ["fog", "fog"]},
        {"severities": [0]},
        {"severities": [2, 2]},
        {"pictures": 0},
    ],
)
def test_configurations_that_cannot_be_meant(data):
    with pytest.raises(ConfigError):
        Config.parse(data)


def test_samples_and_pictures_that_are_too_small(tinted):
    encoder, pairs = tinted
    with pytest.raises(ConfigError, match="larger than the split"):
        config(pictures=25).build().run(encoder, pairs, "s", 0)
    encoder.image_of = {key: image[:8, :8] for key, image in encoder.image_of.items()}
    with pytest.raises(DataError, match="cannot be corrupted"):
        config().build().run(encoder, pairs, "s", 0)
