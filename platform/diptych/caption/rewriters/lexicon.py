"""Rewrites captions by rule from a table of words: offline, about as fast as reading them, the same on every machine."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any, Self

import numpy as np
import polars as pl
from pydantic import Field, model_validator

from diptych.caption.rewriters import Request
from diptych.caption.rewriters.styles import FIELD, FIELDS, STYLES, Phrase, fill
from diptych.core.chance import generator
from diptych.core.config import Config
from diptych.core.errors import DataError, nearest, shorten

Table = Mapping[str, tuple[str, ...]]
MAX_TABLE_BYTES = 256 << 20
ROUNDS = 8  # walks through the styles before a caption is given up as said in every way
READ_CHARS = 600  # no text encoder sees more than some 77 tokens of a caption, so no more of it is worth rewriting


class LexiconConfig(Config):
    """The word table and the sentences of the rule-based rewriter. A user's own words win over WordNet's."""

    wordnet: bool = Field(True, description="use the shipped table of English synonyms and kinds, made from WordNet 3.1")
    path: str | None = Field(None, min_length=1, description="a JSON object or a Parquet file (columns word, alternatives) with more words")
    synonyms: dict[str, tuple[str, ...]] = Field(default_factory=dict, description="more words: word -> words that may stand for it")
    templates: tuple[str, ...] = Field(
        (), description="sentences in place of the built-in styles; fields {caption} {word} {keywords} {tag}"
    )
    share: float = Field(0.5, gt=0, le=1, description="chance of each replaceable word to be replaced; one always is")

    @model_validator(mode="after")
    def _fields_are_known(self) -> Self:
        for template in self.templates:
            unknown = [name for name in FIELD.findall(template) if name not in FIELDS]
            if unknown:
                hint = nearest(unknown[0], FIELDS)
                raise ValueError(f"the template {template!r} has the field {{{unknown[0]}}}; known are {', '.join(FIELDS)} {hint}".rstrip())
            if not FIELD.search(template):
                raise ValueError(f"the template {template!r} has no field, so that all captions would become the same text")
        if not all(others and all(map(str.strip, others)) for others in self.synonyms.values()):
            raise ValueError("synonyms: every word needs at least one alternative, none of them empty")
        return self

    def build(self, seed: int) -> LexiconRewriter:
        """The rewriter. Raises DataError for a `path` that is no word table."""
        return LexiconRewriter(self, seed)


class LexiconRewriter:
    """Rewrites one caption at a time by `(seed, key, copy)`. The copies of a pair walk through the styles or templates."""

    def __init__(self, config: LexiconConfig, seed: int) -> None:
        self.config = config
        self.seed = seed
        own = config.synonyms | (read_table(Path(config.path)) if config.path else {})
        self.own: Table = {word.lower(): others for word, others in (own | config.synonyms).items()}

    def rewrite(self, requests: Sequence[Request]) -> list[str | None]:
        """One rewrite a request; the caption itself where nothing could be said differently."""
        return [self._one(request) for request in requests]

    def alternatives(self, word: str, first: bool, *, english: bool = True) -> Sequence[str]:
        """Words that may stand for `word`. WordNet's are not for names: words with capitals, but for a caption's first."""
        found = self.own.get(word.lower())
        if found is not None or not (english and self.config.wordnet):
            return found or ()
        return shipped_table().get(word.lower(), ()) if word.islower() or (first and word.istitle()) else ()

    def _one(self, request: Request) -> str:
        source = beginning(request.source, READ_CHARS)
        english = is_english(source, request.language)
        phrase = Phrase(source, request.tags, english, partial(self.alternatives, english=english), self.config.share)
        return next(islice(self._candidates(phrase, request.key), request.copy, None), request.source)

    def _candidates(self, phrase: Phrase, key: str) -> Iterator[str]:
        """Different rewrites of one caption, in an order drawn by `(seed, key)`: copy k is the k-th, so that copies differ."""
        draw = generator(self.seed, "laclip.lexicon", key)
        makers = [partial(fill, template) for template in self.config.templates] or STYLES
        seen = {phrase.text.casefold()}
        for index in np.tile(draw.permutation(len(makers)), ROUNDS):
            text = makers[index](phrase, draw)
            if text and text.casefold() not in seen:
                seen.add(text.casefold())
                yield text


@cache
def shipped_table() -> Table:
    """The shipped word table, made by `build_lexicon.py` from WordNet 3.1 (WordNet licence, see NOTICE); read once a process."""
    with files("diptych").joinpath("assets/lexicon.parquet").open("rb") as file:
        return _as_table(pl.read_parquet(file.read()))


def read_table(path: Path) -> dict[str, tuple[str, ...]]:
    """A user's word table: a JSON object word -> list of words, or a Parquet file with `word` and `alternatives`.

    Raises:
        DataError: no such file, larger than 256 MiB, or of another shape.
    """
    try:
        if path.stat().st_size > MAX_TABLE_BYTES:
            raise DataError.at("The word table is too large", path, f"{path.stat().st_size} bytes", f"at most {MAX_TABLE_BYTES} bytes")
        table = _as_table(pl.read_parquet(path)) if path.suffix == ".parquet" else _checked(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, pl.exceptions.PolarsError) as error:
        expected = "a JSON object word -> [words], or Parquet with the columns word and alternatives"
        raise DataError.at("The word table cannot be read", path, f"<{error}>", expected) from None
    return table


def _as_table(frame: pl.DataFrame) -> dict[str, tuple[str, ...]]:
    return _checked(dict(frame.select("word", "alternatives").iter_rows()))


def _checked(data: object) -> dict[str, tuple[str, ...]]:
    rows: list[tuple[Any, Any]] = list(data.items()) if isinstance(data, dict) else [(data, None)]
    for word, others in rows:
        if not (
            isinstance(word, str) and isinstance(others, list) and others and all(isinstance(other, str) and other for other in others)
        ):
            raise ValueError(f"{shorten(word)}: {shorten(others)} is not a word with a list of words")
    return {word: tuple(others) for word, others in rows}


def is_english(text: str, language: str | None) -> bool:
    """Whether English may be put around a caption: its language says so or is unknown, and half of its letters are ASCII."""
    if language is not None and language.lower().split("-")[0] != "en":
        return False
    letters = [letter for letter in text if letter.isalpha()]
    return 2 * sum(letter.isascii() for letter in letters) >= len(letters)


def beginning(text: str, limit: int) -> str:
    """At most `limit` characters of a text, cut between words where it has any."""
    if len(text) <= limit:
        return text
    return text[: limit + 1].rpartition(" ")[0] or text[:limit]
