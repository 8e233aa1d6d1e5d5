from __future__ import annotations

import numpy as np
import pytest

from diptych.core.errors import ConfigError, DataError
from diptych.evaluate import ranks
from diptych.evaluate.retrieval import (
    Config,
    examples,
    gallery,
    image_to_text_ranks,
    ranking,
    recall,
    text_to_image_ranks,
    top,
)


def features(n, width, seed):
    value = np.random.default_rng(seed).standard_normal((n, width)).astype(np.float32)
    return value / np.linalg.norm(value, axis=1, keepdims=True)


@pytest.fixture
def multi():
    """20 images, 1 to 5 texts each in no order, near their images."""
    rng = np.random.default_rng(2)
    image = features(20, 6, 0)
    image_of = rng.permutation(np.repeat(np.arange(20), rng.integers(1, 6, 20)))
    text = image[image_of] + 0.35 * rng.standard_normal((len(image_of), 6)).astype(np.float32)
    return image, text / np.linalg.norm(text, axis=1, keepdims=True), image_of


@pytest.mark.parametrize("chunk", [1, 130, 1 << 22])
def test_ranks_against_full_sorts(multi, monkeypatch, chunk):
    monkeypatch.setattr(ranks, "CHUNK", chunk)
    image, text, image_of = multi
    score = image.astype(float) @ text.T.astype(float)
    by_text = [list(np.argsort(-score[:, m])).index(own) for m, own in enumerate(image_of)]
    by_image = [min(np.flatnonzero(image_of[np.argsort(-line)] == n)) for n, line in enumerate(score)]
    assert text_to_image_ranks(text, image, image_of).tolist() == by_text
    assert image_to_text_ranks(image, text, image_of).tolist() == by_image
    assert 0 < recall(np.array(by_text), 1) < recall(np.array(by_text), 5) < 1


def test_five_captions_do_not_divide_a_hit():
    image = np.eye(2, dtype=np.float32)
    text = np.eye(2, dtype=np.float32)[[0, 1, 1, 1, 1]]
    image_of = np.array([0, 1, 0, 0, 0])  # four of image 0's captions are wrong, one is right
    assert image_to_text_ranks(image, text, image_of).tolist() == [0, 0]


def test_ties_follow_the_given_order_and_do_not_flatter():
    same = np.ones((4, 1), np.float32)
    own = np.arange(4)
    assert text_to_image_ranks(same, same, own).tolist() == [0, 1, 2, 3]
    assert text_to_image_ranks(same, same, own, np.array([3, 2, 1, 0])).tolist() == [3, 2, 1, 0]
    assert image_to_text_ranks(same, same, own, np.array([3, 2, 1, 0])).tolist() == [3, 2, 1, 0]
    # An image with two equal captions is found at the better place of the two.
    two = np.ones((5, 1), np.float32)
    assert image_to_text_ranks(same, two, np.array([0, 1, 2, 3, 0]), np.array([4, 1, 2, 3, 0])).tolist() == [0, 1, 2, 3]


def test_an_image_without_text_is_refused():
    with pytest.raises(DataError, match="no text"):
        image_to_text_ranks(features(3, 2, 0), features(2, 2, 1), np.array([0, 2]))


def test_top_is_the_sorted_beginning():
    # Eighths make ties, and products that are exact in whatever order a processor sums them.
    query, found = ((8 * features(rows, 3, seed)).round() / 8 for rows, seed in ((30, 0), (17, 1)))
    order = np.random.default_rng(0).permutation(17)
    row, score = top(query, found, 4, order)
    for q in range(30):
        line = query[q] @ found.T
        assert row[q].tolist() == np.lexsort((order, -line))[:4].tolist()
        assert score[q] == pytest.approx(line[row[q]])
    assert top(query, found, 99)[0].shape == (30, 17)


@pytest.fixture
def world(table_encoder, pairs_of):
    rng = np.random.default_rng(5)
    keys = [f"k{i}" for i in range(40)]
    image = {key: rng.standard_normal(8) for key in keys}
    captions = [[f"{key} a", f"{key} b"][: 1 + i % 2] for i, key in enumerate(keys)]
    noise = {text: 0.8 * rng.standard_normal(8) for texts in captions for text in texts}

    def text(prompt):
        caption = prompt.removeprefix("a photo of ")
        return image[caption.split()[0]] + noise[caption]

    return table_encoder(image, text), pairs_of(keys, captions)


def test_benchmark_reports_both_directions(world):
    encoder, pairs = world
    rows = {row.metric: row for row in Config().build().run(encoder, pairs, "s", seed=1)}
    found = gallery(pairs, Config())
    assert found.texts == [text for texts in pairs["captions"] for text in [caption["text"] for caption in texts]]
    image, text = encoder.images(pairs), encoder.texts(found.texts)
    expected = {
        "text_to_image": text_to_image_ranks(text, image, found.image_of_M),
        "image_to_text": image_to_text_ranks(image, text, found.image_of_M),
    }
    assert len(rows) == 10
    for way, rank in expected.items():
        for k in (1, 5, 10):
            assert rows[f"{way}_r{k}"].value == pytest.approx((rank < k).mean())
            assert rows[f"{way}_r{k}"].per_example.tolist() == (rank < k).tolist()
        assert rows[f"{way}_mrr"].value == pytest.approx((1 / (rank + 1)).mean())
        assert rows[f"{way}_median_rank"].value == np.median(rank) + 1
        assert rows[f"{way}_median_rank"].per_example is None
    assert 0 < rows["text_to_image_r1"].value < 1
    assert rows["text_to_image_r1"].n == 60
    assert list(rows["text_to_image_r1"].keys)[:4] == ["k0#0", "k1#0", "k1#1", "k2#0"]
    assert list(rows["image_to_text_r1"].keys) == pairs["key"].to_list()


def test_results_do_not_depend_on_the_order_of_rows(world, table_encoder):
    encoder, pairs = world
    flat = table_encoder({key: np.ones(2) for key in pairs["key"]}, lambda text: np.ones(2))
    for model in (encoder, flat):
        straight = Config().build().run(model, pairs, "s", 0)
        turned = Config().build().run(model, pairs.reverse(), "s", 0)
        for a, b in zip(straight, turned, strict=True):
            assert a.value == pytest.approx(b.value)
            if a.per_example is not None:
                assert dict(zip(a.keys, a.per_example, strict=True)) == dict(zip(b.keys, b.per_example, strict=True))
    assert straight[0].value == pytest.approx(1 / 40, abs=1 / 60)  # constant features score at chance


def test_captions_and_prefix(world):
    encoder, pairs = world
    first = gallery(pairs, Config(captions="first", prefix="a photo of "))
    assert first.texts == [f"a photo of {key} a" for key in pairs["key"]]
    assert first.image_of_M.tolist() == list(range(40))
    Config(prefix="a photo of ").build().run(encoder, pairs, "s", 0)
    assert all(text.startswith("a photo of ") for text in encoder.asked)


def test_pool_is_drawn_by_key(world):
    _, pairs = world
    small = gallery(pairs, Config(pool=10)).pairs["key"].to_list()
    assert len(small) == 10
    assert set(small) == set(gallery(pairs.reverse(), Config(pool=10)).pairs["key"])
    assert set(small) < set(gallery(pairs, Config(pool=20)).pairs["key"])
    with pytest.raises(ConfigError, match="pool"):
        gallery(pairs, Config(pool=41))


def test_settings_count_duplicate_texts(table_encoder, pairs_of):
    pairs = pairs_of("abc", [["red", "dot"], ["dot"], ["dot"]])
    encoder = table_encoder({key: np.ones(2) for key in "abc"}, lambda text: np.ones(2))
    settings = Config().build().run(encoder, pairs, "s", 0)[0].settings
    assert (settings["images"], settings["texts"], settings["duplicate_texts"]) == (3, 4, 2)
    assert Config(prefix="x ").build().run(encoder, pairs, "s", 0)[0].settings != settings


def test_pairs_without_captions_are_refused(pairs_of):
    with pytest.raises(DataError, match="'b'"):
        gallery(pairs_of("ab", [["x"], []]), Config())


def test_only_the_split_is_searched(pairs_of):
    pairs = pairs_of("abc", [["x"], ["y"], ["z"]]).with_columns(split=np.array(["test", "train", "test"]))
    assert gallery(pairs, Config()).texts == ["x", "z"]
    with pytest.raises(DataError, match="train"):
        gallery(pairs, Config(split="val"))


def test_ranking_shows_what_was_found(world):
    encoder, pairs = world
    table = ranking(encoder, pairs, 5)
    rows = {row.metric: row for row in Config().build().run(encoder, pairs, "s", 0)}
    assert table.columns == ["query_key", "text", "rank_of_target", "top_keys", "scores"]
    assert (table["rank_of_target"] == 1).mean() == pytest.approx(rows["text_to_image_r1"].value)
    for query, rank, keys, scores in table.select("query_key", "rank_of_target", "top_keys", "scores").rows():
        assert (query in keys) == (rank <= 5)
        assert keys[rank - 1] == query if rank <= 5 else True
        assert scores == sorted(scores, reverse=True)
        assert len(set(keys)) == len(scores) == 5


def test_examples_are_a_handful_of_both_kinds(world):
    encoder, pairs = world
    table = examples(encoder, pairs, seed=0, count=3)
    assert table["right"].to_list() == [True] * 3 + [False] * 3
    assert (table["right"] == (table["rank_of_target"] == 1)).all()
    assert table.equals(examples(encoder, pairs, seed=0, count=3))
    assert not table.equals(examples(encoder, pairs, seed=1, count=3))


@pytest.mark.parametrize("data", [{"ks": [5, 1]}, {"ks": []}, {"pool": 1}, {"captions": "some"}])
def test_configurations_that_cannot_be_meant(data):
    with pytest.raises(ConfigError):
        Config.parse(data)


def test_texts_that_pictures_share(pairs_of, table_encoder):
    looks = {"wide": np.array([1.0, 0]), "narrow": np.array([0, 1.0])}
    shown = {"a": "wide", "b": "wide", "c": "narrow", "d": "narrow"}
    pairs = pairs_of(list(shown), [["x"]] * 4, look=list(shown.values()))
    image_of = {key: looks[text] + np.array([0.1, 0.3]) for key, text in shown.items()}
    image_of["d"] = np.array([1.0, 0])  # looks wide and is called narrow
    model = table_encoder(image_of, lambda text: looks[text])
    rows = {row.metric: row for row in Config(column="look", task="looks", ks=(1, 2)).build().run(model, pairs, "s", 0)}
    assert {row.task for row in rows.values()} == {"looks"}
    assert dict(zip(rows["image_to_text_r1"].keys, rows["image_to_text_r1"].per_example, strict=True)) == {"a": 1, "b": 1, "c": 1, "d": 0}
    assert dict(zip(rows["text_to_image_r1"].keys, rows["text_to_image_r1"].per_example, strict=True)) == {"wide": 0, "narrow": 1}
    assert rows["text_to_image_r2"].value == 1, "any picture with an equal text is a find"
    for wrong in ("nothing", "captions"):
        with pytest.raises(DataError, match="cannot be searched by that column"):
            Config(column=wrong).build().run(model, pairs, "s", 0)
