"""What a tower knows before it pools: the image tower's last feature map, the text tower's tokens; each beside the tower's feature, in one pass.

Shape legend: N pairs, C h w a feature map, L tokens, D feature width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diptych.core.errors import DataError
from diptych.models import preprocess
from diptych.models.clip import DualEncoder, end_of, ignores_padding, pad_id


def image_map(model: DualEncoder, image_NCHW: Tensor) -> tuple[Tensor, Tensor]:
    """The last feature map `[N, C, h, w]` (no class token in it) and the features `[N, D]`, neither of them normalised.

    Pictures as `DualEncoder.encode_image` takes them. Raises DataError for a tower without such a map.
    """
    tower: Any = model.clip.visual
    if not hasattr(tower, "forward_intermediates"):
        raise DataError.at("The image tower gives no feature map", "model", type(tower).__name__, "a tower of open_clip or timm")
    if image_NCHW.dtype == torch.uint8:
        image_NCHW = preprocess.normalize(image_NCHW, model.mean, model.std)
    found = tower.forward_intermediates(image_NCHW, indices=1)
    map_NChw: Tensor = found["image_intermediates"][-1]
    return map_NChw, found["image_features"]


def text_tokens(model: DualEncoder, text_NL: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The last block's tokens `[N, L, C]`, the features `[N, D]`, neither of them normalised, and which tokens are real, bool `[N, L]`.

    Captions as `DualEncoder.encode_text` takes them; padding behind a caption's end is not real.
    """
    tower: Any = getattr(model.clip, "text", model.clip)
    seen: list[Tensor] = []

    def look(_: Any, __: Any, output: Any) -> None:
        seen.append(getattr(output, "last_hidden_state", output))

    handle = tower.transformer.register_forward_hook(look)
    try:
        feature_ND = model.encode_text(text_NL, normalize=False)
    finally:
        handle.remove()
    (token_NLC,) = seen
    length = text_NL.shape[1]
    return token_NLC[:, :length], feature_ND, real_tokens(tower, text_NL)


def real_tokens(tower: Any, text_NL: Tensor) -> Tensor:
    """The tokens up to a caption's end, bool `[N, L]`; for towers that mask their padding, all that are none."""
    if not ignores_padding(tower):
        return text_NL != pad_id(tower)
    return torch.arange(text_NL.shape[1], device=text_NL.device) <= end_of(tower, text_NL)[:, None]
