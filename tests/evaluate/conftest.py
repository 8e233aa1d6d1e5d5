"""A checkpoint made of tables: every key and every text has its vector. A WordNet of a few words."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray

from diptych.pairs.schema import CAPTIONS


class TableEncoder:
    """An `Encoder` that looks features up and remembers what it was asked for."""

    def __init__(self, image_of: Mapping[str, NDArray[Any]], text_of: Callable[[str], NDArray[Any]], logit_scale: float = 100.0) -> None:
        self.image_of, self.text_of, self.logit_scale = image_of, text_of, logit_scale
        self.asked: list[str] = []

    def images(self, pairs: pl.DataFrame) -> NDArray[np.float32]:
        return unit(np.stack([self.image_of[key] for key in pairs["key"]]))

    def texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        self.asked += texts
        return unit(np.stack([self.text_of(text) for text in texts]))


def unit(feature: NDArray[Any]) -> NDArray[np.float32]:
    return np.asarray(feature / np.linalg.norm(feature, axis=-1, keepdims=True), np.float32)


def pair_table(keys: Sequence[str], captions: Sequence[Sequence[str]], **columns: Any) -> pl.DataFrame:
    held = [[{"text": text, "source": "alt", "score": None} for text in texts] for texts in captions]
    data = {"key": list(keys), "captions": held, "split": ["test"] * len(keys), **columns}
    return pl.DataFrame(data, schema_overrides={"captions": CAPTIONS, "key": pl.String, "split": pl.String})


@pytest.fixture
def table_encoder() -> type[TableEncoder]:
    return TableEncoder


@pytest.fixture
def pairs_of() -> Callable[..., pl.DataFrame]:
    return pair_table


SYNSETS = {
    "noun": [["sofa", "couch"], ["child", "kid"], ["boat"], ["digit", "number"]],
    "verb": [["run", "sprint"]],
    "adj": [["happy", "glad"], ["red", "crimson"]],
    "adv": [["quickly", "fast"]],
}


def write_wordnet(folder: Path) -> None:
    """A database in WordNet's own format (wndb(5WN)), with what Debian's package leaves out left out: no `lexnames`, no `index.sense`."""
    folder.mkdir()
    for part, synsets in SYNSETS.items():
        letter = {"noun": "n", "verb": "v", "adj": "a", "adv": "r"}[part]
        data, offsets = "  1 A WordNet of a few words.  \n", defaultdict(list)
        for words in synsets:
            for word in words:
                offsets[word].append(f"{len(data):08}")
            frames = "01 + 02 00 " if part == "verb" else ""
            data += f"{len(data):08} 03 {letter} {len(words):02x} {' '.join(f'{word} 0' for word in words)} 000 {frames}| said of it  \n"
        index = [f"{word} {letter} {len(at)} 0 {len(at)} 0 {' '.join(at)}  \n" for word, at in sorted(offsets.items())]
        (folder / f"data.{part}").write_text(data)
        (folder / f"index.{part}").write_text("".join(index))
        (folder / f"{part}.exc").write_text("children child\n" if part == "noun" else "")
    for path in folder.iterdir():
        path.chmod(0o644)  # NLTK reads nothing that others can write


@pytest.fixture
def wordnet(tmp_path: Path) -> Path:
    write_wordnet(tmp_path / "wordnet")
    return tmp_path / "wordnet"
