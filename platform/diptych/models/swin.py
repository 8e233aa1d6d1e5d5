"""A Swin transformer for pictures of 16 px: timm's own class at small size, under a name of timm's registry, so that open_clip builds it.

The hierarchical tower of DIMAP's experiment. A saved model with it opens in open_clip once this module is imported.
"""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.swin_transformer import SwinTransformer

NAME = "diptych_swin_nano_16"
default_cfgs = generate_default_cfgs(
    {
        f"{NAME}.untrained": {
            "num_classes": 1000, "input_size": (3, 16, 16), "pool_size": (2, 2), "fixed_input_size": True, "interpolation": "bicubic",
            "mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711),
            "first_conv": "patch_embed.proj", "classifier": "head.fc",
        }
    }
)  # fmt: skip


@register_model
def diptych_swin_nano_16(pretrained: bool = False, **options: Any) -> SwinTransformer:
    """Three stages of two blocks, widths 20, 40 and 80, patches of 2 px, windows of 4 x 4; 0.23 million parameters, none of them published."""
    sizes = {"img_size": 16, "patch_size": 2, "embed_dim": 20, "depths": (2, 2, 2), "num_heads": (2, 4, 8), "window_size": 4}
    model: SwinTransformer = build_model_with_cfg(SwinTransformer, NAME, pretrained, **{"drop_path_rate": 0.0, **sizes, **options})
    return model
