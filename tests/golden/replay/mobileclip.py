"""MobileCLIP: the loss on one process and on several, fused blocks, and stored augmentations."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from _ranks import run_ranks
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import conv2d, gelu

from diptych.models import preprocess, reparameterize
from diptych.models.reparameterize import Kernel, Norm
from diptych.objectives.clip import clip_logits
from diptych.objectives.gather import gather
from diptych.objectives.mobileclip import Config, Terms, distillation, targets, terms, transposed
from diptych.pairs.augmentations import Augmentation, apply

Array = NDArray[np.generic]
Weights = tuple[float, float]
INPUTS = ("*/in/*",)
TOLERANCE = {"replay/*": (0.0, 0.02), "*": (1e-9, 1e-12)}
SIDES = ("image", "text", "syn_text")
TEACHERS = tuple(f"teacher_{side}" for side in SIDES)


def replay(vectors: Mapping[str, Array]) -> dict[str, Array]:
    outputs: dict[str, Array] = {}
    for group in sorted({key.split("/")[0] for key in vectors}):
        prefix = f"{group}/in/"
        given = {key.removeprefix(prefix): np.asarray(vectors[key]) for key in vectors if key.startswith(prefix)}
        found = dr(given) if "teacher_dims" in given else augmented(given) if "params_json" in given else fused(given)
        outputs |= {f"{group}/out/{key}": value for key, value in found.items()}
    return outputs


def dr(given: Mapping[str, Array]) -> dict[str, Array]:
    """The variants, then what the released code does otherwise, with the settings of the first variant that has both terms."""
    world, outputs = int(given["world_size"]), dict[str, Array]()
    variants = {name.removesuffix("_weights"): name for name in given if name.endswith("_weights")}
    for variant, key in variants.items():
        weights, scales = tuple(map(float, given[key])), tuple(map(float, given[f"{variant}_teacher_scale"]))
        single = measured(given, weights, scales)
        ranks = run_ranks(world, on_a_rank, given, weights, scales)
        single |= {f"rank_{name}": np.stack([rank[name] for rank in ranks]) for name in ("loss", "grad_log_scale")}
        single |= {f"rank_grad_{side}": np.concatenate([rank[f"grad_{side}"] for rank in ranks]) for side in SIDES}
        outputs |= {f"{variant}_{name}": value for name, value in single.items()}
    weights, scales = tuple(map(float, given["base_weights"])), tuple(map(float, given["base_teacher_scale"]))
    outputs["trap_transposed_rank_loss"] = np.array(run_ranks(world, on_a_rank_transposed, given, weights, scales))
    joined = {**given, "teacher_dims": np.array([given["teacher_dims"].sum()])}
    whole = measured(joined, (1.0, 1.0), scales[:1])
    return outputs | {f"concat_logits_{name}": whole[name] for name in ("loss", "distill")}


def shard(given: Mapping[str, Array], rank: int, world: int) -> dict[str, Array]:
    return {**given, **{key: np.split(given[key], world)[rank] for key in (*SIDES, *TEACHERS)}}


def sliced(given: Mapping[str, Array]) -> list[Tensor]:
    """The teachers' features `[n, K, D]`, zero-padded."""
    dims = given["teacher_dims"].tolist()
    parts = [torch.tensor(given[key]).double().split(dims, dim=1) for key in TEACHERS]
    return [torch.stack([torch.nn.functional.pad(part, (0, max(dims) - part.shape[1])) for part in each], dim=1) for each in parts]


def measured(given: Mapping[str, Array], weights: Weights, scales: Sequence[float]) -> dict[str, Array]:
    inputs = {side: torch.tensor(given[side]).double().requires_grad_() for side in SIDES}
    inputs["log_scale"] = torch.tensor(given["log_scale"]).double().requires_grad_()
    image, *texts = (inputs[side] for side in SIDES)
    image_nKD, *teachers = sliced(given)
    found = [
        terms(image, text, inputs["log_scale"].exp(), image_nKD, teacher, torch.tensor(scales).double())
        for text, teacher in zip(texts, teachers, strict=True)
    ]
    total = Terms(*(sum(parts) for parts in zip(*found, strict=True)))
    config = Config(contrastive=weights[0], distillation=weights[1])
    parts = {"contrastive": config.contrastive * total.contrastive, "distill": config.distillation * total.distillation}
    loss = parts["contrastive"] + parts["distill"]
    grads = torch.autograd.grad(loss, list(inputs.values()))
    tensors = {"loss": loss, **parts} | {f"grad_{name}": grad for name, grad in zip(inputs, grads, strict=True)}
    return {name: tensor.detach().numpy() for name, tensor in tensors.items()}


def on_a_rank(rank: int, world: int, given: Mapping[str, Array], weights: Weights, scales: Sequence[float]) -> dict[str, Array]:
    return measured(shard(given, rank, world), weights, scales)


def on_a_rank_transposed(rank: int, world: int, given: Mapping[str, Array], weights: Weights, scales: Sequence[float]) -> float:
    own = shard(given, rank, world)
    image, *texts = (torch.tensor(own[side]).double() for side in SIDES)
    scale = torch.tensor(own["log_scale"]).double().exp()
    image_NKD, *teachers = (gather(teacher, with_grad=False) for teacher in sliced(own))
    loss = torch.zeros(())
    for text, text_NKD in zip(texts, teachers, strict=True):
        student = clip_logits(image, text, scale, local_loss=False, gather_with_grad=True)
        found = targets(image_NKD, text_NKD, image_NKD, text_NKD, torch.tensor(scales).double())
        plain = terms(image, text, scale, *(each.chunk(world)[rank] for each in (image_NKD, text_NKD)), torch.tensor(scales).double())
        contrastive = gather(plain.contrastive.reshape(1, 1), with_grad=False).mean()
        loss = loss + weights[0] * contrastive + weights[1] * distillation(student, transposed(found))
    return float(loss)


def norm_of(state: Mapping[str, Tensor], name: str) -> Norm:
    return Norm(*(state[f"{name}.{leaf}"] for leaf in ("weight", "bias", "running_mean", "running_var")))


def mobile_one(state: Mapping[str, Tensor], prefix: str, like_OIhw: Tensor) -> Kernel:
    """A block of a state of the official layout; `like_OIhw` has the shape of its fused kernel."""
    convs = sorted({name.removesuffix(".conv.weight") for name in state if name.startswith(prefix) and name.endswith(".conv.weight")})
    branches = [reparameterize.normed(state[f"{conv}.conv.weight"], norm_of(state, f"{conv}.bn")) for conv in convs]
    if f"{prefix}rbr_skip.weight" in state:
        branches.append(reparameterize.normed(reparameterize.identity(like_OIhw), norm_of(state, f"{prefix}rbr_skip")))
    height, width = like_OIhw.shape[2:]
    return reparameterize.added(branches, (height, width))


def fused(given: Mapping[str, Array]) -> dict[str, Array]:
    state = {name.removeprefix("sd/"): torch.tensor(value).double() for name, value in given.items() if name.startswith("sd/")}
    x = torch.tensor(given["x"]).double()
    mixes = "layer_scale" in state
    prefix = "mixer." if mixes else ""
    like = state[f"{prefix}rbr_conv.0.conv.weight"]
    kernel = mobile_one(state, prefix, like)
    if mixes:
        kernel = reparameterize.mixed(state["layer_scale"], kernel, mobile_one(state, "norm.", like))
    stride, groups = int(given.get("stride", np.array(1))), x.shape[1] // like.shape[1]
    y = conv2d(x, *kernel, stride=stride, padding=(like.shape[2] // 2, like.shape[3] // 2), groups=groups)
    y = y if mixes else gelu(y)
    return {"y": y.numpy(), "fused_weight": kernel.weight.numpy(), "fused_bias": kernel.bias.numpy()}


def augmented(given: Mapping[str, Array]) -> dict[str, Array]:
    size, tensors = int(given["size"]), []
    for text in given["params_json"].tolist():
        (top, left, height, width), operations = json.loads(text)
        stored = Augmentation((left, top, width, height), tuple((int(op), float(magnitude)) for op, magnitude in operations))
        picture_HWC = apply(np.asarray(given["image"]), stored, size, drawn_at=size)
        tensors.append(torch.tensor(picture_HWC).permute(2, 0, 1))
    statistics = (torch.tensor(values) for values in (preprocess.MEAN, preprocess.STD))
    return {"tensor": preprocess.normalize(torch.stack(tensors), *statistics).numpy()}
