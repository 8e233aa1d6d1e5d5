import numpy as np
import pytest
import torch
from PIL import Image

from diptych.adapt import strong_views
from diptych.core.errors import ConfigError, DataError
from diptych.models import clip
from diptych.models.preprocess import preprocess


def picture(width=40, height=30, seed=0, mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 5, width // 5, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height)).convert(mode)


@pytest.fixture(scope="module")
def model():
    vision = {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8}
    text = {"context_length": 4, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1}
    return clip.build({"embed_dim": 8, "vision_cfg": vision, "text_cfg": text})


def view(seed=1, epoch=2, key="a", image=None, size=24, **config):
    return strong_views.Config(**config).build(size, seed)(image or picture(), epoch, key)


def test_a_view_is_the_visits_alone():
    state = torch.get_rng_state()
    first = view()
    assert (first.shape, first.dtype) == ((24, 24, 3), np.uint8)
    np.testing.assert_array_equal(first, view())
    for visit in ({"seed": 2}, {"epoch": 3}, {"key": "b"}):
        assert not np.array_equal(first, view(**visit))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
@pytest.mark.parametrize("size", [(1, 1), (3, 200), (40, 30)])
def test_any_mode_and_size(mode, size):
    assert view(image=Image.new(mode, size), size=16).shape == (16, 16, 3)


NONE = {"crop_area": (1.0, 1.0), "flip": 0.0, "jitter": 0.0, "hue": 0.0, "perspective": 0.0, "blur_sigma_px": (0.0, 0.0)}


def test_without_any_strength_a_square_picture_is_only_recropped():
    square = Image.new("RGB", (24, 24), (200, 40, 90))
    assert (view(image=square, **NONE) == (200, 40, 90)).all()


def test_mirrored_is_the_mirror_image_and_nothing_else_changes():
    plain, mirrored = view(**NONE), view(**(NONE | {"flip": 1.0}))
    np.testing.assert_array_equal(mirrored, plain[:, ::-1])


def test_a_blur_smooths():
    plain, blurred = (view(**(NONE | {"blur_sigma_px": (s, s)})).astype(int) for s in (0.0, 2.0))
    assert np.abs(np.diff(blurred, axis=1)).max() < np.abs(np.diff(plain, axis=1)).max() / 2


@pytest.mark.parametrize("config", [{"crop_area": [0.0, 1.0]}, {"crop_area": [0.9, 0.5]}, {"blur_sigma_px": [2.0, 1.0]}, {"flip": 2.0}])
def test_strengths_out_of_range_are_refused(config):
    with pytest.raises(ConfigError):
        strong_views.Config.parse(config)


def test_crops_lie_inside_and_keep_to_area_and_ratio():
    for number in range(300):
        draw = np.random.default_rng(number)
        left, top, right, bottom = strong_views.crop_box(draw, 100, 80, (0.2, 1.0))
        assert 0 <= left < right <= 100
        assert 0 <= top < bottom <= 80
        width, height = right - left, bottom - top
        assert 0.19 <= width * height / 8000 <= 1.01
        assert 0.72 <= width / height <= 1.38


@pytest.mark.parametrize(("size", "box"), [((1000, 3), (498, 0, 502, 3)), ((3, 1000), (0, 498, 3, 502))])
def test_pictures_too_long_for_any_draw_keep_their_middle(size, box):
    assert strong_views.crop_box(np.random.default_rng(0), *size, (0.2, 1.0)) == box


def test_jitter_moves_each_colour_property_within_its_range():
    grey = Image.new("RGB", (4, 4), (100, 100, 100))
    means = [np.asarray(strong_views.jitter(np.random.default_rng(n), grey)).mean() for n in range(200)]
    assert 59 <= min(means) < 70
    assert 130 < max(means) <= 141
    red = Image.new("RGB", (4, 4), (200, 40, 40))
    changed = np.stack([np.asarray(strong_views.jitter(np.random.default_rng(n), red))[0, 0] for n in range(200)]).astype(int)
    assert (changed.argmax(axis=1) == 0).all(), "a tenth of the wheel either way stays reddish"
    assert (changed[:, 1] != changed[:, 2]).any(), "and the hue moves"


def test_perspective_keeps_the_middle_and_moves_the_corners():
    white = Image.new("RGB", (40, 40), "white")
    views = [np.asarray(strong_views.distort(np.random.default_rng(n), white)) for n in range(50)]
    assert all((view[8:32, 8:32] == 255).all() for view in views)
    assert sum((view[0, 0] == 0).all() for view in views) > 25


def test_batches_hold_every_picture_once_an_epoch_in_an_order_of_the_keys(model):
    images, keys = [picture(seed=n) for n in range(7)], [f"k{n}" for n in range(7)]
    label_N = np.arange(7)
    batches = strong_views.view_batches(images, keys, label_N, model=model, batch_size=3, seed=5)
    epoch = list(batches(0))
    assert [len(views.label_N) for views in epoch] == [3, 3, 1]
    order = torch.cat([views.label_N for views in epoch]).tolist()
    assert sorted(order) == list(range(7))
    assert order != torch.cat([views.label_N for views in batches(1)]).tolist()
    weak = torch.cat([views.weak_NCHW for views in epoch])
    strong = torch.cat([views.strong_NCHW for views in epoch])
    assert weak.dtype == strong.dtype == torch.uint8
    strong_view = strong_views.Config().build(16, 5)
    for place, row in enumerate(order):
        np.testing.assert_array_equal(weak[place].permute(1, 2, 0).numpy(), preprocess(images[row], 16))
        np.testing.assert_array_equal(strong[place].permute(1, 2, 0).numpy(), strong_view(images[row], 0, keys[row]))
    backwards = strong_views.view_batches(images[::-1], keys[::-1], label_N[::-1].copy(), model=model, batch_size=3, seed=5)
    for views, same in zip(epoch, backwards(0), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(views, same, strict=True))


@pytest.mark.parametrize(("keys", "labels"), [(["a", "a"], 2), (["a"], 2), (["a", "b"], 3)])
def test_pictures_keys_and_labels_belong_together(model, keys, labels):
    with pytest.raises(DataError, match="key of its own"):
        strong_views.view_batches([picture()] * 2, keys, np.zeros(labels, np.int64), model=model)
