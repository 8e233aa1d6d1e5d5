"""Near copies: the same picture in another size, format or brightness is found, another picture is not."""

from __future__ import annotations

import io

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from tests.evaluation_sets import png

from diptych.evaluate import near_copies
from diptych.evaluate.near_copies import SIDE_PX, Fingerprints, fingerprints
from diptych.pairs.decode import decode_eval


def taken(*encoded: bytes) -> Fingerprints:
    return fingerprints(np.stack([np.moveaxis(decode_eval(data, SIDE_PX), -1, 0) for data in encoded]))


def found(of: Fingerprints, among: Fingerprints) -> NDArray[np.bool_]:
    return near_copies.near_copies(of, among)


def again(data: bytes, side_px: int, quality: int, gain: float = 1.0) -> bytes:
    buffer = io.BytesIO()
    picture = Image.open(io.BytesIO(data)).convert("RGB").resize((side_px, side_px), Image.Resampling.BILINEAR)
    picture.point(lambda value: value * gain).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def test_the_same_picture_is_found_in_another_size_format_and_brightness() -> None:
    originals = [png(seed, 96) for seed in range(60)]
    assert found(taken(*originals), taken(*(again(data, 60, 70, 0.9) for data in originals))).mean() >= 0.95


def test_other_pictures_are_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    few, others = taken(*(png(seed) for seed in range(100))), taken(*(png(seed) for seed in range(100, 300)))
    assert not found(few, others).any()
    both = Fingerprints(*(np.concatenate([a, b[:7]]) for a, b in zip(others, few, strict=True)))
    assert found(few, both).nonzero()[0].tolist() == list(range(7))
    monkeypatch.setattr(near_copies, "CHUNK", 64 * 10)
    assert found(few, both).nonzero()[0].tolist() == list(range(7))
    assert not found(few, Fingerprints(others.hash_N[:0], others.grey_NP[:0])).any()


def test_an_equal_hash_alone_is_no_copy() -> None:
    """Two shapes with the same sign of every coarse gradient, one of which is bent beyond likeness."""
    ramp = np.tile(np.linspace(0, 250, SIDE_PX, dtype=np.float32), (SIDE_PX, 1))
    bent = 250 * (ramp / 250) ** 6 + ramp * 0.1
    of, among = (fingerprints(np.tile(np.clip(x, 0, 255).astype(np.uint8), (1, 3, 1, 1))) for x in (ramp, bent))
    assert np.bitwise_count(of.hash_N ^ among.hash_N)[0] <= near_copies.BITS
    assert not found(of, among).any()


def test_a_picture_that_shows_nothing_is_no_copy_of_another() -> None:
    flat = fingerprints(np.full((2, 3, SIDE_PX, SIDE_PX), 200, np.uint8))
    assert not found(flat, flat).any()
