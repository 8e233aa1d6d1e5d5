"""LaCLIP: the objective on one and on two ranks, the learning-rate table, the choice of captions, the prompt and its parsing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from _ranks import run_ranks

from diptych.caption.rewriters.prompts import build_prompt, parse_official
from diptych.pairs.captions import choose_caption
from diptych.train.schedule import laclip_schedule

WORLD_SIZES = (1, 2)
INPUTS = (
    "loss_image",
    "loss_text",
    "loss_logit_scale_param",
    "sched_*_args",
    "cap_original",
    "cap_rewrites",
    "prompt_pairs",
    "prompt_source",
    "completion",
)
TOLERANCE = {"loss_*_acc": (1e-6, 0.0), "loss_*": (1e-9, 1e-12), "sched_*": (0.0, 1e-12)}


def replay(vectors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return _losses(vectors) | _schedules(vectors) | _captions(vectors) | _prompts(vectors)


def _losses(vectors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    image_ND, text_ND, scale = (vectors[f"loss_{name}"] for name in ("image", "text", "logit_scale_param"))
    outputs = {}
    for world_size in WORLD_SIZES:
        ranks = run_ranks(world_size, loss_on_rank, image_ND, text_ND, float(scale))
        for name in ("loss", "acc", "gs"):
            outputs[f"loss_ws{world_size}_{name}"] = np.asarray([rank[name] for rank in ranks])
        for name in ("gi", "gt"):
            outputs[f"loss_ws{world_size}_{name}"] = np.concatenate([rank[name] for rank in ranks])
    return outputs


def loss_on_rank(rank: int, world_size: int, image_ND: np.ndarray, text_ND: np.ndarray, scale: float) -> dict[str, Any]:
    """This rank's loss and gradients on its contiguous share of the batch; un-normalised float64 features."""
    import torch
    from torch.nn.functional import normalize

    from diptych.core.points import Encoded
    from diptych.objectives.clip import Config

    image, text = (torch.tensor(np.split(side, world_size)[rank], requires_grad=True) for side in (image_ND, text_ND))
    parameter = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    parts = Config(local_loss=True, gather_with_grad=True).build()(
        Encoded(normalize(image, dim=1), normalize(text, dim=1), parameter.exp())
    )
    gi, gt, gs = torch.autograd.grad(parts["loss"], (image, text, parameter))
    return {
        "loss": parts["loss"].item(),
        "acc": 100 * parts["accuracy"].double().item(),
        "gi": gi.numpy(),
        "gt": gt.numpy(),
        "gs": gs.item(),
    }


def _schedules(vectors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    outputs = {}
    for key in vectors:
        if key.startswith("sched_"):
            base, final, epochs, iters_per_epoch, warmup_epochs, start = vectors[key].tolist()
            outputs[key.removesuffix("_args")] = laclip_schedule(base, final, int(epochs), int(iters_per_epoch), warmup_epochs, start)
    return outputs


def _captions(vectors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    rows = np.concatenate([vectors["cap_original"][None], vectors["cap_rewrites"]]).T.tolist()
    return {"cap_chosen_text": np.asarray([[choose_caption(row, choice) for choice in range(len(row))] for row in rows])}


def _prompts(vectors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    prompts = [
        build_prompt(pairs, source)
        for pairs, source in zip(vectors["prompt_pairs"].tolist(), vectors["prompt_source"].tolist(), strict=True)
    ]
    parsed = [parse_official(prompt, text) for prompt, text in zip(prompts, vectors["completion"].tolist(), strict=True)]
    return {"prompt_text": np.asarray(prompts), "parsed": np.asarray(parsed)}
