"""VR-LwF: its loss in one session and in several, on one process and on two; random sentences; forgetting; the variant zscl."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from _ranks import run_ranks
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from diptych.evaluate.forgetting import accuracy, backward_transfer, phase_matrix
from diptych.objectives.vr_lwf import FIRST_EXCLUDED, Features, losses, pseudo_sentences, total, zscl_losses

Array = NDArray[np.generic]
Inputs = Mapping[str, Array]

INPUTS: tuple[str, ...] = ("*/in/*",)

TOLERANCE: dict[str, tuple[float, float]] = {"pseudo/*": (0, 0), "*": (1e-9, 1e-12)}

SIDES = ("image", "class_text", "pseudo_text")
RANKS = 2


def replay(vectors: Mapping[str, Array]) -> dict[str, Array]:
    """Every output of the file, from its inputs."""
    outputs = {**vr(vectors), **pseudo(vectors), **metric(vectors), **zscl(vectors)}
    return {key: value.detach().numpy() if isinstance(value, Tensor) else np.asarray(value) for key, value in outputs.items()}


def features(vectors: Inputs, prefix: str = "") -> list[Tensor]:
    return [torch.tensor(np.asarray(vectors[f"vr/in/{prefix}{side}"])).double() for side in SIDES]


def vr(vectors: Inputs) -> dict[str, Any]:
    names = [key.removeprefix("vr/in/").removesuffix("_label") for key in vectors if key.startswith("vr/in/") and key.endswith("_label")]
    given = {key: np.asarray(value) for key, value in vectors.items() if key.startswith("vr/in/")}
    ranks = run_ranks(RANKS, on_a_rank, names, given)
    outputs: dict[str, Any] = {}
    for index, name in enumerate(names):
        found = case(name, given, slice(None))
        found["rank_loss"] = np.stack([rank[index] for rank in ranks])
        outputs |= {f"vr/out/{name}_{key}": value for key, value in found.items()}
    return outputs


def on_a_rank(rank: int, world: int, names: list[str], given: Inputs) -> list[float]:
    share = len(given["vr/in/image"]) // world
    return [float(case(name, given, slice(rank * share, (rank + 1) * share))["loss"].detach()) for name in names]


def case(name: str, vectors: Inputs, rows: slice) -> dict[str, Any]:
    """Loss, parts and gradients of some pictures. From the second session on, classes so far are kept, and the present ones answer."""
    label, phase = torch.tensor(np.asarray(vectors[f"vr/in/{name}_label"])), int(vectors[f"vr/in/{name}_phase"])
    image, class_text, pseudo_text = (feature.requires_grad_() for feature in features(vectors))
    log_scale = torch.tensor(float(vectors["vr/in/log_scale"]), dtype=torch.float64, requires_grad=True)
    teacher_scale = torch.tensor(float(vectors["vr/in/teacher_log_scale"]), dtype=torch.float64).exp()
    each = len(class_text) // int(vectors["vr/in/phases"])
    earlier, known = (0, len(class_text)) if name == "ost" else (phase * each, (phase + 1) * each)
    student = Features(*(normalize(side, dim=-1) for side in (image[rows], class_text[:known], pseudo_text)))
    was = features(vectors, "teacher_")
    teacher = Features(*(normalize(side, dim=-1) for side in (was[0][rows], was[1][:known], was[2])))
    replayed: Any = ("vocabulary", "classes") if earlier else ("vocabulary",)
    parts = losses(student, teacher, (log_scale.exp(), teacher_scale), label[rows], replayed, earlier)
    loss = total(parts, float(vectors["vr/in/alpha"]))
    grads = torch.autograd.grad(loss, [image, class_text, pseudo_text, log_scale])
    return {
        "loss": loss,
        "ce": parts["supervised"],
        "vr": parts["vocabulary"],
        "lwf": parts.get("classes", torch.zeros((), dtype=torch.float64)),
        **dict(zip(("grad_image", "grad_class_text", "grad_pseudo_text", "grad_log_scale"), grads, strict=True)),
    }


def pseudo(vectors: Inputs) -> dict[str, Any]:
    draw, context = np.asarray(vectors["pseudo/in/draw"]), int(vectors["pseudo/in/context"])
    cut = pseudo_sentences(
        draw[:, : int(vectors["pseudo/in/length"])].astype(np.int64), int(vectors["pseudo/in/sot"]), int(vectors["pseudo/in/eot"])
    )
    tokens = np.pad(cut, ((0, 0), (0, context - cut.shape[1])))
    return {"pseudo/out/tokens": tokens, "pseudo/out/first_excluded_id": FIRST_EXCLUDED}


def metric(vectors: Inputs) -> dict[str, Any]:
    matrix = phase_matrix(np.asarray(vectors["metric/in/class_accuracy"]), int(vectors["metric/in/phases"]))
    return {"metric/out/phase_matrix": matrix, "metric/out/acc": accuracy(matrix), "metric/out/bwt": backward_transfer(matrix)}


def zscl(vectors: Inputs) -> dict[str, Any]:
    image, class_text, pseudo_text = features(vectors)
    image.requires_grad_()
    student = Features(*(normalize(side, dim=-1) for side in (image, class_text, pseudo_text)))
    teacher = Features(*(normalize(side, dim=-1) for side in features(vectors, "teacher_")))
    scale = torch.tensor(float(vectors["vr/in/teacher_log_scale"]), dtype=torch.float64).exp()
    settings = float(vectors["zscl/in/temperature"]), float(vectors["zscl/in/label_smoothing"])
    parts = zscl_losses(student, teacher, scale, torch.tensor(np.asarray(vectors["zscl/in/label"])), *settings)
    loss = total(parts, 1.0)
    values = {"image_loss": parts["image"], "text_loss": parts["text"], "ce": parts["supervised"], "loss": loss}
    return {f"zscl/out/{key}": value for key, value in {**values, "grad_image": torch.autograd.grad(loss, image)[0]}.items()}
