"""The language filter: pairs with a caption in one of the languages asked for.

Languages are told by py3langid, a small model of byte sequences that comes with its weights and needs no network (97 languages; Lui &
Baldwin, langid.py, ACL 2012). On captions of a word or two it guesses; `surest` asks for a probability.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import polars as pl
from pydantic import Field, field_validator

from diptych.core.config import Config as BaseConfig
from diptych.core.errors import ConfigError
from diptych.core.points import PairMethod, Verdict

OTHER, UNSURE = "another language", "language not sure"
COLUMN = "language"


class Config(BaseConfig):
    """Which languages stay. A pair keeps its captions in them and gains the column `language`, that of its first such caption."""

    method: Literal["language-filter"] = "language-filter"
    languages: tuple[str, ...] = Field(("en",), min_length=1, description="ISO 639-1 codes of the languages that stay")
    surest: float = Field(0.5, ge=0, le=1, description="least probability of the language, among all that the model knows")
    among: tuple[str, ...] | None = Field(
        None, min_length=2, description="languages to choose among, where it is known what there can be; null: all"
    )

    @field_validator("languages", "among")
    @classmethod
    def _are_codes(cls, codes: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for code in codes or ():
            if not (len(code) == 2 and code.isascii() and code.islower()):
                raise ValueError(f"two small letters a language, such as en, not {code!r}")
        return codes

    def build(self, seed: int) -> LanguageFilter:
        """The method; nothing is drawn. Raises ConfigError for a language that the model does not know."""
        del seed
        return LanguageFilter(self)


@dataclass(frozen=True)
class LanguageFilter(PairMethod):
    """Rejects pairs none of whose captions is in the languages (score: the probability of what the first caption is in)."""

    config: Config

    def apply(self, batch: pl.DataFrame, state: Any) -> Verdict:
        """The verdict on a batch."""
        del state
        config = self.config
        texts = batch["captions"].list.eval(pl.element().struct.field("text")).to_list()
        told = told_apart(texts, config.among)
        good = [[code in config.languages and sure >= config.surest for code, sure in row] for row in told]
        stays = pl.Series([any(row) for row in good], dtype=pl.Boolean)
        languages = [
            next((code for (code, _), fits in zip(row, fit, strict=True) if fits), None) for row, fit in zip(told, good, strict=True)
        ]
        captions = [
            [caption for caption, fits in zip(row, fit, strict=True) if fits]
            for row, fit in zip(batch["captions"].to_list(), good, strict=True)
        ]
        columns = [pl.Series("captions", captions, dtype=batch.schema["captions"]), pl.Series(COLUMN, languages, dtype=pl.String)]
        unsure = pl.Series([bool(row) and row[0][0] in config.languages for row in told], dtype=pl.Boolean)
        reason = pl.when(unsure).then(pl.lit(UNSURE)).otherwise(pl.lit(OTHER))
        score = pl.Series([row[0][1] if row else None for row in told], dtype=pl.Float32)
        return Verdict(
            kept=batch.with_columns(columns).filter(stays), rejected=batch.select("key", reason=reason, score=score).filter(~stays)
        )

    def report(self, state: Any) -> Mapping[str, Any]:
        """The languages and the least probability."""
        del state
        return {"languages": list(self.config.languages), "surest": self.config.surest}


def told_apart(texts: Sequence[Sequence[str]], among: tuple[str, ...] | None = None) -> list[list[tuple[str, float]]]:
    """The language of every text of every pair with its probability in [0, 1]; a text is judged once, however often it occurs."""
    model = identifier(among)
    found: dict[str, tuple[str, float]] = {}
    for row in texts:
        for text in row:
            if text not in found:
                code, sure = model.classify(text)
                found[text] = (str(code), float(sure))
    return [[found[text] for text in row] for row in texts]


@cache
def identifier(among: tuple[str, ...] | None) -> Any:
    """The model, restricted to some languages; held once a process. Raises ConfigError without py3langid or for a language it lacks."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise ConfigError.at(
            "The language filter needs py3langid", "method", "language-filter", "the package py3langid", "pip install py3langid"
        ) from None
    model = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    if among is not None:
        try:
            model.set_languages(list(among))
        except ValueError as error:
            raise ConfigError.at("The model does not know a language", "among", list(among), f"languages it knows ({error})") from None
    return model
