from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from diptych.core.errors import DataError
from diptych.evaluate.clip_score import Config, best_reference, candidates, clip_score, ref_clip_score
from diptych.pairs.schema import CAPTIONS


def test_clip_score_is_cut_at_zero_and_stretched():
    assert clip_score([-0.3, 0, 0.2, 1]).tolist() == [0, 0, 0.5, 2.5]


def test_ref_clip_score_is_a_harmonic_mean():
    assert ref_clip_score(0.2, 0.5) == pytest.approx(0.5)
    assert ref_clip_score(0.3, 0.6) == pytest.approx(2 / (1 / 0.75 + 1 / 0.6))
    assert ref_clip_score([-0.1, 0.3, 0], [0.6, -0.2, 0]).tolist() == [0, 0, 0]
    assert ref_clip_score(1, 1) == pytest.approx(10 / 7)


def test_best_reference_is_the_candidates_own():
    text = np.eye(3)
    reference = np.array([[0.6, 0.8, 0], [0.8, 0.6, 0], [0, 1, 0]])
    assert best_reference(text, reference, np.array([0, 0, 2])).tolist() == [0.8, -np.inf, 0]


@pytest.fixture
def pairs():
    held = [
        [("alt a", "alt"), ("human a", "human"), ("new a", "rewrite:x")],
        [("human b", "human"), ("new b", "rewrite:x"), ("newer b", "rewrite:y")],
        [("human c", "human"), ("new c", "rewrite:y")],
    ]
    captions = [[{"text": text, "source": source, "score": None} for text, source in row] for row in held]
    data = {"key": ["a", "b", "c"], "captions": captions, "split": ["test"] * 3}
    return pl.DataFrame(data, schema_overrides={"captions": CAPTIONS})


@pytest.mark.parametrize(
    ("source", "references", "texts", "others"),
    [
        (None, None, ["alt a", "human b", "human c"], ["human a", "new a", "new b", "newer b", "new c"]),
        ("rewrite:", "human", ["new a", "new b", "new c"], ["human a", "human b", "human c"]),
        ("human", "alt", ["human a", "human b", "human c"], ["alt a"]),
        (None, "rewrite:y", ["alt a", "human b", "human c"], ["newer b", "new c"]),
    ],
)
def test_candidates_and_references(pairs, source, references, texts, others):
    found = candidates(pairs, "test", source, references)
    assert (found.texts, found.references) == (texts, others)
    assert [found.pairs["key"][int(row)] for row in found.row_of_R] == [text[-1] for text in others]


def test_pairs_without_a_candidate_are_named(pairs):
    with pytest.raises(DataError, match="2 pairs have no caption to score") as error:
        candidates(pairs, "test", "alt")
    assert "'b', 'c'" in str(error.value)


def test_benchmark(table_encoder, pairs):
    rng = np.random.default_rng(0)
    image = {key: rng.standard_normal(6) for key in "abc"}
    noise = {}

    def text(prompt):
        assert prompt.startswith("A photo depicts ")
        return image[prompt[-1]] + noise.setdefault(prompt, 0.6 * rng.standard_normal(6))

    encoder = table_encoder(image, text)
    rows = {row.metric: row for row in Config(references="alt", source="human").build().run(encoder, pairs, "s", seed=0)}
    score = clip_score((encoder.images(pairs) * encoder.texts([f"A photo depicts human {key}" for key in "abc"])).sum(1))
    assert rows["clip_score"].per_example == pytest.approx(score)
    assert rows["clip_score"].value == pytest.approx(score.mean())
    assert rows["clip_score"].low < score.mean() < rows["clip_score"].high
    reference = encoder.texts(["A photo depicts human a"])[0] @ encoder.texts(["A photo depicts alt a"])[0]
    assert rows["ref_clip_score"].keys == ["a"]
    assert rows["ref_clip_score"].value == pytest.approx(ref_clip_score(score[0] / 2.5, reference))
    assert rows["clip_score_p10"].value == pytest.approx(min(score)), "the worst of three"
    assert rows["clip_score_p10"].low <= rows["clip_score_p10"].value <= rows["clip_score_p10"].high
    assert [row.metric for row in Config(references="tag").build().run(encoder, pairs, "s", seed=0)] == ["clip_score", "clip_score_p10"]


@pytest.mark.parametrize(("misfit", "share"), [(-1.0, 0.0), (0.5, 1 / 3), (1.0, 1.0)])
def test_misfits_are_counted_below_a_cosine(table_encoder, pairs, misfit, share):
    angle = {"a": 0.1, "b": 0.8, "c": 1.4}

    def text(prompt):
        return [np.cos(angle[prompt[-1]]), np.sin(angle[prompt[-1]])]

    encoder = table_encoder({key: [1.0, 0.0] for key in "abc"}, text)
    rows = {row.metric: row for row in Config(source="human", misfit=misfit).build().run(encoder, pairs, "s", seed=0)}
    assert rows["misfits"].value == pytest.approx(share)
