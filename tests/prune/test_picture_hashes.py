from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from tests.prune.pictures import encoded, picture

from diptych.core.errors import DataError
from diptych.prune import picture_hashes
from diptych.prune.picture_hashes import band_bounds, band_of, content, nearest_before, perceptual


def bits(one: int | None, other: int | None) -> int:
    assert one is not None
    assert other is not None
    return int(one ^ other).bit_count()


@pytest.mark.parametrize("kind", ["phash", "dhash"])
def test_hashes_survive_size_format_and_brightness_but_tell_pictures_apart(kind: str) -> None:
    original = picture(0, 128)
    own = perceptual(encoded(original), kind)
    for changed in (
        encoded(original, "JPEG", quality=70),
        encoded(original.resize((64, 64), Image.Resampling.BICUBIC)),
        encoded(original.point(lambda level: min(255, level * 0.9 + 10))),
    ):
        assert bits(own, perceptual(changed, kind)) <= 4
    assert min(bits(own, perceptual(encoded(picture(seed, 128)), kind)) for seed in range(1, 10)) > 12


@pytest.mark.parametrize("kind", ["phash", "dhash"])
def test_hashes_are_the_usual_ones(kind: str) -> None:
    imagehash = pytest.importorskip("imagehash", reason="imagehash is no dependency; a machine that has it checks the bits")
    for seed in range(20):
        image = picture(seed, 50 + 13 * seed)
        assert perceptual(encoded(image), kind) == int(str(getattr(imagehash, kind)(image)), 16)


def test_known_bits() -> None:
    ramp = np.repeat(np.tile(np.arange(36, dtype=np.uint8) * 7, (32, 1))[..., None], 3, axis=2)
    assert perceptual(encoded(Image.fromarray(ramp)), "dhash") == 2**64 - 1, "every point is darker than its right neighbour"
    assert perceptual(encoded(Image.fromarray(ramp[:, ::-1])), "dhash") == 0


def test_flat_pictures_have_no_hash() -> None:
    assert perceptual(encoded(Image.new("RGB", (50, 50), (200, 10, 10))), "phash") is None


def test_content_is_of_pixels_or_of_the_file() -> None:
    image = picture(1)
    png, other, webp = encoded(image), encoded(image, compress_level=1), encoded(image, "WEBP", lossless=True)
    assert content(png, "pixels") == content(other, "pixels") == content(webp, "pixels") >= 0
    assert content(png, "file") != content(other, "file")
    assert content(encoded(image.transpose(Image.Transpose.ROTATE_90)), "pixels") != content(png, "pixels")
    wide, tall = Image.new("RGB", (4, 2)), Image.new("RGB", (2, 4))
    assert content(encoded(wide), "pixels") != content(encoded(tall), "pixels"), "the same bytes in another shape are another picture"


def test_a_broken_picture_is_named() -> None:
    with pytest.raises(DataError, match="pair-7"):
        perceptual(encoded(picture(0))[:200], "phash", "pair-7")
    with pytest.raises(DataError, match="pair-8"):
        content(b"no picture", "pixels", "pair-8")


@pytest.mark.parametrize("radius", range(8))
def test_hashes_within_the_radius_share_a_band(radius: int) -> None:
    bounds = band_bounds(radius)
    assert sum(number for _, number in bounds) == 64
    rng = np.random.default_rng(radius)
    one_N = rng.integers(0, 2**64, 500, dtype=np.uint64)
    flips = [rng.choice(64, radius, replace=False) for _ in range(500)]
    other_N = one_N ^ np.array([sum(1 << int(bit) for bit in flip) for flip in flips], dtype=np.uint64)
    shared = np.zeros(500, dtype=bool)
    for band in range(radius + 1):
        value_N = band_of(one_N, radius, band)
        assert value_N.min() >= 0
        shared |= value_N == band_of(other_N, radius, band)
    assert shared.all()


@pytest.mark.parametrize("block", [1, 7, 512])
def test_nearest_before_is_the_plain_double_loop(block: int) -> None:
    rng = np.random.default_rng(0)
    hash_N = rng.integers(0, 2**10, 60, dtype=np.uint64)
    place_N, distance_N = nearest_before(hash_N, 2, block)
    for row in range(60):
        apart = [int(hash_N[row] ^ hash_N[before]).bit_count() for before in range(row)]
        if apart and min(apart) <= 2:
            assert (place_N[row], distance_N[row]) == (apart.index(min(apart)), min(apart))
        else:
            assert place_N[row] == -1


def test_transparency_lies_on_white() -> None:
    clear = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    assert content(encoded(clear), "pixels") == content(encoded(Image.new("RGB", (40, 40), (255, 255, 255))), "pixels")
    assert Image.open(io.BytesIO(encoded(clear))).mode == "RGBA"


def test_runs_of_any_length_are_searched_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    size_R = [1, 2, 5, 40, 60, 1, 3]
    run_N = np.repeat(np.arange(len(size_R)), size_R)
    hash_N = rng.integers(0, 2**9, len(run_N), dtype=np.uint64)
    expected = [
        min(
            ((int(hash_N[row] ^ hash_N[before]).bit_count(), before) for before in range(row) if run_N[before] == run_N[row]),
            default=(99, -1),
        )
        for row in range(len(run_N))
    ]
    for longest in (1, 4, 48, 1000):
        monkeypatch.setattr(picture_hashes, "LONG", longest)
        place_N, distance_N = picture_hashes.nearest_in_runs(hash_N, run_N, 2)
        assert [(distance_N[row], place_N[row]) if place_N[row] >= 0 else None for row in range(len(run_N))] == [
            found if found[0] <= 2 else None for found in expected
        ]
    assert [len(found) for found in picture_hashes.nearest_in_runs(hash_N[:0], run_N[:0], 2)] == [0, 0]
