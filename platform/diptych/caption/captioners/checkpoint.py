"""Captions with a model directory of ours or of open_clip: a CoCa, with classifier-free guidance."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field, model_validator

from diptych.caption.captioners import Picture
from diptych.core.chance import key_hashes, uniform
from diptych.core.config import Config
from diptych.core.errors import ConfigError, DataError, DiptychError


class CheckpointConfig(Config):
    """How a captioner of ours decodes."""

    batch_size: int = Field(64, ge=1, description="pictures captioned at a time")
    beams: int = Field(1, ge=1, le=64, description="beams of the search; 1: the best token each time")
    temperature: float = Field(0.0, ge=0, le=10, description="of sampling; 0: the best token each time")
    top_k: int | None = Field(None, ge=1, description="sample among so many best tokens; null: among all")
    max_length: int | None = Field(None, ge=1, description="tokens of a caption; null: what the context holds")
    device: str = Field("cpu", pattern=r"^(cpu|cuda(:\d+)?|mps)$", description="cpu, cuda, cuda:1, mps")

    @model_validator(mode="after")
    def _one_way_to_decode(self) -> Self:
        if self.beams > 1 and self.temperature > 0:
            raise ValueError("beams and temperature exclude each other: a beam search draws nothing")
        return self

    def build(self, path: str, guidance: float, seed: int) -> CheckpointCaptioner:
        """The captioner; weights are loaded at first use. Raises ConfigError if there is no model at `path`."""
        if not (Path(path) / "open_clip_config.json").is_file():
            raise ConfigError.at("There is no captioner", "caption.model", path, "a model directory with open_clip_config.json")
        return CheckpointCaptioner(self, path, guidance, seed)


class CheckpointCaptioner:
    """Captions in batches. Tokens are drawn by `(seed, key, position)`."""

    def __init__(self, config: CheckpointConfig, path: str, guidance: float, seed: int) -> None:
        self.config, self.path, self.guidance, self.seed = config, path, guidance, seed

    def __reduce__(self) -> tuple[Any, ...]:
        """Travels to workers without its weights."""
        return CheckpointCaptioner, (self.config, self.path, self.guidance, self.seed)

    def caption(self, pictures: Sequence[Picture]) -> list[str | None]:
        """One answer a picture. Raises DataError for a picture or a model that cannot be read, ConfigError for a model that cannot caption."""
        size = self.config.batch_size
        return [text or None for start in range(0, len(pictures), size) for text in self._texts(pictures[start : start + size])]

    def _texts(self, pictures: Sequence[Picture]) -> list[str]:
        import torch

        config, captioner = self.config, self._captioner
        options: dict[str, Any] = {"beams": config.beams, "max_length": config.max_length}
        if config.temperature > 0:
            hash_N = key_hashes(picture.key for picture in pictures)
            options |= {"temperature": config.temperature, "top_k": config.top_k}
            options["draw"] = lambda position: torch.from_numpy(uniform(self.seed, hash_N, position))
        image_NHWC = np.stack([view(picture, captioner.model.preprocess_cfg) for picture in pictures])
        image_NCHW = torch.from_numpy(np.ascontiguousarray(np.moveaxis(image_NHWC, -1, 1))).to(config.device)
        texts: list[str] = captioner.caption(image_NCHW, self.guidance, **options)
        return texts

    @cached_property
    def _captioner(self) -> Any:
        from diptych.models import clip
        from diptych.models.captioner import Captioner

        return Captioner(clip.load(Path(self.path)).to(self.config.device).eval())


def view(picture: Picture, cfg: dict[str, Any]) -> NDArray[np.uint8]:
    """A picture as a model takes it, uint8 `[size, size, 3]`. Raises DataError with the pair's key."""
    from diptych.models.preprocess import preprocess
    from diptych.pairs.decode import decode, flatten

    try:
        pixels = flatten(decode(picture.data))
    except DiptychError as error:
        raise DataError.at("A picture cannot be decoded", "pixels", picture.key, "an image", str(error)) from error
    return preprocess(Image.fromarray(pixels), cfg["size"], cfg["resize_mode"], cfg["interpolation"], cfg["fill_color"])
