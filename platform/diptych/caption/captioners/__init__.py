"""What a picture captioner is asked and what it answers. One file a captioner: a checkpoint of ours, a 🤗 model on disk, a server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Picture:
    """One picture to caption.

    Attributes:
        key: the pair's key; with the method's seed it names every random draw.
        data: the encoded picture.
    """

    key: str
    data: bytes


class PictureCaptioner(Protocol):
    """Says what pictures show. Answers depend on `(seed, key)` and the picture, not on its neighbours."""

    def caption(self, pictures: Sequence[Picture]) -> list[str | None]:
        """One answer a picture, in order; None where it got no usable one.

        Raises:
            DataError: a picture that cannot be decoded.
            ResourceError: nothing can be captioned at all, e.g. the server is down.
        """
        ...
