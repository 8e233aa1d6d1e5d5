"""Logit scales that an objective fixes instead of learning them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn


@torch.no_grad()
def fix_logit_scale(model: nn.Module, scale: float) -> None:
    """Sets a dual encoder's logit scale for good, so that the saved model has the temperature it was trained with.

    For an objective's `start`: the parameter no longer requires a gradient, and the optimizer does not get it.
    """
    encoder: Any = model
    encoder.logit_scale.fill_(math.log(scale))
    encoder.logit_scale.requires_grad_(False)
