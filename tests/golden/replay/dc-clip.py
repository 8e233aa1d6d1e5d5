"""DC-CLIP: the losses of feature maps and of tokens with their gradients, and the second stage's loss on one process and on several."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from _ranks import run_ranks
from numpy.typing import NDArray
from torch import Tensor, nn

from diptych.objectives.clip import clip_loss
from diptych.objectives.dc_clip import map_loss, token_loss

Array = NDArray[np.generic]
INPUTS = ("*/in/*",)
TOLERANCE = {"*": (1e-9, 1e-12)}


def replay(vectors: Mapping[str, Array]) -> dict[str, Array]:
    found = {"image": image, "text": text, "align": align}
    return {f"{name}/out/{key}": value for name, of in found.items() for key, value in of(given(name, vectors)).items()}


def given(name: str, vectors: Mapping[str, Array]) -> dict[str, Tensor]:
    values = {
        key.removeprefix(f"{name}/in/"): torch.from_numpy(np.asarray(vectors[key])) for key in vectors if key.startswith(f"{name}/in/")
    }
    return {key: value.double() if value.is_floating_point() else value for key, value in values.items()}


def adapter_of(layer: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    layer.double().load_state_dict({"weight": values["adapter_weight"], "bias": values["adapter_bias"]})
    return layer


def image(values: Mapping[str, Tensor]) -> dict[str, Array]:
    adapter = adapter_of(nn.Conv2d(values["student"].shape[1], values["teacher"].shape[1], 1), values)
    student = values["student"].clone().requires_grad_()
    loss = map_loss(student, values["teacher"], adapter, float(values["beta"]))
    loss.backward()
    return {
        "adapted": adapter(student).detach().numpy(),
        "loss": loss.detach().numpy(),
        "grad_student": student.grad.numpy(),
        "grad_adapter_weight": adapter.weight.grad.numpy(),
        "grad_adapter_bias": adapter.bias.grad.numpy(),
    }


def text(values: Mapping[str, Tensor]) -> dict[str, Array]:
    adapter = adapter_of(nn.Linear(values["student"].shape[2], values["teacher"].shape[2]), values)
    student = values["student"].clone().requires_grad_()
    loss = token_loss(student, values["teacher"], adapter, 1.0)
    loss.backward()
    return {
        "loss": loss.detach().numpy(),
        "masked_loss": token_loss(student, values["teacher"], adapter, 1.0, values["token_mask"]).detach().numpy(),
        "grad_student": student.grad.numpy(),
        "grad_adapter_weight": adapter.weight.grad.numpy(),
    }


def measured(image_ND: Tensor, text_ND: Tensor, log_scale: Tensor) -> tuple[Array, ...]:
    inputs = [tensor.clone().requires_grad_() for tensor in (image_ND, text_ND, log_scale)]
    loss = clip_loss(inputs[0], inputs[1], inputs[2].exp())
    return tuple(value.detach().numpy() for value in (loss, *torch.autograd.grad(loss, inputs)))


def on_a_rank(rank: int, world: int, image_ND: Tensor, text_ND: Tensor, log_scale: Tensor) -> tuple[Array, ...]:
    return measured(image_ND.chunk(world)[rank], text_ND.chunk(world)[rank], log_scale)


def align(values: Mapping[str, Tensor]) -> dict[str, Array]:
    inputs = (values["image"], values["text"], values["log_scale"])
    loss, grad_image, grad_text, grad_scale = measured(*inputs)
    ranks = run_ranks(int(values["world_size"]), on_a_rank, *inputs)
    return {
        "loss": loss,
        "grad_image": grad_image,
        "grad_text": grad_text,
        "grad_log_scale": grad_scale,
        "rank_loss": np.stack([result[0] for result in ranks]),
        "rank_grad_image": np.concatenate([result[1] for result in ranks]),
        "rank_grad_text": np.concatenate([result[2] for result in ranks]),
    }
