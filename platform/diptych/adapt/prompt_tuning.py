"""NoLA's third stage: a few learnt tokens, the LayerNorms and the classifier of a CLIP image tower, taught by another model's labels.

The student sees strongly augmented pictures; the teacher, a head on self-supervised features (`adapt/nola.py`), has labelled the plain
ones. The prompts stand between [CLS] and the patches, behind `ln_pre`, without positions: `[CLS, p_1 … p_M, patches]`. Features are not
normalised and logits have no scale: either would change the temperature a hundredfold.

The released code keeps the epoch with the best accuracy on LABELLED validation pictures (`stop: validation`). By default the last of a
fixed number of epochs is kept; `stop: agreement` keeps the epoch that agrees best with the teacher. Neither reads a label.

Source: Fazli Imam et al., CLIP meets DINO for Tuning Zero-Shot Classifier using Unlabeled Image Collections (2024): the stage of
DINO-assisted prompt learning.
Shape legend: N pictures of a batch, C classes (in `NCHW`: colours), H W height and width, D embedding width, L tokens, M prompts, W tower width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from math import inf, sqrt
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import nn

from diptych.core import chance
from diptych.core.config import Config as BaseConfig
from diptych.core.errors import ConfigError, DataError, DiptychError
from diptych.models import preprocess, readout
from diptych.models.clip import DualEncoder


class Views(NamedTuple):
    """A batch of unlabelled pictures: uint8 pixels, or floats normalised already.

    Attributes:
        weak_NCHW: as the model evaluates them; what `stop: agreement` is measured on.
        strong_NCHW: strongly augmented (`adapt/strong_views.py`); what the student learns from.
        label_N: the teacher's labels of the weak views, int64 in [0, C).
    """

    weak_NCHW: torch.Tensor
    strong_NCHW: torch.Tensor
    label_N: torch.Tensor


class Epoch(NamedTuple):
    """What an epoch gave: mean loss in nats, and the share of hits that stopping goes by (None with `stop: fixed`)."""

    loss: float
    score: float | None


Batches = Callable[[int], Iterable[Views]]
Validation = Callable[[], Iterable[tuple[torch.Tensor, torch.Tensor]]]


class Config(BaseConfig):
    """The recipe of the tuning; the defaults are the released ones, but for `stop` and `init_patch_px`."""

    method: Literal["nola-prompt-tuning"] = "nola-prompt-tuning"
    prompts: int = Field(16, ge=1, description="learnt tokens; the released default, beside a comment that all experiments used 50")
    epochs: int = Field(50, ge=1, description="most passes over the unlabelled pictures")
    lr: float = Field(0.004, gt=0, description="learning rate of AdamW, constant")
    weight_decay: float = Field(0.01, ge=0, description="of prompts, classifier and LayerNorm gains; biases do not decay")
    label_smoothing: float = Field(0.1, ge=0, lt=1, description="probability that the target spreads over all classes")
    stop: Literal["fixed", "agreement", "validation"] = Field(
        "fixed",
        description="`fixed` keeps the last epoch, `agreement` the one nearest the teacher, `validation` (as released) reads labels",
    )
    first_patience: int = Field(22, ge=1, description="epochs without improvement before the first one, until it stops")
    patience: int = Field(15, ge=1, description="epochs without improvement after one, until it stops")
    init_patch_px: int | None = Field(
        None, ge=1, description="patch size in the range of the first prompts; null: the tower's own; released: 16 for every tower"
    )

    def build(self, model: DualEncoder, text_CD: NDArray[np.float32] | torch.Tensor, seed: int) -> PromptTuned:
        """The student: the model's image tower with prompts that the seed draws, and the zero-shot weights as its classifier."""
        tower = vision_transformer(model)
        patch_px = self.init_patch_px or int(tower.patch_size[0])
        prompt_MW = first_prompts(self.prompts, tower.transformer.width, patch_px, seed)
        return PromptTuned(model, prompt_MW, torch.as_tensor(text_CD))


# ---------------------------------------------------------------- the student


def prompt_bound(patch_px: int, width: int) -> float:
    """Prompts start uniform within +- this: Glorot's bound for a patch of three colours and a token."""
    return sqrt(6 / (3 * patch_px**2 + width))


def first_prompts(count: int, width: int, patch_px: int, seed: int) -> torch.Tensor:
    """Prompts float32 `[M, W]`, drawn by the seed."""
    bound = prompt_bound(patch_px, width)
    drawn_MW = chance.generator(seed, "prompts").uniform(-bound, bound, (count, width))
    return torch.from_numpy(drawn_MW.astype(np.float32))


def vision_transformer(model: DualEncoder) -> Any:
    """The model's image tower. Raises ConfigError if it is not open_clip's VisionTransformer: others have no tokens to insert."""
    from open_clip.transformer import VisionTransformer

    tower = model.clip.visual
    if not isinstance(tower, VisionTransformer):
        raise ConfigError.at(
            "The image tower takes no prompts", "model", type(tower).__name__, "open_clip's VisionTransformer", "choose a ViT"
        )
    return tower


class PromptTuned(nn.Module):
    """A copy of a model's image tower with prompts and a classifier. Only prompts, LayerNorms and classifier ever change.

    The tower stays in evaluation mode, and the model that was handed in stays as it is.

    Args:
        model: its image tower is a VisionTransformer; with `avg` or attention pooling, the pool leaves the prompts out.
        prompt_MW: first values of the prompts.
        head_CD: first weights of the classifier, a row a class; the zero-shot weights.

    Raises ConfigError for a tower without tokens, DataError where the widths do not fit the model.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, model: DualEncoder, prompt_MW: torch.Tensor, head_CD: torch.Tensor) -> None:
        super().__init__()
        self.visual: Any = deepcopy(vision_transformer(model)).requires_grad_(False).eval()
        like = self.visual.class_embedding
        _check_width("prompt_MW", prompt_MW, len(like))
        _check_width("head_CD", head_CD, len(like) if self.visual.proj is None else self.visual.proj.shape[1])
        self.prompts = nn.Parameter(prompt_MW.detach().to(like, copy=True))
        self.head = nn.Parameter(head_CD.detach().to(like, copy=True))
        for module in self.visual.modules():
            if isinstance(module, nn.LayerNorm):
                module.requires_grad_(True)
        self.register_buffer("mean", model.mean.clone(), persistent=False)
        self.register_buffer("std", model.std.clone(), persistent=False)

    def train(self, mode: bool = True) -> PromptTuned:
        """As of any module; the tower stays in evaluation mode."""
        super().train(mode)
        self.visual.eval()
        return self

    def features(self, image_NCHW: torch.Tensor) -> torch.Tensor:
        """`[N, D]`, NOT normalised. uint8 pixels are scaled and normalised here, floats are taken as normalised already."""
        if image_NCHW.dtype == torch.uint8:
            image_NCHW = preprocess.normalize(image_NCHW, self.mean, self.std)
        token_NLW = self.visual._embeds(image_NCHW)  # [CLS] and patches with positions, behind ln_pre
        prompt_NMW = self.prompts.expand(len(token_NLW), -1, -1)
        token_NLW = torch.cat([token_NLW[:, :1], prompt_NMW, token_NLW[:, 1:]], dim=1)
        if readout.reads_class_token(self.visual):
            return readout.class_token(self.visual, token_NLW)
        token_NLW = self.visual.transformer(token_NLW)
        token_NLW = torch.cat([token_NLW[:, :1], token_NLW[:, 1 + len(self.prompts) :]], dim=1)
        pooled_NW: torch.Tensor = self.visual._pool(token_NLW)[0]
        return pooled_NW if self.visual.proj is None else pooled_NW @ self.visual.proj

    def forward(self, image_NCHW: torch.Tensor) -> torch.Tensor:
        """Logits `[N, C]`: features times classifier, no scale and no bias."""
        return self.features(image_NCHW) @ self.head.T

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that change, by name: what a checkpoint of the tuning must hold beside the model."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Two groups for AdamW: what decays, LayerNorm gains included, and the biases."""
        named = self.trained().items()
        return [
            {"params": [(name, parameter) for name, parameter in named if "bias" not in name], "weight_decay": weight_decay},
            {"params": [(name, parameter) for name, parameter in named if "bias" in name], "weight_decay": 0.0},
        ]

    @torch.no_grad()
    def accuracy(self, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> float:
        """The share of pictures `[N, C, H, W]` whose likeliest class is their label `[N]`. Raises DataError if there are none."""
        hits = [self(image.to(self.head.device)).argmax(dim=1) == label.to(self.head.device) for image, label in batches]
        if not hits:
            raise _no_batches()
        return float(torch.cat(hits).float().mean())

    def fit(self, batches: Batches, config: Config, validation: Validation | None = None) -> list[Epoch]:
        """Tunes on the teacher's labels and keeps the epoch that `config.stop` says.

        Args:
            batches: an epoch's number -> its batches; `stop: agreement` asks for them a second time.
            config: the recipe; `config.prompts` and `config.init_patch_px` were used up by `build`.
            validation: the labelled batches of `stop: validation`.

        Returns the epochs that were run. Raises ConfigError if `stop: validation` has no batches, DataError if an epoch has none.
        """
        if (config.stop == "validation") != (validation is not None):
            raise ConfigError.at(
                "`stop: validation` and labelled validation batches go together", "stop", config.stop,
                "validation with batches, or another without", "`stop: agreement` needs no labels",
            )  # fmt: skip
        optimizer, best, epochs = adamw(self, config), Best(config.first_patience, config.patience), []
        for epoch in range(config.epochs):
            losses = [train_step(self, optimizer, views.strong_NCHW, views.label_N, config.label_smoothing) for views in batches(epoch)]
            if not losses:
                raise _no_batches()
            if config.stop == "fixed":
                epochs.append(Epoch(float(np.mean(losses)), None))
                continue
            checked = validation() if validation else ((views.weak_NCHW, views.label_N) for views in batches(epoch))
            epochs.append(Epoch(float(np.mean(losses)), score := self.accuracy(checked)))
            if best.is_over(score, self.trained()):
                break
        if config.stop != "fixed":
            best.restore(self.trained())
        return epochs


# ---------------------------------------------------------------- tuning


def smoothed_cross_entropy(logit_NC: torch.Tensor, label_N: torch.Tensor, smoothing: float = 0.1) -> torch.Tensor:
    """`(1 - s) * -log p_label + s * mean_c(-log p_c)`, mean over the rows, in nats."""
    return nn.functional.cross_entropy(logit_NC, label_N, label_smoothing=smoothing)


def adamw(student: PromptTuned, config: Config) -> torch.optim.AdamW:
    """The optimizer of the recipe; the rate has no schedule."""
    return torch.optim.AdamW(student.parameter_groups(config.weight_decay), lr=config.lr)


def train_step(
    student: PromptTuned, optimizer: torch.optim.Optimizer, image_NCHW: torch.Tensor, label_N: torch.Tensor, smoothing: float = 0.1
) -> float:
    """One update on a batch of strong views; gives the loss before it, in nats. The gradients stay until the next step.

    Raises DataError for a label that is not in [0, C).
    """
    _check_labels(label_N, len(student.head))
    device = student.head.device
    loss = smoothed_cross_entropy(student(image_NCHW.to(device)), label_N.to(device), smoothing)
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return loss.item()


@dataclass
class Best:
    """The best epoch so far, and when to stop waiting for a better one.

    Attributes:
        left: epochs without improvement until it is over.
        patience: what `left` becomes after an improvement.
        score: of the best epoch.
        state: its trained parameters by name.
    """

    left: int
    patience: int
    score: float = -inf
    state: dict[str, torch.Tensor] = field(default_factory=dict)

    def is_over(self, score: float, trained: Mapping[str, nn.Parameter]) -> bool:
        """Takes an epoch's score and parameters; whether to stop. An equal score is no improvement."""
        if score > self.score:
            self.score, self.left = score, self.patience
            self.state = {name: parameter.detach().clone() for name, parameter in trained.items()}
            return False
        self.left -= 1
        return self.left == 0

    @torch.no_grad()
    def restore(self, trained: Mapping[str, nn.Parameter]) -> None:
        """Puts the best epoch's values back."""
        for name, value in self.state.items():
            trained[name].copy_(value)


def _check_width(name: str, value: torch.Tensor, width: int) -> None:
    if value.ndim != 2 or value.shape[1] != width:
        raise DataError.at("The tensor does not fit the image tower", name, tuple(value.shape), f"[*, {width}]")


def _no_batches() -> DiptychError:
    return DataError.at("There is nothing to tune on", "batches", "no batch", "at least one batch an epoch")


def _check_labels(label_N: torch.Tensor, classes: int) -> None:
    # Unchecked, the loss would pass over -100 without a word.
    if len(label_N) and not 0 <= int(label_N.min()) <= int(label_N.max()) < classes:
        raise DataError.at("A label is no class number", "label_N", [int(label_N.min()), int(label_N.max())], f"in [0, {classes})")
