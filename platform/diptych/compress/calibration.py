"""What compressors that look at data have in common: how much of it, which towers, how sparse; and the statistics of one block's inputs.

Shape legend: N samples (pictures or captions), L tokens, T tokens that count, I inputs of a matrix.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from diptych.compress.blocks import Batch, Inputs, collect
from diptych.compress.magnitude import PATTERN
from diptych.core.config import Config as BaseConfig
from diptych.core.errors import DataError


class Calibrated(BaseConfig):
    """A compressor that looks at training pairs."""

    calibration_pairs: int = Field(256, ge=1, description="training pairs it looks at, the first by key hash")
    calibration_batch: int = Field(32, ge=2, description="pairs a batch: what a contrastive loss compares with each other")
    towers: Literal["both", "image", "text"] = Field("both", description="which towers are compressed")


class OneShot(Calibrated):
    """A pruner of the matrices inside the blocks; embeddings, projections and norms stay as they are."""

    sparsity: float = Field(0.5, ge=0, lt=1, description="share of the weights that become zero; with an n:m pattern it is 1 - n/m")
    pattern: str = Field("unstructured", description="`unstructured`, or n:m such as 2:4: n of every m weights along a row stay")

    @field_validator("pattern")
    @classmethod
    def _known(cls, pattern: str) -> str:
        found = PATTERN.match(pattern)
        if pattern != "unstructured" and not (found and 0 < int(found[1]) < int(found[2])):
            raise ValueError("`unstructured`, or n:m with 0 < n < m, e.g. 2:4")
        return pattern


def required(calibration: Iterable[Batch], method: str) -> list[Batch]:
    """The batches, at least one. Raises DataError without any."""
    batches = list(calibration)
    if not batches:
        raise DataError.at("There are no calibration pairs", method, 0, "at least one batch of training pairs", "look at the data's splits")
    return batches


def input_norms(block: nn.Module, prefix: str, states: Iterable[Inputs]) -> dict[str, Tensor]:
    """For every matrix the norm of each input feature, float32 `[I]`: the root of the mean over samples of the sum of squares over tokens.

    Source: Wanda (Sun et al., ICLR 2024), section 3. Sums are float64.
    """
    sums: dict[str, Tensor] = {}
    samples = 0

    def add(name: str, inputs: Inputs, x_NLI: Tensor) -> None:
        square_I = inputs.tokens(x_NLI).square().sum(dim=0, dtype=torch.float64)
        sums[name] = sums[name] + square_I if name in sums else square_I

    states = list(states)
    collect(block, prefix, states, add)
    samples = sum(inputs.samples for inputs in states)
    return {name: (total / samples).sqrt().float() for name, total in sums.items()}


def input_moments(block: nn.Module, prefix: str, states: Iterable[Inputs]) -> dict[str, Tensor]:
    """For every matrix the mean over samples of twice the sum of x x^T over tokens, float32 `[I, I]`: the Hessian of its squared error.

    Matrices with the same inputs get one each; the largest is as large as the block's widest matrix is wide, squared.
    Source: SparseGPT (Frantar and Alistarh, ICML 2023), section 3.
    """
    states = list(states)
    samples = sum(inputs.samples for inputs in states)
    moments: dict[str, Tensor] = {}

    def add(name: str, inputs: Inputs, x_NLI: Tensor) -> None:
        x_TI = inputs.tokens(x_NLI).float()
        if name not in moments:
            moments[name] = x_TI.new_zeros(x_TI.shape[1], x_TI.shape[1])
        moments[name].addmm_(x_TI.T, x_TI, alpha=2 / samples)

    collect(block, prefix, states, add)
    return moments
