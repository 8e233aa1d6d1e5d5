"""Pictures and captions that grow while a run trains: cheap small ones first, those of the model for the rest.

Li et al., "An Inverse Scaling Law for CLIP Training" (NeurIPS 2023): most of a training can do with fewer tokens of either side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from pydantic import Field

from diptych.core.config import Config


class Stage(Protocol):
    """A share of the run."""

    @property
    def share(self) -> float:
        """Of all steps."""
        ...


class ImageStage(Config):
    """Pictures of one size for a share of the run."""

    size: int = Field(ge=1, le=4096, description="side in pixels; a multiple of the tower's patch")
    share: float = Field(gt=0, le=1, description="share of the run's steps")


class TextStage(Config):
    """Captions of at most one length for a share of the run."""

    tokens: int = Field(ge=3, le=4096, description="tokens of a caption at most, start and end among them")
    share: float = Field(gt=0, le=1, description="share of the run's steps")


def stage(stages: Sequence[Stage], step: int, total: int) -> int | None:
    """The number of the stage that a step belongs to; None after the last. Stages end at whole steps, each at the rounded sum of shares."""
    reached = 0.0
    for number, each in enumerate(stages):
        reached += each.share
        if step < round(reached * total):
            return number
    return None


def check(name: str, stages: Sequence[Stage]) -> None:
    """Raises ValueError for more stages than there is run."""
    together = sum(each.share for each in stages)
    if together > 1 + 1e-9:
        raise ValueError(f"the shares of {name} come to {together:g}, which is more than the whole run")
