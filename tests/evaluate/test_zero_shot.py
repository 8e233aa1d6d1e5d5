from __future__ import annotations

import warnings

import numpy as np
import polars as pl
import pytest
from scipy.special import log_softmax
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

from diptych.core.errors import ConfigError, DataError
from diptych.evaluate import ranks
from diptych.evaluate.intervals import interval
from diptych.evaluate.zero_shot import (
    Config,
    class_order,
    class_weights,
    classes,
    classifier,
    log_loss,
    logits,
    mean_per_class,
    top_k_accuracy,
)

NAMES = ["cat", "dog", "owl", "cow", "hen", "pig", "rat"]


def test_classifier_averages_unit_vectors_and_normalises_again():
    prompt = np.array([[[2.0, 0.0], [0.0, 10.0]], [[1.0, 0.0], [3.0, 0.0]]])
    assert classifier(prompt) == pytest.approx(np.array([[np.sqrt(0.5), 1.0], [np.sqrt(0.5), 0.0]]))
    assert classifier(prompt.astype(np.float32)).dtype == np.float32


def test_figures_against_scikit_learn():
    rng = np.random.default_rng(0)
    image, weight = rng.standard_normal((90, 5)), rng.standard_normal((5, 7))
    label = np.concatenate([np.arange(7), rng.integers(0, 3, 83)])
    logit = logits(image, weight, 4.0)
    for k in (1, 3):
        assert top_k_accuracy(logit, label, k) == pytest.approx(top_k_accuracy_score(label, logit, k=k, labels=range(7)))
    predicted = logit.argmax(1)
    assert mean_per_class(predicted == label, label) == pytest.approx(balanced_accuracy_score(label, predicted))
    assert log_loss(logit, label) == pytest.approx(-log_softmax(logit, axis=1)[np.arange(90), label])
    assert class_weights(label).mean() == pytest.approx(1)


@pytest.fixture
def noisy(table_encoder, pairs_of):
    """70 pictures of 7 classes; picture = its class's vector + noise; a prompt = the class's vector + a template's own."""
    rng = np.random.default_rng(1)
    vector = dict(zip(NAMES, rng.standard_normal((7, 8)), strict=True))
    label = np.repeat(np.arange(7), [4, 16, 10, 10, 10, 10, 10])
    keys = [f"p{i}" for i in range(70)]
    images = {key: vector[NAMES[c]] + 1.1 * rng.standard_normal(8) for key, c in zip(keys, label, strict=True)}

    def text(prompt):
        return vector[next(name for name in NAMES if name in prompt)] + np.random.default_rng(len(prompt)).standard_normal(8)

    pairs = pairs_of(keys, [["x"]] * 70, label=label.tolist(), label_name=[NAMES[c] for c in label])
    return table_encoder(images, text, logit_scale=20.0), pairs


def by_metric(rows):
    return {row.metric: row for row in rows}


def test_benchmark_reports_what_the_definitions_say(noisy):
    encoder, pairs = noisy
    rows = by_metric(Config(templates=("a {}.", "one {} here")).build().run(encoder, pairs, "animals", seed=3))
    assert set(rows) == {"acc1", "acc5", "mean_per_class", "log_loss"}
    assert encoder.asked == [t.format(name) for name in NAMES for t in ("a {}.", "one {} here")]
    prompts = encoder.texts(encoder.asked[:]).reshape(7, 2, -1)
    mean = prompts.mean(1)
    score = encoder.images(pairs) @ (mean / np.linalg.norm(mean, axis=1, keepdims=True)).T
    label = pairs["label"].to_numpy()
    hit = score.argmax(1) == label
    assert 0.3 < hit.mean() < 0.95
    assert rows["acc1"].value == pytest.approx(hit.mean())
    assert rows["acc1"].per_example.tolist() == hit.tolist()
    assert rows["mean_per_class"].value == pytest.approx(balanced_accuracy_score(label, score.argmax(1)))
    assert rows["mean_per_class"].per_example.mean() == pytest.approx(rows["mean_per_class"].value)
    assert rows["log_loss"].value == pytest.approx(-log_softmax(20 * score, axis=1)[np.arange(70), label].mean(), rel=1e-5)
    assert (rows["acc1"].low, rows["acc1"].high) == interval(hit, 3)
    assert (rows["mean_per_class"].low, rows["mean_per_class"].high) == interval(hit, 3, weights=class_weights(label))
    assert rows["acc5"].value == pytest.approx(top_k_accuracy_score(label, score, k=5))
    assert all((row.set, row.task, row.n, list(row.keys)) == ("animals", "zero-shot", 70, pairs["key"].to_list()) for row in rows.values())


def test_without_ensemble_every_template_counts_alone(noisy):
    encoder, pairs = noisy
    templates = ("a {}.", "one {} here", "{}")
    alone = [by_metric(Config(templates=(t,)).build().run(encoder, pairs, "s", 0))["acc1"].value for t in templates]
    none = by_metric(Config(templates=templates, ensemble="none").build().run(encoder, pairs, "s", 0))["acc1"]
    assert len(set(alone)) > 1
    assert none.value == pytest.approx(np.mean(alone))


def test_results_do_not_depend_on_chunks_or_rows_order(noisy, monkeypatch):
    encoder, pairs = noisy
    whole = by_metric(Config().build().run(encoder, pairs, "s", 0))
    monkeypatch.setattr(ranks, "CHUNK", 20)
    turned = by_metric(Config().build().run(encoder, pairs.reverse(), "s", 0))
    for metric, row in whole.items():
        assert turned[metric].value == pytest.approx(row.value, rel=1e-6)
        assert dict(zip(turned[metric].keys, turned[metric].per_example, strict=True)) == pytest.approx(
            dict(zip(row.keys, row.per_example, strict=True)), rel=1e-4
        )


def test_the_scale_moves_the_loss_and_no_accuracy(noisy):
    encoder, pairs = noisy
    base = by_metric(Config().build().run(encoder, pairs, "s", 0))
    hot = by_metric(Config(logit_scale=100.0).build().run(encoder, pairs, "s", 0))
    assert hot["acc1"].value == base["acc1"].value
    assert hot["log_loss"].value != pytest.approx(base["log_loss"].value)
    assert hot["acc1"].settings != base["acc1"].settings


def test_settings_tell_unlike_rows_apart(noisy):
    encoder, pairs = noisy

    def settings(pairs=pairs, **config):
        return Config(**config).build().run(encoder, pairs, "s", 0)[0].settings

    assert settings() == settings(templates="plain")
    assert settings()["templates"] != settings(templates="icon")["templates"]
    renamed = pairs.with_columns(label_name=pairs["label_name"].replace("cat", "cat dog"))
    assert settings(renamed)["classnames"] != settings()["classnames"]
    encoder.settings = {"image_size": 64}
    assert settings()["preprocessing"] == {"image_size": 64}


def test_a_class_per_picture(table_encoder, pairs_of):
    rng = np.random.default_rng(0)
    n = 1911
    vector = rng.standard_normal((n, 32))
    keys = [f"k{i}" for i in range(n)]
    encoder = table_encoder(dict(zip(keys, vector, strict=True)), lambda prompt: vector[int(prompt)])
    pairs = pairs_of(keys, [["x"]] * n, label=list(range(n)), label_name=[str(i) for i in range(n)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = by_metric(Config(templates="name-only").build().run(encoder, pairs, "s", 0))
    assert {row.value for metric, row in rows.items() if metric != "log_loss"} == {1.0}


def test_classes_of_other_splits_still_compete(noisy):
    _, pairs = noisy
    split = ["train" if name == "hen" else "test" for name in pairs["label_name"]]
    known, rows = classes(pairs.with_columns(split=np.array(split)), "test")
    assert known.names == NAMES
    assert len(rows) == 60
    assert 4 not in known.label_N


def test_labels_that_skip_numbers_are_closed_up(pairs_of):
    known, _ = classes(pairs_of("abc", [["x"]] * 3, label=[7, 2, 9], label_name=["seven", "two", "nine"]), "test")
    assert known.names == ["two", "seven", "nine"]
    assert known.label_N.tolist() == [1, 0, 2]


def test_topk_beyond_the_classes_is_left_out(table_encoder, pairs_of):
    pairs = pairs_of("abcd", [["x"]] * 4, label=[0, 1, 0, 1], label_name=["u", "v", "u", "v"])
    encoder = table_encoder({key: np.array([1.0, 0.5]) for key in "abcd"}, lambda text: np.array([1.0, float("v" in text)]))
    assert "acc5" not in by_metric(Config(templates="name-only").build().run(encoder, pairs, "s", 0))


@pytest.mark.parametrize(
    ("columns", "headline"),
    [
        ({"label": [0, 1, 2]}, "label_name"),
        ({"label_name": ["a", "b", "c"]}, "'label'"),
        ({"label": [0, 0, 1], "label_name": ["a", "b", "c"]}, "more than one class name"),
        ({"label": [0, 1, 2], "label_name": ["a", "b", "b"]}, "share a class name"),
        ({"label": [0, -1, 2], "label_name": ["a", "b", "c"]}, "out of range"),
        ({"label": [0, None, 2], "label_name": ["a", "b", "c"]}, "no class"),
        ({"label": [0, 1, 2], "label_name": ["a", None, "c"]}, "no class"),
    ],
)
def test_sets_with_broken_classes_are_refused(pairs_of, columns, headline):
    with pytest.raises(DataError, match=headline):
        classes(pairs_of("xyz", [["t"]] * 3, **columns), "test")


def test_an_unknown_split_names_those_there_are(pairs_of):
    with pytest.raises(DataError, match=r"\['test'\]"):
        classes(pairs_of("x", [["t"]], label=[0], label_name=["a"]), "val")


def test_labels_in_another_order_than_the_names_are_noticed(noisy):
    encoder, pairs = noisy
    turned = pairs.with_columns(label_name=pairs["label_name"].replace_strict(dict(zip(NAMES, NAMES[1:] + NAMES[:1], strict=True))))
    with pytest.warns(UserWarning, match="different orders"):
        Config().build().run(encoder, turned, "s", 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Config().build().run(encoder, pairs, "s", 0)
        Config(check_order=False).build().run(encoder, turned, "s", 0)


def test_a_weak_classifier_is_not_taken_for_a_wrong_order():
    rng = np.random.default_rng(0)
    keys = list(map(str, range(3000)))
    label = rng.integers(0, 10, 3000)
    order = class_order(rng.integers(0, 10, 3000), label, keys)
    assert not order.suspect
    assert order.as_given == pytest.approx(0.1, abs=0.03)
    assert class_order((label + 1) % 10, label, keys) == (0.0, 1.0)


@pytest.mark.parametrize(
    "data",
    [
        {"templates": "plane"},
        {"templates": ["a photo"]},
        {"templates": []},
        {"topk": [5, 1]},
        {"topk": [0]},
        {"topk": []},
        {"logit_scale": 0},
        {"ensemble": "mean"},
        {"shots": 1},
    ],
)
def test_configurations_that_cannot_be_meant(data):
    with pytest.raises(ConfigError):
        Config.parse(data)


def test_configuration_round_trips():
    config = Config.parse({"templates": ["a {}"], "topk": [1, 3]})
    assert config.templates == ("a {}",)
    assert Config.parse(config.plain()) == config


def test_the_worst_class_is_reported_where_every_class_can_be_judged():
    rng = np.random.default_rng(0)
    label = np.repeat([0, 1], [20, 12])
    pairs = pl.DataFrame(
        {"key": [f"k{i}" for i in range(32)], "label": label, "label_name": np.array(["cat", "dog"])[label], "split": "test"}
    )
    right = np.where(label == 0, 1.0, rng.permuted(np.arange(32) % 2))

    class Fixed:
        logit_scale = 1.0

        def images(self, rows):
            own = np.eye(2, dtype=np.float32)[label]
            return np.where(right[:, None] > 0, own, 1 - own).astype(np.float32)

        def texts(self, texts):
            return np.stack([np.eye(2, dtype=np.float32)[0 if "cat" in text else 1] for text in texts])

    rows = by_metric(Config(templates=("{}",), task="again").build().run(Fixed(), pairs, "s", 0))
    assert rows["worst_class"].value == pytest.approx(right[label == 1].mean())
    assert rows["worst_class"].n == 12
    assert {row.task for row in rows.values()} == {"again"}
