"""What a picture is, found out without decoding it; what is broken, too large or not a picture gets a reason instead of a traceback."""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError
from pydantic import Field

from diptych.core.config import Config

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
TRAINABLE = frozenset({"JPEG", "PNG", "WEBP", "GIF"})
"""Formats that may lie in shards; others are packed as PNG."""

EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif"}
_MAGIC = {b"\xff\xd8\xff": "jpg", b"\x89PNG\r\n\x1a\n": "png", b"GIF8": "gif", b"II*\0": "tif", b"MM\0*": "tif"}
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, IndexError, KeyError, TypeError, OverflowError, ZeroDivisionError)


class ImageLimits(Config):
    """What a picture may cost before it is decoded."""

    max_pixels: int = Field(default=1 << 26, gt=0, description="width times height, pixels")
    max_bytes: int = Field(default=64 << 20, gt=0, description="length of the encoded picture, bytes")


class Fault(ValueError):  # noqa: N818 - a pair is at fault, not the program
    """Why a pair cannot be used; `reason` is short and countable."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


@dataclass(frozen=True)
class ImageInfo:
    """A picture's header: width and height in pixels as stored, format and mode as Pillow names them, frames of an animation."""

    width: int
    height: int
    format: str
    mode: str
    frames: int

    @property
    def plain(self) -> bool:
        """True if every decoder makes the same pixels of it: one frame, eight bits, not CMYK, a format that training reads."""
        return self.frames == 1 and self.format in TRAINABLE and self.mode in ("RGB", "RGBA", "L", "LA", "P", "1")


def probe(data: bytes, limits: ImageLimits | None = None) -> ImageInfo:
    """Reads a picture's header; no pixel is decoded. `data` may be its first part only, where the header lies in it.

    Raises Fault: `empty image`, `too many bytes`, `not an image`, `truncated image`, `too many pixels (decompression bomb)`.
    """
    limits = limits or ImageLimits()
    with _opened(data, limits) as picture:
        return ImageInfo(*picture.size, str(picture.format), picture.mode, int(getattr(picture, "n_frames", 1)))


def verify(data: bytes, limits: ImageLimits | None = None) -> ImageInfo:
    """`probe`, and the first frame is decoded (JPEGs at an eighth of their size), so that what is cut off or corrupt is found."""
    limits = limits or ImageLimits()
    with _opened(data, limits) as picture:
        info = ImageInfo(*picture.size, str(picture.format), picture.mode, int(getattr(picture, "n_frames", 1)))
        picture.draft("L", (1, 1))
        picture.load()
    return info


def to_rgb(data: bytes, background: tuple[int, int, int] = (255, 255, 255), limits: ImageLimits | None = None) -> Image.Image:
    """The picture as 8-bit RGB: the first frame, transparency laid on `background`, CMYK, palettes and 16 bits converted.

    EXIF orientation is not applied, as in CLIP's own preprocessing. Raises Fault.
    """
    with _opened(data, limits or ImageLimits()) as picture:
        return _flattened(picture, background)


def to_eight_bits(data: bytes, limits: ImageLimits | None = None) -> Image.Image:
    """The picture's first frame as RGB, or RGBA where it has transparency. Raises Fault."""
    with _opened(data, limits or ImageLimits()) as picture:
        picture.load()
        return picture.convert("RGBA") if picture.has_transparency_data else _flattened(picture, (255, 255, 255))


@contextmanager
def _opened(data: bytes, limits: ImageLimits) -> Iterator[Image.Image]:
    """The picture behind its header, within the limits; whatever Pillow raises becomes a fault."""
    if not data:
        raise Fault("empty image")
    if len(data) > limits.max_bytes:
        raise Fault("too many bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on odd metadata, and on sizes below Pillow's limit: ours is stricter
            with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
                if picture.width * picture.height > limits.max_pixels:
                    raise Fault("too many pixels (decompression bomb)")
                if picture.width * picture.height == 0:
                    raise Fault("not an image")
                yield picture
    except Fault:
        raise
    except Image.DecompressionBombError:
        raise Fault("too many pixels (decompression bomb)") from None
    except UnidentifiedImageError:
        raise Fault("truncated image" if extension_of(data) != "bin" else "not an image") from None
    except _BROKEN as error:
        raise Fault("truncated image" if _is_cut(data, error) else "corrupt image") from error


def extension_of(data: bytes) -> str:
    """The file ending of an encoded picture, told by its first bytes; `bin` for what is none of ours."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return next((ending for magic, ending in _MAGIC.items() if data.startswith(magic)), "bin")


def _is_cut(data: bytes, error: Exception) -> bool:
    """Pillow has no error of its own for files that end early: its words tell, or for WebP the length in the header."""
    words = str(error).lower()
    if data[:4] == b"RIFF":
        return len(data) < int.from_bytes(data[4:8], "little") + 8
    return isinstance(error, EOFError | struct.error) or any(
        word in words for word in ("truncated", "not enough", "unexpected end", "not enough image data")
    )


def _flattened(picture: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    picture.load()
    if picture.mode.startswith("I"):  # 16 bits: Pillow's own conversion would clip them to white
        return Image.fromarray((np.asarray(picture).astype(np.uint32) >> 8).astype(np.uint8)).convert("RGB")
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    drawn = picture.convert("RGBA")
    base = Image.new("RGB", drawn.size, background)
    base.paste(drawn, mask=drawn)
    return base
