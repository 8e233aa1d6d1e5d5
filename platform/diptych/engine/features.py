"""Image features for pair methods: from plain pixels, from a model that the run trained, or from any open_clip model.

Shape legend: N pairs, D feature width, H height, W width, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray
from PIL import Image

from diptych.core import digest
from diptych.core.config import Config
from diptych.core.errors import DataError, DiptychError

if TYPE_CHECKING:
    from diptych.models.clip import DualEncoder
    from diptych.pairs.shards import ShardReader

PIXEL_SIDE = 16
ENCODE_BATCH = 128


class FeatureSpec(Config):
    """Which features: `pixels`, or a model by name or directory.

    `weights` is the digest of the model's files (empty for `pixels` and for names), `pictures` the digest of the shards,
    `cache` a folder where features are kept between runs (none when empty).
    """

    name: str
    weights: str = ""
    seed: int = 0
    pictures: str = ""
    cache: str = ""


def compute(spec: FeatureSpec, frame: pl.DataFrame, reader: ShardReader) -> NDArray[np.float32]:
    """L2-normalised features `[N, D]` of a table's pictures, from the cache when they are there.

    Raises DataError naming the pair whose picture cannot be decoded.
    """
    stored = _cached(spec, frame)
    if stored is not None and stored.exists():
        values: NDArray[np.float32] = np.load(stored, mmap_mode="r", allow_pickle=False)
        if len(values) == frame.height:
            return np.asarray(values)
    values = _pixels(frame, reader) if spec.name == "pixels" else _encoded(spec, frame, reader)
    if stored is not None:
        stored.parent.mkdir(parents=True, exist_ok=True)
        partial = stored.with_suffix(".partial.npy")
        np.save(partial, values)
        partial.replace(stored)
    return values


def _cached(spec: FeatureSpec, frame: pl.DataFrame) -> Path | None:
    if not spec.cache:
        return None
    rows = frame.select("key", pl.col("image").struct.unnest()).write_csv(include_header=False).encode()
    identity = digest.of_plain([spec.name, spec.weights, spec.seed, spec.pictures, digest.of_bytes(rows)])
    return Path(spec.cache) / f"{identity.removeprefix('sha256:')}.npy"


class View(NamedTuple):
    """How a picture becomes a square, in open_clip's words; checkpoints of one view see the same pixels."""

    size: int
    resize_mode: str = "shortest"
    interpolation: str = "bicubic"
    fill_color: int = 0

    @property
    def words(self) -> str:
        """The view without its size, for the settings of rows."""
        how = {"shortest": "short side, centre crop", "longest": f"long side, padded with {self.fill_color}", "squash": "squashed"}
        return f"{self.interpolation}, {how[self.resize_mode]}"

    def of(self, data: bytes) -> NDArray[np.uint8]:
        """The view `[size, size, 3]` of an encoded picture, transparency on white. Raises DataError if it cannot be decoded."""
        from diptych.models.preprocess import preprocess
        from diptych.pairs.decode import decode, decode_eval, flatten

        if self[1:3] == ("shortest", "bicubic"):
            return decode_eval(data, self.size)
        return preprocess(Image.fromarray(flatten(decode(data))), *self)  # type: ignore[arg-type]


def pictures(frame: pl.DataFrame, reader: ShardReader, view: View | int, batch: int = ENCODE_BATCH) -> Iterator[NDArray[np.uint8]]:
    """Evaluation pictures `[n, 3, size, size]` uint8 in batches, in the frame's order; a size alone means CLIP's own view of it."""
    if isinstance(view, int):
        view = View(view)
    for start in range(0, frame.height, batch):
        rows = frame.slice(start, batch)
        decoded = np.empty((rows.height, 3, view.size, view.size), dtype=np.uint8)
        encoded = reader.read_column(rows["image"])
        for position, (key, image, data) in enumerate(zip(rows["key"], rows["image"], encoded, strict=True)):
            try:
                picture = view.of(data)
            except DiptychError as error:
                raise DataError.at(
                    "A picture cannot be decoded", f"{image['shard']} at {image['offset']}", key, "an image", str(error)
                ) from error
            decoded[position] = np.moveaxis(picture, -1, 0)
        yield decoded


def _pixels(frame: pl.DataFrame, reader: ShardReader) -> NDArray[np.float32]:
    """Centred, unit-norm pixels of the picture at 16 x 16, RGB: D = 768."""
    values = np.empty((frame.height, 3 * PIXEL_SIDE * PIXEL_SIDE), dtype=np.float32)
    start = 0
    for image_NCHW in pictures(frame, reader, PIXEL_SIDE):
        flat = image_NCHW.reshape(len(image_NCHW), -1).astype(np.float32)
        flat -= flat.mean(axis=1, keepdims=True)
        norm = np.linalg.norm(flat, axis=1, keepdims=True)
        values[start : start + len(flat)] = flat / np.maximum(norm, 1e-6)
        start += len(flat)
    return values


@lru_cache(maxsize=2)
def model(name: str, weights: str, seed: int) -> DualEncoder:
    """The dual encoder of a spec, kept by the worker process for its next tables. `weights` keeps stale ones apart."""
    from diptych.models import clip

    del weights
    encoder = clip.create(name, seed)
    return encoder.eval()


def of_captions(spec: FeatureSpec, frame: pl.DataFrame) -> NDArray[np.float32]:
    """L2-normalised features `[N, D]` of every pair's first caption, 0 where it has none. Not cached: texts cost little beside pictures."""
    import torch

    from diptych.evaluate.encode import encode_texts

    if frame.is_empty():
        return np.zeros((0, 1), dtype=np.float32)
    encoder = model(spec.name, spec.weights, spec.seed)
    encoder.to("cuda" if torch.cuda.is_available() else "cpu")
    first = frame["captions"].list.first().struct.field("text")
    values = encode_texts(encoder, first.fill_null("").to_list())
    values[first.is_null().to_numpy()] = 0
    return values


def _encoded(spec: FeatureSpec, frame: pl.DataFrame, reader: ShardReader) -> NDArray[np.float32]:
    import torch

    encoder = model(spec.name, spec.weights, spec.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder.to(device)
    parts: list[NDArray[np.float32]] = []
    with torch.inference_mode():
        parts.extend(
            encoder.encode_image(torch.from_numpy(image_NCHW).to(device)).float().cpu().numpy()
            for image_NCHW in pictures(frame, reader, encoder.image_size)
        )
    width = parts[0].shape[1] if parts else 1
    return np.concatenate(parts) if parts else np.zeros((0, width), dtype=np.float32)
