"""A picture's name by its pixels: the same for two files that decode to the same picture, whatever wrote them.

Source: BIOMEDICA's image hash, over pixels in place of a PNG file, whose bytes depend on the encoder's version.
"""

from __future__ import annotations

import hashlib

from PIL import Image

from diptych.pairs.image import ImageLimits, to_eight_bits

SHRUNK_PX = 1000


def shrunk(picture: Image.Image) -> Image.Image:
    """The picture as RGB (grey stays grey), no side longer than 1,000 pixels, in its own proportions; a smaller one keeps its size."""
    small = picture.copy() if picture.mode in ("RGB", "L") else picture.convert("RGB")
    small.thumbnail((SHRUNK_PX, SHRUNK_PX))
    return small


def pixel_hash(data: bytes, limits: ImageLimits | None = None) -> str:
    """SHA-256 over size, mode and pixels of the shrunk picture, hexadecimal. Raises Fault."""
    small = shrunk(to_eight_bits(data, limits))
    return hashlib.sha256(f"{small.width}x{small.height}{small.mode}".encode() + small.tobytes()).hexdigest()
