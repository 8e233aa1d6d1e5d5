"""The shifts of the digits by their definitions, on arrays."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import convolve

from diptych.core import chance
from diptych.pairs.sources.digits_shift import BLOCKS, SIGMA, Corruption, block_of, blurred, sideways, strength_of

GREY = np.random.default_rng(0).random((8, 8))


def draw() -> np.random.Generator:
    return chance.generator(0, "a picture")


def test_a_pixel_sideways() -> None:
    moved = sideways(GREY)
    assert np.array_equal(moved[:, 1:], GREY[:, :-1])
    assert not moved[:, 0].any()


def test_blur_is_the_convolution() -> None:
    kernel = np.outer([1, 2, 1], [1, 2, 1]) / 16
    assert np.allclose(blurred(GREY), convolve(GREY, kernel, mode="constant"), rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("shift", "expected"),
    [("none", GREY), ("noise", GREY), ("pixel", sideways(GREY)), ("blur", blurred(GREY)), ("contrast", 0.5 * GREY + 0.25)],
)
def test_a_shift_is_a_change_and_noise(shift: str, expected: np.ndarray) -> None:
    changed = Corruption(shift, 0.0, contrast=0.5, brightness=0.25).apply(GREY, draw())  # type: ignore[arg-type]
    assert np.array_equal(changed, expected)
    noisy = Corruption(shift, 0.4, contrast=0.5, brightness=0.25).apply(GREY, draw())  # type: ignore[arg-type]
    assert np.allclose(noisy - expected, draw().normal(0, 0.4, GREY.shape))


def test_noise_has_its_sigma() -> None:
    noise = Corruption("noise", 0.3).apply(np.zeros((200, 200)), draw())
    assert noise.std() == pytest.approx(0.3, rel=0.02)
    assert noise.mean() == pytest.approx(0, abs=0.01)


def test_the_drift_grows_from_nothing_to_the_whole_corruption() -> None:
    drift = Corruption("drift", SIGMA["drift"])
    by_strength = [drift.apply(GREY, draw(), strength_of(block)) for block in range(BLOCKS)]
    assert np.array_equal(by_strength[0], GREY)
    assert np.array_equal(by_strength[-1], Corruption("pixel", 0.3).apply(GREY, draw()))
    steps = np.diff(np.stack(by_strength), axis=0)
    assert np.allclose(steps, steps[0]), "linear in the block"


@pytest.mark.parametrize("rows", [12, 13, 597, 1197, 1787])
def test_blocks_are_consecutive_and_of_one_size(rows: int) -> None:
    blocks = [block_of(row, rows) for row in range(rows)]
    assert blocks == sorted(blocks)
    sizes = np.bincount(blocks)
    assert len(sizes) == BLOCKS
    assert np.ptp(sizes) <= 1
