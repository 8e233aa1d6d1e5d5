"""Data reinforcement: asks strong models once, before training, about fixed augmentations of every picture and about every caption.

Vasu et al., "MobileCLIP: Fast Image-Text Models through Multi-Modal Reinforced Training" (CVPR 2024), section 3. The objective `mobileclip` then learns from what is stored
(`pairs/reinforced.py`), any number of times, at the price of plain training. Synthetic captions are those that an earlier method wrote, source
`synthetic:…` (`cfg-captioning`, `veclip`, a source of its own): this method comes last.

Each teacher's features have unit norm by themselves; they are joined, never normalised as a whole. The paper stores bfloat16; we store IEEE half
precision, which has three more bits and, for numbers within [-1, 1], no smaller range that would matter.

Shape legend: A augmentations of a pair, M of its captions, F the sum of the teachers' widths, N pictures or texts at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field, model_validator

from diptych.core.config import Config as BaseConfig
from diptych.core.errors import ConfigError, DataError
from diptych.core.points import Need, PairMethod, Verdict
from diptych.pairs.augmentations import BINS, Augmentation, Recipe, apply, draw
from diptych.pairs.decode import Pixels, decode, flatten
from diptych.pairs.reinforced import COLUMN, Reinforcement, series

if TYPE_CHECKING:
    from diptych.models.clip import DualEncoder

HUB, LOCAL_DIR = "open_clip:", "local-dir:"


class Config(BaseConfig):
    """Stores, for every pair, augmentations of its picture and what the teachers make of them and of its captions. No pair is rejected."""

    directories: ClassVar[tuple[str, ...]] = ("teachers",)

    method: Literal["reinforce"] = "reinforce"
    teachers: tuple[str, ...] = Field(
        min_length=1, description="the teachers, two in the paper: model directories, or `open_clip:ARCHITECTURE/TAG`"
    )
    augmentations: int = Field(10, ge=1, le=1000, description="stored augmentations a pair: 10 for a billion pairs, 30 for 12 million")
    crop_scale: tuple[float, float] = Field((0.08, 1.0), description="share of the picture's area that is kept: least, most")
    crop_ratio: tuple[float, float] = Field((3 / 4, 4 / 3), description="width / height of the crop: least, most")
    operations: int = Field(2, ge=0, le=14, description="RandAugment's operations after the crop")
    magnitude: int = Field(9, ge=0, lt=BINS, description="bin of their strength, of 31")
    size_px: int = Field(224, ge=8, le=1024, description="side of the augmented picture, which each teacher resizes to its own, pixels")
    batch: int = Field(64, ge=1, description="pictures or texts that a teacher encodes at once")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale {self.crop_scale} must be (least, most) with 0 < least <= most <= 1")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ValueError(f"crop_ratio {self.crop_ratio} must be (least, most) with 0 < least <= most")
        return self

    @property
    def recipe(self) -> Recipe:
        """What augmentations are drawn from."""
        return Recipe(self.crop_scale, self.crop_ratio, self.operations, self.magnitude, self.size_px)

    def build(self, seed: int) -> Reinforce:
        """The method; teachers are read when they are first asked. Raises ConfigError for a model folder that is not there."""
        for place, name in enumerate(self.teachers):
            if not name.startswith(HUB) and not Path(name.removeprefix(LOCAL_DIR)).is_dir():
                expected = "a model directory, or open_clip:ARCHITECTURE/TAG"
                raise ConfigError.at("There is no such teacher", f"caption.teachers.{place}", name, expected)
        return Reinforce(self, seed)


class Reinforce(PairMethod):
    """Draws augmentations from `(seed, key)`, asks the teachers, stores the answers in `meta.reinforced`."""

    needs: frozenset[Need] = frozenset({"captions", "pixels"})

    def __init__(self, config: Config, seed: int) -> None:
        self.config, self.seed = config, seed
        self._teachers: list[DualEncoder] | None = None

    def apply(self, batch: pl.DataFrame, state: Any) -> Verdict:
        """Keeps every pair. Raises DataError for a pair without a caption that holds words."""
        del state
        keys, pictures = batch["key"].to_list(), [flatten(decode(data, key)) for key, data in batch.select("key", "pixels").iter_rows()]
        texts = [_texts(key, captions) for key, captions in batch.select("key", "captions").iter_rows()]
        drawn = [self._drawn(key, picture) for key, picture in zip(keys, pictures, strict=True)]
        images = (
            apply(picture, augmentation, self.config.size_px)
            for picture, augmentations in zip(pictures, drawn, strict=True)
            for augmentation in augmentations
        )
        image_F, text_F = self._of_images(images), self._of_texts([text for own in texts for text in own])
        ends = np.cumsum([len(own) for own in texts])
        stored = [
            Reinforcement(augmentations, image_AF, own, text_F[end - len(own) : end])
            for augmentations, image_AF, own, end in zip(
                drawn, image_F.reshape(len(keys), self.config.augmentations, image_F.shape[1]), texts, ends, strict=True
            )
        ]
        column = series(self.config.size_px, self.widths, stored)
        return Verdict(batch.with_columns(column), pl.DataFrame(schema={"key": pl.String, "reason": pl.String, "score": pl.Float32}))

    def report(self, state: Any) -> Mapping[str, Any]:
        """Who was asked, and what a pair takes."""
        del state
        names, augmentations = list(self.config.teachers), self.config.augmentations
        return {"teachers": names, "augmentations": augmentations, "column": COLUMN}

    @property
    def teachers(self) -> list[DualEncoder]:
        """The models, read on first use, frozen and in evaluation mode."""
        if self._teachers is None:
            from diptych.models import clip

            self._teachers = [clip.create(name, self.seed).eval().requires_grad_(False) for name in self.config.teachers]
        return self._teachers

    @property
    def widths(self) -> list[int]:
        """Each teacher's feature width."""
        return [int(teacher.config["embed_dim"]) for teacher in self.teachers]

    def _drawn(self, key: str, picture_HWC: Pixels) -> list[Augmentation]:
        size = (picture_HWC.shape[1], picture_HWC.shape[0])
        return [draw(self.config.recipe, self.seed, key, index, size) for index in range(self.config.augmentations)]

    def _of_images(self, images: Iterator[Pixels]) -> NDArray[np.float32]:
        """All teachers' features of pictures, `[N, F]`; no more than `batch` pictures are held at once."""
        import torch

        rows = []
        for part in _in_parts(images, self.config.batch):
            image_NCHW = torch.from_numpy(np.stack(part).transpose(0, 3, 1, 2).copy())
            with torch.inference_mode():
                features = [teacher.encode_image(_resized(image_NCHW, teacher)) for teacher in self.teachers]
            rows.append(torch.cat(features, dim=1).float().numpy())
        return np.concatenate(rows) if rows else np.empty((0, sum(self.widths)), np.float32)

    def _of_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """All teachers' features of captions, `[N, F]`; each teacher has its own tokenizer."""
        import torch

        rows = []
        for part in _in_parts(iter(texts), self.config.batch):
            with torch.inference_mode():
                features = [teacher.encode_text(torch.from_numpy(teacher.tokenizer.encode_cut(part))) for teacher in self.teachers]
            rows.append(torch.cat(features, dim=1).float().numpy())
        return np.concatenate(rows) if rows else np.empty((0, sum(self.widths)), np.float32)


def _texts(key: str, captions: list[dict[str, Any]] | None) -> list[str]:
    """The different texts of a pair's captions, in their order."""
    texts = list(dict.fromkeys(caption["text"] for caption in captions or [] if caption["text"]))
    if not texts:
        raise DataError.at("A pair has no caption to ask the teachers about", key, "none", "a caption", "reject such pairs before")
    return texts


def _resized(image_NCHW: Any, teacher: DualEncoder) -> Any:
    """Pictures uint8 in the teacher's size, bicubic, in whole grey levels."""
    import torch

    size = teacher.image_size
    if image_NCHW.shape[-1] == size:
        return image_NCHW
    resized_NCHW = torch.nn.functional.interpolate(image_NCHW.float(), (size, size), mode="bicubic", antialias=True, align_corners=False)
    return resized_NCHW.round_().clamp_(0, 255).to(torch.uint8)


def _in_parts(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    part: list[Any] = []
    for item in items:
        part.append(item)
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part
