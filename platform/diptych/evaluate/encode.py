"""Features from a dual encoder: every distinct text once, long texts apart from short ones, pictures as uint8 until they are on the device.

Shape legend: N pictures or texts, C channels, H x W pixels, L tokens, D feature width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from diptych.core.points import PictureTransform
from diptych.models.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

    from diptych.models.clip import DualEncoder

Features = NDArray[np.float32]
Pixels = NDArray[np.uint8]

CPU_BATCH, DEVICE_BATCH = 16, 256
"""Pictures a forward pass by default; the second is a multiple of the first. On a CPU small batches stay in the cache, and their buffers in memory that is already mapped: a third
less time than 64 at a time for a small ViT at 224 px. Accelerators need large ones."""
TEXT_BATCH = 256
READ = 64
"""Pairs a call of `load_pixels`."""
TEXTS_HELD = 1 << 16
"""Texts tokenised at a time: 40 MB of ids at 77 tokens."""


def encode_images(
    model: DualEncoder, images: Iterable[Pixels], batch_size: int | None = None, device: torch.device | str | None = None
) -> Features:
    """L2-normalised image features, float32 `[N, D]`, in the order given.

    Args:
        model: the dual encoder; it normalises the pixels, a batch at a time.
        images: blocks of pictures, uint8 `[n, C, H, W]`, of any length; they are cut and joined to batches.
        batch_size: pictures a forward pass; by default what suits the device.
        device: where the model is; its own by default.
    """
    features = [block for (block,) in encode_blocks([model], images, batch_size, device)]
    return np.concatenate(features) if features else np.empty((0, 0), np.float32)


def encode_blocks(
    models: Sequence[DualEncoder], images: Iterable[Pixels], batch_size: int | None = None, device: torch.device | str | None = None
) -> Iterator[list[Features]]:
    """Image features of several models of one image size, a block of pictures at a time: every picture is read once for all of them.

    Each block gives a list of L2-normalised float32 `[n, D]`, one a model; the batches, and so the features, are those of `encode_images`.
    Arguments as there.
    """
    whole = DEVICE_BATCH if batch_size is None else batch_size * max(1, DEVICE_BATCH // batch_size)
    for block in _batches(images, whole):
        yield [_encode_pictures(model, block, batch_size, device) for model in models]


def _encode_pictures(model: DualEncoder, image_NCHW: Pixels, batch_size: int | None, device: torch.device | str | None) -> Features:
    import torch

    with _evaluating(model, device) as home:
        size = batch_size or image_batch(home)
        batches = (torch.from_numpy(image_NCHW[at : at + size]).to(home) for at in range(0, len(image_NCHW), size))
        return np.concatenate([model.encode_image(batch, normalize=True).float().cpu().numpy() for batch in batches])


def transformed(blocks: Iterable[Pixels], keys: Sequence[str], transform: PictureTransform) -> Iterator[Pixels]:
    """Blocks of pictures uint8 `[n, C, H, W]` as `transform` leaves them; `keys` names the pictures of all blocks, in order."""
    start = 0
    for image_NCHW in blocks:
        changed_NHWC = transform(keys[start : start + len(image_NCHW)], np.ascontiguousarray(np.moveaxis(image_NCHW, 1, -1)))
        changed_NCHW = np.ascontiguousarray(np.moveaxis(changed_NHWC, -1, 1))
        assert (changed_NCHW.shape, changed_NCHW.dtype) == (image_NCHW.shape, image_NCHW.dtype), f"{transform.tag} changed more than values"
        start += len(image_NCHW)
        yield changed_NCHW


def image_batch(device: torch.device) -> int:
    """Pictures a forward pass that suit a device."""
    return CPU_BATCH if device.type == "cpu" else DEVICE_BATCH


def encode_texts(
    model: DualEncoder, texts: Sequence[str], batch_size: int = TEXT_BATCH, device: torch.device | str | None = None
) -> Features:
    """L2-normalised text features, float32 `[N, D]`, in the order given.

    Equal texts are encoded once. With CLIP's tokenizer, batches hold texts of like length and are cut to the longest of them; the model
    takes short contexts and gives the features of the full one (up to rounding).

    Args:
        model: the dual encoder with its `tokenizer`.
        texts: captions or prompts.
        batch_size: texts a forward pass.
        device: where the model is; its own by default.
    """

    row_of = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    distinct = list(row_of)
    with _evaluating(model, device) as home:
        blocks = [_encode_block(model, distinct[at : at + TEXTS_HELD], batch_size, home) for at in range(0, len(distinct), TEXTS_HELD)]
    return np.concatenate(blocks)[[row_of[text] for text in texts]] if blocks else np.empty((0, 0), np.float32)


def _encode_block(model: DualEncoder, texts: list[str], batch_size: int, device: torch.device) -> Features:
    import torch

    text_NL = model.tokenizer.encode_cut(texts)
    length_N = _lengths(text_NL) if isinstance(model.tokenizer, Tokenizer) else np.full(len(texts), text_NL.shape[1])
    by_length = np.argsort(length_N, kind="stable")
    features = []
    for at in range(0, len(texts), batch_size):
        rows = by_length[at : at + batch_size]
        batch_NL = torch.from_numpy(np.ascontiguousarray(text_NL[rows, : length_N[rows[-1]]]))
        features.append(model.encode_text(batch_NL.to(device), normalize=True).float().cpu().numpy())
    return np.concatenate(features)[np.argsort(by_length, kind="stable")]


def _lengths(text_NL: NDArray[np.int64]) -> NDArray[np.int64]:
    """Tokens up to the end token, which has the largest id of CLIP's vocabulary; padding has the id of "!"."""
    return np.asarray(text_NL.argmax(axis=1) + 1)


class ModelEncoder:
    """An `Encoder` straight from a model, without a cache.

    Args:
        model: the dual encoder.
        load_pixels: reads the pictures of some pairs: frame of n rows -> uint8 `[n, C, H, W]`.
        batch_size: pictures a forward pass; by default what suits the device.
        device: where the model is; its own by default.
        settings: how pixels were prepared, for the rows' `settings`; by default the model's `preprocess_cfg`.
    """

    def __init__(
        self,
        model: DualEncoder,
        load_pixels: Callable[[pl.DataFrame], Pixels],
        batch_size: int | None = None,
        device: torch.device | str | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.model = model
        self.load_pixels = load_pixels
        self.batch_size = batch_size
        self.device = device
        self.settings = dict(model.preprocess_cfg if settings is None else settings)

    @property
    def logit_scale(self) -> float:
        """The factor of the cosine in the logits (already exponentiated)."""
        return float(self.model.logit_scale.detach().exp())

    def images(self, pairs: pl.DataFrame, transform: PictureTransform | None = None) -> Features:
        """`[n, D]`, a row a pair, in the order of the frame. Pictures are read `READ` at a time and changed by `transform`, if one is given."""
        blocks = (self.load_pixels(pairs[start : start + READ]) for start in range(0, len(pairs), READ))
        return encode_images(
            self.model, transformed(blocks, pairs["key"].to_list(), transform) if transform else blocks, self.batch_size, self.device
        )

    def texts(self, texts: Sequence[str]) -> Features:
        """`[m, D]`, a row a text."""
        return encode_texts(self.model, texts, device=self.device)


@contextmanager
def _evaluating(model: DualEncoder, device: torch.device | str | None) -> Iterator[torch.device]:
    """Evaluation mode without gradients; gives the device to encode on and puts the model's mode back."""
    import torch

    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield torch.device(device) if device is not None else next(model.parameters()).device
    finally:
        model.train(was_training)


def _batches(blocks: Iterable[Pixels], size: int) -> Iterator[Pixels]:
    """Joins and cuts blocks to batches of `size` rows; the last may be shorter."""
    waiting: list[Pixels] = []
    held = 0
    for block in blocks:
        waiting.append(block)
        held += len(block)
        if held >= size:
            joined = np.concatenate(waiting) if len(waiting) > 1 else block
            whole = held - held % size
            yield from (joined[at : at + size] for at in range(0, whole, size))
            waiting, held = [joined[whole:]], held - whole
    if held:
        yield np.concatenate(waiting) if len(waiting) > 1 else waiting[0]
