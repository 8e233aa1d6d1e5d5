"""Broken and hostile pictures get a reason; odd but whole ones become RGB."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from diptych.core.errors import DataError
from diptych.pairs.image import EXTENSIONS, Fault, ImageLimits, extension_of, probe, to_rgb, verify
from diptych.pairs.thumbnails import webp

from .conftest import picture

FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]


def noise(format: str, size: tuple[int, int] = (64, 48)) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format)
    return buffer.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be huge."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def animated(format: str) -> bytes:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 0, 255), (0, 255, 0))]
    buffer = io.BytesIO()
    frames[0].save(buffer, format, save_all=True, append_images=frames[1:], **({"lossless": True} if format == "WEBP" else {}))
    return buffer.getvalue()


@pytest.mark.parametrize("format", FORMATS)
def test_header(format: str) -> None:
    info = probe(noise(format))
    assert (info.width, info.height, info.format, info.frames) == (64, 48, format, 1)
    assert verify(noise(format)) == info
    assert extension_of(noise(format)) == {**EXTENSIONS, "TIFF": "tif", "BMP": "bin"}[format]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_cut_off_picture_is_found_by_decoding(format: str, share: float) -> None:
    data = noise(format)
    with pytest.raises(Fault) as caught:
        verify(data[: int(len(data) * share)])
    assert caught.value.reason in ("truncated image", "corrupt image")
    if format in ("JPEG", "PNG", "WEBP"):
        assert caught.value.reason == "truncated image"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty image"),
        (b"<html>404 not found</html>", "not an image"),
        (b"\x00" * 1000, "not an image"),
        (b"\x89PNG\r\n\x1a\n", "truncated image"),
        (b"\xff\xd8\xff\xe0", "truncated image"),
        (bomb(60_000, 60_000), "too many pixels (decompression bomb)"),
        (bomb(12_000, 12_000), "too many pixels (decompression bomb)"),
        (picture(size=(300, 300))[:60], "truncated image"),
    ],
)
def test_faults(data: bytes, reason: str) -> None:
    with pytest.raises(Fault) as caught:
        verify(data)
    assert caught.value.reason == reason


def test_limits() -> None:
    data = picture(size=(20, 10))
    probe(data, ImageLimits(max_pixels=200))
    with pytest.raises(Fault, match="too many pixels"):
        probe(data, ImageLimits(max_pixels=199))
    with pytest.raises(Fault, match="too many bytes"):
        probe(data, ImageLimits(max_bytes=len(data) - 1))


def test_no_reason_is_a_traceback() -> None:
    """Whatever single byte is damaged, the outcome is a picture or a reason."""
    whole = {format: noise(format, (16, 12)) for format in FORMATS}
    for data in whole.values():
        for position in range(0, len(data), 7):
            damaged = data[:position] + bytes([data[position] ^ 0xFF]) + data[position + 1 :]
            with contextlib.suppress(Fault):
                assert to_rgb(damaged, limits=ImageLimits(max_pixels=1 << 16)).mode == "RGB"


def test_cmyk() -> None:
    buffer = io.BytesIO()
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(buffer, "JPEG", quality=95)
    info = probe(buffer.getvalue())
    assert info.mode == "CMYK"
    assert not info.plain
    red, green, blue = to_rgb(buffer.getvalue()).getpixel((4, 4))  # type: ignore[misc]
    assert red > 240
    assert green < 15
    assert blue < 15


def test_sixteen_bits_are_not_clipped() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4), 0x8000, dtype=np.uint16)).save(buffer, "PNG")
    assert not probe(buffer.getvalue()).plain
    assert to_rgb(buffer.getvalue()).getpixel((0, 0)) == (128, 128, 128)


def test_palette_and_transparency() -> None:
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    buffer = io.BytesIO()
    palette.save(buffer, "PNG")
    assert to_rgb(buffer.getvalue()).getpixel((0, 0)) == (10, 200, 30)
    clear = picture((255, 0, 0, 0), mode="RGBA")
    assert to_rgb(clear).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(clear, background=(1, 2, 3)).getpixel((0, 0)) == (1, 2, 3)
    half = to_rgb(picture((255, 0, 0, 128), mode="RGBA"), background=(0, 0, 0)).getpixel((0, 0))
    assert half == (128, 0, 0)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_animation_gives_its_first_frame(format: str) -> None:
    info = probe(animated(format))
    assert info.frames == 3
    assert not info.plain
    assert to_rgb(animated(format)).getpixel((0, 0)) == (255, 0, 0)


def test_thumbnail() -> None:
    small = Image.open(io.BytesIO(webp(noise("PNG", (64, 48)), 16)))
    assert small.size == (16, 12)
    with pytest.raises(DataError, match="cannot be shown"):
        webp(b"nothing", 16)
