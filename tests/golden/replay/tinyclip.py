"""TinyCLIP: affinity mimicking on one process and on several, slices of a teacher, masks and their sparsity, and a block under masks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from _ranks import run_ranks
from numpy.typing import NDArray

from diptych.compress.hard_concrete import Lagrangian, Masks, Sizes, TowerMasks, mask_optimizer, score, sparsity, target
from diptych.compress.masked import Form, fuse_block, masked
from diptych.models.inherit import depth_map, inherited
from diptych.objectives.teacher import Taught
from diptych.objectives.tinyclip import terms

Array = NDArray[np.generic]

INPUTS: tuple[str, ...] = ("*/in/*",)
TOLERANCE: dict[str, tuple[float, float]] = {
    "inherit/*": (0.0, 0.0),
    "depth/*": (0.0, 0.0),
    "l0/out/ascent_trace": (1e-8, 1e-12),
    "block/out/kept_dims": (0.0, 0.0),
    "block/*": (1e-5, 1e-5),
    "*": (1e-9, 1e-12),
}
UPDATES = 4
SIDES = ("image", "text", "log_scale")


def replay(vectors: Mapping[str, Array]) -> dict[str, Array]:
    """Every output of the file, from its inputs."""
    outputs: dict[str, Array] = {}
    for part, make in {
        "affinity": affinity,
        "inherit": inheritance,
        "depth": depths,
        "l0": learnt_masks,
        "block": block_under_masks,
    }.items():
        start = f"{part}/in/"
        given = {key.removeprefix(start): np.asarray(vectors[key]) for key in vectors if key.startswith(start)}
        outputs |= {f"{part}/out/{key}": value for key, value in make(given).items()}
    return outputs


def affinity(given: Mapping[str, Any]) -> dict[str, Array]:
    found: dict[str, Array] = {}
    for case, alpha in {"pure": 1.0, "mixed": float(given["alpha_mixed"])}.items():
        own = step(given, alpha, with_grad=True)
        hard = own.pop("hard")
        found |= {f"{case}_{key}": value for key, value in own.items()} | ({"mixed_hard": hard} if case == "mixed" else {})
        for with_grad in (True, False):
            ranks = run_ranks(int(given["world_size"]), on_a_rank, dict(given), alpha, with_grad)
            start = f"{case}_gathergrad{int(with_grad)}_rank_"
            found |= {start + key: np.stack([rank[key] for rank in ranks]) for key in ("loss", "grad_log_scale")}
            found |= {start + key: np.concatenate([rank[key] for rank in ranks]) for key in ("grad_image", "grad_text")}
    return found


def on_a_rank(rank: int, world: int, given: Mapping[str, Any], alpha: float, with_grad: bool) -> dict[str, Array]:
    own = {key: np.split(value, world)[rank] if value.ndim else value for key, value in given.items()}
    return step(own, alpha, with_grad)


def step(given: Mapping[str, Any], alpha: float, with_grad: bool) -> dict[str, Array]:
    """Loss, terms and raw gradients of this process."""
    tensors = {key: torch.tensor(value, dtype=torch.float64) for key, value in given.items()}
    inputs = [tensors[side].requires_grad_() for side in SIDES]
    taught = Taught(tensors["teacher_image"], tensors["teacher_text"])
    found = terms(inputs[0], inputs[1], inputs[2].exp(), taught, tensors["teacher_log_scale"].exp(), with_grad)
    loss = found.weighed(alpha)
    grads = dict(zip((f"grad_{side}" for side in SIDES), torch.autograd.grad(loss, inputs), strict=True))
    values = {"loss": loss, "i2t": found.by_image, "t2i": found.by_text, "hard": found.hard, **grads}
    return {key: value.detach().numpy() for key, value in values.items()}


def inheritance(given: Mapping[str, Any]) -> dict[str, Array]:
    teacher = {key.removeprefix("teacher/"): torch.tensor(value) for key, value in given.items() if key.startswith("teacher/")}
    layers, width = int(given["student_layers"]), int(given["student_width"])
    full = teacher["resblocks.0.ln_1.weight"].numel()
    first = {name: value for name, value in teacher.items() if int(name.split(".")[1]) < layers}
    shapes = {name: [size * width // full for size in value.shape] for name, value in first.items()}
    student = inherited(teacher, shapes, {"resblocks.": int(given["head_dim"])})
    chosen = np.asarray(depth_map(int(given["teacher_layers"]), layers))
    return {"depth_map": chosen, **{f"student/{name}": value.numpy() for name, value in student.items()}}


def depths(given: Mapping[str, Any]) -> dict[str, Array]:
    maps = [depth_map(int(teacher), int(student)) for teacher, student in given["teacher_student"]]
    longest = max(map(len, maps))
    return {"index": np.asarray([chosen + [-1] * (longest - len(chosen)) for chosen in maps])}


def learnt_masks(given: Mapping[str, Any]) -> dict[str, Array]:
    masks = masks_of(given)
    sampled, settled = masks.sampled(uniform_of(given)), masks.settled()
    found = {
        "score_heads": torch.stack([score(each) for each in masks.heads]),
        "expected_params": masks.expected(),
        "prunable_params": torch.tensor(float(masks.sizes.total), dtype=torch.float64),
        "z_train_hidden": sampled.hidden,
        "z_train_heads": torch.stack(list(sampled.heads)),
        "z_train_intermediate": torch.stack(list(sampled.neurons)),
        "z_eval_hidden": settled.hidden,
        "z_eval_heads": torch.stack(list(settled.heads)),
        "z_eval_intermediate": torch.stack(list(settled.neurons)),
    }
    rows = [penalty(given, masks, int(step)) for step in given["step"]]
    found |= {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    return {key: value.detach().numpy() for key, value in (found | ascent(given)).items()}


def masks_of(given: Mapping[str, Any]) -> TowerMasks:
    hidden, layers, heads = (int(given[key]) for key in ("hidden_size", "layers", "heads"))
    masks = TowerMasks(Sizes(hidden, (heads,) * layers, hidden // heads, (int(given["intermediate_size"]),) * layers)).double()
    rows = [given["loga_hidden"], *given["loga_heads"], *given["loga_intermediate"]]
    for parameter, row in zip((masks.hidden, *masks.heads, *masks.neurons), rows, strict=True):
        parameter.data = torch.tensor(row)
    return masks


def uniform_of(given: Mapping[str, Any]) -> dict[str, list[torch.Tensor]]:
    names = {"heads": "u_heads", "neurons": "u_intermediate"}
    return {"hidden": [torch.tensor(given["u_hidden"])], **{name: list(torch.tensor(given[key])) for name, key in names.items()}}


def lagrangian_of(given: Mapping[str, Any]) -> Lagrangian:
    lagrangian = Lagrangian().double()
    lagrangian.linear.data, lagrangian.square.data = (torch.tensor(float(given[key])).double() for key in ("lambda_1", "lambda_2"))
    return lagrangian


def wanted(given: Mapping[str, Any], step: int) -> float:
    return target(step, float(given["start_sparsity"]), float(given["target_sparsity"]), int(given["warmup"]))


def penalty(given: Mapping[str, Any], masks: TowerMasks, step: int) -> dict[str, torch.Tensor]:
    lagrangian, found = lagrangian_of(given), sparsity([masks])
    loss = lagrangian(wanted(given, step), found)
    layers = len(masks.heads)
    grads = torch.autograd.grad(loss, [*lagrangian.parameters(), *masks.parameters()])
    named = dict(zip(("grad_lambda_1", "grad_lambda_2", "grad_hidden"), grads, strict=False))
    named |= {"grad_heads": torch.stack(grads[3 : 3 + layers]), "grad_intermediate": torch.stack(grads[3 + layers :])}
    asked = torch.tensor(wanted(given, step), dtype=torch.float64)
    return {"expected_sparsity": found, "target_sparsity": asked, "loss": loss, **named}


def ascent(given: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Four updates at the full target: loss and sparsity before each, multipliers after it."""
    masks, lagrangian = masks_of(given), lagrangian_of(given)
    optimizer = mask_optimizer([masks], lagrangian, float(given["loga_lr"]), abs(float(given["lambda_lr"])))
    rows = []
    for _ in range(UPDATES):
        optimizer.zero_grad()
        found = sparsity([masks])
        loss = lagrangian(wanted(given, int(given["warmup"])), found)
        loss.backward()
        lagrangian.ascend()
        optimizer.step()
        masks.clamp()
        rows.append(torch.stack([loss, found, lagrangian.linear, lagrangian.square]).detach())
    return {"ascent_trace": torch.stack(rows), "loga_heads_after": torch.stack(list(masks.heads))}


def block_under_masks(given: Mapping[str, Any]) -> dict[str, Array]:
    """In double precision, batch first."""
    from open_clip.transformer import ResidualAttentionBlock

    state = {key.removeprefix("sd/"): torch.tensor(value).double() for key, value in given.items() if key.startswith("sd/")}
    hidden, heads, neurons = (torch.tensor(given[f"{key}_z"]).double() for key in ("hidden", "heads", "intermediate"))
    block = ResidualAttentionBlock(len(hidden), int(given["heads"]), len(neurons) / len(hidden)).double().eval()
    block.load_state_dict(state)
    x_NLD = torch.tensor(given["x"]).double().transpose(0, 1)
    causal_LL = torch.full((x_NLD.shape[1],) * 2, float("-inf")).triu(1).double()
    found = {"unmasked": block(x_NLD)}
    with masked(Form.of_blocks([block]), lambda: Masks(hidden, [heads], [neurons])):
        found |= {"masked": block(x_NLD), "masked_causal": block(x_NLD, attn_mask=causal_LL)}
    kept = hidden.nonzero()[:, 0]
    fuse_block(block, hidden, heads, neurons)
    found["pruned"] = block(x_NLD[..., kept])
    return {"kept_dims": kept.numpy(), **{key: value.transpose(0, 1).detach().numpy() for key, value in found.items()}}
