"""ShrinkMatch: the shrink loss, distribution alignment, the whole objective over successive batches, the STL-10 variant, learning rates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from diptych.objectives.shrinkmatch import Config, ShrinkMatch, shrink, shrink_losses
from diptych.train.schedule import fixmatch

Array = NDArray[np.generic]

INPUTS: tuple[str, ...] = (
    "*_prob", "*_aux_logits", "*_thresh", "da_in", "obj_logits_x", "obj_y", "obj_logits_strong", "obj_logits_aux", "stl_weak", "lr_total",
)  # fmt: skip

TOLERANCE: dict[str, tuple[float, float]] = {"*_removed_to": (0, 0), "*": (1e-8, 1e-12)}

BASE_LR, SEEN_STEPS = 0.03, 60


def replay(vectors: Mapping[str, Array]) -> dict[str, Array]:
    """Every output of the file, from its inputs."""
    outputs: dict[str, Any] = {"lr_curve": [fixmatch(step, BASE_LR, int(vectors["lr_total"])) for step in range(SEEN_STEPS)]}
    for name in [key.removesuffix("_prob") for key in vectors if key.endswith("_prob")]:
        outputs |= shrink_case(name, vectors)
    aligned = alignment(tensor(vectors, "da_in"))
    outputs["da_out"] = aligned
    outputs |= objective(aligned, vectors)
    for variant in (0, 1):
        outputs |= stl(variant, vectors)
    return {name: value.detach().numpy() if isinstance(value, Tensor) else np.asarray(value) for name, value in outputs.items()}


def tensor(vectors: Mapping[str, Array], name: str) -> Tensor:
    return torch.tensor(np.asarray(vectors[name]))


def built(classes: int, **settings: object) -> ShrinkMatch:
    made = Config(**settings).build()  # type: ignore[arg-type]
    made.allocate(classes)
    return made.double()


def everything(rows: Tensor) -> Tensor:
    return torch.ones(len(rows), dtype=torch.bool)


def shrink_case(name: str, vectors: Mapping[str, Array]) -> dict[str, Tensor]:
    prob_NC, threshold = tensor(vectors, f"{name}_prob"), float(vectors[f"{name}_thresh"])
    logits_NC = tensor(vectors, f"{name}_aux_logits").requires_grad_()
    reliability_N = prob_NC.amax(dim=1)
    shrunk = shrink(prob_NC, threshold, reliability_N < threshold)
    loss = shrink_losses(logits_NC, shrunk, reliability_N).sum()
    (grad_NC,) = torch.autograd.grad(loss, logits_NC)
    return {f"{name}_loss_sum": loss, f"{name}_grad": grad_NC, f"{name}_removed_to": shrunk.stop_N[shrunk.searched_N]}


def alignment(batch_TNC: Tensor) -> Tensor:
    made = built(batch_TNC.shape[2])
    return torch.stack([made.align(prob_NC, everything(prob_NC)) for prob_NC in batch_TNC])


def objective(aligned_TNC: Tensor, vectors: Mapping[str, Array]) -> dict[str, Tensor]:
    """The loss of successive batches; rho goes on. Gradients of the last."""
    made = built(aligned_TNC.shape[2], threshold=float(vectors["obj_thresh"]))
    rows = []
    for t, prob_NC in enumerate(aligned_TNC):
        x_NC, strong_NC, aux_NC = (tensor(vectors, f"obj_logits_{name}")[t].requires_grad_() for name in ("x", "strong", "aux"))
        supervised = cross_entropy(x_NC, tensor(vectors, "obj_y")[t])
        found = made.unlabelled(prob_NC, prob_NC, strong_NC, aux_NC, everything(prob_NC))
        parts = made.total(supervised, found)
        rows.append(torch.stack([parts["supervised"], parts["certain"], parts["shrink"], parts["rho"], parts["loss"].detach()]))
    parts["loss"].backward()
    grads = {"strong": strong_NC.grad, "aux": aux_NC.grad, "x": x_NC.grad}
    return {"obj_rows": torch.stack(rows), **{f"obj_grad_{name}": grad for name, grad in grads.items()}}


def stl(variant: int, vectors: Mapping[str, Array]) -> dict[str, Tensor]:
    """Hard targets; the search goes by the weak view before alignment, which is by a running average, or off."""
    weak_TNC, threshold = tensor(vectors, "stl_weak"), float(vectors["stl_thresh"])
    settings = {"alignment": "average" if variant else "none", "search": "raw", "hard": True, "threshold": threshold}
    made = built(weak_TNC.shape[2], **settings)
    outputs = {}
    for t, weak_NC in enumerate(weak_TNC):
        raw_NC = weak_NC.softmax(dim=1)
        strong_NC, aux_NC = tensor(vectors, "obj_logits_strong")[t], tensor(vectors, "obj_logits_aux")[t]
        prob_NC = made.align(raw_NC, everything(raw_NC))
        found = made.unlabelled(prob_NC, raw_NC, strong_NC, aux_NC, everything(raw_NC))
        searched_N, reliability_N = found.shrunk.searched_N, prob_NC.amax(dim=1)
        count = searched_N.sum().double() + 1e-5
        means = [value_N[searched_N].sum() / count for value_N in (found.shrunk.stop_N, reliability_N)]
        outputs[f"stl_{t}_da{variant}"] = torch.stack([found.certain, found.mask, found.shrink, *means])
        if variant:
            outputs[f"stl_{t}_pmodel"] = made.mean_C
    return outputs
