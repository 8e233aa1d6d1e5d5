"""Pictures for the tests of duplicates: smooth random ones, and what commonly happens to a picture."""

from __future__ import annotations

import io

import numpy as np
import polars as pl
from PIL import Image


def picture(seed: int, side: int = 96) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def table(pictures: dict[str, bytes], captions: dict[str, str] | None = None) -> pl.DataFrame:
    sizes = [Image.open(io.BytesIO(data)).size for data in pictures.values()]
    return pl.DataFrame(
        {
            "key": list(pictures),
            "image": [{"width": width, "height": height} for width, height in sizes],
            "captions": [[{"text": (captions or {}).get(key, "x")}] for key in pictures],
            "pixels": list(pictures.values()),
        }
    )
