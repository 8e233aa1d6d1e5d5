from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import polars as pl
import pytest

from diptych.core import catalogue
from diptych.core.config import Config as BaseConfig
from diptych.core.errors import ConfigError, DataError
from diptych.core.points import Examples, Support
from diptych.evaluate.few_shot import Config
from diptych.evaluate.pictures import draw_shots, principal_axes, stacked, take

NAMES = ["cat", "dog", "owl"]
SIZES = {"pool": 24, "val": 9, "test": 30}
SEEN: list[Seen] = []


@dataclass
class Seen:
    """What one adapter was shown, in turn."""

    support: Support | None = None
    predicted: list[Examples] = field(default_factory=list)
    updated: list[Examples] = field(default_factory=list)
    turns: list[str] = field(default_factory=list)


class Spy(BaseConfig):
    """An adapter that answers with the nearest labelled picture, or a constant, and notes what it is shown."""

    method: Literal["spy"] = "spy"
    needs: tuple[str, ...] = ()
    online: bool = False
    select: int = 0
    twist: float = 0.0

    def build(self) -> Any:
        spied = Seen()
        SEEN.append(spied)
        adapter = SimpleNamespace(needs=frozenset(self.needs))

        def fit(support: Support) -> Any:
            spied.support = support
            if self.select:
                adapter.selection = SimpleNamespace(row_S=np.arange(self.select), label_S=np.zeros(self.select, np.int64))
            return adapter

        def predict(test: Examples) -> Any:
            spied.predicted.append(test)
            spied.turns.append("predict")
            support = spied.support
            score = np.zeros((len(test.feature_ND), len(support.text_CD)), np.float32)
            score[:, 0] = self.twist
            if support.labelled is not None:
                nearest = (test.feature_ND @ support.labelled.feature_ND.T).argmax(axis=1)
                score[np.arange(len(score)), support.labelled.label_N[nearest]] = 1
            return score

        def update(test: Examples) -> None:
            spied.updated.append(test)
            spied.turns.append("update")

        adapter.fit, adapter.predict = fit, predict
        if self.online:
            adapter.update = update
        return adapter


@pytest.fixture(autouse=True)
def spy(monkeypatch):
    """A catalogue that holds the spy beside the real adapters."""
    SEEN.clear()
    row = catalogue.Row("spy", "adapter", f"{__name__}:Spy", "Adapter", "", "")
    known = {**catalogue.rows(), "spy": row}
    monkeypatch.setattr(catalogue, "rows", lambda: known)
    genuine = catalogue.config_class
    monkeypatch.setattr(catalogue, "config_class", lambda asked: Spy if asked is row else genuine(asked))


def shown() -> list[Seen]:
    """What fitted adapters were shown; some are built only to ask for their needs."""
    return [seen for seen in SEEN if seen.support is not None]


@pytest.fixture
def world(table_encoder, pairs_of):
    """Three classes of noisy pictures in three splits, rows out of order; captions give the class away, and a second encoder."""
    rng = np.random.default_rng(0)
    vector = np.linalg.qr(rng.standard_normal((8, 8)))[0]
    split = np.repeat(list(SIZES), list(SIZES.values()))
    label = np.arange(len(split)) % 3
    keys = [f"{name}-{row:03d}" for row, name in enumerate(split)]
    images = {key: vector[c] + 0.45 * rng.standard_normal(8) for key, c in zip(keys, label, strict=True)}
    encoder = table_encoder(images, lambda text: vector[next(c for c, name in enumerate(NAMES) if name in text)], logit_scale=50.0)
    second = {key: rng.standard_normal(5) * [9, 4, 1, 1, 1] + 3 for key in keys}
    encoder.auxiliary = lambda frame, name: np.stack([second[key] for key in frame["key"]]).astype(np.float32)
    order = rng.permutation(len(split))
    pairs = pairs_of(
        [keys[row] for row in order], [[f"one {NAMES[label[row]]}"] for row in order], label=label[order].tolist(),
        label_name=[NAMES[c] for c in label[order]],
    )  # fmt: skip
    return encoder, pairs.with_columns(split=pl.Series([str(split[row]) for row in order]))


def parse(*adapters, **values):
    return Config.parse({"templates": ["{}"], "shots_from": "pool", "shots": [1], "adapters": list(adapters), **values}, "evaluate.3")


def run(world, *adapters, seed=0, **values):
    return parse(*adapters, **values).build().run(*world, "zoo", seed)


# ---------------------------------------------------------------- draws of shots


def test_draws_are_balanced_nested_and_named_by_key():
    rng = np.random.default_rng(0)
    keys, label = [f"k{row}" for row in range(60)], rng.permutation(np.repeat(np.arange(4), [9, 11, 20, 20]))
    by_shots = {shots: draw_shots(keys, label, 4, shots, draw=5) for shots in (1, 2, 5, 9)}
    for shots, rows in by_shots.items():
        assert label[rows].tolist() == np.repeat(np.arange(4), shots).tolist()
    for fewer, more in ((1, 2), (2, 5), (5, 9)):
        assert set(by_shots[fewer]) < set(by_shots[more])
    order = rng.permutation(60)
    shuffled = draw_shots([keys[row] for row in order], label[order], 4, 5, draw=5)
    assert {keys[row] for row in by_shots[5]} == {keys[order[row]] for row in shuffled}
    assert set(by_shots[5]) != set(draw_shots(keys, label, 4, 5, draw=6))


def test_a_class_with_too_few_pictures_is_named():
    with pytest.raises(DataError, match="at most 2: so many has class 1"):
        draw_shots(list("abcde"), np.array([0, 0, 0, 1, 1]), 2, 3, draw=0)
    with pytest.raises(DataError, match="class 2"):
        draw_shots(list("abcde"), np.array([0, 0, 0, 1, 1]), 3, 1, draw=0)


def test_all_adapters_see_the_same_shots_and_more_of_them_hold_the_fewer(world):
    run(world, {"method": "spy"}, {"method": "spy", "name": "other"}, shots=[1, 2], draws=[7])
    one, two, other_one, _ = [{tuple(row) for row in seen.support.labelled.feature_ND} for seen in shown()]
    assert one == other_one
    assert one < two
    assert [len(one), len(two)] == [3, 6]


def test_all_shots_are_the_whole_split(world):
    row = run(world, {"method": "spy"}, shots=["all"], draws=[1])[0]
    assert (row.task, row.shots) == ("spy-allshot", None)
    assert np.bincount(shown()[0].support.labelled.label_N).tolist() == [8, 8, 8]


# ---------------------------------------------------------------- what adapters may see


@pytest.mark.parametrize("online", [False, True])
def test_no_label_reaches_predict(world, online):
    run(world, {"method": "spy", "needs": ["captions"], "online": online}, {"method": "spy", "name": "b", "online": online}, draws=[1])
    tests = [examples for seen in shown() for examples in (*seen.predicted, *seen.updated)]
    assert len(tests) == (4 if online else 2)
    assert all(examples.label_N is None and examples.caption_ND is None for examples in tests)


def test_unlabelled_pictures_carry_neither_labels_nor_captions(world):
    run(world, {"method": "spy", "needs": ["unlabelled"]}, {"method": "spy", "name": "b", "needs": ["captions"]}, shots=[0], draws=[1])
    first, second = shown()
    assert (first.support.unlabelled.label_N, first.support.unlabelled.caption_ND) == (None, None)
    assert len(first.support.unlabelled.feature_ND) == SIZES["pool"]
    assert first.support.labelled is None
    assert second.support.unlabelled is None


def test_captions_go_with_their_shots(world):
    run(world, {"method": "spy", "needs": ["captions", "labelled"]}, shots=[2], draws=[1])
    support = shown()[0].support
    assert support.labelled.caption_ND @ support.text_CD.T == pytest.approx(np.eye(3)[support.labelled.label_N], abs=1e-6)
    assert support.validation.caption_ND is None


def test_captions_are_encoded_only_if_wanted(world):
    run(world, {"method": "spy"}, draws=[1])
    assert shown()[0].support.labelled.caption_ND is None
    assert set(world[0].asked) == set(NAMES)


def test_an_online_adapter_meets_the_test_split_in_the_order_of_keys(world):
    encoder, pairs = world
    run(world, {"method": "spy", "online": True}, stream=7, draws=[1])
    seen = shown()[0]
    assert [len(batch.feature_ND) for batch in seen.predicted] == [7, 7, 7, 7, 2]
    assert all((a.feature_ND == b.feature_ND).all() for a, b in zip(seen.predicted, seen.updated, strict=True))
    expected = encoder.images(pairs.filter(pl.col("split") == "test").sort("key"))
    assert (np.concatenate([batch.feature_ND for batch in seen.predicted]) == expected).all()


def test_an_online_adapter_is_scored_on_a_batch_before_it_learns_from_it(world):
    run(world, {"method": "spy", "online": True}, stream=16, draws=[1])
    assert shown()[0].turns == ["predict", "update"] * 2


# ---------------------------------------------------------------- the second encoder


def test_axes_come_from_the_pool_alone(world):
    encoder, pairs = world
    run(world, {"method": "spy", "needs": ["unlabelled", "auxiliary"]}, auxiliary="pixels", auxiliary_pca=2, shots=[0], draws=[1])
    seen = shown()[0]
    pool = seen.support.unlabelled.auxiliary_NE
    assert pool.mean(axis=0) == pytest.approx(np.zeros(2), abs=1e-5)
    assert np.square(pool).mean() == pytest.approx(1)
    frames = {split: pairs.filter(pl.col("split") == split).sort("key") for split in SIZES}
    axes = principal_axes(encoder.auxiliary(frames["pool"], "pixels"), 2)
    assert seen.predicted[0].auxiliary_NE == pytest.approx(axes.project(encoder.auxiliary(frames["test"], "pixels")), abs=1e-5)


def test_principal_axes_against_scikit_learn():
    from sklearn.decomposition import PCA

    rng = np.random.default_rng(0)
    feature = (rng.standard_normal((40, 6)) * [5, 3, 2, 1, 0.5, 0.1] + 4).astype(np.float32)
    ours, theirs = principal_axes(feature, 3).project(feature), PCA(3).fit_transform(feature.astype(np.float64))
    theirs /= np.sqrt(np.square(theirs).mean())
    assert np.abs(ours) == pytest.approx(np.abs(theirs), abs=1e-4)
    axis = principal_axes(feature, 3).axis_EK
    assert (axis[np.abs(axis).argmax(axis=0), np.arange(3)] > 0).all()
    with pytest.raises(DataError, match="at most 4"):
        principal_axes(feature[:5], 5)


def test_an_encoder_without_a_second_one_is_refused(world):
    del world[0].auxiliary
    with pytest.raises(DataError, match="no second one"):
        run(world, {"method": "spy", "needs": ["auxiliary"]}, auxiliary="pixels", draws=[1])


# ---------------------------------------------------------------- what is refused before anything runs


@pytest.mark.parametrize(
    ("adapter", "values", "where"),
    [
        ({"method": "gda"}, {"shots": [0, 1]}, "shots"),
        ({"method": "spy", "needs": ["validation"]}, {"validation": None}, "validation"),
        ({"method": "nola"}, {"shots": [0]}, "auxiliary"),
        ({"method": "spy"}, {"auxiliary_pca": 3}, "auxiliary_pca"),
        ({"method": "spy"}, {"shots": [-1]}, "shots"),
        ({"method": "spy"}, {"draws": [1, 1]}, "draws"),
        ({"method": "gdaa"}, {}, "adapters.0.method"),
        ({"method": "clip"}, {}, "adapters.0.method"),
        ({"method": "gda", "alhpa": 1.0}, {}, "adapters.0.alhpa"),
        ({"method": "gda", "name": "G D A"}, {}, "adapters.0.name"),
    ],
)
def test_what_cannot_work_is_refused_with_its_place(adapter, values, where):
    with pytest.raises(ConfigError) as caught:
        parse(adapter, **values)
    assert [problem.where for problem in caught.value.problems] == [f"evaluate.3.{where}"]


def test_all_unserved_needs_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        parse({"method": "gda"}, {"method": "nola"}, {"method": "gda", "fitter": "em"}, shots=[0])
    assert [problem.where for problem in caught.value.problems] == [
        f"evaluate.3.{place}" for place in ("adapters.0.name", "adapters.2.name", "shots", "auxiliary")
    ]


def test_a_missing_caption_names_its_pair(world):
    encoder, pairs = world
    bare = pairs.with_columns(captions=pl.when(pl.col("key") == "pool-004").then(pl.col("captions").list.head(0)).otherwise("captions"))
    with pytest.raises(DataError, match="pool-004"):
        run((encoder, bare), {"method": "spy", "needs": ["captions"]}, draws=[1])


# ---------------------------------------------------------------- the rows


def test_a_row_a_draw_and_one_over_draws(world):
    rows = run(world, {"method": "spy"}, draws=[1, 2, 3])
    assert {(row.set, row.task, row.method, row.shots) for row in rows} == {("zoo", "spy-1shot", "spy", 1)}
    for metric in ("acc1", "mean_per_class"):
        whole, *single = [row for row in rows if row.metric == metric]
        assert [row.seed for row in (whole, *single)] == [None, 1, 2, 3]
        values = [row.value for row in single]
        assert len(set(values)) > 1
        assert whole.value == pytest.approx(np.mean(values))
        assert whole.per_example == pytest.approx(np.mean([row.per_example for row in single], axis=0))
        reach = 4.302653 * np.std(values, ddof=1) / np.sqrt(3)  # Student's t, two degrees of freedom
        assert (whole.low, whole.high) == pytest.approx((whole.value - reach, whole.value + reach))
    assert list(rows[0].keys) == sorted(rows[0].keys)


def test_draws_that_agree_leave_the_bootstrap(world):
    whole, *single = [row for row in run(world, {"method": "spy"}, shots=["all"]) if row.metric == "acc1"]
    assert len({row.value for row in single}) == 1
    assert (whole.low, whole.high) == (single[0].low, single[0].high)
    assert whole.low < whole.value < whole.high


def test_accuracy_is_that_of_the_predictions(world):
    encoder, pairs = world
    row = run(world, {"method": "spy"}, draws=[4])[0]
    test = pairs.filter(pl.col("split") == "test").sort("key")
    labelled = shown()[0].support.labelled
    nearest = labelled.label_N[(encoder.images(test) @ labelled.feature_ND.T).argmax(axis=1)]
    assert row.per_example.tolist() == (nearest == test["label"].to_numpy()).tolist()
    assert 0.4 < row.value < 1


def test_settings_differ_by_adapter_and_not_by_its_name(world):
    adapters = {"method": "spy"}, {"method": "spy", "name": "same"}, {"method": "spy", "name": "twisted", "twist": 0.5}
    plain, same, twisted = [row.settings for row in run(world, *adapters, draws=[1]) if row.metric == "acc1" and row.seed is None]
    assert plain == same
    assert {key for key in plain if plain[key] != twisted[key]} == {"adapter"}
    longer = run(world, {"method": "spy"}, draws=[1], stream=8)[0].settings
    assert {key for key in plain if plain[key] != longer[key]} == {"stream"}


def test_pictures_that_an_adapter_labels_itself_are_checked(world):
    _, pairs = world
    rows = [row for row in run(world, {"method": "spy", "select": 7}, draws=[1, 2]) if row.metric == "pseudo_label_acc"]
    label = pairs.filter(pl.col("split") == "pool").sort("key")["label"].to_numpy()
    assert [(row.seed, row.n) for row in rows] == [(None, 7), (1, 7), (2, 7)]
    assert rows[0].value == pytest.approx((label[:7] == 0).mean())


def test_cosine_of_support_and_test(world):
    encoder, pairs = world
    rows = run(world, {"method": "spy"}, shots=["all"], draws=[1], support_cosine=True)
    pool, test = (encoder.images(pairs.filter(pl.col("split") == split)).mean(axis=0) for split in ("pool", "test"))
    (found,) = [row.value for row in rows if row.metric == "support_cosine" and row.seed is None]
    assert found == pytest.approx(pool @ test / np.linalg.norm(pool) / np.linalg.norm(test))
    assert not [row for row in run(world, {"method": "spy"}, draws=[1]) if row.metric == "support_cosine"]


def test_a_configuration_survives_being_written_out():
    config = parse({"method": "gda"}, {"method": "gda", "name": "em", "fitter": "em"}, shots=[1, "all"])
    assert [adapter["name"] for adapter in config.adapters] == ["gda", "em"]
    assert Config.parse(config.plain()) == config


# ---------------------------------------------------------------- views


def test_views_stand_below_each_other_and_share_their_picture(world, monkeypatch):
    encoder, _ = world
    plain, tags = encoder.images, []

    def images(frame, transform=None):
        if transform is None:
            return plain(frame)
        tags.append(transform.tag)
        return plain(frame) + np.float32(len(tags))

    monkeypatch.setattr(encoder, "images", images)
    run(world, {"method": "spy"}, shots=[2], views=3, draws=[1])
    labelled = shown()[0].support.labelled
    assert len(set(tags)) == 3
    assert labelled.feature_ND.shape == (18, 8)
    assert labelled.picture_N.reshape(3, 6).tolist() == [labelled.picture_N[:6].tolist()] * 3
    assert labelled.label_N.reshape(3, 6).tolist() == [[0, 0, 1, 1, 2, 2]] * 3
    first, second, third = labelled.feature_ND.reshape(3, 6, 8)
    assert second - first == pytest.approx(np.ones((6, 8)), abs=1e-5)
    assert third - second == pytest.approx(np.ones((6, 8)), abs=1e-5)


def test_rows_are_taken_of_every_array_that_there_is():
    examples = Examples(np.arange(8.0, dtype=np.float32).reshape(4, 2), np.arange(4))
    some = take(examples, np.array([3, 1]))
    assert (some.label_N.tolist(), some.feature_ND.tolist(), some.caption_ND) == ([3, 1], [[6, 7], [2, 3]], None)
    both = stacked([some, replace(some, label_N=np.array([5, 6]))])
    assert (both.label_N.tolist(), both.auxiliary_NE) == ([3, 1, 5, 6], None)
