"""The contrastive loss of pairs that are not trained on, for choosing a checkpoint. Measuring a model is `evaluate/`'s task, not this.

Shape legend: N pairs of a global batch, D feature width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from diptych.core.errors import ConfigError
from diptych.train import sync
from diptych.train.augment import AugmentConfig
from diptych.train.config import TrainConfig
from diptych.train.loader import PairLoader


@dataclass(frozen=True)
class Validation:
    """CLIP's loss in batches over the validation pairs: the middle of each picture, first captions, the same batches every time.

    Attributes:
        loader: this rank's share of the pairs.
        task: encodes as in training (`Contrastive`).
        model: its layers behave as in evaluation meanwhile.
    """

    loader: PairLoader
    task: Any
    model: nn.Module
    world: int = 1
    device: str = "cpu"

    @torch.no_grad()
    def loss(self) -> float:
        """The mean loss in nats; the same on every rank. Every rank must call it."""
        losses = []
        with _evaluating(self.model):
            for step in range(self.loader.steps_per_epoch):
                tensors = self.loader.batch(step).tensors
                image_ND = self.task.encode_image(tensors["image_NCHW"].to(self.device))
                text_ND = self.task.encode_text(tensors["text_NL"].to(self.device))
                image_ND, text_ND = sync.gathered(image_ND, self.world), sync.gathered(text_ND, self.world)
                logits: torch.Tensor = self.task.model.logit_scale.exp() * image_ND @ text_ND.T
                label_N = torch.arange(len(logits), device=logits.device)
                losses.append(float(cross_entropy(logits, label_N) + cross_entropy(logits.T, label_N)) / 2)
        return sum(losses) / len(losses)


def settings(config: TrainConfig, rows: int, world: int) -> TrainConfig:
    """How the validation pairs are read. Raises ConfigError if there are too few for a batch of two a rank."""
    batch_size = min(config.batch_size, rows) // world * world
    if batch_size < 2 * world:
        raise ConfigError.at(
            "There are too few pairs to validate on", "validate_every_steps", rows, f"at least {2 * world} in the split val"
        )
    whole = AugmentConfig(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
    changes = {
        "augment": whole,
        "caption": "first",
        "original": None,
        "avoid": None,
        "labelled": None,
        "image_sizes": (),
        "text_lengths": (),
    }
    return config.model_copy(update={**changes, "batch_size": batch_size, "accumulate": 1})


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Layers behave as in evaluation, and as they did before afterwards: a frozen tower stays frozen."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
