import numpy as np
import pytest

from diptych.caption.rewriters.styles import (
    FRAMES,
    STYLES,
    Phrase,
    article_everywhere,
    framed,
    is_plural,
    keywords,
    mend_articles,
    reordered,
    tagged,
    with_article,
)

WORDS = {"cat": ("feline",), "smile": ("grin",), "car": ("automobile",)}


def phrase(text: str, tags: tuple[str, ...] = (), *, english: bool = True) -> Phrase:
    return Phrase(text, tags, english, lambda word, _: WORDS.get(word.lower(), ()), 0.5)


def all_of(style: object, text: str, tags: tuple[str, ...] = (), **options: bool) -> set[str | None]:
    return {style(phrase(text, tags, **options), np.random.default_rng(index)) for index in range(60)}  # type: ignore[operator]


@pytest.mark.parametrize(
    ("bare", "expected"),
    [
        ("cat", "a cat"),
        ("orange cat", "an orange cat"),
        ("unicorn", "a unicorn"),
        ("hourglass", "an hourglass"),
        ("eyes", "eyes"),
        ("glass", "a glass"),
        ("cactus", "a cactus"),
        ("people with bunny ears", "people with bunny ears"),
        ("the cat", "the cat"),
        ("Malawi", "Malawi"),
        ("Japanese post office", "a Japanese post office"),
        ("rice", "rice"),
        ("unlocked", "unlocked"),
        ("3 cats", "3 cats"),
        ("猫", "猫"),
        ("", ""),
    ],
)
def test_articles(bare: str, expected: str) -> None:
    assert with_article(bare) == expected


def test_articles_agree_after_a_swap() -> None:
    assert mend_articles("A automobile and an car, a hour, an unicorn") == "An automobile and a car, an hour, a unicorn"
    assert phrase("a car").swapped(np.random.default_rng(0)) == "an automobile"
    assert article_everywhere("cat with wry smile") == "a cat with a wry smile"


def test_plurals() -> None:
    assert [is_plural(text) for text in ("busts in silhouette", "bus", "glass", "men", "dogs, cats")] == [True, False, False, True, True]


def test_a_swap_changes_at_least_one_word_and_keeps_case_and_marks() -> None:
    swaps = {phrase("Cat (smile)!").swapped(np.random.default_rng(index)) for index in range(40)}
    assert swaps == {"Feline (smile)!", "Cat (grin)!", "Feline (grin)!"}
    assert phrase("dog").swapped(np.random.default_rng(0)) == "dog"


def test_reordering() -> None:
    assert all_of(reordered, "flag: Malawi") == {"Malawi, flag"}
    assert all_of(reordered, "boy, girl") == {"girl, boy"}
    assert "with a wry smile, a cat" in all_of(reordered, "cat with wry smile")
    assert all_of(reordered, "A dog is asleep on the beach.") == {"on the beach, a dog is asleep"}
    assert all_of(reordered, "dog") == {None}
    assert all_of(reordered, "hund mit katze", english=False) == {None}


def test_keywords() -> None:
    assert all_of(keywords, "dog with a wry face") == {"dog, wry, face"}
    assert all_of(keywords, "dog", ("pet",)) == {"dog, pet"}
    assert all_of(keywords, "dog") == {None}


def test_tags_add_what_the_caption_does_not_say() -> None:
    assert all_of(tagged, "lungs", ("lung", "EC", "4", "*", "not")) == {None}
    assert all_of(tagged, "dog", ("pet",)) == {"dog, pet", "pet, dog", "dog (pet)", "pet dog"}
    assert all_of(tagged, "犬", ("顔",), english=False) == {"犬, 顔", "顔, 犬", "犬 (顔)"}


def test_frames() -> None:
    assert all_of(framed, "dog") == {frame.format("a dog") for frame in FRAMES}
    assert "here we see a flag (Malawi)" in all_of(framed, "flag: Malawi")
    assert "in this scene, a man is running" in all_of(framed, "A man is running.")
    assert "there are eyes" in all_of(framed, "eyes")
    assert all_of(framed, "123") == {None}


@pytest.mark.parametrize("text", [" ", ",", ": ", ", ,", "a", "with", "with with with", "(", "{}", "{0}", "%s", "\\1", "."])
def test_no_style_breaks_on_scraps(text: str) -> None:
    for style in STYLES:
        for answer in all_of(style, text, ("tag {}", "\\g<0>")):
            assert answer is None or isinstance(answer, str)
