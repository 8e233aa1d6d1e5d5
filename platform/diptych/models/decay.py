"""Which parameters decay: the rule of CLIP's reference trainer, in one place for whoever makes parameter groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

NO_DECAY_NAMES = ("bn", "ln", "bias", "logit_scale")


def decays(name: str, parameter: Tensor, others: Sequence[str] = ()) -> bool:
    """Whether weight decay applies to a parameter, by its full dotted name.

    Gains, biases and the temperature do not decay: nothing with fewer than two dimensions, and nothing whose name contains one
    of `NO_DECAY_NAMES` anywhere (open_clip's rule; Radford et al. 2021, section 2.5), nor one of `others`. Matrices such as
    token and position embeddings and the projections do.

    >>> import torch
    >>> decays("visual.proj", torch.empty(4, 3)), decays("visual.ln_pre.weight", torch.empty(4)), decays("class_embedding", torch.empty(4))
    (True, False, False)
    """
    return parameter.ndim >= 2 and not any(part in name for part in (*NO_DECAY_NAMES, *others))
