"""Small pictures for pages."""

from __future__ import annotations

import io

from PIL import Image

from diptych.core.errors import DataError
from diptych.pairs.image import Fault, to_rgb


def webp(data: bytes, side: int, quality: int = 70) -> bytes:
    """A picture as WebP of at most `side` x `side` pixels, on white. Raises DataError if it cannot be decoded."""
    try:
        picture = to_rgb(data)
    except Fault as fault:
        raise DataError.at("A picture cannot be shown", "thumbnail", f"<{fault.reason}>", "a whole picture") from None
    picture.thumbnail((side, side), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=quality)
    return buffer.getvalue()
