"""METEOR's values worked by hand from its definition of 2007, and what it does and does not take for a synonym."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diptych.core.errors import DataError
from diptych.evaluate.meteor import FILES, meteor, missing_files, read_wordnet


def score(caption: str, *references: str, thesaurus: Any = None) -> float:
    return float(meteor([caption.split()], [[text.split() for text in references]], thesaurus)[0])


@pytest.fixture(autouse=True)
def _no_nltk_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """NLTK neither looks for its data nor downloads any, whatever is asked; its folders end as they began."""
    import nltk.data
    import nltk.downloader

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("NLTK looked for its own data")

    monkeypatch.setattr(nltk.data, "find", refuse)
    monkeypatch.setattr(nltk.downloader.Downloader, "download", refuse)
    monkeypatch.setattr(nltk.data, "path", list(nltk.data.path))
    read_wordnet.cache_clear()


def test_a_caption_that_is_its_reference() -> None:
    assert score("a dog runs on the beach", "a dog runs on the beach") == pytest.approx(1 - 0.5 / 6**3)
    assert score("a dog", "a cat on a mat", "a dog") == pytest.approx(1 - 0.5 / 2**3)  # the best reference counts


def test_stems() -> None:
    assert score("a dog runs", "a dog running") == pytest.approx(1 - 0.5 / 3**3)
    # two of two words match two of four, in one piece: P = 1, R = 1/2, F = PR / (0.9 P + 0.1 R)
    assert score("dogs sleep", "a dog sleeps here") == pytest.approx(0.5 / 0.95 * (1 - 0.5 / 2**3))
    # equal words go first: `dogs` to `dogs`, though `dog` has its stem and stands last
    assert score("dogs", "dogs dog") == pytest.approx(0.5 / 0.95 * 0.5)
    assert score("dogs x", "dogs x dog") > score("dogs x", "dog x dog") > 0


def test_chunks() -> None:
    assert score("on the mat sat the cat", "the cat sat on the mat") == pytest.approx(0.5)
    assert score("d c b a", "a b c d") < score("a b c d", "a b c d")


def test_every_figure_is_nltks() -> None:
    from nltk.translate.meteor_score import meteor_score

    class NoSynonyms:
        def synsets(self, _: str) -> tuple[()]:
            return ()

    rng = np.random.default_rng(0)
    words = np.asarray(["a", "dog", "dogs", "running", "runs", "ran", "happily", "happy", "beach"])
    texts = [rng.choice(words, size).tolist() for size in rng.integers(1, 12, 300)]
    captions, references = texts[:100], [texts[100 + row : 300 : 100] for row in range(100)]
    theirs = [meteor_score(others, text, wordnet=NoSynonyms()) for text, others in zip(captions, references, strict=True)]
    assert meteor(captions, references).tolist() == theirs


def test_nothing_to_compare() -> None:
    assert meteor([], []).shape == (0,)
    assert score("a cat", "quite another thing") == score("", "a cat") == score("a cat", "") == score("", "") == score("a cat") == 0


def test_synonyms_need_wordnet(wordnet: Path) -> None:
    thesaurus = read_wordnet(wordnet)
    assert score("a red sofa", "a crimson couch") == pytest.approx(1 / 3 * (1 - 0.5))
    assert score("a red sofa", "a crimson couch", thesaurus=thesaurus) == pytest.approx(1 - 0.5 / 3**3)
    assert score("a red sofa", "a crimson boat", thesaurus=thesaurus) < score("a red sofa", "a crimson couch", thesaurus=thesaurus) < 1
    assert score("children sprint", "kids run", thesaurus=thesaurus) == pytest.approx(1 - 0.5 / 2**3)  # irregular forms, verbs, stems
    # NLTK looks up what stemming left of a word, and `happi` is none
    assert score("happy", "glad", thesaurus=thesaurus) == 0


def test_wordnet_is_read_once_and_by_its_own_files(wordnet: Path) -> None:
    assert missing_files(wordnet) == []
    assert read_wordnet(wordnet) is read_wordnet(wordnet)
    (wordnet / "verb.exc").unlink()
    assert missing_files(wordnet) == ["verb.exc"]
    assert missing_files(wordnet / "elsewhere") == list(FILES)


@pytest.mark.parametrize("broken", ["index", "others", "empty"])
def test_a_wordnet_that_cannot_be_read(wordnet: Path, broken: str) -> None:
    index = wordnet / "index.noun"
    match broken:
        case "index":
            index.write_text("sofa n 1 0 2 0 00000031\n")
        case "others":
            index.chmod(0o666)
        case "empty":
            index.write_text("sofa n 1\n")
    with pytest.raises(DataError, match="WordNet cannot be read") as caught:
        read_wordnet(wordnet)
    assert str(wordnet) in str(caught.value)


@pytest.mark.parametrize("text", ["", "00000032 03 n 02 sofa 0\n"])
def test_index_and_data_of_two_versions(wordnet: Path, text: str) -> None:
    (wordnet / "data.noun").write_text(text and "  1 A WordNet of a few words.  \n" + text)
    thesaurus = read_wordnet(wordnet)
    with pytest.raises(DataError, match="WordNet cannot be read"):
        score("a sofa", "a couch", thesaurus=thesaurus)


def test_nltk_is_imported_when_it_is_asked() -> None:
    import subprocess

    script = "import sys, diptych.evaluate.captioning; print([name for name in ('nltk', 'pycocoevalcap') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip() == "[]"
