"""Captions with a 🤗 image-to-text model on this machine: a vision encoder-decoder, BLIP, GIT or a vision-language model, from a local folder."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import Field

from diptych.caption.captioners import Picture
from diptych.core.config import Config
from diptych.core.errors import ConfigError, DataError, DiptychError


class LocalConfig(Config):
    """A model folder and how to decode with it: greedy, or by beams."""

    path: str = Field(min_length=1, description="folder with config.json, safetensors weights, a tokenizer and an image processor")
    prompt: str | None = Field(
        None, min_length=1, description="text handed in beside every picture, with the model's own mark for it; null: the picture alone"
    )
    batch_size: int = Field(16, ge=1, description="pictures captioned at a time")
    beams: int = Field(1, ge=1, le=64, description="beams of the search")
    max_new_tokens: int = Field(50, ge=1, le=4096, description="most new tokens a caption")
    device: str = Field("cpu", pattern=r"^(cpu|cuda(:\d+)?|mps)$", description="cpu, cuda, cuda:1, mps")

    def build(self) -> LocalCaptioner:
        """The captioner; weights are loaded at first use. Raises ConfigError if there is no model folder at `path`."""
        if not (Path(self.path) / "config.json").is_file():
            raise ConfigError.at("There is no captioner", "caption.local.path", self.path, "a folder with config.json and *.safetensors")
        return LocalCaptioner(self)


class LocalCaptioner:
    """Captions in batches; draws nothing."""

    def __init__(self, config: LocalConfig) -> None:
        self.config = config

    def __reduce__(self) -> tuple[Any, ...]:
        """Travels to workers without its weights."""
        return LocalCaptioner, (self.config,)

    def caption(self, pictures: Sequence[Picture]) -> list[str | None]:
        """One answer a picture. Raises DataError for a picture, or a folder, that cannot be read safely."""
        size = self.config.batch_size
        return [text.strip() or None for at in range(0, len(pictures), size) for text in self._texts(pictures[at : at + size])]

    def _texts(self, pictures: Sequence[Picture]) -> list[str]:
        import torch

        images, prompt = [_image(picture) for picture in pictures], self.config.prompt
        if prompt is None:
            inputs = self._image_processor(images=images, return_tensors="pt")
        else:
            inputs = self._processor(images=images, text=[prompt] * len(images), return_tensors="pt", padding=True)
        inputs = inputs.to(self.config.device)
        with torch.inference_mode():
            id_NL = self._model.generate(**inputs, do_sample=False, num_beams=self.config.beams, max_new_tokens=self.config.max_new_tokens)
        given_NL = inputs.get("input_ids")
        if given_NL is not None and id_NL.shape[1] >= given_NL.shape[1] and torch.equal(id_NL[:, : given_NL.shape[1]], given_NL):
            id_NL = id_NL[:, given_NL.shape[1] :]  # a decoder repeats what it was given
        texts: list[str] = self._tokenizer.batch_decode(id_NL, skip_special_tokens=True)
        return texts

    @cached_property
    def _image_processor(self) -> Any:
        from transformers import AutoImageProcessor

        return self._loaded(AutoImageProcessor)

    @cached_property
    def _processor(self) -> Any:
        from transformers import AutoProcessor

        return self._loaded(AutoProcessor)

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return self._loaded(AutoTokenizer)

    @cached_property
    def _model(self) -> Any:
        from transformers import AutoModelForImageTextToText

        return self._loaded(AutoModelForImageTextToText, use_safetensors=True).to(self.config.device).eval()

    def _loaded(self, kind: Any, **options: Any) -> Any:
        """Loads from the folder alone: no network, no code from the folder, no pickles."""
        try:
            return kind.from_pretrained(self.config.path, local_files_only=True, trust_remote_code=False, **options)
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = str(error).partition("\n")[0]
            expected = "a 🤗 image-to-text model with safetensors weights, a tokenizer and an image processor"
            raise DataError.at("The captioner cannot be loaded", self.config.path, f"<{reason}>", expected) from None


def _image(picture: Picture) -> Any:
    """The picture, RGB, transparency on white. Raises DataError with the pair's key."""
    from PIL import Image

    from diptych.pairs.decode import decode, flatten

    try:
        return Image.fromarray(flatten(decode(picture.data)))
    except DiptychError as error:
        raise DataError.at("A picture cannot be decoded", "pixels", picture.key, "an image", str(error)) from error
