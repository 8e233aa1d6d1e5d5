"""A-CLIP: half of a picture's tokens are left out, those that the class token of a slowly moving image tower cares least about.

Yang et al., "Attentive Mask CLIP" (ICCV 2023), section 3. Two views of each picture are compared with its caption and with each other (SimCLR),
and with what the running average of the tower sees in a larger part of the picture that holds both (BYOL). The views are cut and coloured as
`train.augment` says; the paper takes crops of half the area or more, with colours. At evaluation nothing is left out.

The released SimCLR call compares the first view with itself; here it is the first with the second.

Shape legend: n pairs on this rank, N pairs in the global batch, P patches, D feature width, W the image tower's width, E width of a head.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from diptych.core import chance
from diptych.core.config import Config as BaseConfig
from diptych.core.errors import ConfigError
from diptych.core.points import Encoded, TrainContext
from diptych.models.image_tokens import attended, normalized, see, side_of, transformer_of
from diptych.objectives.clip import clip_loss
from diptych.objectives.gather import gather, rank
from diptych.objectives.projectors import cosine_regression, follow, mlp
from diptych.objectives.token_selection import keep, moved, places

VIEWS = ("image", "view0")
WHOLE = "view1"
STREAM = chance.key_hash("a-clip")


class Parts(NamedTuple):
    """The losses of this rank, scalars: of both views against the captions, between the views, and towards the running average."""

    contrast: tuple[Tensor, Tensor]
    simclr: Tensor
    byol: Tensor


def simclr(first_nE: Tensor, second_nE: Tensor, temperature: float) -> Tensor:
    """SimCLR's loss (Chen et al. 2020) of two views, in nats: each picture finds its other view among all other pictures' views.

    Every rank scores its own rows; the mean over the ranks, and its gradient, are those of the global batch. Rows are normalised here.
    """
    own = [normalize(side_nE, dim=-1) for side_nE in (first_nE, second_nE)]
    everyone = gather(torch.cat(own, dim=1), with_grad=True).chunk(2, dim=1)
    label_n = torch.arange(len(first_nE), device=first_nE.device) + len(first_nE) * rank()
    losses = []
    for view_nE, same_NE, other_NE in ((own[0], everyone[0], everyone[1]), (own[1], everyone[1], everyone[0])):
        itself_nN = (view_nE @ same_NE.T / temperature).scatter(1, label_n[:, None], -torch.inf)
        losses.append(cross_entropy(torch.cat([view_nE @ other_NE.T / temperature, itself_nN], dim=1), label_n))
    return (losses[0] + losses[1]) / 2


def momentum_at(step: int, total_steps: int, base: float) -> float:
    """The share of itself that the running average keeps: from `base` to 1 by half a cosine."""
    return 1 - (1 - base) * 0.5 * (1 + math.cos(math.pi * step / total_steps))


class AClip(nn.Module):
    """The objective; it runs the image tower itself. State: the heads, the running averages of the image tower and of the projector.

    The average of the text tower, which the released code keeps too, is used by no loss.
    """

    encodes = ("text",)
    whole_batch = whole_weights = True
    views = ("weak", "around")
    boxes = True

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.seed, self.total_steps = 0, 1

    def start(self, context: TrainContext) -> None:
        """Makes the heads and the averages. Raises ConfigError for an image tower that has no tokens to leave out."""
        config = self.config
        model: Any = context.model
        tower = transformer_of(model)
        side, width = side_of(tower), tower.ln_post.normalized_shape[0]
        if side % config.cell:
            raise ConfigError.at("The patches do not divide into cells", "train.objective.cell", config.cell, f"a divisor of {side}")
        self.seed, self.total_steps = context.seed, context.total_steps
        self.average = copy.deepcopy(tower).requires_grad_(False)
        self.ssl_head = mlp([width, config.hidden, config.hidden, config.width])
        self.projector = mlp([width, config.hidden, config.width])
        self.predictor = mlp([config.width, config.hidden, config.width])
        self.average_projector = copy.deepcopy(self.projector).requires_grad_(False)

    def forward(self, encoded: Encoded) -> dict[str, Tensor]:
        """`loss`; what it is made of: `contrast` (both views), `simclr`, `byol`; `kept`, the share of patches that the tower saw."""
        model: Any = encoded.model
        tower, batch = transformer_of(model), encoded.batch
        with encoded.arithmetic(batch["image_NCHW"].device):
            map_NP, whole_NW = attended(self.average, normalized(model, batch[f"{WHOLE}_NCHW"]))
            kept_MP = self.select(map_NP.float(), batch, encoded.step)
            view_MCHW = torch.cat([batch[f"{view}_NCHW"] for view in VIEWS])
            seen = see(tower, normalized(model, view_MCHW), places(kept_MP))
        feature_MD, class_MW, whole_NW = (_at_least_float32(x) for x in (seen.feature_ND, seen.class_NW, whole_NW))
        with torch.no_grad():
            target_NE = self.average_projector(whole_NW)
        predicted_ME = self.predictor(self.projector(class_MW))
        parts = self.parts(feature_MD, encoded.text_ND, self.ssl_head(class_MW), predicted_ME, target_NE, encoded.logit_scale)
        figures = {"contrast": (parts.contrast[0] + parts.contrast[1]) / 2, "simclr": parts.simclr, "byol": parts.byol}
        return {"loss": self.total(parts), **{name: part.detach() for name, part in figures.items()}, "kept": kept_MP.float().mean()}

    def parts(self, image_MD: Tensor, text_ND: Tensor, ssl_ME: Tensor, byol_ME: Tensor, target_NE: Tensor, logit_scale: Tensor) -> Parts:
        """The losses. Rows of `_M` are those of the first view, then those of the second; all are normalised here."""
        text_ND = normalize(text_ND, dim=-1)
        contrast = [clip_loss(normalize(image_ND, dim=-1), text_ND, logit_scale) for image_ND in image_MD.chunk(2)]
        first_NE, second_NE = ssl_ME.chunk(2)
        between = simclr(first_NE, second_NE, self.config.simclr_temperature)
        return Parts((contrast[0], contrast[1]), between, cosine_regression(byol_ME, target_NE.repeat(2, 1)))

    def total(self, parts: Parts) -> Tensor:
        """The weighted sum."""
        config = self.config
        return (parts.contrast[0] + parts.contrast[1]) / 2 + config.simclr * parts.simclr + config.byol * parts.byol

    @torch.no_grad()
    def select(self, map_NP: Tensor, batch: Mapping[str, Tensor], step: int) -> Tensor:
        """What both views keep, bool `[2N, P]`, by a map over the larger crop."""
        config = self.config
        if config.select == "random":
            scores = [self._drawn(batch["row_N"], map_NP, step, view) for view in range(len(VIEWS))]
        else:
            sign = 1 if config.select == "attentive" else -1
            scores = [sign * moved(map_NP, batch[f"{WHOLE}_box_N5"], batch[f"{view}_box_N5"]) for view in VIEWS]
        return keep(torch.cat(scores), config.kept, config.cell)

    def _drawn(self, row_N: Tensor, like_NP: Tensor, step: int, view: int) -> Tensor:
        """Scores that know nothing, by `(seed, row, step, view)`."""
        row_N1 = row_N.cpu().numpy().astype(np.uint64)[:, None]
        drawn_NP = chance.uniform(self.seed, STREAM, step, view, row_N1, np.arange(like_NP.shape[1], dtype=np.uint64))
        return torch.from_numpy(drawn_NP).to(like_NP)

    def after_step(self, step: int, model: nn.Module) -> None:
        """Moves the averages towards the weights just made, as the released code does before the next step."""
        encoder: Any = model
        momentum = momentum_at(step, self.total_steps, self.config.momentum)
        follow(self.average, transformer_of(encoder), momentum)
        follow(self.average_projector, self.projector, momentum)

    def extra_repr(self) -> str:
        """The settings: they name a run's checkpoints."""
        return repr(self.config)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Config(BaseConfig):
    """A-CLIP's objective; the defaults are the paper's, at half of the tokens. Needs a vision transformer with a class token."""

    method: Literal["a-clip"] = "a-clip"
    kept: float = Field(0.5, gt=0, le=1, description="share of the cells that the image tower sees, and one cell more; 1: all of them")
    cell: int = Field(2, ge=1, description="patches along each side of a cell, which is kept or left out as a whole")
    select: Literal["attentive", "random", "inattentive"] = Field(
        "attentive", description="which cells stay: the most attended ones, any, or the least attended ones; the latter two for comparison"
    )
    momentum: float = Field(0.996, ge=0, le=1, description="of the running averages at the start; it rises to 1 by a cosine")
    simclr: float = Field(1.0, ge=0, description="weight of the loss between the two views")
    simclr_temperature: float = Field(0.1, gt=0, description="temperature of that loss")
    byol: float = Field(2.0, ge=0, description="weight of the loss towards the running average")
    hidden: int = Field(4096, ge=1, description="width of the hidden layers of the heads")
    width: int = Field(256, ge=1, description="width of what the heads give")

    def build(self) -> AClip:
        """The objective."""
        return AClip(self)
