"""On a WordNet of a dozen synsets, in WordNet's own file format."""

from pathlib import Path

import pytest

from diptych.caption.rewriters.build_lexicon import EVERYDAY, gerund, main, plural, table
from diptych.core.errors import DataError

# offset lexfile type n_words (word id)* n_pointers (symbol offset pos source/target)* | gloss
NOUNS = """  1 licence text
00000010 06 n 02 shutter 0 blind 0 001 @ 00000011 n 0000 | a hinged cover
00000011 06 n 01 screen 0 001 @ 00000012 n 0000 | a partition
00000012 06 n 01 artifact 0 000 | something made
00000013 18 n 02 sot 0 drunkard 0 001 @ 00000012 n 0000 | a person
00000014 06 n 02 pump 0 ticker 0 000 | a machine; the heart
00000015 10 n 01 obscenity 0 000 | rude words
00000016 06 n 02 crudity 0 rudery 0 001 ;u 00000015 n 0000 | rude
00000017 06 n 01 Venetian_blind 0 001 @ 00000010 n 0000 | slats
"""
VERBS = "00000020 38 v 02 stroll 0 amble 0 000 01 + 02 00 | walk\n"
ADJECTIVES = "00000030 00 a 02 huge 0 vast(p) 0 000 | large\n"
SENSES = """shutter%1:06:00:: 00000010 1 5
blind%1:06:00:: 00000010 1 2
screen%1:06:00:: 00000011 1 4
artifact%1:06:00:: 00000012 1 9
sot%1:18:00:: 00000013 1 1
drunkard%1:18:00:: 00000013 1 1
pump%1:06:00:: 00000014 1 3
ticker%1:06:00:: 00000014 3 0
rudery%1:06:00:: 00000016 1 1
crudity%1:06:00:: 00000016 1 1
venetian_blind%1:06:00:: 00000017 1 1
stroll%2:38:00:: 00000020 1 2
amble%2:38:00:: 00000020 1 2
huge%3:00:00:: 00000030 1 2
vast%3:00:00:: 00000030 1 2
"""


@pytest.fixture
def dictionary(tmp_path: Path) -> Path:
    files = {"data.noun": NOUNS, "data.verb": VERBS, "data.adj": ADJECTIVES, "index.sense": SENSES}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def test_which_words_may_stand_for_which(dictionary: Path) -> None:
    import json

    everyday = json.loads(EVERYDAY.read_text())
    rows = {word: others for word, others in table(dictionary).iter_rows() if word not in everyday}
    assert rows == {
        "shutter": ["blind"],
        "shutters": ["blinds"],
        "blind": ["shutter"],
        "blinds": ["shutters"],
        "strolling": ["ambling"],
        "ambling": ["strolling"],
        "huge": ["vast"],
        "vast": ["huge"],
    }  # no persons, no rude words, nothing that is the third sense of the other word, nothing as broad as an artifact


def test_the_everyday_words_are_in_it(dictionary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(dictionary), str(tmp_path / "out.parquet")])
    assert "words" in capsys.readouterr().out
    words = dict(table(dictionary).iter_rows())
    assert words["cat"] == ["kitty", "feline"]
    assert "picture" not in words  # an empty list in everyday.json keeps a word
    assert list(words) == sorted(words)


def test_a_folder_without_wordnet_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.noun"):
        table(tmp_path)


@pytest.mark.parametrize(
    ("noun", "expected"),
    [
        ("cat", "cats"),
        ("box", "boxes"),
        ("city", "cities"),
        ("boy", "boys"),
        ("fireman", "firemen"),
        ("child", "children"),
        ("sheep", None),
        ("glasses", None),
    ],
)
def test_plurals(noun: str, expected: str | None) -> None:
    assert plural(noun) == expected


@pytest.mark.parametrize(
    ("verb", "expected"),
    [
        ("walk", "walking"),
        ("ride", "riding"),
        ("run", "running"),
        ("lie", "lying"),
        ("see", "seeing"),
        ("play", "playing"),
        ("offer", None),
        ("give up", None),
    ],
)
def test_ing_forms(verb: str, expected: str | None) -> None:
    assert gerund(verb) == expected
