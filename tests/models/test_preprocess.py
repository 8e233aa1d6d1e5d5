from pathlib import Path

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from diptych.models.preprocess import MEAN, STD, normalize, openai_preprocess, preprocess

GOLDEN = Path(__file__).parents[1] / "golden" / "vectors" / "clip.npz"


def picture(width, height, mode="RGB", seed=0):
    channels = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    if mode == "P":
        return Image.fromarray(pixels[..., 0]).convert("P")
    return Image.fromarray(pixels.squeeze(), mode)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA", "P"])
@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [(40, 56), (57, 31), (24, 24), (24, 33), (9, 200), (10, 7)])
def test_pixels_are_open_clips(mode, resize_mode, size):
    image = picture(*size, mode)
    cfg = PreprocessCfg(size=24, mean=(0, 0, 0), std=(1, 1, 1), resize_mode=resize_mode)
    expected_CHW = image_transform_v2(cfg, is_train=False)(image).mul(255).round().to(torch.uint8)
    np.testing.assert_array_equal(preprocess(image, 24, resize_mode), expected_CHW.permute(1, 2, 0).numpy())


def test_bilinear_is_open_clips():
    image = picture(50, 41)
    cfg = PreprocessCfg(size=24, mean=(0, 0, 0), std=(1, 1, 1), interpolation="bilinear")
    expected_CHW = image_transform_v2(cfg, is_train=False)(image).mul(255).round().to(torch.uint8)
    np.testing.assert_array_equal(preprocess(image, 24, interpolation="bilinear"), expected_CHW.permute(1, 2, 0).numpy())


def test_normalize_a_batch_equals_open_clip_one_by_one():
    images = [picture(24, 24, seed=seed) for seed in range(3)]
    transform = image_transform_v2(PreprocessCfg(size=24), is_train=False)
    image_NCHW = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])
    before = image_NCHW.clone()
    result_NCHW = normalize(image_NCHW, torch.tensor(MEAN), torch.tensor(STD))
    torch.testing.assert_close(result_NCHW, torch.stack([transform(image) for image in images]), rtol=0, atol=0)
    assert torch.equal(image_NCHW, before)


def test_openai_preprocess_of_the_golden_picture():
    with np.load(GOLDEN) as golden:
        tensor_CHW = openai_preprocess(golden["prep/in/image"], int(golden["prep/in/n_px"]))
        np.testing.assert_allclose(tensor_CHW, golden["prep/out/tensor"], rtol=0, atol=2 / 255 / 0.26)
        assert tensor_CHW.dtype == np.float32
