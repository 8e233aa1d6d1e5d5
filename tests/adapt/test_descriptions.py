import numpy as np
import pytest

from diptych.adapt import descriptions
from diptych.adapt.descriptions import class_prompts, description_classifier, ensemble, mean_direction
from diptych.core import chance
from diptych.core.errors import ConfigError, DataError

SENTENCES = {"cat": ["A small animal with whiskers."], "dog": ["It barks.", "It wags its tail."], "never asked for": []}


class FakeEncoder:
    """Texts as unit vectors drawn by the text; counts what it encodes."""

    logit_scale = 100.0

    def __init__(self):
        self.seen = []

    def images(self, pairs):
        raise NotImplementedError

    def texts(self, texts):
        self.seen += texts
        return np.stack([vector(text) for text in texts])


def vector(text):
    x = chance.generator(0, text).normal(size=6)
    return (x / np.linalg.norm(x)).astype(np.float32)


def test_prompts_are_templates_and_then_descriptions():
    prompts = class_prompts(["dog", "cat"], SENTENCES, ["a {}.", "{}: a {}"])
    assert prompts == [
        ("a dog.", "dog: a dog", "It barks.", "It wags its tail."),
        ("a cat.", "cat: a cat", "A small animal with whiskers."),
    ]


def test_names_and_sentences_with_braces_are_texts():
    assert class_prompts(["{0}"], {"{0}": ["a {} in a {set}"]}, ["the {}"]) == [("the {0}", "a {} in a {set}")]


def test_an_empty_list_is_enough_where_there_are_templates():
    assert class_prompts(["x"], {"x": []}, ["a {}"]) == [("a x",)]
    with pytest.raises(DataError, match="no prompt"):
        class_prompts(["x"], {"x": []})


def test_a_class_without_descriptions_is_refused_with_the_nearest():
    with pytest.raises(DataError, match="did you mean 'dog'"):
        class_prompts(["dogs"], SENTENCES)


@pytest.mark.parametrize("sentences", ["It barks.", ["It barks.", 3], [""], [" "]])
def test_what_is_no_list_of_sentences_is_refused(sentences):
    with pytest.raises(DataError, match="not texts"):
        class_prompts(["dog"], {"dog": sentences})


def test_a_template_without_a_place_is_refused():
    with pytest.raises(ConfigError, match="place for the class name"):
        class_prompts(["dog"], SENTENCES, ["a photo"])


def test_a_class_is_the_mean_direction_of_its_prompts():
    encoder = FakeEncoder()
    text_CD = description_classifier(encoder, [("a", "b"), ("b", "c", "c")])
    expected = [vector("a") + vector("b"), vector("b") + 2 * vector("c")]
    np.testing.assert_allclose(text_CD, [x / np.linalg.norm(x) for x in expected], atol=1e-6)
    assert text_CD.dtype == np.float32
    assert encoder.seen == ["a", "b", "c"], "shared texts are encoded once"
    with pytest.raises(DataError, match="class 1"):
        description_classifier(encoder, [("a",), ()])


def test_every_prompt_counts_alike_whatever_its_norm():
    x, y = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    np.testing.assert_allclose(mean_direction(np.stack([1000 * x, y])), np.sqrt([0.5, 0.5]), rtol=1e-6)


@pytest.mark.parametrize("rows", [[[1.0, 0.0], [-1.0, 0.0]], [[0.0, 0.0]], [[np.nan, 1.0]]])
def test_features_without_a_direction_are_refused(rows):
    with pytest.raises(DataError, match="no direction"):
        mean_direction(np.array(rows))


def test_classifiers_count_by_their_weights():
    a, b = np.array([[3.0, 0.0], [0.0, 1.0]]), np.array([[0.0, 5.0], [0.0, 1.0]])
    np.testing.assert_allclose(ensemble([a, b]), [np.sqrt([0.5, 0.5]), [0, 1]], atol=1e-7)
    np.testing.assert_allclose(ensemble([a, b], [3, 4]), [[0.6, 0.8], [0, 1]], atol=1e-7)
    np.testing.assert_allclose(ensemble([a, b], [1, 0]), [[1, 0], [0, 1]], atol=1e-7)


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [0.0, 0.0], [1.0, np.nan]])
def test_weights_that_do_not_fit_are_refused(weights):
    with pytest.raises(ConfigError, match="weights"):
        ensemble([np.eye(2), np.eye(2)], weights)


def test_classifiers_of_other_shapes_are_refused():
    for classifiers in ([], [np.eye(2), np.eye(3)]):
        with pytest.raises(DataError, match="do not fit together"):
            ensemble(classifiers)


def test_the_example_in_the_documentation():
    import doctest

    assert doctest.testmod(descriptions).failed == 0
