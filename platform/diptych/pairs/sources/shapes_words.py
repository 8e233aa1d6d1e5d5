"""What is said of a rendered shape: its captions, the words that can stand in for one another, and the texts of an edit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

PATTERNED = "patterned"
"""What a picture with a texture has in place of a colour."""

PLAIN = (
    "a {size} {colour} {shape} on a {background} background",
    "a {colour} {shape} that is {size} on a {background} background",
    "a {background} background behind a {size} {colour} {shape}",
)
WORDINGS = (*PLAIN, *(f"A photo depicts {words}" for words in PLAIN))
"""Captions that say the same in other words; the later ones as prompts put it (CLIPScore, CLIP4DM)."""

PARTS: Mapping[str, str] = {"shape": "a {}", "colour": "{}", "background": "a {} background", "size": "{}"}
"""Texts that tell one attribute alone, in words that captions have."""

EDITS = ("ideal", "over", "none")
"""Kinds of edit: the attribute that was asked for changes, everything changes, nothing does."""


class Seen(NamedTuple):
    """What a picture shows, in words."""

    shape: str
    colour: str
    background: str
    size: str


def caption(seen: Seen, wording: int = 0) -> str:
    """The text of a picture, by default `a small red circle on a black background`; one that is patterned has no colour."""
    words = seen._replace(colour="") if seen.colour == PATTERNED else seen
    return " ".join(WORDINGS[wording].format(**words._asdict()).split())


def others(known: Mapping[str, Sequence[str]], seen: Seen) -> dict[str, list[str]]:
    """For every attribute that the picture's texts name, the known words that would be wrong; without those that have none."""
    wrong = {name: [word for word in words if word != getattr(seen, name)] for name, words in known.items()}
    return {name: words for name, words in wrong.items() if words and getattr(seen, name) != PATTERNED}


def replaced(seen: Seen, known: Mapping[str, Sequence[str]], draw: np.random.Generator) -> tuple[str, str]:
    """An attribute and a wrong word for it: each replaceable attribute is as likely, and so is each of its words."""
    name, words = list(others(known, seen).items())[int(draw.integers(len(others(known, seen))))]
    return name, words[int(draw.integers(len(words)))]


SHORT = ("a {colour} {shape}", "a photo of the {shape}")
"""What a captioner says: less than the texts tell."""


def described(seen: Seen, known: Mapping[str, Sequence[str]], draw: np.random.Generator, errors: float) -> str:
    """A captioner's short text; with the chance `errors` it names another shape or colour of those known."""
    wording, wrong = SHORT[int(draw.integers(len(SHORT)))], float(draw.random()) < errors
    if wrong:
        named = {name: known[name] for name in ("shape", "colour") if f"{{{name}}}" in wording}
        name, word = replaced(seen, named, draw)
        seen = seen._replace(**{name: word})
    return wording.format(**seen._asdict())


class Edit(NamedTuple):
    """One attribute of a picture that is to change, and what the kinds of edit make of the picture."""

    attribute: str
    seen: Seen
    ideal: Seen
    over: Seen

    @classmethod
    def drawn(cls, seen: Seen, known: Mapping[str, Sequence[str]], draw: np.random.Generator) -> Edit:
        """A random edit. `known` has two words or more for every attribute."""
        attribute, word = replaced(seen, known, draw)
        wrong = others(known, seen)
        ideal = seen._replace(**{attribute: word})
        elsewhere = {name: words[int(draw.integers(len(words)))] for name, words in wrong.items() if name != attribute}
        return cls(attribute, seen, ideal, ideal._replace(**elsewhere))

    def shown(self, kind: str) -> Seen:
        """What a kind of edit shows."""
        return {"ideal": self.ideal, "over": self.over, "none": self.seen}[kind]

    def columns(self, source_key: str, kind: str, separator: str) -> dict[str, Any]:
        """The columns that `evaluate/augclip.py` reads: the user's two texts tell the edited attribute alone, the lists tell all."""
        texts = {"source": self.seen, "target": self.ideal}
        return {
            "meta.source_key": source_key,
            "meta.edit": kind,
            **{f"meta.{side}_text": PARTS[self.attribute].format(getattr(seen, self.attribute)) for side, seen in texts.items()},
            **{
                f"meta.{side}_attributes": separator.join(caption(seen, wording) for wording in range(len(PLAIN)))
                for side, seen in texts.items()
            },
        }
