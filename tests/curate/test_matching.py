"""The matcher against the definition: " entry " is a substring of the spaced text."""

from __future__ import annotations

import itertools
import pickle

import numpy as np
import pytest

from diptych.core.errors import DataError
from diptych.curate import matching
from diptych.curate.matching import Matcher, space


def oracle(entries: list[str], texts: list[str]) -> list[list[int]]:
    """One `in` test an entry and text."""
    return [[index for index, entry in enumerate(entries) if f" {entry} " in space(text)] for text in texts]


def ours(entries: list[str], texts: list[str]) -> list[list[int]]:
    indptr, ids = Matcher(entries).match(texts)
    assert indptr.dtype == ids.dtype == np.int64
    return [ids[begin:end].tolist() for begin, end in itertools.pairwise(indptr.tolist())]


@pytest.mark.parametrize(
    ("text", "spaced"),
    [
        ("", "  "),
        ("a dog", " a dog "),
        ("a,b.c;d:e?f!g`h", " a , b . c ; d : e ? f ! g ` h "),
        ("a\r\nb\tc", " a  b c "),
        ('it\'s "t-shirt" (x)/y', ' it\'s "t-shirt" (x)/y '),
        ("caf\u00e9\u00a0au", " caf\u00e9\u00a0au "),
    ],
)
def test_spacing(text: str, spaced: str) -> None:
    assert space(text) == spaced


@pytest.mark.parametrize(
    ("entry", "text", "found"),
    [
        ("hot dog", "a hot dog", True),
        ("hot dog", "a hot  dog", False),  # repeated spaces are not collapsed
        ("hot dog", "hot\tdog", True),
        ("hot dog", "hot\ndog", True),
        ("hot dog", "hot\r\ndog", False),  # becomes two spaces
        ("hot  dog", "hot\r\ndog", True),
        ("hot dog", "hot, dog", False),
        ("hot , dog", "hot,dog", True),
        ("dog", "Dog", False),  # case is kept
        ("dog", "hotdog", False),
        ("dog", "(dog)", False),
        ("dog", "`dog`", True),
        ("st. louis", "st. louis", False),  # dead: the text's dot is set apart
        ("vs.", "a vs. b", False),
        ("a\tb", "a\tb", False),  # dead: no spaced text has a tab
        ("a\nb", "a\nb", False),
        ("!", "stop!", True),
        ("", "", True),
        ("", "a", False),
        ("", "a, b", True),  # " ,  b": nothing stands between two spaces
        (" ", "a   b", True),
        ("x", "", False),
        ("x", "   ", False),
        ("東京", "東京 tokyo", True),
        ("東京", "東京タワー", False),
        ("café", "cafe\u0301", False),  # no Unicode normalisation
        ("\u00a0nbsp", "a \u00a0nbsp", True),
        ("a", "a\0", False),
        ("a\0", "a\0", True),
        ("a\0\0", "a\0", False),
        ("abcdefgh", "abcdefgh", True),  # eight bytes: its own key
        ("abcdefgh", "abcdefghi", False),
        ("abcdefghi", "abcdefghi", True),  # nine: hashed and compared
        ("abcdefghijklmnopq", "abcdefghijklmnopz", False),
        ("\ud800", "a \ud800 b", True),  # a lone surrogate stops nothing
    ],
)
def test_single_entries(entry: str, text: str, found: bool) -> None:
    assert ours([entry], [text]) == oracle([entry], [text]) == [[0] if found else []]


def test_entries_do_not_reach_across_texts() -> None:
    assert ours(["hot dog", "dog hot"], ["a hot", "dog hot", "dog"]) == [[], [1], []]


def test_an_entry_counts_once_a_text_and_ids_ascend() -> None:
    assert ours(["dog", "big dog", "big"], ["big dog big dog dog", "dog"]) == [[0, 1, 2], [0]]


@pytest.mark.parametrize("seed", range(4))
def test_random_texts_agree_with_the_definition(seed: int) -> None:
    generator = np.random.default_rng(seed)
    alphabet = [
        "a",
        "b",
        "B",
        "ab",
        "aa",
        "longword",
        "longerword",
        "longerwords",
        "é",
        "東京",
        "-",
        "",
        ",",
        ".",
        "!",
        "a.",
        "\t",
        "\n",
        "\r\n",
        "\0",
    ]

    def phrase(most: int) -> str:
        return "".join(
            generator.choice(alphabet) + str(generator.choice([" ", " ", " ", "", "  "])) for _ in range(generator.integers(0, most))
        )

    entries = list(dict.fromkeys(phrase(5).strip(" ") if generator.random() < 0.8 else phrase(4) for _ in range(300)))
    texts = [phrase(14) for _ in range(300)]
    expected = oracle(entries, texts)
    assert sum(map(len, expected)) > 300, "the test would show nothing"
    assert ours(entries, texts) == expected


def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = ["a", "b", "a b", "b a b"]
    texts = [" ".join("ab"[(i * j) % 2] for j in range(i % 7)) for i in range(100)]
    expected = ours(entries, texts)
    monkeypatch.setattr(matching, "BLOCK_TEXTS", 8)
    assert ours(entries, texts) == expected
    monkeypatch.setattr(matching, "BLOCK_CHARS", 5)
    assert ours(entries, texts) == expected == oracle(entries, texts)


def test_a_huge_text_and_a_huge_word() -> None:
    texts = ["x" * 3_000_000, "dog " * 300_000, "a " + "y" * 40]
    assert ours(["dog", "dog dog dog", "y" * 40, "y" * 41], texts) == [[], [0, 1], [2]]


def test_no_texts() -> None:
    indptr, ids = Matcher(["dog"]).match([])
    assert indptr.tolist() == [0]
    assert len(ids) == 0


def test_pieces_whose_hashes_meet_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [f"a-long-piece-{index:03d}" for index in range(50)]
    matcher = Matcher(entries)
    keys = matcher._vocabulary._keys
    # Strangers are given the key of a piece in the vocabulary: they must fail the comparison, not match.
    known = matching._Pieces(b"a-long-piece-007\n")
    monkeypatch.setattr(matcher._vocabulary, "_keys", lambda pieces: np.broadcast_to(keys(known), len(pieces.size_P)).copy())
    indptr, ids = matcher.match(["a-long-piece-007", "a-long-piece-xyz", "a-long-piece-0077"])
    assert indptr.tolist() == [0, 1, 1, 1]
    assert ids.tolist() == [7]


def test_the_salt_changes_until_keys_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = matching._Vocabulary._keys

    def clashing(self: matching._Vocabulary, pieces: matching._Pieces) -> np.ndarray:
        key_P = keys(self, pieces)
        key_P[(pieces.size_P > 8) & (self._salt < 3)] = np.uint64(0xFF00000000000001)
        return key_P

    monkeypatch.setattr(matching._Vocabulary, "_keys", clashing)
    matcher = Matcher(["elephants", "crocodiles"])
    assert matcher._vocabulary._salt == 3
    assert matcher.match(["crocodiles", "elephants"]).ids.tolist() == [1, 0]


def test_tables_hold_keys_that_meet() -> None:
    table = matching._Table(1000)
    keys = np.random.default_rng(0).choice(5000, 1000, replace=False).astype(np.uint64)
    table._home = lambda keys: (keys % np.uint64(3)).astype(np.int64)  # type: ignore[method-assign]
    table.insert(keys)
    slots = table.find(np.arange(5000, dtype=np.uint64))
    assert set(np.flatnonzero(slots >= 0).tolist()) == set(keys.tolist())
    assert len(set(slots[slots >= 0].tolist())) == 1000


def test_a_matcher_travels() -> None:
    matcher = Matcher(["dog", "hot dog"])
    assert pickle.loads(pickle.dumps(matcher)).match(["hot dog"]).ids.tolist() == [0, 1]


def test_bad_lists_are_refused() -> None:
    with pytest.raises(DataError, match="'dog' 2 times"):
        Matcher(["dog", "cat", "dog"])
    with pytest.raises(DataError, match="empty"):
        Matcher([])
