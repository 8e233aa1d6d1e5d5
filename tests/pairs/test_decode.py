from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from diptych.core.errors import DataError
from diptych.pairs.decode import crop, decode, decode_eval, decode_train, flatten


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth noise: what JPEG is good at."""
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 16 + 2, width // 16 + 2, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def reference_eval(data: bytes, size: int) -> np.ndarray:
    """torchvision's Resize and CenterCrop on Pillow's picture."""
    from torchvision.transforms import CenterCrop, InterpolationMode, Resize

    image = Image.open(io.BytesIO(data)).convert("RGB")
    return np.asarray(CenterCrop(size)(Resize(size, InterpolationMode.BICUBIC)(image)))


@pytest.mark.parametrize(("width", "height"), [(160, 120), (119, 163), (64, 64), (301, 40), (41, 40), (20, 33)])
@pytest.mark.parametrize(
    ("kind", "options"), [("JPEG", {"quality": 90}), ("JPEG", {"quality": 75, "subsampling": 0}), ("PNG", {}), ("WEBP", {})]
)
def test_evaluation_pixels_are_pillows(width: int, height: int, kind: str, options: dict[str, int]) -> None:
    data = encoded(photo(width, height), kind, **options)
    ours = decode_eval(data, 40)
    assert ours.dtype == np.uint8
    np.testing.assert_array_equal(ours, reference_eval(data, 40))


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_jpeg_colours_are_pillows(mode: str) -> None:
    data = encoded(photo(50, 60).convert(mode), "JPEG", quality=95)
    np.testing.assert_array_equal(decode(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    np.testing.assert_array_equal(decode_eval(data, 16), reference_eval(data, 16))
    assert decode_train(data, 16, (0, 0, 50, 50), (50, 60)).shape == (16, 16, 3)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_lies_on_the_background(mode: str) -> None:
    rgba = np.zeros((10, 12, 4), dtype=np.uint8)
    rgba[:, :6] = (200, 0, 0, 255)
    image = Image.fromarray(rgba)
    data = encoded(image.convert(mode) if mode == "LA" else image.quantize(4) if mode == "P" else image, "PNG")
    whole = decode(data)
    assert whole.shape == (10, 12, 4)
    on_green = flatten(whole, (0, 255, 0))
    assert (on_green[:, 6:] == (0, 255, 0)).all()
    np.testing.assert_array_equal(on_green[:, :6], whole[:, :6, :3])
    assert (decode_eval(data, 10)[:, -3:] == 255).all()
    assert (decode_train(data, 4, (6, 0, 6, 10), (12, 10), background=(9, 8, 7)) == (9, 8, 7)).all()


def test_half_transparency_is_mixed() -> None:
    data = encoded(Image.new("RGBA", (4, 4), (255, 0, 0, 128)), "PNG")
    np.testing.assert_allclose(flatten(decode(data), (0, 0, 255))[0, 0], (128, 0, 127), atol=1)


def test_opaque_alpha_and_animations_are_rgb() -> None:
    assert decode(encoded(Image.new("RGBA", (5, 6), (1, 2, 3, 255)), "PNG")).shape == (6, 5, 3)
    frames = [Image.new("RGB", (5, 6), colour) for colour in ("red", "blue")]
    animation = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (decode(animation)[..., 0] > 200).all()


def test_sixteen_bit_greys_keep_their_range() -> None:
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    data = encoded(Image.fromarray(ramp), "PNG")
    np.testing.assert_array_equal(decode(data)[..., 0], ramp >> 8)


@pytest.mark.parametrize("size", [24, 32, 100])
@pytest.mark.parametrize("box", [(0, 0, 320, 240), (37, 11, 210, 200), (100, 100, 30, 40)])
def test_training_pixels_are_near_pillows(size: int, box: tuple[int, int, int, int]) -> None:
    data = encoded(photo(320, 240), "JPEG", quality=92)
    left, top, width, height = box
    ours = decode_train(data, size, box, (320, 240))
    factor = max(factor for factor in (1, 2, 4, 8) if factor == 1 or min(width, height) >= factor * size)
    edges = (factor * round(edge / factor) for edge in (left, top, left + width, top + height))
    part = Image.open(io.BytesIO(data)).crop(tuple(edges))
    expected = np.asarray(part.resize((size, size), Image.Resampling.BICUBIC))
    error = np.abs(ours.astype(int) - expected)
    assert ours.shape == (size, size, 3)
    assert error.mean() < 4, "a JPEG decoded at reduced size differs by a few grey levels, no more"


def test_png_crops_are_pillows_but_for_rounding() -> None:
    data = encoded(photo(50, 70), "PNG")
    ours = decode_train(data, 20, (3, 5, 33, 44), (50, 70))
    expected = np.asarray(photo(50, 70).crop((3, 5, 36, 49)).resize((20, 20), Image.Resampling.BICUBIC))
    assert np.abs(ours.astype(int) - expected).max() <= 1
    same = crop(decode(data), 20, (3, 5, 20, 20))
    np.testing.assert_array_equal(same, np.asarray(photo(50, 70))[5:25, 3:23])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.6])
def test_a_cut_off_picture_is_named(kind: str, share: float) -> None:
    data = encoded(photo(200, 150), kind)
    cut = data[: int(len(data) * share)]
    with pytest.raises(DataError, match="pair-7"):
        decode(cut, "pair-7")
    with pytest.raises(DataError, match="pair-7"):
        decode_train(cut, 20, (0, 0, 200, 150), (200, 150), "pair-7")


def test_other_bytes_and_formats_are_refused() -> None:
    for data in (b"hello", b"\xff\xd8 no", encoded(photo(20, 20), "BMP"), encoded(photo(20, 20), "TIFF")):
        with pytest.raises(DataError, match="pair-7"):
            decode_eval(data, 8, "pair-7")


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_large_picture_is_refused_before_it_is_decoded(kind: str) -> None:
    data = encoded(photo(300, 200), kind)
    for call in (
        lambda: decode(data, "big", max_pixels=59_999),
        lambda: decode_train(data, 8, (0, 0, 9, 9), (300, 200), "big", max_pixels=59_999),
    ):
        with pytest.raises(DataError, match="big") as error:
            call()
        assert "300 x 200" in str(error.value)
    assert decode(data, max_pixels=60_000).shape == (200, 300, 3)


def test_a_decompression_bomb_is_refused_by_its_header() -> None:
    bomb = encoded(Image.new("1", (30_000, 30_000)), "PNG")
    assert len(bomb) < 1 << 20
    with pytest.raises(DataError, match="pair-7"):
        decode(bomb, "pair-7")


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_picture_of_another_size_than_the_table_says_is_refused(kind: str) -> None:
    data = encoded(photo(40, 30), kind)
    with pytest.raises(DataError, match="not the one that was ingested"):
        decode_train(data, 8, (0, 0, 30, 30), (30, 40))
    with pytest.raises(DataError, match="not the one that was ingested"):
        decode(data, size=(30, 40))
