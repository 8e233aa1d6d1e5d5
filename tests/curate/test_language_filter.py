from __future__ import annotations

import sys

import polars as pl
import pytest

from diptych.core.errors import ConfigError
from diptych.curate import language_filter
from diptych.curate.language_filter import Config
from diptych.pairs.schema import CAPTIONS

ENGLISH = "a small brown dog runs over the green meadow behind our house"
GERMAN = "ein kleiner brauner Hund rennt über die grüne Wiese hinter unserem Haus"
FRENCH = "un petit chien brun court dans le pré vert derrière notre maison"


@pytest.fixture
def model() -> None:
    pytest.importorskip("py3langid")


def pairs(*captions: list[str]) -> pl.DataFrame:
    held = [[{"text": text, "source": "alt", "score": None} for text in texts] for texts in captions]
    return pl.DataFrame({"key": [f"p{row}" for row in range(len(captions))], "captions": pl.Series(held, dtype=CAPTIONS)})


@pytest.mark.usefixtures("model")
def test_captions_in_the_language_stay() -> None:
    verdict = Config().build(0).apply(pairs([ENGLISH], [GERMAN], [FRENCH, ENGLISH], []), None)
    assert verdict.kept["key"].to_list() == ["p0", "p2"]
    assert [len(captions) for captions in verdict.kept["captions"]] == [1, 1]
    assert verdict.kept["language"].to_list() == ["en", "en"]
    assert verdict.rejected["reason"].to_list() == ["another language"] * 2
    assert verdict.rejected["score"][0] > 0.5
    assert verdict.rejected["score"][1] is None


@pytest.mark.usefixtures("model")
def test_several_languages_and_what_is_not_sure() -> None:
    both = Config(languages=("de", "fr")).build(0).apply(pairs([GERMAN], [FRENCH], [ENGLISH]), None)
    assert both.kept["language"].to_list() == ["de", "fr"]
    verdict = Config(surest=1.0).build(0).apply(pairs(["dog"]), None)
    assert verdict.rejected["reason"].to_list() in (["language not sure"], ["another language"])
    short = Config(among=("en", "de"), surest=0.0).build(0).apply(pairs(["the dog"]), None)
    assert short.kept.height == 1


@pytest.mark.usefixtures("model")
def test_an_unknown_language_is_refused() -> None:
    with pytest.raises(ConfigError, match="does not know"):
        Config(among=("en", "xx")).build(0).apply(pairs([ENGLISH]), None)


def test_a_text_is_judged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Model:
        def classify(self, text: str) -> tuple[str, float]:
            asked.append(text)
            return "en", 0.9

    monkeypatch.setattr(language_filter, "identifier", lambda among: Model())
    assert language_filter.told_apart([["a", "b"], ["a"]]) == [[("en", 0.9), ("en", 0.9)], [("en", 0.9)]]
    assert asked == ["a", "b"]


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    language_filter.identifier.cache_clear()
    with pytest.raises(ConfigError, match="pip install py3langid"):
        language_filter.identifier(None)


@pytest.mark.parametrize("values", [{"languages": []}, {"languages": ["english"]}, {"languages": ["EN"]}, {"surest": 2}, {"among": ["en"]}])
def test_wrong_configurations(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        Config.parse(values)
