"""The panels that a caption names: `(A) … (B) …`, `A, …; B, …`. A figure with more than one is compound.

A run of marks counts if it begins at A and goes on letter by letter; a mark may name several (`(A, B)`, `(C-E)`). Marks that are named
again later do not count twice.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

_DASH = "-–—−"
_SEVERAL = rf"[A-Za-z](?:\s*(?:[,{_DASH}]|and|&)\s*[A-Za-z])*"
_STYLES = (
    re.compile(rf"\((?P<marks>{_SEVERAL})\)"),
    re.compile(rf"(?:^|[.;:]\s+)(?P<marks>[A-Z](?:\s*[{_DASH}]\s*[A-Z])?)(?:[,.:)]|\s*[{_DASH}])\s+(?=\S)"),
    re.compile(rf"(?:^|[.;:]\s+)(?P<marks>[a-z](?:\s*[{_DASH}]\s*[a-z])?)[,.:)]\s+(?=\S)"),
)


@dataclass(frozen=True)
class Panel:
    """One mark of a caption: the letters it names, and where it begins."""

    letters: str
    start: int


def panels(caption: str) -> list[Panel]:
    """The marks of a caption's panels, in order; empty for a figure that is not compound."""
    best = max((_run(style, caption) for style in _STYLES), key=_count)
    return best if _count(best) > 1 else []


def count(caption: str) -> int:
    """How many panels a caption names; 1 if it names none."""
    return max(1, _count(panels(caption)))


def split(caption: str) -> list[str]:
    """The caption of each panel: what stands before the first mark, which is said of all, and the panel's own part; empty if none is named."""
    found = panels(caption)
    if not found:
        return []
    common = caption[: found[0].start].strip()
    ends = [panel.start for panel in found[1:]] + [len(caption)]
    own = [(panel.letters, caption[panel.start : end].strip(" ;")) for panel, end in zip(found, ends, strict=True)]
    return [f"{common} {part}".strip() for letters, part in own for _ in letters]


def _count(found: list[Panel]) -> int:
    return sum(len(panel.letters) for panel in found)


def _run(style: re.Pattern[str], caption: str) -> list[Panel]:
    found: list[Panel] = []
    due = 0
    for match in style.finditer(caption):
        letters = _letters(match["marks"])
        if letters and ord(letters[0]) - ord("a") == due:
            found.append(Panel(letters, match.start("marks") - (caption[match.start("marks") - 1 : match.start("marks")] == "(")))
            due += len(letters)
    return found


def _letters(marks: str) -> str:
    """The letters that a mark names, lower-case, ranges filled; empty if they do not go up one by one."""
    tokens = re.findall(rf"[A-Za-z](?![a-z])|[{_DASH}]", marks)
    letters = ""
    for index, token in enumerate(tokens):
        if token in _DASH:
            continue
        letter = token.lower()
        if index and tokens[index - 1] in _DASH and letters:
            letters += "".join(map(chr, range(ord(letters[-1]) + 1, ord(letter))))
        letters += letter
    return letters if all(ord(after) - ord(before) == 1 for before, after in itertools.pairwise(letters)) else ""
