"""Who says what a picture shows, without seeing its text: a rule, a multimodal model on a server or on this machine, or a caption that is there already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from diptych.caption.captioners import Picture, PictureCaptioner
from diptych.caption.rewriters import Request, Rewriter

PROMPT = "Say in one short sentence of fewer than 20 words what is to be seen in this picture."


@dataclass(frozen=True)
class Seen:
    """A pair as a captioner sees it: its key, its encoded picture, and the texts it has from the source that is asked for."""

    key: str
    picture: bytes
    texts: tuple[str, ...] = ()


class Captioner(Protocol):
    """Describes pictures. Answers depend on `(seed, key)` and the picture, not on its neighbours."""

    def describe(self, seen: Sequence[Seen]) -> list[str | None]:
        """A raw description a picture, in order; None where there is none.

        Raises DataError for a broken picture, ResourceError if nothing can be described at all.
        """
        ...


class RuleCaptioner:
    """Describes drawings in white on black by rule: tone, width, loops (`pairs/strokes.py`)."""

    def describe(self, seen: Sequence[Seen]) -> list[str | None]:
        """A description a picture. Raises DataError for a picture that cannot be decoded."""
        from diptych.pairs.decode import decode, flatten, luma
        from diptych.pairs.strokes import describe

        return [describe(luma(flatten(decode(each.picture, each.key))).astype(np.float64) / 255) for each in seen]


class ModelCaptioner:
    """Asks a multimodal chat model; no text of the pair is shown to it."""

    def __init__(self, rewriter: Rewriter) -> None:
        self.rewriter = rewriter

    def describe(self, seen: Sequence[Seen]) -> list[str | None]:
        """One answer a picture. Raises as the rewriter does."""
        return self.rewriter.rewrite([Request(each.key, 0, "", prompt=PROMPT, picture=each.picture) for each in seen])


class LocalDescriber:
    """Asks an image-to-text model on this machine; no text of the pair is shown to it."""

    def __init__(self, captioner: PictureCaptioner) -> None:
        self.captioner = captioner

    def describe(self, seen: Sequence[Seen]) -> list[str | None]:
        """One answer a picture. Raises as the captioner does."""
        return self.captioner.caption([Picture(each.key, each.picture) for each in seen])


class ExistingCaptioner:
    """Takes the first of the texts that the pair has from another captioner."""

    def describe(self, seen: Sequence[Seen]) -> list[str | None]:
        """The text, None for a pair without one."""
        return [next(iter(each.texts), None) for each in seen]
