"""Models and calibration pairs of the compressors' tests."""

from __future__ import annotations

import torch
from torch import Tensor

from diptych.models import clip

TIMM = {
    "embed_dim": 32,
    "vision_cfg": {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": 160},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    "custom_text": True,
}
TEXTS = ("a", "two words and more of them", "three words here", "the number seven", "a zero", "nothing at all", "one", "it is a nine")


def timm_model() -> clip.DualEncoder:
    torch.manual_seed(0)
    return clip.build(TIMM).eval()


def batch_of(model: clip.DualEncoder, texts: tuple[str, ...] = TEXTS[:3], seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    size = model.image_size
    image_NCHW = torch.randint(0, 256, (len(texts), 3, size, size), generator=generator, dtype=torch.uint8)
    return {"image_NCHW": image_NCHW, "text_NL": torch.from_numpy(model.tokenizer.encode_cut(list(texts)))}


def batches_of(model: clip.DualEncoder, count: int = 3) -> list[dict[str, Tensor]]:
    return [batch_of(model, TEXTS, seed) for seed in range(count)]
