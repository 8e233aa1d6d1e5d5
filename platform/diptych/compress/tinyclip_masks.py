"""TinyCLIP's automatic inheritance: learn which width, heads and neurons a smaller model needs, then cut the rest out.

Source: Wu et al., TinyCLIP (ICCV 2023), section 3.2. Masks and weights are trained together to reproduce the affinities of the model as it was
handed over (section 3.1), while the sparsity asked for rises; then masks are settled and fused, and the smaller model, which computes what the
masked one did, is trained on.

A shrinking in several stages is a list in `stages`: each stage begins with what the one before left, and all learn from the same first model.
A list of this method in `compress` does the same with each stage's own start as its teacher. In claims, arms with growing `stages` compare them.

The width can be cut in open_clip's own vision and text transformers, which are also the only towers that this takes. The head's width, the
shared space and the number of blocks stay; a smaller model is kept with `structure.json`, since open_clip's configuration cannot say its shape.
The multipliers are one pair for both towers: two pairs, as in the published code, receive equal gradients and remain equal.

Shape legend: N pairs, D feature width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from diptych.compress.blocks import Batch, evaluating
from diptych.compress.calibration import Calibrated, required
from diptych.compress.footprint import measure
from diptych.compress.hard_concrete import Lagrangian, Masks, TowerMasks, mask_optimizer, sparsity, target
from diptych.compress.magnitude import masks_of
from diptych.compress.masked import Form, fuse, masked
from diptych.compress.retrain import Pool, train
from diptych.core.chance import generator
from diptych.core.errors import ConfigError
from diptych.models.clip import DualEncoder
from diptych.models.contrastive import affinity_cross_entropy, symmetric_cross_entropy
from diptych.models.structure import Kind, open_clip_says


class Config(Calibrated):
    """TinyCLIP's learnt masks."""

    method: Literal["tinyclip-masks"] = "tinyclip-masks"
    stages: tuple[float, ...] = Field(
        (0.5,),
        min_length=1,
        description="share of the blocks' parameters that is gone after each stage, rising; published: 0.25 a stage at most",
    )
    width: bool = Field(True, description="learn which features of the width stay too; false: heads and neurons alone")
    steps: int = Field(800, ge=1, description="updates of masks and weights together, a stage")
    warmup: float = Field(0.8, ge=0, le=1, description="share of them in which the sparsity asked for rises from 0; published: all")
    retrain_steps: int = Field(200, ge=0, description="updates of the smaller model, a stage")
    lr: float = Field(1e-3, gt=0, description="highest learning rate of the weights; published: 1e-4")
    mask_lr: float = Field(
        0.02, gt=0, description="learning rate of masks and multipliers: log-alphas start near 5, fall by it an update, and must pass -2"
    )
    multiplier: float = Field(10.0, ge=0, description="both multipliers of the sparsity penalty, at first")
    alpha: float = Field(1.0, ge=0, le=1, description="share of the affinity term; the rest is CLIP's own loss")
    scale: float = Field(50.0, ge=1, le=100, description="logit scale of both models, which the smaller one keeps")
    seed: int = Field(0, ge=0, lt=2**63, description="names the draws of batches and masks")
    calibration_pairs: int = Field(4096, ge=2, description="training pairs, the first by key hash; kept in memory as they are given")
    calibration_batch: int = Field(64, ge=2, description="pairs a batch")

    @field_validator("stages")
    @classmethod
    def _rising(cls, stages: tuple[float, ...]) -> tuple[float, ...]:
        if not all(earlier < later for earlier, later in zip((0.0, *stages), (*stages, 1.0), strict=True)):
            raise ValueError("shares must rise, above 0 and below 1, e.g. [0.25, 0.5]")
        return stages

    def build(self) -> TinyClipMasks:
        """The compressor."""
        return TinyClipMasks(self)


@dataclass(frozen=True)
class Taught:
    """The teacher's features `[N, D]` of all calibration pairs."""

    image_ND: Tensor
    text_ND: Tensor


class TinyClipMasks:
    """The compressor. After `compress`, `report` says of each stage what was asked, expected and reached."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._figures: dict[str, Any] = {}

    def compress(self, model: nn.Module, calibration: Iterable[Batch]) -> nn.Module:
        """Learns, cuts and trains stage by stage, in place; gives the model back.

        Raises ConfigError for other towers than open_clip's own transformers and for a model with masks; DataError without calibration pairs.
        """
        if not isinstance(model, DualEncoder):
            raise ConfigError.at("This is no dual encoder", "model", type(model).__name__, "a model of open_clip")
        if masks_of(model):
            raise ConfigError.at(
                "The model has masks already", "compress", "masks", "a dense model", "put tinyclip-masks before other methods"
            )
        batches = required(calibration, "tinyclip-masks")
        kinds: tuple[Kind, ...] = ("image", "text") if self.config.towers == "both" else (self.config.towers,)
        pool = Pool(model, batches, self.config.calibration_batch, self.config.seed)
        with evaluating(model):
            before, taught = measure(model, batches[0]), _features(model, pool)
            total = sum(Form.of_tower(model, kind).sizes().total for kind in kinds)
            with torch.no_grad():
                model.logit_scale.fill_(math.log(self.config.scale))
            stages = [self._stage(model, kinds, pool, taught, total, number) for number in range(len(self.config.stages))]
            after = measure(model, batches[0])
        last = stages[-1]
        kept = {kind: _shape(Form.of_tower(model, kind)) for kind in kinds}
        self._figures = {**last, "stages": stages, "kept": kept, "before": before.plain(), "after": after.plain()}
        self._figures["open_clip"] = open_clip_says(model)
        return model

    def report(self, model: nn.Module) -> dict[str, Any]:
        """Figures of the last stage, those of all `stages`, what is `kept`, `before` and `after` (see `Footprint`), and `open_clip`.

        Of a stage: `asked`, the sparsity wanted; `expected`, what the masks promised; `reached`, what is gone; `difference`, the largest
        between features of the masked and the cut model; `mask_loss` and `loss`, the last of both trainings.
        """
        del model
        return dict(self._figures)

    def _stage(self, model: DualEncoder, kinds: Sequence[Kind], pool: Pool, taught: Taught, total: int, number: int) -> dict[str, Any]:
        config, forms = self.config, {kind: Form.of_tower(model, kind) for kind in kinds}
        masks = {kind: TowerMasks(form.sizes(), config.width).to(pool.device) for kind, form in forms.items()}
        own = sum(each.sizes.total for each in masks.values())
        asked = max(0.0, 1 - (1 - config.stages[number]) * total / own)  # of what the stage before left, which may be little already
        mask_loss = self._learn(model, forms, masks, pool, taught, asked, number)
        expected = 1 - (1 - float(sparsity(list(masks.values())).detach())) * own / total
        settled = {kind: each.settled() for kind, each in masks.items()}
        difference = self._fuse(model, forms, settled, pool.at(0))
        left = sum(Form.of_tower(model, kind).sizes().total for kind in kinds)

        def loss(step: int) -> Tensor:
            return self._loss(model, pool.at((number + 1) * config.steps + number * config.retrain_steps + step), taught)

        losses = train(_weights(model), loss, config.retrain_steps, config.lr)
        figures = {"asked": config.stages[number], "expected": expected, "reached": 1 - left / total, "difference": difference}
        return {**figures, "mask_loss": mask_loss, "loss": losses[-1] if losses else mask_loss}

    def _learn(
        self,
        model: DualEncoder,
        forms: dict[Kind, Form],
        masks: dict[Kind, TowerMasks],
        pool: Pool,
        taught: Taught,
        asked: float,
        number: int,
    ) -> float:
        """Trains masks and weights together; gives the last loss, without the penalty."""
        config, every = self.config, list(masks.values())
        lagrangian = Lagrangian(config.multiplier).to(pool.device)
        optimizer = mask_optimizer(every, lagrangian, config.mask_lr)
        current: dict[Kind, Masks] = {}
        last = math.nan

        def loss(step: int) -> Tensor:
            nonlocal last
            optimizer.zero_grad(set_to_none=True)
            draws = torch.Generator()
            draws.manual_seed(int(generator(config.seed, "tinyclip-masks", f"{number}/{step}").integers(2**62)))
            current.update({kind: each.drawn(draws) for kind, each in masks.items()})
            found = self._loss(model, pool.at(number * (config.steps + config.retrain_steps) + step), taught)
            last = float(found.detach())
            wanted = target(step + 1, 0.0, asked, round(config.warmup * config.steps))
            penalty: Tensor = lagrangian(wanted, sparsity(every))
            return found + penalty

        def after() -> None:
            lagrangian.ascend()
            optimizer.step()
            for each in every:
                each.clamp()

        with _under(forms, current):
            train(_weights(model), loss, config.steps, config.lr, after)
        return last

    @torch.no_grad()
    def _fuse(self, model: DualEncoder, forms: dict[Kind, Form], settled: dict[Kind, Masks], batch: Batch) -> float:
        with _under(forms, settled):
            before = _encode(model, batch)
        for kind, each in settled.items():
            fuse(model, kind, each)
        return max(float((one - other).abs().max()) for one, other in zip(before, _encode(model, batch), strict=True))

    def _loss(self, model: DualEncoder, batch: Batch, taught: Taught) -> Tensor:
        """Affinity and contrast of a batch, in nats, weighed."""
        image_ND, text_ND = _encode(model, batch)
        theirs = (taught.image_ND[batch["row_N"]], taught.text_ND[batch["row_N"]])
        ours_NN, theirs_NN = (self.config.scale * image @ text.T for image, text in ((image_ND, text_ND), theirs))
        affinity = (affinity_cross_entropy(ours_NN, theirs_NN) + affinity_cross_entropy(ours_NN.T, theirs_NN.T)) / 2
        alpha = self.config.alpha
        if alpha == 1:
            return affinity
        return alpha * affinity + (1 - alpha) * symmetric_cross_entropy(
            ours_NN, ours_NN.T, torch.arange(len(ours_NN), device=ours_NN.device)
        )


@contextmanager
def _under(forms: Mapping[Kind, Form], current: Mapping[Kind, Masks]) -> Iterator[None]:
    with ExitStack() as stack:
        for kind, form in forms.items():
            stack.enter_context(masked(form, partial(current.__getitem__, kind)))
        yield


def _encode(model: DualEncoder, batch: Batch) -> tuple[Tensor, Tensor]:
    return model.encode_image(batch["image_NCHW"]), model.encode_text(batch["text_NL"])


@torch.no_grad()
def _features(model: DualEncoder, pool: Pool) -> Taught:
    parts = zip(torch.split(pool.image_NCHW, pool.size), torch.split(pool.text_NL, pool.size), strict=True)
    sides = [_encode(model, {"image_NCHW": image.to(pool.device), "text_NL": text.to(pool.device)}) for image, text in parts]
    image_ND, text_ND = (torch.cat(side) for side in zip(*sides, strict=True))
    return Taught(image_ND, text_ND)


def _weights(model: DualEncoder) -> list[nn.Parameter]:
    """What is trained: all but the logit scale, which is fixed."""
    return [each for each in model.parameters() if each.requires_grad and each is not model.logit_scale]


def _shape(form: Form) -> dict[str, Any]:
    sizes = form.sizes()
    return {"width": sizes.hidden, "heads": list(sizes.heads), "neurons": list(sizes.neurons)}
