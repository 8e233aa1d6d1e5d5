"""A small labelled world for objectives that learn from class names: an encoder of vectors, a tokenizer, a context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from diptych.core.points import Encoded, TrainContext

WIDTH, FEATURES, WORDS = 12, 8, 32


class Letters:
    """A token a letter."""

    def encode_cut(self, texts: Sequence[str]) -> np.ndarray:
        ids = np.zeros((len(texts), max(map(len, texts))), dtype=np.int64)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = [1 + ord(letter) % (WORDS - 1) for letter in text]
        return ids


class Vectors(nn.Module):
    """Both towers are linear; a "picture" is a vector `[N, WIDTH]`."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.image = nn.Parameter(torch.randn(WIDTH, FEATURES, generator=generator))
        self.words = nn.Parameter(torch.randn(WORDS, FEATURES, generator=generator))
        self.texts_encoded = 0

    def encode_image(self, image_NW: Tensor, normalize: bool = True) -> Tensor:
        return unit(image_NW @ self.image, normalize)

    def encode_text(self, text_NL: Tensor, normalize: bool = True) -> Tensor:
        self.texts_encoded += 1
        return unit((self.words[text_NL] * (text_NL > 0)[..., None]).sum(dim=1), normalize)


def unit(feature_ND: Tensor, wanted: bool) -> Tensor:
    return normalize(feature_ND, dim=-1) if wanted else feature_ND


def context(model: nn.Module, names: Mapping[int, str], rows: int = 20) -> TrainContext:
    return TrainContext(model, Letters(), rows, names, total_steps=10)


def encoded(model: Vectors, batch: dict[str, Tensor], scale: float = 5.0) -> Encoded:
    """What the loop hands over, with the features of both towers where the batch has their inputs."""
    text_ND = model.encode_text(batch["text_NL"]) if "text_NL" in batch else torch.empty(0, 0)
    return Encoded(model.encode_image(batch["image_NCHW"]), text_ND, torch.tensor(scale), batch, model)
