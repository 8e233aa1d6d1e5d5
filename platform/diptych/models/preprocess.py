"""What a picture goes through before CLIP sees it: resize, centre crop, RGB; then, a batch at a time on the device, normalisation.

The same steps as open_clip's evaluation transform, but the picture stays uint8 until it is on the device: a quarter of the bytes.

Shape legend: N pictures, H W height and width in pixels, C channels (RGB).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

if TYPE_CHECKING:
    import torch

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

ResizeMode = Literal["shortest", "longest", "squash"]
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def preprocess(
    image: Image.Image, size: int, resize_mode: ResizeMode = "shortest", interpolation: str = "bicubic", fill_color: int = 0
) -> NDArray[np.uint8]:
    """A picture as CLIP evaluates it, uint8 `[size, size, 3]`; pixel for pixel open_clip's transform before its `ToTensor`.

    Args:
        image: a Pillow image of any mode; it is resized in its own mode and then made RGB, so transparency is dropped, as there.
        size: side of the result in pixels.
        resize_mode: `shortest` scales the shorter side to `size` and keeps the centre, `longest` scales the longer side and pads
            with `fill_color`, `squash` ignores the aspect ratio.
        interpolation: `bicubic` or `bilinear`, both antialiased.
    """
    resample = FILTERS[interpolation]
    width, height = image.size
    if resize_mode == "squash":
        return np.asarray(image.resize((size, size), resample).convert("RGB"))
    if resize_mode == "longest":
        scale = max(width, height) / size
        resized = image.resize((round(width / scale), round(height / scale)), resample)
        return _padded(resized.convert("RGB"), size, fill_color)
    short = min(width, height)
    resized = image.resize((size * width // short, size * height // short), resample) if short != size else image
    left, top = round((resized.width - size) / 2), round((resized.height - size) / 2)
    return np.asarray(resized.crop((left, top, left + size, top + size)).convert("RGB"))


def normalize(image_NCHW: torch.Tensor, mean_C: torch.Tensor, std_C: torch.Tensor) -> torch.Tensor:
    """Pixels uint8 `[N, 3, H, W]` to `(pixels / 255 - mean) / std`, on their device, in the dtype of `mean_C`."""
    pixel_NCHW = image_NCHW.to(mean_C.dtype).div_(255)
    return pixel_NCHW.sub_(mean_C.view(-1, 1, 1)).div_(std_C.view(-1, 1, 1))


def openai_preprocess(image_HWC: NDArray[np.uint8], n_px: int) -> NDArray[np.float32]:
    """OpenAI's transform of a picture uint8 `[H, W, 3]`: float32 `[3, n_px, n_px]`, normalised (CLIP, section 2.5)."""
    unit_HWC = preprocess(Image.fromarray(image_HWC), n_px).astype(np.float32) / 255
    normal_HWC = (unit_HWC - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    return np.ascontiguousarray(normal_HWC.transpose(2, 0, 1))


def _padded(image: Image.Image, size: int, fill_color: int) -> NDArray[np.uint8]:
    canvas = Image.new("RGB", (size, size), (fill_color,) * 3)
    canvas.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return np.asarray(canvas)
