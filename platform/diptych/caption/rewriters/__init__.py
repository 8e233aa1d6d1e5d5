"""What a rewriter is asked and what it answers. One file a rewriter: a word table, a server, a local language model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Request:
    """One caption to rewrite once.

    Attributes:
        key: the pair's key. Together with `copy` and the method's seed it names every random draw.
        copy: which of the K rewrites this is, from 0.
        source: the original caption, white space collapsed, never empty.
        tags: the pair's own tags, in their order.
        language: BCP 47 tag of the caption, None where nobody said.
        prompt: what a language model is asked, as it stands, in place of three example pairs and the caption; "" for those.
        picture: the encoded picture, for a model that sees; only with a `prompt`.
    """

    key: str
    copy: int
    source: str
    tags: tuple[str, ...] = ()
    language: str | None = None
    prompt: str = ""
    picture: bytes | None = None


class Rewriter(Protocol):
    """Turns requests into rewrites. Answers depend on `(seed, key, copy)` and the request, not on its neighbours."""

    def rewrite(self, requests: Sequence[Request]) -> list[str | None]:
        """One answer a request, in order; None where it got no usable one. Answers are raw: the caller judges them.

        Raises:
            ResourceError: nothing can be rewritten at all, e.g. the server is down.
        """
        ...
