"""Models made of tables: a model is a mixture of a class's vector and noise, so that its accuracy is known to grow with its skill."""

from __future__ import annotations

import numpy as np
import pytest

from diptych.core.errors import ConfigError, DataError
from diptych.evaluate.effective_robustness import expected, fit_line
from diptych.evaluate.quality_not_quantity import Config, line_of, resampled_lines

NAMES = ["cat", "dog", "owl", "cow"]
SKILL = {"plain": (0.3, 0.5, 0.8), "robust": (0.3, 0.5, 0.8)}
LOSS = {"plain": 0.35, "robust": 0.9}


@pytest.fixture
def zoo(table_encoder, pairs_of):
    """Two sources of three models; those of `plain` lose most of their skill under shift. The shift lacks the last class."""
    rng = np.random.default_rng(0)
    vector = np.linalg.qr(rng.standard_normal((8, 8)))[0][:4]
    split = np.repeat(["test", "moved"], 400)
    label = rng.integers(0, 4, len(split))
    label[split == "moved"] %= 3
    keys = [f"k{row}" for row in range(len(split))]
    noise = rng.standard_normal((len(split), 8)) / np.sqrt(8)
    asked = []

    def model(name: str):
        source, number = name.split("-")
        skill = SKILL[source][int(number)] * np.where(split == "moved", LOSS[source], 1.0)
        feature = skill[:, None] * vector[label] + noise
        one = table_encoder(dict(zip(keys, feature, strict=True)), lambda text: vector[NAMES.index(text)], logit_scale=50.0)
        one.beside = lambda path: asked.append(path) or model(path)
        return one

    names = [NAMES[c] for c in label]
    pairs = pairs_of(keys, [["x"]] * len(keys), label=label.tolist(), label_name=names)
    return model("robust-2"), pairs.with_columns(split=np.array(split)), asked


SOURCES = {"plain": ["plain-0", "plain-1", "plain-2"], "robust": ["robust-0", "robust-1"]}
WHOLE = {
    "templates": ["{}"],
    "shifted": ["moved"],
    "sources": SOURCES,
    "own": "robust",
    "ensembles": {"both": ["plain", "robust"]},
    "read_at": [0.8],
}


def run(zoo, **values):
    encoder, pairs, _ = zoo
    return {row.metric: row for row in Config.parse({**WHOLE, **values}).build().run(encoder, pairs, "zoo", 0)}


def test_the_robust_source_has_the_higher_line_and_the_ensemble_lies_between(zoo) -> None:
    rows = run(zoo)
    at = {name: rows[f"at80.{name}.moved"] for name in ("plain", "robust", "both")}
    assert at["plain"].value + 0.1 < at["both"].value < at["robust"].value
    assert rows["effective_robustness.plain.moved"].value == pytest.approx(0, abs=0.02)
    assert rows["effective_robustness.robust.moved"].value > 0.1
    assert at["plain"].low <= at["plain"].value <= at["plain"].high
    assert set(zoo[2]) == {name for names in SOURCES.values() for name in names}


def test_a_shift_without_a_class_is_held_against_the_same_classes(zoo) -> None:
    rows = run(zoo)
    assert "point.plain.0" not in rows, "accuracy among all classes is not what the shift is held against"
    point = rows["point.plain.0.moved"]
    assert point.n == 400
    line = fit_line(
        *zip(*[(rows[f"point.plain.{i}.moved"].settings["known"], rows[f"point.plain.{i}.moved"].value) for i in range(3)], strict=True),
        "probit",
    )
    assert rows["slope.plain.moved"].value == pytest.approx(line.slope)
    assert rows["at80.plain.moved"].value == pytest.approx(float(expected(line, 0.8, "probit")))
    known = point.settings["known"]
    encoder, pairs, _ = zoo
    inside = pairs.filter((pairs["split"] == "test") & (pairs["label"] < 3))
    weak = encoder.beside("plain-0")
    logits = weak.images(inside) @ weak.texts(NAMES[:3]).T
    assert known == pytest.approx((logits.argmax(axis=1) == inside["label"].to_numpy()).mean())


def test_reading_outside_the_range_is_told(zoo) -> None:
    with pytest.warns(UserWarning, match="outside its models' range"):
        run(zoo, read_at=[0.999])


def test_the_reference_can_be_chosen(zoo) -> None:
    rows = run(zoo, reference="robust")
    assert rows["effective_robustness.robust.moved"].value == pytest.approx(0, abs=0.02)
    assert rows["effective_robustness.plain.moved"].value < -0.1
    assert rows["effective_robustness.plain.moved"].settings["reference"] == "robust"


def test_an_encoder_without_others_is_refused(zoo) -> None:
    del zoo[0].beside
    with pytest.raises(DataError, match="knows no other models"):
        run(zoo)


def test_equal_models_have_no_line() -> None:
    with pytest.raises(DataError, match="equally accurate"):
        line_of(np.full(3, 0.5), np.array([0.1, 0.2, 0.3]), "probit", 100, 100)


def test_accuracies_of_zero_and_one_are_kept_finite() -> None:
    line = line_of(np.array([0.5, 0.8, 1.0]), np.array([0.0, 0.4, 1.0]), "probit", 100, 50)
    assert np.isfinite(line).all()


def test_resampled_lines_leave_out_what_has_no_line() -> None:
    acc_id, acc_shift = np.array([0.3, 0.5, 0.8]), np.array([0.2, 0.4, 0.7])
    drawn = resampled_lines(acc_id, acc_shift, "probit", (1000, 1000), 0)
    assert 800 < len(drawn) < 1000, "a ninth of the draws holds one model alone"
    assert min(line.slope for line in drawn) <= fit_line(acc_id, acc_shift, "probit").slope <= max(line.slope for line in drawn)
    assert drawn == resampled_lines(acc_id, acc_shift, "probit", (1000, 1000), 0)


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"own": "other"}, "own"),
        ({"reference": "other"}, "reference"),
        ({"own": None}, "at least 3 models"),
        ({"read_at": [85.0]}, "not per cent"),
        ({"shifted": ["test"]}, "shifted"),
        ({"ensembles": {"plain": ["plain"]}}, "is the name of a source"),
        ({"ensembles": {"both": ["plain", "no"]}}, "ensembles.both"),
        ({"sources": {"plain": ["a", "b", "c", "d"], "robust": ["x", "y"]}}, "equally many"),
    ],
)
def test_wrong_configurations(values: dict[str, object], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        Config.parse({**WHOLE, **values})


def test_directories_count_for_the_phase() -> None:
    config = Config.parse(WHOLE)
    assert config.directories == ("model_directories",)
    assert config.model_directories == ("plain-0", "plain-1", "plain-2", "robust-0", "robust-1")
