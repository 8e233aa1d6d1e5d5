"""AST: distils a labelled set into a few learnt pictures a class, by matching the smoothed trainings of experts.

The pairs that stay are those whose pictures the learning starts from. They keep their keys, captions and labels; their pictures are
replaced, so that the result is a pair dataset like any other and the ledger still adds up. All others leave as `distilled`.

The whole training set is held in memory at `size_px`, and the inner loop's graph, whose size grows with steps times parameters.

Source: Shen et al., Efficient Dataset Distillation through Alignment with Smooth and High-Quality Expert Trajectories (2023).

Shape legend: N pairs, S synthetic pictures, C channels, H x W pixels, K classes, E epochs, P parameters, M expert epochs.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field, field_validator, model_validator

from diptych.core.chance import generator, key_hashes, uniform
from diptych.core.config import Config as BaseConfig
from diptych.core.errors import DataError
from diptych.core.points import Fold, Need, PairMethod, Verdict
from diptych.models import convnet, siamese
from diptych.models.trajectories import ExpertConfig, movement, record
from diptych.pairs.decode import decode_square
from diptych.prune.matching_loss import Middle, balance_factor, chunks, matched, perturbed
from diptych.prune.representatives import representatives

LR = "meta.distilled_lr"
"""The learnt learning rate, with which networks train best on the pictures."""
LEAST_LR = 1e-5
PIXEL_MOMENTUM = 0.5


class Config(BaseConfig):
    """Learns `per_class` pictures of every class. Each of the paper's parts has a switch; all are on by default."""

    method: Literal["smooth-distillation"] = "smooth-distillation"
    per_class: int = Field(1, ge=1, le=1000, description="pictures a class that are left")
    size_px: int = Field(
        32, ge=8, le=128, description="side of the learnt pictures, pixels; larger ones are cropped in the middle and resized"
    )
    channels: Literal[1, 3] = Field(3, description="1: grey pictures; 3: coloured ones")
    width: int = Field(128, ge=1, description="filters a block of the network")
    depth: int = Field(3, ge=1, le=6, description="blocks of the network; each halves the picture")
    experts: int = Field(100, ge=1, description="trainings on the whole set to learn from")
    expert: ExpertConfig = Field(default=ExpertConfig(), description="how an expert is trained")
    augment: tuple[siamese.Kind, ...] = Field(
        siamese.KINDS, description="augmentations of experts and students, one a batch; flips mirror text"
    )
    init: Literal["representative", "random"] = Field(
        "representative", description="the pictures to start from: near the centres of their class's k-means, or any of the class"
    )
    iterations: int = Field(5000, ge=0, description="updates of the pictures; 0 leaves them as they were: coresets to compare with")
    max_start: int = Field(10, ge=1, description="matching starts at an expert's epoch below this one")
    expert_epochs: int = Field(2, ge=1, description="M: epochs of the expert that a student has to reach")
    steps: int = Field(40, ge=1, description="T: the student's updates")
    batch_size: int = Field(256, ge=1, description="synthetic pictures an update of the student")
    momentum: float = Field(0.9, ge=0, lt=1, description="of the student's updates")
    balance: bool = Field(True, description="weigh the student's loss by where the matching starts")
    middle: Middle = Field("equal", description="match the epochs between too: not at all, all alike, or weighted by i / M")
    perturb: float = Field(1.0, ge=0, description="alpha: how far the student's first weights are moved; 0: not")
    pixel_lr: float = Field(1000.0, gt=0, description="learning rate of the pixels, in units of their standard deviation; 100 to 10,000")
    student_lr: float = Field(0.01, gt=0, description="the student's learning rate at first; it is learnt too")
    lr_lr: float = Field(1e-5, ge=0, description="learning rate of the student's learning rate; 0: it stays")

    @field_validator("augment")
    @classmethod
    def _each_once(cls, kinds: tuple[siamese.Kind, ...]) -> tuple[siamese.Kind, ...]:
        if len(set(kinds)) < len(kinds):
            raise ValueError("each at most once")
        return kinds

    @model_validator(mode="after")
    def _trajectories_suffice(self) -> Self:
        if self.max_start - 1 + self.expert_epochs > self.expert.epochs:
            raise ValueError(
                f"max_start - 1 + expert_epochs = {self.max_start - 1 + self.expert_epochs} lies behind the expert's {self.expert.epochs} epochs"
            )
        if self.expert_epochs > self.steps:
            raise ValueError(f"expert_epochs: {self.steps} steps cannot match {self.expert_epochs} epochs")
        if self.size_px >> self.depth == 0:
            raise ValueError(f"depth: {self.depth} halvings leave nothing of {self.size_px} pixels")
        return self

    def build(self, seed: int) -> SmoothDistillation:
        """The method; `seed` names all draws."""
        return SmoothDistillation(self, seed)


# ---------------------------------------------------------------- the training set


@dataclass(frozen=True)
class Pictures:
    """Labelled pictures in memory: keys, uint8 `[N, C, H, W]`, int64 `[N]`."""

    keys: tuple[str, ...]
    image_NCHW: NDArray[np.uint8]
    label_N: NDArray[np.int64]

    def joined(self, other: Pictures) -> Pictures:
        """Both, one after the other."""
        images = np.concatenate([self.image_NCHW, other.image_NCHW])
        return Pictures(self.keys + other.keys, images, np.concatenate([self.label_N, other.label_N]))

    def sorted(self) -> Pictures:
        """By key, so that nothing depends on the order that rows came in."""
        order = sorted(range(len(self.keys)), key=self.keys.__getitem__)
        return Pictures(tuple(self.keys[row] for row in order), self.image_NCHW[order], self.label_N[order])


def read_pictures(batch: pl.DataFrame, size_px: int, channels: int) -> Pictures:
    """The labelled pairs of a batch with its column `pixels`. Raises DataError for a set without labels, or a picture that is broken."""
    if "label" not in batch.columns or not batch["label"].dtype.is_integer():
        got = batch["label"].dtype if "label" in batch.columns else "no such column"
        raise DataError.at("Distillation needs classes", "label", str(got), "integers, one a class", "ingest a labelled set")
    rows = batch.filter(pl.col("label").is_not_null())
    pictures = [decode_square(data, size_px, channels, key) for key, data in rows.select("key", "pixels").iter_rows()]
    stack = np.stack(pictures) if pictures else np.empty((0, channels, size_px, size_px), np.uint8)
    return Pictures(tuple(rows["key"]), stack, rows["label"].cast(pl.Int64).to_numpy())


class Gather(Fold):
    """Brings all labelled pictures together and distils them. A partial result holds its pictures: `size_px^2 * channels` bytes a pair."""

    def __init__(self, config: Config, seed: int) -> None:
        self.config, self.seed = config, seed

    def map(self, batch: pl.DataFrame, state: Any) -> Pictures:
        """The batch's pictures."""
        del state
        return read_pictures(batch, self.config.size_px, self.config.channels)

    def merge(self, left: Pictures, right: Pictures) -> Pictures:
        """All of them."""
        return left.joined(right)

    def finish(self, partial: Pictures, state: Any) -> Distilled:
        """The learnt pictures. Raises DataError as `distil`."""
        del state
        return distil(partial.sorted(), self.config, self.seed)


# ---------------------------------------------------------------- distillation


@dataclass(frozen=True)
class Distilled:
    """The learnt pictures by the key of the pair that each started from (PNG), the learnt learning rate, and figures for the report."""

    pictures: Mapping[str, bytes]
    lr: float
    figures: Mapping[str, float] = field(default_factory=dict)


def distil(real: Pictures, config: Config, seed: int) -> Distilled:
    """Trains the experts, chooses the pictures to start from, and learns them.

    Raises DataError if there are fewer than two classes, or fewer pictures of a class than are to be left.
    """
    labels, class_N = np.unique(real.label_N, return_inverse=True)
    counts = np.bincount(class_N, minlength=len(labels))
    if len(labels) < 2 or counts.min() < config.per_class:
        got = {int(label): int(count) for label, count in zip(labels, counts, strict=True)}
        raise DataError.at(
            "There is too little to distil", "label", got, f"two classes or more, of {config.per_class} pictures or more each"
        )
    image_NCHW = torch.from_numpy(real.image_NCHW).float() / 255
    mean_C, std_C = image_NCHW.mean(dim=(0, 2, 3)), image_NCHW.std(dim=(0, 2, 3)).clamp(min=1e-3)
    scale = Scale(mean_C.view(1, -1, 1, 1), std_C.view(1, -1, 1, 1))
    image_NCHW, class_T = scale.normal(image_NCHW), torch.from_numpy(class_N)
    shape = convnet.NetShape(config.channels, len(labels), config.width, config.depth, config.size_px)
    needed = config.experts if config.iterations else int(config.init == "representative")
    trajectories = [_expert(image_NCHW, class_T, shape, config, seed, number) for number in range(needed)]
    rows_S = _start(real, image_NCHW, class_N, shape, trajectories, config, seed)
    figures = {"experts": float(needed)}
    if needed:
        figures["expert_movement"] = sum(movement(flat_EP) for flat_EP in trajectories) / needed
    image_SCHW, lr = image_NCHW[rows_S], config.student_lr
    if config.iterations:
        image_SCHW, lr, learnt = _learn(image_SCHW, class_T[rows_S], trajectories, shape, scale, config, seed)
        figures |= learnt
    pixels_SCHW = scale.eight_bits(image_SCHW)
    pictures = {real.keys[row]: _png(pixels_CHW) for row, pixels_CHW in zip(rows_S.tolist(), pixels_SCHW, strict=True)}
    return Distilled(pictures, lr, {**figures, "lr": lr})


@dataclass(frozen=True)
class Scale:
    """Between pixels in [0, 1] and the normalised pictures that networks see: mean and standard deviation `[1, C, 1, 1]`."""

    mean: torch.Tensor
    std: torch.Tensor

    def normal(self, image_NCHW: torch.Tensor) -> torch.Tensor:
        """Normalised pictures."""
        return (image_NCHW - self.mean) / self.std

    def possible(self, image_NCHW: torch.Tensor) -> torch.Tensor:
        """The nearest normalised pictures whose pixels lie in [0, 1]."""
        return self.normal((image_NCHW * self.std + self.mean).clamp(0, 1))

    def eight_bits(self, image_NCHW: torch.Tensor) -> NDArray[np.uint8]:
        """uint8 pixels."""
        pixels: NDArray[np.uint8] = ((image_NCHW * self.std + self.mean) * 255).round().clamp(0, 255).to(torch.uint8).numpy()
        return pixels


def _expert(
    image_NCHW: torch.Tensor, class_N: torch.Tensor, shape: convnet.NetShape, config: Config, seed: int, number: int
) -> torch.Tensor:
    """The parameters `[E + 1, P]` of one expert's training."""
    draw = generator(seed, "distil expert", number)
    net = convnet.create(shape, int(draw.integers(2**63)))

    def batches(_: int) -> Sequence[torch.Tensor]:
        return torch.split(torch.from_numpy(draw.permutation(len(class_N))), config.expert.batch_size)

    return record(net, image_NCHW, class_N, batches, config.expert, lambda batch: siamese.augment(batch, config.augment, draw)).flat_EP


def _start(
    real: Pictures,
    image_NCHW: torch.Tensor,
    class_N: NDArray[np.int64],
    shape: convnet.NetShape,
    trajectories: Sequence[torch.Tensor],
    config: Config,
    seed: int,
) -> torch.Tensor:
    """The rows of the pictures to start from, `per_class` a class, class after class."""
    rows = []
    if config.init == "representative":
        with torch.no_grad():
            last_P = trajectories[int(generator(seed, "distil representatives").integers(len(trajectories)))][-1]
            logit_NK = (
                torch.cat([convnet.run(convnet.create(shape, 0), last_P, part) for part in torch.split(image_NCHW, 256)]).double().numpy()
            )
    else:
        draw_N = uniform(seed, key_hashes(real.keys))
    for label in range(shape.classes):
        own = np.flatnonzero(class_N == label)
        if config.init == "representative":
            rows.append(own[representatives(logit_NK[own], config.per_class, seed)])
        else:
            rows.append(own[np.argsort(draw_N[own], kind="stable")[: config.per_class]])
    return torch.from_numpy(np.concatenate(rows))


def _learn(
    image_SCHW: torch.Tensor,
    class_S: torch.Tensor,
    trajectories: Sequence[torch.Tensor],
    shape: convnet.NetShape,
    scale: Scale,
    config: Config,
    seed: int,
) -> tuple[torch.Tensor, float, dict[str, float]]:
    """The learnt pictures, the learnt learning rate, and the matching loss at both ends. Pixels are kept within what a picture can show."""
    image_SCHW = image_SCHW.clone().requires_grad_(True)
    lr = torch.tensor(config.student_lr, requires_grad=True)
    pixels = torch.optim.SGD([image_SCHW], lr=config.pixel_lr, momentum=PIXEL_MOMENTUM)
    rates = torch.optim.SGD([lr], lr=config.lr_lr, momentum=PIXEL_MOMENTUM)
    net, losses = convnet.create(shape, 0), []
    for iteration in range(config.iterations):
        draw = generator(seed, "distil iteration", iteration)
        flat_EP = trajectories[int(draw.integers(len(trajectories)))]
        start = int(draw.integers(config.max_start))
        start_P = flat_EP[start]
        if config.perturb:
            noise_P = torch.from_numpy(draw.normal(size=len(start_P))).float()
            start_P = perturbed(net, start_P, noise_P, config.perturb)
        cut = chunks(_orders(len(class_S), draw), config.batch_size)
        found = matched(
            net, image_SCHW, class_S, lr, start_P, flat_EP[start + 1 : start + config.expert_epochs + 1], [next(cut) for _ in range(config.steps)],
            momentum=config.momentum, factor=balance_factor(start, config.max_start) if config.balance else 1.0, middle=config.middle,
            augment=lambda batch, draw=draw: siamese.augment(batch, config.augment, draw),  # type: ignore[misc]
        )  # fmt: skip
        image_SCHW.grad, lr.grad = torch.autograd.grad(found.loss, (image_SCHW, lr))
        pixels.step()
        rates.step()
        with torch.no_grad():
            image_SCHW.copy_(scale.possible(image_SCHW))
            lr.clamp_(min=LEAST_LR)
        losses.append(found.end.item())
    tenth = max(1, len(losses) // 10)
    figures = {"loss_first": float(np.mean(losses[:tenth])), "loss_last": float(np.mean(losses[-tenth:]))}
    return image_SCHW.detach(), lr.item(), figures


def _orders(count: int, draw: np.random.Generator) -> Iterator[torch.Tensor]:
    while True:
        yield torch.from_numpy(draw.permutation(count))


def _png(pixels_CHW: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels_CHW[0] if len(pixels_CHW) == 1 else pixels_CHW.transpose(1, 2, 0)).save(file, "PNG")
    return file.getvalue()


# ---------------------------------------------------------------- the method


@dataclass(frozen=True)
class SmoothDistillation(PairMethod):
    """Keeps the pairs that pictures were learnt from, with the learnt pictures, and adds `meta.distilled_lr`."""

    config: Config
    seed: int
    needs = frozenset[Need]({"captions", "pixels"})
    paints = True

    def folds(self) -> Sequence[Fold]:
        """One, which does all of the work."""
        return [Gather(self.config, self.seed)]

    def state_bytes(self, rows: int, width: int) -> int:
        """Most memory of the state: all pictures, once as pixels and once as the networks see them."""
        del width
        return 5 * rows * self.config.channels * self.config.size_px**2

    def apply(self, batch: pl.DataFrame, state: Distilled) -> Verdict:
        """The verdict on a batch; a pair leaves as `distilled` or, where it has none, for want of a label."""
        is_kept = pl.col("key").is_in(list(state.pictures))
        reason = pl.when(pl.col("label").is_null()).then(pl.lit("no label")).otherwise(pl.lit("distilled"))
        rejected = batch.filter(~is_kept).select("key", reason.alias("reason"), score=pl.lit(None, pl.Float32))
        kept = batch.filter(is_kept)
        pictures = pl.Series("pixels", [state.pictures[key] for key in kept["key"]], dtype=pl.Binary)
        return Verdict(kept.with_columns(pictures, pl.lit(state.lr, pl.Float32).alias(LR)), rejected)

    def report(self, state: Distilled | None) -> Mapping[str, Any]:
        """Pictures left, experts and how far they moved an epoch, the matching loss at both ends, the learnt learning rate."""
        return {} if state is None else {"pictures": len(state.pictures), **state.figures}
