from collections import Counter

import pytest

from diptych.caption.rewriters.prompts import EXAMPLE_SETS, build_prompt, examples, parse, parse_official, shots, truncate

PAIRS = [("a red car", "A shiny car."), ("two kids", "Children."), ("dog", "A hound.")]


def test_the_prompt_has_the_official_layout() -> None:
    gap = "\n\n" + 12 * " "
    lines = ["write image captions differently,", "a red car => A shiny car.", "two kids => Children.", "dog => A hound.", "cat =>"]
    assert build_prompt(PAIRS, "ca\nt\n") == gap.join(lines)


def test_official_parsing_reads_line_eight() -> None:
    prompt = build_prompt(PAIRS, "a cat")
    assert parse_official(prompt, " A feline. => more\nnext => line") == "A feline."
    assert parse_official(prompt, "") == ""
    assert parse_official("too short", " => nothing") == ""


def test_a_caption_with_an_arrow_breaks_the_official_parsing_but_not_ours() -> None:
    source = "step 1 => step 2"
    completion = " The second step follows the first.\nfoo => bar"
    assert parse_official(build_prompt(PAIRS, source), completion) == "step 2"
    assert parse(completion, source) == "The second step follows the first."


@pytest.mark.parametrize(
    ("completion", "rewrite"),
    [
        (" A cat.\n\n  dog => A dog.", "A cat."),
        ("\n\n A cat sits.", "A cat sits."),
        ("A cat => and more", "A cat"),
        ('"A cat sits."', "A cat sits."),
        ("a cat => A feline.", "A feline."),
        ("a cat on a mat", "a cat on a mat"),
        ("A\tcat \u00a0 sits", "A cat sits"),
        ("=> A feline.", ""),
        ("", ""),
        (" \n ", ""),
        ('"', '"'),
    ],
)
def test_parse(completion: str, rewrite: str) -> None:
    assert parse(completion, "a cat") == rewrite


@pytest.mark.parametrize(("tokens", "left"), [(95, None), (96, 90), (1000, 90)])
def test_long_prompts_are_cut(tokens: int, left: int | None) -> None:
    cut = truncate(range(tokens), lambda ids: " ".join(map(str, ids)), 100)
    assert cut == (None if left is None else " ".join(map(str, range(left))) + " =>")


@pytest.mark.parametrize("name", EXAMPLE_SETS)
def test_example_sets_hold_sixteen_usable_pairs(name: str) -> None:
    pairs = examples(name)
    assert len(pairs) == len({source for source, _ in pairs}) == 16
    for source, rewrite in pairs:
        assert source != rewrite
        assert not any("=>" in text or "\n" in text or text != text.strip() or not text for text in (source, rewrite))


def test_shots_are_three_different_pairs_drawn_by_seed_key_and_copy() -> None:
    drawn = [shots("plain", 1, "key", 0) for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) == 3
    others = [shots("plain", *name) for name in ((2, "key", 0), (1, "other", 0), (1, "key", 1))]
    assert all(other != drawn[0] for other in others)
    uses = Counter(pair for index in range(400) for pair in shots("plain", 0, str(index), 0))
    assert len(uses) == 16
    assert min(uses.values()) > 40  # 75 expected
