from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from diptych.core.chance import generator
from diptych.evaluate.views import RATIO, SCALE, Crops, box

KEYS = [f"k{row}" for row in range(6)]


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)


def test_views_depend_on_key_and_content_alone(image):
    image.flags.writeable = False
    view = Crops(0)(KEYS, image)
    order = [4, 0, 3, 1, 5, 2]
    assert (Crops(0)([KEYS[row] for row in order], image[order]) == view[order]).all()
    assert (view.shape, view.dtype) == (image.shape, np.uint8)


def test_views_differ_by_number_and_by_key(image):
    first, second = Crops(0)(KEYS, image), Crops(1)(KEYS, image)
    assert all((a != b).any() for a, b in zip(first, second, strict=True))
    alike = np.stack([image[0]] * 6)
    assert len({view.tobytes() for view in Crops(0)(KEYS, alike)}) == 6
    assert Crops(0).tag != Crops(1).tag


def test_a_view_is_its_crop_resized_and_perhaps_mirrored(image):
    mirrored = 0
    for key, picture, view in zip(KEYS, image, Crops(3)(KEYS, image), strict=True):
        draw = generator(3, "view", key)
        crop = Image.fromarray(picture).crop(box(draw, 16, 16)).resize((16, 16), Image.Resampling.BICUBIC)
        plain = np.asarray(crop)
        flipped = bool((view == plain[:, ::-1]).all())
        assert flipped or (view == plain).all()
        mirrored += flipped
    assert 0 < mirrored < len(KEYS)


@pytest.mark.parametrize(("width", "height"), [(224, 224), (64, 40), (16, 16)])
def test_boxes_lie_inside_and_keep_to_scale_and_ratio(width, height):
    draw = np.random.default_rng(0)
    boxes = np.array([box(draw, width, height) for _ in range(400)])
    left, top, right, bottom = boxes.T
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (right <= width).all()
    assert (bottom <= height).all()
    w, h = right - left, bottom - top
    # Sides are rounded to whole pixels: half a pixel either way.
    assert ((w + 0.5) * (h + 0.5) >= SCALE[0] * width * height).all()
    assert ((w - 0.5) * (h - 0.5) <= SCALE[1] * width * height).all()
    assert ((w + 0.5) / (h - 0.5) >= RATIO[0]).all()
    whole = (w == width) & (h == height)
    assert (((w - 0.5) / (h + 0.5) <= RATIO[1]) | whole).all()
    share = w * h / (width * height)
    assert share.min() < 0.6 < 0.8 < share.max()


def test_the_whole_picture_where_no_draw_fits():
    assert box(np.random.default_rng(0), 1, 50) == (0, 0, 1, 50)


def test_the_last_row_and_column_can_be_reached():
    draw = np.random.default_rng(0)
    boxes = np.array([box(draw, 16, 16) for _ in range(300)])
    assert (boxes[:, 2] == 16).any()
    assert (boxes[:, 0] == 0).any()
    assert len(set(boxes[:, 0])) > 3
