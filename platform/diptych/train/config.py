"""What a training run is told, apart from the data, the model, the objective, the optimizer and the seed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from diptych.core.config import Config
from diptych.train import curriculum
from diptych.train.augment import AugmentConfig
from diptych.train.best import VALIDATION, KeepBest
from diptych.train.curriculum import ImageStage, TextStage
from diptych.train.schedule import ScheduleConfig

MOST_SPARE = 16
"""Threads of a loader at most that nobody asked for by number."""
UNJUDGED: Mapping[str, None] = {"validate_every_steps": None, "keep_best": None}
"""What a training goes without whose checkpoints nobody compares: a probe, a scout."""


class TrainConfig(Config):
    """The loop's settings. The length is given in epochs or in steps; batches are global, so workers do not change the result."""

    epochs: float | None = Field(default=None, gt=0, description="passes over the pairs; may be a fraction")
    steps: int | None = Field(default=None, gt=0, description="optimizer updates, instead of epochs")
    batch_size: int = Field(default=256, ge=1, description="pairs an update, over all workers")
    accumulate: int = Field(default=1, ge=1, description="micro-batches a worker encodes one after another; the loss still sees all pairs")
    precision: Literal["fp32", "bf16", "auto"] = Field(
        default="fp32", description="arithmetic of the encoders; the loss is always float32; auto: bf16 where the device has it"
    )
    parallel: Literal["ddp", "fsdp"] = Field(
        default="ddp", description="every worker holds the whole model, or (FSDP2) a part of its weights, gradients and moments"
    )
    compile: bool = Field(default=False, description="compile the towers (torch.compile); the first steps take longer")
    checkpoint_activations: bool = Field(
        default=False, description="compute activations again in the backward: less memory, a third more time"
    )
    layer_decay: float | None = Field(
        default=None, gt=0, lt=1, description="factor of the learning rate from each layer to the one below; null: all learn alike"
    )
    patch_dropout: float = Field(default=0.0, ge=0, lt=1, description="share of a picture's patches that are left out while training")
    image_sizes: tuple[ImageStage, ...] = Field(
        default=(), description="stages {size, share} of smaller or larger pictures; after them the model's own size"
    )
    text_lengths: tuple[TextStage, ...] = Field(
        default=(), description="stages {tokens, share} of shorter captions; after them the model's whole context"
    )
    no_decay: tuple[str, ...] = Field(default=(), description="parts of parameter names that do not decay, beside gains and biases")
    schedule: ScheduleConfig = Field(default=ScheduleConfig(), description="learning rate by step")
    clip_grad_norm: float | None = Field(default=None, gt=0, description="largest L2 norm of the gradient; none: never clipped")
    ema: float | None = Field(default=None, gt=0, lt=1, description="decay a step of averaged weights; if set, they are what is saved")

    caption: Literal["uniform", "first"] = Field(
        default="uniform", description="one of a pair's captions, drawn anew each visit, or its first"
    )
    original: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="share of visits that see a pair's first caption; the others draw from the rest; null: uniform",
    )
    tags: bool = Field(default=False, description="draw from captions of the source `tag` too; false: only for pairs that have no other")
    augment: AugmentConfig = Field(default=AugmentConfig(), description="what happens to a picture on each visit")
    freeze: Literal["none", "image", "text"] = Field(
        default="none", description="a tower that keeps its weights; best with `init`; image: LiT"
    )
    labelled: float | None = Field(
        default=None, gt=0, lt=1, description="share of a batch drawn from pairs with a label, the rest from those without; null: all alike"
    )
    avoid: str | None = Field(default=None, description="a column, e.g. label: no two pairs of one batch have the same value in it")

    loader_workers: Annotated[int, Field(ge=0, le=256)] | Literal["auto"] = Field(
        default="auto", description="threads that read and decode ahead; 0: none, everything in line; auto: as many as cores are to spare"
    )
    cache_bytes: int = Field(default=1 << 30, ge=0, description="if all decoded pictures fit, they are kept in memory at full size")
    threads: int = Field(
        default=1, ge=1, le=1024, description="torch threads a process; part of the arithmetic, so not taken from the machine"
    )
    log_every: int = Field(default=10, ge=1, description="steps between two records of steps.jsonl")
    checkpoint_every_s: float = Field(default=60.0, ge=0, description="seconds between two checkpoints; 0: every step")
    checkpoint_every_steps: int | None = Field(default=None, ge=1, description="steps between two checkpoints, beside the seconds")
    checkpoint_async: bool = Field(
        default=True, description="checkpoints are written while training goes on, from a copy in memory as large as they are"
    )
    keep_best: KeepBest | None = Field(
        default=None, description="keep the checkpoint with the best figure, and make the model of it; null: the last one's"
    )
    validate_every_steps: int | None = Field(
        default=None, ge=1, description="steps between two losses of the split `val`, logged as val_loss; a multiple of log_every"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("exactly one of epochs and steps must be given")
        if self.original is not None and self.caption == "first":
            raise ValueError("original has no effect with caption: first")
        if self.avoid is not None and self.labelled is not None:
            raise ValueError("avoid and labelled both compose the batches; only one can be given")
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} does not divide by accumulate {self.accumulate}")
        self._check_best()
        self._check_parallel()
        curriculum.check("image_sizes", self.image_sizes)
        curriculum.check("text_lengths", self.text_lengths)
        if self.compile and self.image_sizes:
            raise ValueError("compile builds the image tower for one size, so it excludes image_sizes")
        if self.patch_dropout and self.freeze == "image":
            raise ValueError("patch_dropout has no effect with freeze: image, since a frozen tower behaves as in evaluation")
        return self

    def _check_parallel(self) -> None:
        if self.parallel == "ddp":
            return
        for name, reason in (
            ("ema", "an average needs the whole weights on every worker"),
            ("compile", "sharded towers are not compiled here"),
            ("image_sizes", "position embeddings are interpolated whole"),
        ):
            if getattr(self, name):
                raise ValueError(f"parallel: fsdp excludes {name}: {reason}")
        if self.accumulate > 1:
            raise ValueError("parallel: fsdp excludes accumulate above 1: a micro-batch's backward would gather the weights anew each time")

    def _check_best(self) -> None:
        every = self.validate_every_steps
        if every is not None and every % self.log_every:
            raise ValueError(
                f"validate_every_steps {every} is not a multiple of log_every {self.log_every}, so its loss would not be logged"
            )
        if self.keep_best is None:
            return
        if self.checkpoint_every_steps is None:
            raise ValueError("keep_best chooses among checkpoints by steps, so it needs checkpoint_every_steps")
        if self.keep_best.metric == VALIDATION and every is None:
            raise ValueError("keep_best by val_loss needs validate_every_steps")

    def loader_threads(self, cores: int) -> int:
        """The loader's threads in a process that has this many cores to itself; arithmetic takes `threads` of them."""
        return max(0, min(MOST_SPARE, cores - self.threads)) if self.loader_workers == "auto" else self.loader_workers

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimizer updates of the whole run; a fraction of an epoch is rounded to whole steps, at least one."""
        return self.steps if self.steps is not None else max(1, round((self.epochs or 0) * steps_per_epoch))
