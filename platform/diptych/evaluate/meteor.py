"""METEOR of captions by NLTK: words that are equal, then words of one stem, then, with WordNet, synonyms.

Source: Lavie and Agarwal, METEOR (2007), whose alpha, beta and gamma NLTK takes; METEOR 1.5, which captions are mostly reported in, has other
ones, paraphrases and lower weights for stems and synonyms (`coco_agreement`). Stems and synonyms are English.

Shape legend: N captions.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from diptych.core.errors import DataError, DiptychError

Floats = NDArray[np.float64]
Words = Sequence[str]

PARTS = ("noun", "verb", "adj", "adv")
FILES = tuple(name for part in PARTS for name in (f"index.{part}", f"data.{part}", f"{part}.exc"))
"""What is read of a WordNet directory: the index, the synsets and the irregular forms of every part of speech."""
LEXICOGRAPHER_FILES = 100
"""More than any WordNet numbers."""


class Thesaurus(Protocol):
    """What METEOR asks of WordNet: the synsets that a word is in."""

    def synsets(self, lemma: str) -> Sequence[Any]:
        """The synsets, each with `lemmas()`, each of these with `name()`."""


class _NoSynonyms:
    """Stands where NLTK would look for its own WordNet."""

    def synsets(self, lemma: str) -> Sequence[Any]:
        del lemma
        return ()


def meteor(captions: Sequence[Words], references: Sequence[Sequence[Words]], thesaurus: Thesaurus | None = None) -> Floats:
    """METEOR of every caption `[N]`, in [0, 1], against its best reference; 0 for a caption without references or without words.

    Exactly NLTK's `meteor_score` on lower-cased words. Synonyms are looked up of what stemming left of a word, as NLTK does it: of `sofa` they
    are found, of `happy`, whose stem `happi` is no word, they are not.

    Args:
        captions: the words of each caption.
        references: of each caption, the words of what people wrote.
        thesaurus: where synonyms come from (`read_wordnet`); None: equal words and stems alone.
    """
    from nltk.stem.porter import PorterStemmer
    from nltk.translate.meteor_score import meteor_score

    class Stems:
        stem = staticmethod(lru_cache(maxsize=None)(PorterStemmer().stem))  # captions repeat their words; stemming is most of the time

    known = thesaurus or _NoSynonyms()
    return np.asarray(
        [
            float(meteor_score(others, words, stemmer=Stems(), wordnet=known)) if others else 0.0
            for words, others in zip(captions, references, strict=True)
        ],
        dtype=np.float64,
    )


def missing_files(folder: Path) -> list[str]:
    """The names of the files of a WordNet directory that are not there."""
    return [name for name in FILES if not (folder / name).is_file()]


@lru_cache(maxsize=1)
def read_wordnet(folder: Path) -> Thesaurus:
    """WordNet's database as a directory holds it, in seconds; the last one read is kept. Raises DataError if it cannot be read.

    NLTK opens files below its own data folders alone, so the directory becomes one of these for the process.
    """
    import nltk.data
    from nltk.corpus.reader.wordnet import WordNetCorpusReader, WordNetError

    class Reader(WordNetCorpusReader):  # type: ignore[misc]
        def open(self, file: str) -> Any:
            if file == "lexnames":  # which Debian leaves out; METEOR does not ask what lexicographers called their files
                return io.StringIO("".join(f"{number:02} {number:02} 0\n" for number in range(LEXICOGRAPHER_FILES)))
            return super().open(file)

        def map_wn(self, version: str = "wordnet") -> None:
            """Nothing: the numbers of another WordNet would be looked for among NLTK's downloads."""

    root = str(folder.resolve())
    if root not in nltk.data.path:
        nltk.data.path.append(root)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # other languages are not there; nobody asks for them
        try:
            return _WordNet(Reader(root, omw_reader=None), folder)
        except (WordNetError, OSError, ValueError, LookupError, StopIteration) as error:
            raise _unreadable(folder, error) from None


class _WordNet:
    """NLTK's reader, asked once a word; a gap between index and data is an error and no lack of synonyms."""

    def __init__(self, reader: Any, folder: Path) -> None:
        self._reader, self._folder = reader, folder
        self._found: dict[str, Sequence[Any]] = {}

    def synsets(self, lemma: str) -> Sequence[Any]:
        if lemma not in self._found:
            with warnings.catch_warnings():
                warnings.simplefilter("error", UserWarning)
                try:
                    self._found[lemma] = self._reader.synsets(lemma)
                except Exception as error:  # NLTK's own class, an assertion or a warning, by where the text breaks off
                    raise _unreadable(self._folder, error) from None
        return self._found[lemma]


def _unreadable(folder: Path, reason: object) -> DiptychError:
    expected = "WordNet's database files, all of one version, which no other account can write"
    return DataError.at("WordNet cannot be read", folder, f"<{reason}>", expected, "install them again, or leave wordnet out")
