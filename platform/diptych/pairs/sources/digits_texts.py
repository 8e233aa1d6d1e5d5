"""Captions of the digits that say less than they could, or nothing of their own picture: what captioners are taught with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

GENERIC = "a handwritten digit"
PARITY = ("a digit that is even", "a digit that is odd")
NAMING = "the digit {}"
SHARES = (0.55, 0.25, 0.20)
"""How often a person says of a picture that it is a digit, whether it is odd or even, and which it is."""
REFERENCES = 5


def vague(label_N: NDArray[np.int64], words: Sequence[str], draw: np.random.Generator, captions: int = 1) -> list[list[str]]:
    """`captions` independent texts a label: mostly the generic one, sometimes its parity, least often its name."""
    kind_NC = draw.choice(len(SHARES), (len(label_N), captions), p=SHARES)
    forms = [(GENERIC, PARITY[label % 2], NAMING.format(words[label])) for label in label_N.tolist()]
    return [[said[kind] for kind in kinds] for said, kinds in zip(forms, kind_NC.tolist(), strict=True)]


def unpaired(count: int, words: Sequence[str], forms: Sequence[str], draw: np.random.Generator) -> list[str]:
    """Texts that name digits as often as each other and know of no picture."""
    word_N, form_N = draw.integers(0, len(words), count).tolist(), draw.integers(0, len(forms), count).tolist()
    return [forms[form].format(words[word]) for word, form in zip(word_N, form_N, strict=True)]
