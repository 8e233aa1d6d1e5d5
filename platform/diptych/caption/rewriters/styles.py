"""Ways to say a caption differently by rule: other words, other order, key words, its tags, a sentence around it.

Every style takes a `Phrase` and a generator and gives a rewrite, or None where it does not apply. The sentences that are put around a
caption (`FRAMES` and its kin) keep clear of the prompt templates that CLIP models are evaluated with ("a photo of a …" and its like).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np

T = TypeVar("T")

Alternatives = Callable[[str, bool], Sequence[str]]
"""`(word, is the first of its caption) -> words that may stand for it`, nearest first, empty if there are none."""


def word_set(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


WORD = re.compile(r"\w+(?:['’.&-]\w+)*")
PREPOSITIONS = word_set("with in on at under behind over near beside without between by from above below against inside through")
DETERMINERS = word_set("a an the this that these those some many several no one two three four five six my his her their its our")
FUNCTION_WORDS = PREPOSITIONS | DETERMINERS | word_set("of and or to for is are was were be being has have it as up down not")
CLAUSE_VERBS = word_set("is are was were has have stands sits lies")
UNCOUNTED = word_set(
    "rice bread water sushi money hair snow wind fog rain ice milk wine honey corn cheese bacon meat garlic spaghetti luggage baggage food "
    "music fire grass sand lightning weather chocolate broccoli ginger popcorn custard butter salt poultry joy love traffic art "
    "dusk dawn nightfall night noon home work school sunshine ink"
)
VOWEL_SOUND = re.compile(r"(?!(?:uni|use|usu|eu|one|once|uk))[aeiou]|hour|honest|heir", re.IGNORECASE)
ARTICLE = re.compile(r"\b(an?)(?=\s+(\w))", re.IGNORECASE)
MAX_TAGS = 2

FRAMES = (
    "here we see {}",
    "there is {}",
    "{} is what it shows",
    "what we have here is {}",
    "look, {}",
    "you can see {}",
    "this one shows {}",
)
PLURAL_FRAMES = ("here we see {}", "there are {}", "look, {}", "you can see {}", "this one shows {}")
CLAUSE_FRAMES = ("in this scene, {}", "you can see that {}", "here, {}", "what happens here: {}")


@dataclass(frozen=True)
class Phrase:
    """A caption and what is known about it.

    Attributes:
        text: the original caption, white space collapsed.
        tags: the pair's tags.
        english: whether English words may be put around it.
        alternatives: the word table.
        share: the chance of each replaceable word to be replaced, in (0, 1].
    """

    text: str
    tags: tuple[str, ...]
    english: bool
    alternatives: Alternatives
    share: float

    @cached_property
    def fresh_tags(self) -> list[str]:
        """Tags that say something the caption does not, each once."""
        said = {_stem(word) for word in WORD.findall(self.text)}
        tags = dict.fromkeys(tag for tag in self.tags if tells(tag))
        return [tag for tag in tags if not said.issuperset(map(_stem, WORD.findall(tag)))]

    @cached_property
    def swappable(self) -> list[tuple[re.Match[str], Sequence[str]]]:
        """The words that have alternatives, where they stand, and those alternatives."""
        found = ((match, self.alternatives(match.group(), match.start() == 0)) for match in WORD.finditer(self.text))
        return [(match, others) for match, others in found if others]

    def swapped(self, draw: np.random.Generator) -> str:
        """The caption with some of its words replaced, at least one if any can be."""
        if not self.swappable:
            return self.text
        chosen = draw.random(len(self.swappable)) < self.share
        chosen[draw.integers(len(chosen))] = True
        return self._replace([(match, pick(others, draw)) for (match, others), take in zip(self.swappable, chosen, strict=True) if take])

    def _replace(self, swaps: Sequence[tuple[re.Match[str], str]]) -> str:
        parts, end = [], 0
        for match, other in swaps:
            parts += [self.text[end : match.start()], other.capitalize() if match.group().istitle() else other]
            end = match.end()
        text = "".join(parts) + self.text[end:]
        return mend_articles(text) if self.english else text


def synonyms(phrase: Phrase, draw: np.random.Generator) -> str | None:
    """`cat with wry smile` -> `feline with twisted smile`."""
    return phrase.swapped(draw) if phrase.swappable else None


def keywords(phrase: Phrase, draw: np.random.Generator) -> str | None:
    """`cat with wry smile` -> `kitty, wry, smile`, half of the time with a tag of the pair added."""
    if not phrase.english:
        return None
    words = [word for word in WORD.findall(phrase.swapped(draw)) if word.lower() not in FUNCTION_WORDS]
    if phrase.fresh_tags and (len(words) < 2 or draw.random() < 0.5):
        words.append(pick(phrase.fresh_tags, draw))
    words = list(dict.fromkeys(words))
    return ", ".join(words) if len(words) > 1 else None


def reordered(phrase: Phrase, draw: np.random.Generator) -> str | None:
    """`cat with wry smile` -> `with a wry smile, a cat`; `flag: Malawi` -> `Malawi, flag`; `red car` -> `car (red)`."""
    text = phrase.swapped(draw).rstrip(".") if draw.random() < 0.5 else phrase.text.rstrip(".")
    for mark in (": ", ", "):
        before, found, after = text.partition(mark)
        if found and before and after:
            return f"{after}, {before}"
    return _fronted(text, draw) if phrase.english else None


def _fronted(text: str, draw: np.random.Generator) -> str | None:
    words = text.split(" ")
    places = [index for index, word in enumerate(words) if word in PREPOSITIONS and 0 < index < len(words) - 1]
    if places:
        head, tail = " ".join(words[: places[-1]]), " ".join(words[places[-1] + 1 :])
        return f"{words[places[-1]]} {with_article(tail)}, {with_article(lowered(head))}"
    if (
        not 2 <= len(words) <= 4
        or not words[-1].islower()
        or words[-2].endswith("ing")
        or FUNCTION_WORDS.intersection(map(str.lower, words))
    ):
        return None
    return f"{words[-1]}, {' '.join(words[:-1])}" if draw.random() < 0.5 else f"{words[-1]} ({' '.join(words[:-1])})"


def tagged(phrase: Phrase, draw: np.random.Generator) -> str | None:
    """`cat with wry smile` -> `ironic cat with wry smile`, `cat with wry smile, ironic`, `cat with wry smile (face, ironic)`."""
    if not phrase.fresh_tags:
        return None
    text = (phrase.swapped(draw) if draw.random() < 0.5 else phrase.text).rstrip(".")
    tags = [phrase.fresh_tags[index] for index in draw.permutation(len(phrase.fresh_tags))[:MAX_TAGS]]
    shapes = [f"{text}, {tags[0]}", f"{tags[0]}, {text}", f"{text} ({', '.join(tags)})"]
    if phrase.english and ":" not in text and text[:1].islower() and text.split(" ")[0] not in DETERMINERS:
        shapes.append(f"{tags[0]} {text}")
    return pick(shapes, draw)


def framed(phrase: Phrase, draw: np.random.Generator) -> str | None:
    """`cat with wry smile` -> `here we see a cat with a wry smile`; a caption with a verb -> `in this scene, a man is running`."""
    if not phrase.english or not any(letter.isascii() and letter.isalpha() for letter in phrase.text):
        return None
    text = lowered(phrase.swapped(draw).rstrip("."))
    if CLAUSE_VERBS.intersection(text.split(" ")):
        return pick(CLAUSE_FRAMES, draw).format(text)
    head, colon, rest = text.partition(": ")
    frames = PLURAL_FRAMES if is_plural(head) else FRAMES
    return pick(frames, draw).format(f"{with_article(head)} ({rest})" if colon else article_everywhere(text))


Style = Callable[[Phrase, np.random.Generator], str | None]
STYLES: tuple[Style, ...] = (synonyms, keywords, reordered, tagged, framed)

FIELD = re.compile(r"\{(\w*)\}")
FIELDS = ("caption", "word", "keywords", "tag")


def fill(template: str, phrase: Phrase, draw: np.random.Generator) -> str | None:
    """A user's template with its fields filled in: `{caption}`, `{word}` (a replacement of one word), `{keywords}`, `{tag}`.

    None where the caption has nothing for a field.
    """
    makers: Mapping[str, Callable[[], str | None]] = {
        "caption": lambda: phrase.swapped(draw),
        "word": lambda: pick(pick(phrase.swappable, draw)[1], draw) if phrase.swappable else None,
        "keywords": lambda: keywords(phrase, draw),
        "tag": lambda: pick(phrase.tags, draw) if phrase.tags else None,
    }
    values = {name: makers[name]() for name in dict.fromkeys(FIELD.findall(template))}
    if None in values.values():
        return None
    text = FIELD.sub(lambda match: values[match.group(1)] or "", template)
    return mend_articles(text) if phrase.english else text


# ---------------------------------------------------------------- a little English


def pick(choices: Sequence[T], draw: np.random.Generator) -> T:
    """One of the choices, uniformly."""
    return choices[int(draw.integers(len(choices)))]


def tells(tag: str) -> bool:
    """Whether a tag reads as a word: not a mark (`*`), not a code or number (`EC`, `4`), not `not`."""
    return WORD.search(tag) is not None and tag.lower() not in FUNCTION_WORDS and (len(tag) > 2 or not tag.isascii())


def _stem(word: str) -> str:
    """Lower case without a plural's s: enough to see that `lung` adds nothing to `lungs`."""
    return word.casefold().removesuffix("s")


def mend_articles(text: str) -> str:
    """Makes `a` and `an` agree with the word that follows."""

    def agreeing(match: re.Match[str]) -> str:
        article = "an" if VOWEL_SOUND.match(text, match.end() + 1) else "a"
        return article.capitalize() if match.group(1)[0] == "A" else article

    return ARTICLE.sub(agreeing, text)


def lowered(text: str) -> str:
    """Takes the capital off a first word that is no name: an article or another function word."""
    first, space, rest = text.partition(" ")
    return f"{first.lower()}{space}{rest}" if first.lower() in FUNCTION_WORDS else text


def is_plural(phrase: str) -> bool:
    """Whether a noun phrase looks like more than one thing."""
    head = _head(phrase)
    return (head.endswith("s") and not head.endswith(("ss", "us", "is"))) or head in {"people", "children", "men", "women"}


def with_article(phrase: str) -> str:
    """Puts `a` or `an` before a noun phrase that wants one: not before names, numbers, plurals, and what is not counted."""
    words = phrase.split(" ")
    first, head = words[0], _head(phrase)
    is_participle = len(words) == 1 and len(first) > 4 and first.endswith("ed")
    is_name = first[:1].isupper() and not (len(words) > 1 and words[-1].islower())
    if is_name or is_participle or is_plural(phrase) or head in UNCOUNTED:
        return phrase
    if not first[:1].isalpha() or not first.isascii() or first.lower() in FUNCTION_WORDS:
        return phrase
    return f"{'an' if VOWEL_SOUND.match(phrase) else 'a'} {phrase}"


def article_everywhere(text: str) -> str:
    """Articles for a noun phrase and for what follows its first preposition: `a cat with a wry smile`."""
    words = text.split(" ")
    place = next((index for index, word in enumerate(words) if word in {"with", "without"} and 0 < index < len(words) - 1), None)
    if place is None:
        return with_article(text)
    return f"{with_article(' '.join(words[:place]))} {words[place]} {with_article(' '.join(words[place + 1 :]))}"


def _head(phrase: str) -> str:
    """The noun that a noun phrase is about: its last word before a preposition, `of`, a participle or punctuation."""
    head = ""
    for word in phrase.split(" "):
        if head and (word in PREPOSITIONS or word == "of" or word.startswith("(")):
            break
        head = word
        if word.endswith((",", ":")):
            break
    return head.rstrip(",:")
