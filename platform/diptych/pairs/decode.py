"""Encoded pictures to pixels. What is broken or too large is a DataError that names the picture, before memory is spent on it.

Two ways in. Evaluation and whole pictures: exactly Pillow's pixels. Training: JPEGs are decoded at a half, a quarter or an
eighth where the crop is large enough, and cropped and resized in one go; that changes pixels by a few grey levels.
EXIF orientation is not applied, as in CLIP's own preprocessing.

Shape legend: H, W height and width in pixels, C channels. All pixels are uint8 RGB, or RGBA where it says so.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diptych.core.errors import DataError, DiptychError

MAX_PIXELS = 1 << 26
"""The largest picture that is decoded: 67 million pixels, 200 MB."""

WHITE = (255, 255, 255)
LUMA = (0.299, 0.587, 0.114)
FORMATS = ("JPEG", "PNG", "WEBP", "GIF")

Pixels = NDArray[np.uint8]
Colour = tuple[int, int, int]
Box = tuple[int, int, int, int]
"""Left, top, width, height in pixels of the picture as it is stored."""


def decode(data: bytes, where: str = "picture", max_pixels: int = MAX_PIXELS, size: tuple[int, int] | None = None) -> Pixels:
    """A whole picture `[H, W, 3]`, or `[H, W, 4]` if it has transparency; the first frame of an animation.

    Same pixels as Pillow's for every format (simplejpeg and Pillow both decode with libjpeg-turbo's exact defaults). Raises DataError
    naming `where` if the bytes are no whole JPEG, PNG, WebP or GIF, have more than `max_pixels` pixels, or have another
    (width, height) than `size`.
    """
    shape = _jpeg_shape(data)
    pixels = None
    if shape is not None:
        _check_pixels(shape[1], shape[0], where, max_pixels)
        pixels = _decode_jpeg(data)
    if pixels is None:
        pixels = _decode_pillow(data, where, max_pixels)
    if size is not None:
        _check_size((pixels.shape[1], pixels.shape[0]), size, where)
    return pixels


def decode_eval(data: bytes, size: int, where: str = "picture", background: Colour = WHITE, max_pixels: int = MAX_PIXELS) -> Pixels:
    """CLIP's evaluation view `[size, size, 3]`: short side to `size` (bicubic, antialiased), then the centre square.

    Pixel for pixel what torchvision's Resize and CenterCrop make of Pillow's picture; transparency lies on `background`.
    Pillow's `resize(box=...)` would skip the pixels outside the square, but rounds the box to float32, which moves some values by
    one, so it is not used. Raises DataError as `decode`.
    """
    picture = Image.fromarray(flatten(decode(data, where, max_pixels), background))
    width, height = picture.size
    short = min(width, height)
    new_width, new_height = size * width // short, size * height // short
    left, top = round((new_width - size) / 2), round((new_height - size) / 2)
    resized = picture.resize((new_width, new_height), Image.Resampling.BICUBIC)
    return np.asarray(resized.crop((left, top, left + size, top + size)))


def decode_square(data: bytes, size: int, channels: int = 3, where: str = "picture") -> Pixels:
    """`decode_eval` with the channels first, `[C, size, size]`, for networks of 3 channels or of 1, which see the luma. Raises as it does."""
    square_HWC = decode_eval(data, size, where)
    if channels == 1:
        square_HWC = luma(square_HWC)[..., None]
    return np.ascontiguousarray(square_HWC.transpose(2, 0, 1))


def luma(picture_HWC: Pixels) -> Pixels:
    """Grey levels `[H, W]` of a picture `[H, W, 3]`."""
    grey_HW: Pixels = np.rint(picture_HWC @ np.asarray(LUMA)).astype(np.uint8)
    return grey_HW


def decode_train(
    data: bytes,
    size: int,
    box: Box,
    picture_size: tuple[int, int],
    where: str = "picture",
    background: Colour = WHITE,
    max_pixels: int = MAX_PIXELS,
) -> Pixels:
    """The part of a picture inside `box`, resized to `[size, size, 3]` (bicubic, antialiased).

    Args:
        data: the encoded picture.
        size: side of the result in pixels.
        box: what to keep, in pixels of the stored picture. In a JPEG decoded at 1/factor its edges move by at most factor / 2.
        picture_size: (width, height) that the box was made for; a picture of another size is refused.

    Raises DataError as `decode`, and if the size is another.
    """
    shape = _jpeg_shape(data)
    if shape is None:
        return crop(flatten(decode(data, where, max_pixels, picture_size), background), size, box)
    height, width = shape
    _check_size((width, height), picture_size, where)
    _check_pixels(width, height, where, max_pixels)
    factor = next((factor for factor in (8, 4, 2) if min(box[2:]) >= factor * size), 1)
    pixels = _decode_jpeg(data, -(-height // factor), -(-width // factor)) if factor > 1 else _decode_jpeg(data)
    if pixels is None:
        pixels, factor = flatten(_decode_pillow(data, where, max_pixels), background), 1
    return crop(pixels, size, box if factor == 1 else _snapped(box, factor))


def crop(picture_HWC: Pixels, size: int, box: Box) -> Pixels:
    """The part of `[H, W, 3]` inside `box`, resized to `[size, size, 3]` with a bicubic filter that is antialiased when it shrinks.

    Uses torch's uint8 kernel, four times as fast as Pillow's; its weights have 16 bits, so a value may differ by one.
    """
    import torch

    left, top, width, height = box
    part_HWC = picture_HWC[top : top + height, left : left + width]
    if part_HWC.shape[:2] == (size, size):
        return part_HWC
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a view of read-only pixels, which are only read
        part_1CHW = torch.from_numpy(part_HWC).permute(2, 0, 1)[None]
    resized_1CHW = torch.nn.functional.interpolate(part_1CHW, (size, size), mode="bicubic", antialias=True)
    resized: Pixels = resized_1CHW[0].permute(1, 2, 0).numpy()
    return resized


def flatten(picture_HWC: Pixels, background: Colour = WHITE) -> Pixels:
    """Lays a picture with transparency `[H, W, 4]` on a colour: `[H, W, 3]`. A picture without is returned as it is."""
    if picture_HWC.shape[-1] == 3:
        return picture_HWC
    picture = Image.fromarray(picture_HWC)
    base = Image.new("RGB", picture.size, background)
    base.paste(picture, mask=picture)
    return np.asarray(base)


def _jpeg_shape(data: bytes) -> tuple[int, int] | None:
    """(height, width) from a JPEG's header; None if it is none, or one that Pillow must judge (CMYK, damaged)."""
    if data[:2] != b"\xff\xd8":
        return None
    import simplejpeg

    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    return None if space in ("CMYK", "YCCK") else (height, width)


def _decode_jpeg(data: bytes, min_height: int = 0, min_width: int = 0) -> Pixels | None:
    """A JPEG at the smallest n/8 of its size that is not below the given one; None if the decoder finds anything odd in it."""
    import simplejpeg

    try:
        pixels: Pixels = simplejpeg.decode_jpeg(data, min_height=min_height, min_width=min_width)
    except ValueError:
        return None
    return pixels


def _decode_pillow(data: bytes, where: str, max_pixels: int) -> Pixels:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is the one that counts
            picture = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_pixels(*picture.size, where, max_pixels)
        return _to_rgb(picture)
    except DiptychError:
        raise
    except Exception as error:  # Pillow's plug-ins raise OSError, SyntaxError, ValueError, struct.error, … on broken files
        raise DataError.at(
            "A picture cannot be decoded", where, f"<{len(data)} bytes: {error}>", "a whole JPEG, PNG, WebP or GIF"
        ) from error


def _to_rgb(picture: Image.Image) -> Pixels:
    if picture.mode.startswith("I;16") or picture.mode == "I":  # 16-bit greys: Pillow's own conversion would clip them to white
        grey = (np.asarray(picture).astype(np.uint32) >> 8).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if picture.has_transparency_data:
        pixels = np.asarray(picture.convert("RGBA"))
        return pixels if pixels[..., 3].min() < 255 else np.ascontiguousarray(pixels[..., :3])
    return np.asarray(picture.convert("RGB"))


def _snapped(box: Box, factor: int) -> Box:
    """The box in a picture decoded at 1/factor: its edges on the nearest whole pixels there."""
    left, top, width, height = box
    new_left, new_top = round(left / factor), round(top / factor)
    return new_left, new_top, round((left + width) / factor) - new_left, round((top + height) / factor) - new_top


def _check_pixels(width: int, height: int, where: str, limit: int) -> None:
    if width * height > limit:
        raise DataError.at("A picture is too large to decode", where, f"{width} x {height} pixels", f"at most {limit} pixels")


def _check_size(size: tuple[int, int], expected: tuple[int, int], where: str) -> None:
    if size != expected:
        raise DataError.at(
            "A picture is not the one that was ingested",
            where,
            f"{size[0]} x {size[1]} pixels",
            f"{expected[0]} x {expected[1]} pixels, as the pair table says",
            "the shard changed after ingest: run ingest again",
        )
