"""A small encoder of timm's FastViT, and norms as training leaves them."""

from __future__ import annotations

import torch
from torch import nn

from diptych.models import clip

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {
        "timm_model_name": "fastvit_t8",
        "timm_model_pretrained": False,
        "timm_pool": "avg",
        "timm_proj": None,
        "image_size": 64,
    },
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
}


def unsettled(model: nn.Module) -> nn.Module:
    """Norms with statistics, gains and offsets of their own, and layer scales that count."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith("gamma"):
                tensor.uniform_(0.1, 0.4, generator=generator)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.uniform_(-0.5, 0.5, generator=generator)
                module.running_mean.uniform_(-0.5, 0.5, generator=generator)  # type: ignore[union-attr]
                module.running_var.uniform_(0.5, 1.5, generator=generator)  # type: ignore[union-attr]
    return model


def encoder() -> clip.DualEncoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = clip.build(CONFIG)
    unsettled(model.clip.visual)
    return model.eval()
