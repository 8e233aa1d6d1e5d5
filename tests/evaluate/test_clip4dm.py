from __future__ import annotations

import numpy as np
import pytest
import torch

from diptych.core.errors import ConfigError, DataError
from diptych.evaluate import clip4dm
from diptych.evaluate.clip4dm import (
    Attribution,
    Config,
    Misaligned,
    attribute,
    f_clip_score,
    is_located,
    location_accuracy,
    lowest_single_words,
    merged,
    misaligned,
    prediction,
    word_lengths,
)
from diptych.evaluate.encode import encode_texts
from diptych.models.clip import build
from diptych.models.tokenizer import Tokenizer

CAPTIONS = ["a red circle", "a dog, a cat and a bird.", "the dog's t-shirt", "a very large purple hexagon on a yellow ground"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 4, "layers": 1, "width": 8, "head_width": 8, "patch_size": 4},
        "text_cfg": {"context_length": 16, "width": 16, "heads": 2, "layers": 4, "mlp_ratio": 2.0},
    }
    made = build(config).eval()
    with torch.no_grad():
        for parameter in made.clip.parameters():
            parameter.normal_(std=0.4)
    return made


@pytest.fixture(scope="module")
def image():
    feature = np.random.default_rng(0).standard_normal((len(CAPTIONS), 8)).astype(np.float32)
    return feature / np.linalg.norm(feature, axis=1, keepdims=True)


# ---------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A photo depicts a cup of coke", ["A", "photo", "depicts", "a", "cup", "of", "coke"]),
        ("two dogs, on the grass.", ["two", "dogs", ",", "on", "the", "grass", "."]),
        ("the dog's  t-shirt!\n(red)", ["the", "dog's", "t-shirt!", "(red)"]),
        ("wait... what", ["wait...", "what"]),
        ("3.5 miles", ["3", ".", "5", "miles"]),
        ("the dog’s caf\u0065\u0301 &amp; bar", ["the", "dog's", "café", "&", "bar"]),
        ("", []),
    ],
)
def test_words(text, words):
    [found] = word_lengths(Tokenizer(77), [text])
    assert [word for word, _ in found] == words


@pytest.mark.parametrize(
    "text", ["wait... what?!", "the dog's owner (a man, 42) isn't 3.5m tall.", "ﬁve “curly” 🐈🐈 ﬀ, x&lt;y ... ,,. a", "Hü.,..b"]
)
def test_words_have_the_tokens_of_the_whole(text):
    [found] = word_lengths(Tokenizer(77), [text])
    assert sum(length for _, length in found) == Tokenizer(77).encode([text])[0].argmax() - 1


def test_words_get_the_means_of_their_tokens(model, image):
    prompts = ["A photo depicts " + caption for caption in CAPTIONS]
    text_NL = torch.from_numpy(model.tokenizer.encode(prompts))
    tokens, cosine_N = clip4dm.token_attributions(model, torch.from_numpy(image), text_NL)
    found = attribute(model, image, CAPTIONS, batch_size=3)
    assert [attribution.cosine for attribution in found] == pytest.approx(cosine_N, abs=1e-6)
    assert found[1].words == ("a", "dog", ",", "a", "cat", "and", "a", "bird", ".")
    assert found[1].score_W == pytest.approx(tokens[1][3:], abs=1e-6)
    assert found[1].without_punctuation().words == ("a", "dog", "a", "cat", "and", "a", "bird")
    assert found[2].words == ("the", "dog's", "t-shirt")
    expected = [tokens[2][3], tokens[2][4:6].mean(), tokens[2][6:9].mean()]
    assert found[2].score_W == pytest.approx(expected, abs=1e-6)


def test_words_beyond_the_context_are_dropped_and_a_cut_one_keeps_what_remains(model, image):
    long = "a b c d e f g h i extraordinarilyunlikely words that follow"
    [found] = attribute(model, image[:1], [long])
    assert found.words == (*"abcdefghi", "extraordinarilyunlikely")
    tokens, _ = clip4dm.token_attributions(
        model, torch.from_numpy(image[:1]), torch.from_numpy(model.tokenizer.encode(["A photo depicts " + long]))
    )
    assert len(tokens[0]) == 14
    assert found.score_W[-1] == pytest.approx(tokens[0][12:].mean(), abs=1e-6)


def test_the_order_and_size_of_batches_do_not_matter(model, image):
    whole = attribute(model, image, CAPTIONS)
    for batch_size in (1, 3):
        for a, b in zip(whole, attribute(model, image, CAPTIONS, batch_size=batch_size), strict=True):
            assert a.words == b.words
            assert a.score_W == pytest.approx(b.score_W, abs=1e-6)
    assert attribute(model, image[:0], []) == []


def test_a_foreign_tokenizer_is_refused(model, image, monkeypatch):
    monkeypatch.setattr(type(model), "tokenizer", property(lambda _: type("Foreign", (), {"tokenizer": print})()))
    with pytest.raises(DataError, match="tokenizer"):
        attribute(model, image, CAPTIONS)


# ---------------------------------------------------------------- read-outs


HELD = Attribution(("a", "cup", ",", "of", "black", "coke", "?!"), np.array([-1.0, 2, -9, -0.2, -3, -4, -8]), 0.4)


def test_threshold_leaves_punctuation_out_and_sorts():
    found = misaligned(HELD, "threshold", -0.5)
    assert found.words == ("coke", "black", "a")
    assert found.place_M.tolist() == [4, 3, 0]
    assert found.total == -8
    assert merged(found) == [("a", -1.0), ("black coke", -3.5)]
    assert prediction(found) == "black coke"
    nothing = misaligned(HELD, "threshold", -20)
    assert (nothing.words, nothing.total, merged(nothing), prediction(nothing)) == ((), 0, [], "")


def test_most_negative_always_names_a_word():
    assert misaligned(HELD, "most_negative").words == (",",)
    fits = Attribution(("x", "y", "z"), np.array([3.0, 1, 1]), 0.9)
    assert misaligned(fits, "most_negative").words == ("y",)
    assert misaligned(fits, "most_negative").total == 1
    assert misaligned(fits, "threshold").total == 0


def test_f_clip_score():
    assert f_clip_score(-0.4, 0.5) == pytest.approx(-0.32)
    assert f_clip_score([-0.4, 0, 0.2], [0, 1, 2.5]).tolist() == [-0.4, 0, 0]


def test_merging_joins_neighbours_only():
    found = Misaligned(np.array([7, 2, 8, 0, 1]), ("h", "c", "i", "a", "b"), np.array([-5.0, -4, -3, -2, -1]))
    assert merged(found) == [("a b c", pytest.approx(-7 / 3)), ("h i", -4)]


def test_located_words_are_whole_words():
    assert is_located("Coke,", "coke")
    assert is_located("racing bike", "a fast racing bike.")
    assert not is_located("a", "cat")
    assert not is_located("", "cat")
    assert not is_located("bike racing", "racing bike")


def test_location_accuracy_counts_foils_only():
    assert location_accuracy([True, False, True, True], [True, True, True, False]) == pytest.approx(2 / 3)


# ---------------------------------------------------------------- the benchmark


class FeaturesOnly:
    def __init__(self, image_of, text_of):
        self.image_of, self.text_of = image_of, text_of
        self.logit_scale = 1.0

    def images(self, pairs):
        return np.stack([self.image_of[key] for key in pairs["key"]])

    def texts(self, texts):
        return self.text_of(texts)


class WithModel(FeaturesOnly):
    def __init__(self, model, image_of):
        super().__init__(image_of, lambda texts: encode_texts(model, texts))
        self.model = model


@pytest.fixture
def world(model, image, pairs_of):
    keys = [f"k{row}" for row in range(4)]
    columns = {
        "meta.foil": ["a blue circle", "a dog, a fish and a bird.", "the dog's old coat", "a very small purple hexagon on a yellow ground"],
        "meta.foil_word": ["blue", "fish", "old coat", "small"],
    }
    pairs = pairs_of(keys, [[caption] for caption in CAPTIONS], **columns)
    return WithModel(model, dict(zip(keys, image, strict=True))), pairs


@pytest.mark.parametrize("readout", ["most_negative", "threshold"])
def test_benchmark_with_foils(world, model, image, readout):
    encoder, pairs = world
    config = Config(readout=readout, epsilon=-1e-3)
    rows = {row.metric: row for row in config.build().run(encoder, pairs, "s", seed=0)}
    originals, foils = attribute(model, image, CAPTIONS), attribute(model, image, pairs["meta.foil"].to_list())

    def fine(attribution):
        return misaligned(attribution, readout, -1e-3).total * (1 - max(attribution.cosine, 0))

    assert rows["f_clip_score"].per_example == pytest.approx([fine(attribution) for attribution in originals], abs=1e-6)
    assert rows["clip_score"].value == pytest.approx(np.mean([2.5 * max(attribution.cosine, 0) for attribution in originals]), abs=1e-6)
    named = [prediction(misaligned(attribution, readout, -1e-3)) for attribution in foils]
    hits = [is_located(word, put_in) for word, put_in in zip(named, pairs["meta.foil_word"], strict=True)]
    assert rows["location_accuracy"].per_example.tolist() == hits
    score = [fine(attribution) for attribution in [*originals, *foils]]
    for_score = clip4dm.average_precision(score, [True] * 4 + [False] * 4)
    assert rows["ap_f_clip_score"].value == pytest.approx(float(for_score))
    assert rows["ap_f_clip_score"].low <= rows["ap_f_clip_score"].value <= rows["ap_f_clip_score"].high
    assert rows["ap_f_clip_score"].n == 8
    turned = {row.metric: row for row in config.model_copy(update={"positive": "foils"}).build().run(encoder, pairs, "s", seed=0)}
    assert turned["ap_f_clip_score"].value == pytest.approx(
        float(clip4dm.average_precision(-np.array(score), [False] * 4 + [True] * 4)), abs=1e-6
    )


def test_benchmark_without_foils(world):
    encoder, pairs = world
    rows = Config(foil=None).build().run(encoder, pairs.drop("meta.foil"), "s", seed=0)
    assert [row.metric for row in rows] == ["clip_score", "f_clip_score"]


def test_the_baseline_names_the_content_word_with_the_lowest_cosine():
    table = {"red": [0.9, 0], "blue": [0.1, 0], "circle": [0.5, 0], "cat": [0.2, 0.9]}
    encoder = FeaturesOnly({}, lambda texts: np.array([table[text.removeprefix("A photo depicts ")] for text in texts]))
    image = np.array([[1, 0], [1, 0], [0, 1], [0, 1]], np.float32)
    words = [("a", "blue", "circle", "."), ("the", "Red,", "cat"), ("of", "a"), ("red", "cat")]
    assert lowest_single_words(encoder, image, words) == ["blue", "cat", "", "red"]
    assert lowest_single_words(encoder, image[:1], [("a",)]) == [""]


def test_the_baseline_is_an_option_of_the_benchmark(world):
    encoder, pairs = world
    rows = {row.metric: row for row in Config(locate="single-word").build().run(encoder, pairs, "s", seed=0)}
    words = [attribution.words for attribution in attribute(encoder.model, encoder.images(pairs), pairs["meta.foil"].to_list())]
    named = lowest_single_words(encoder, encoder.images(pairs), words)
    hits = [is_located(word, put_in) for word, put_in in zip(named, pairs["meta.foil_word"], strict=True)]
    assert rows["location_accuracy"].per_example.tolist() == hits


def test_what_cannot_be_measured_is_said(world, pairs_of):
    encoder, pairs = world
    run = Config().build().run
    with pytest.raises(DataError, match="looks into the text tower"):
        run(FeaturesOnly(encoder.image_of, encoder.text_of), pairs, "s", seed=0)
    with pytest.raises(DataError, match="no foils") as error:
        run(encoder, pairs.drop("meta.foil_word"), "s", seed=0)
    assert "meta.foil_word" in str(error.value)
    wrong = pairs_of(["k0"], [["a red circle"]], **{"meta.foil": ["a blue circle"], "meta.foil_word": ["green"]})
    with pytest.raises(DataError, match="1 foils do not hold"):
        run(encoder, wrong, "s", seed=0)
    with pytest.raises(ConfigError):
        Config.parse({"method": "clip4dm", "epsilon": 1e-3})
    with pytest.raises(ConfigError):
        Config.parse({"method": "clip4dm", "template": "photo:"})
