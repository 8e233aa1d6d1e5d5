"""Known values worked by hand; the field's own scorer beside these formulas is in `test_coco_agreement`."""

from __future__ import annotations

import numpy as np
import pytest

from diptych.evaluate.caption_metrics import bleu, bleu_counts, cider, rouge_l, words_of

HYPOTHESES = ["a dog runs on the beach", "two dogs sleep on a couch", "a cat"]
REFERENCES = [
    ["a dog runs on the beach", "a brown dog running along a beach", "dog on sand"],
    ["two cats sleep on a red couch", "cats sleeping on a sofa"],
    ["a plate of food"],
]
SAID = [text.split() for text in HYPOTHESES]
WRITTEN = [[text.split() for text in texts] for texts in REFERENCES]


def test_words() -> None:
    assert words_of("A dog's life, on the well-known SOFA -- no. 7!") == [
        "a",
        "dog's",
        "life",
        "on",
        "the",
        "well-known",
        "sofa",
        "no",
        "7",
    ]
    assert words_of("…") == []


def test_equal_captions_have_the_best_scores() -> None:
    same = [[words] for words in SAID]
    assert bleu(bleu_counts(SAID[:2], same[:2])) == pytest.approx(np.ones(4))
    assert cider(SAID[:2], same[:2]) == pytest.approx([10.0, 10.0])
    assert rouge_l(SAID[0], same[0]) == pytest.approx(1)


def test_nothing_in_common_scores_nothing() -> None:
    other = [[["quite", "another", "thing"]]]
    assert cider([["a", "cat"], ["x"]], [*other, [["y"]]]).tolist() == [0, 0]
    assert rouge_l(["a", "cat"], other[0]) == 0
    assert bleu(bleu_counts([["a", "cat"]], other))[0] < 1e-10
    assert rouge_l([], other[0]) == rouge_l(["a"], []) == 0


def test_bleu_cuts_repetition_and_brevity() -> None:
    counts = bleu_counts([["the"] * 7], [[["the", "cat", "is", "on", "the", "mat"], ["there", "is", "a", "cat", "on", "the", "mat"]]])
    assert bleu(counts)[0] == pytest.approx(2 / 7)
    short = bleu_counts([["the", "cat"]], [[["the", "cat", "sat", "down"]]])
    assert bleu(short)[0] == pytest.approx(np.exp(1 - 4 / 2))
    nearest = bleu_counts([["a"] * 5], [[["a"] * 6, ["a"] * 4, ["a"] * 9]])
    assert nearest.reference_N.tolist() == [4]


def test_cider_weighs_rare_words_more() -> None:
    references = [[["a", "red", "car"]], [["a", "dog"]], [["a", "cat"]], [["a", "bus"]]]
    rare, common = cider([["red"], ["x"], ["x"], ["x"]], references)[0], cider([["a"], ["x"], ["x"], ["x"]], references)[0]
    assert rare > 0
    assert common == 0  # a word of every picture weighs nothing
    assert cider([["a", "cat"]], [[["a", "cat"]]]).tolist() == [0]


def test_cider_punishes_another_length() -> None:
    references = [[["a", "b", "c"]], [["d"]]]
    right = cider([["a", "b", "c"], ["d"]], references)[0]
    long = cider([["a", "b", "c"] * 4, ["d"]], references)[0]
    assert right > long > 0


def test_rouge_takes_the_best_precision_and_the_best_recall() -> None:
    # common subsequences: 3 of 4 words of the caption, 2 of 2 of the short reference
    assert rouge_l(["a", "b", "c", "d"], [["a", "b", "c", "x", "y", "z"], ["a", "d"]]) == pytest.approx(
        (1 + 1.44) * 0.75 / (1 + 1.44 * 0.75)
    )
