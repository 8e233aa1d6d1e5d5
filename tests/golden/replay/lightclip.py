"""LightCLIP: soft targets, their ramp, matched tokens, masked words."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diptych.objectives.clip import clip_logits
from diptych.objectives.lightclip import assignment, exact, relaxed, soft_loss, soft_targets, softness, token_loss
from diptych.objectives.masked_words import masked_loss

Array = NDArray[np.generic]

INPUTS: tuple[str, ...] = ("*/in/*",)

TOLERANCE: dict[str, tuple[float, float]] = {"*": (1e-9, 1e-12)}


def replay(vectors: Mapping[str, Array]) -> dict[str, Array]:
    """Every output of the file, from its inputs."""
    given = {name: torch.tensor(np.asarray(vectors[name])) for name in vectors}
    given = {name: value.double() if value.is_floating_point() else value for name, value in given.items()}
    cases = {"soft": soft, "alpha": alpha, "token": token, "mlm": mlm}
    found = {f"{case}/out/{name}": value for case, run in cases.items() for name, value in run(given).items()}
    return {name: value.detach().numpy() for name, value in found.items()}


def soft(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    inputs = [given[f"soft/in/{name}"].requires_grad_() for name in ("image", "text", "log_scale")]
    share = float(given["soft/in/alpha"])
    logits = clip_logits(inputs[0], inputs[1], inputs[2].exp(), local_loss=True, gather_with_grad=True)
    loss = soft_loss(logits, share)
    grads = torch.autograd.grad(loss, inputs, retain_graph=True)
    targets = [soft_targets(side, logits.label_n, share) for side in (logits.image, logits.text)]
    names = ("grad_image", "grad_text", "grad_log_scale", "target_i2t", "target_t2i")
    return {**dict(zip(names, (*grads, *targets), strict=True)), "loss": loss, "uniform_loss": soft_loss(logits, share, "uniform")}


def alpha(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    total, most = int(given["alpha/in/total"]), float(given["alpha/in/alpha_max"])
    steps = given["alpha/in/step"].tolist()
    return {"alpha": torch.tensor([softness(step, total, most) for step in steps], dtype=torch.float64)}


def token(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    patch, word = (given[f"token/in/{name}"].requires_grad_() for name in ("patch", "word"))
    words, scale = given["token/in/word_mask"], given["token/in/log_scale"].exp()
    loss = token_loss(patch, word, words, scale)
    grads = torch.autograd.grad(loss, [patch, word])
    matched = [assignment(patch[i], word[i], words[i]) for i in range(len(patch))]
    return {
        "relaxed_similarity": relaxed(patch, word, words),
        "hungarian_similarity": exact(patch, word, words),
        "hungarian_assignment": torch.stack(matched),
        "relaxed_loss": loss,
        "grad_patch": grads[0],
        "grad_word": grads[1],
    }


def mlm(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    logits = given["mlm/in/logits"].requires_grad_()
    loss = masked_loss(logits, given["mlm/in/target"])
    return {"loss": loss, "grad": torch.autograd.grad(loss, logits)[0]}
