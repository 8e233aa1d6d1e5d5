"""AST: the network's parameters, experts with clipping loss and gradient penalty, outer iterations, balance, representative picks.

The expert's initial weights are the first row of `nogp_traj`; the outer iterations start from our own expert's trajectory.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from diptych.models import convnet
from diptych.models.trajectories import ExpertConfig, gradient_penalty, record
from diptych.prune.matching_loss import balance_factor, chunks, match_steps, matched, perturbed
from diptych.prune.representatives import nearest_to_centres

RUNS = ("d1", "d2", "d3", "d4", "d5", "d6", "d7", "d8", "d9")
OPTIONS = tuple(f"{run}_{name}" for run in RUNS for name in ("images", "labels", "noise", "batch_index", "batch_len", "syn_lr", "opt_*"))
INPUTS = (
    "cfg",
    "expert_lr",
    "expert_momentum",
    "expert_weight_decay",
    "gp_lambda",
    "loss_coef",
    "real_*",
    "nogp_traj",
    "balance_args",
    *OPTIONS,
    "repre*_logits",
    "repre*_labels",
    "repre*_centers",
    "repre*_ipc",
)
TOLERANCE = {"*_names": (0.0, 0.0), "*_steps": (0.0, 0.0), "param_ndim": (0.0, 0.0), "param_shapes": (0.0, 0.0), "repre*": (0.0, 0.0)}
TOLERANCE |= {"*_grad_*": (1e-6, 1e-9), "*": (1e-6, 1e-11)}


def replay(vectors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    channels, classes, width, depth, size, _, batch, epochs = vectors["cfg"].tolist()
    net = convnet.create(convnet.NetShape(channels, classes, width, depth, size), seed=0).double()
    image_NCHW, label_N = torch.from_numpy(vectors["real_images"]).double(), torch.from_numpy(vectors["real_labels"])
    initial_P = torch.from_numpy(vectors["nogp_traj"][0])
    with torch.no_grad():
        outputs = _parameters(net) | {"init_logits": convnet.run(net, initial_P, image_NCHW).numpy()}
    outputs |= _experts(vectors, net, initial_P, image_NCHW, label_N, batch, epochs)
    trajectory_EP = torch.from_numpy(outputs["expert_traj"])
    for run in RUNS:
        if f"{run}_images" in vectors:
            outputs |= {f"{run}_{name}": value for name, value in _iteration(vectors, run, net, trajectory_EP).items()}
    outputs["balance_factor"] = np.asarray([balance_factor(start, most) for start, most in vectors["balance_args"].tolist()])
    for name in [key.removesuffix("_logits") for key in vectors if key.startswith("repre") and key.endswith("_logits")]:
        logits_NK, of_N, centres = (vectors[f"{name}_{part}"] for part in ("logits", "labels", "centers"))
        picks = [
            np.flatnonzero(of_N == label)[
                nearest_to_centres(logits_NK[of_N == label], centre, int(vectors[f"{name}_ipc"]) // len(centre), distinct=False)
            ]
            for label, centre in zip(np.unique(of_N), centres, strict=True)
        ]
        outputs[f"{name}_selected"] = np.concatenate(picks)
    return outputs


def _parameters(net: convnet.ConvNet) -> dict[str, np.ndarray]:
    shapes = {name: tuple(parameter.shape) for name, parameter in net.named_parameters()}
    return {
        "param_names": np.asarray(list(shapes)),
        "param_ndim": np.asarray([len(shape) for shape in shapes.values()]),
        "param_shapes": np.asarray([shape + (0,) * (4 - len(shape)) for shape in shapes.values()]),
    }


def _experts(
    vectors: Mapping[str, np.ndarray],
    net: convnet.ConvNet,
    initial_P: torch.Tensor,
    image_NCHW: torch.Tensor,
    label_N: torch.Tensor,
    batch: int,
    epochs: int,
) -> dict[str, np.ndarray]:
    rows = torch.arange(len(label_N)).split(batch)
    factors = vectors["loss_coef"].tolist()
    common = {name: float(vectors[f"expert_{name}"]) for name in ("lr", "momentum", "weight_decay")} | {"batch_size": batch, "decay": 1.0}
    penalised = ExpertConfig(**common, epochs=epochs, gradient_penalty=float(vectors["gp_lambda"]))
    _load(net, initial_P)
    penalty = gradient_penalty(net, image_NCHW[rows[0]]).item()
    smooth = record(net, image_NCHW, label_N, lambda _: rows, penalised, factors=factors)
    _load(net, initial_P)
    few = len(vectors["nogp_traj"]) - 1
    clipped = record(
        net, image_NCHW, label_N, lambda _: rows, ExpertConfig(**common, epochs=few, gradient_penalty=0.0), factors=factors[:few]
    )
    return {
        "expert_traj": smooth.flat_EP.numpy(),
        "expert_epoch_loss": smooth.loss_E.numpy(),
        "nogp_epoch_loss": clipped.loss_E.numpy(),
        "gp_value_init_batch0": np.asarray(penalty),
    }


def _load(net: convnet.ConvNet, flat_P: torch.Tensor) -> None:
    net.load_state_dict(convnet.named(net, flat_P))


def _iteration(vectors: Mapping[str, np.ndarray], run: str, net: convnet.ConvNet, trajectory_EP: torch.Tensor) -> dict[str, np.ndarray]:
    def option(name: str) -> float:
        return vectors[f"{run}_opt_{name}"].item()

    start, epochs, steps = (int(option(name)) for name in ("start_epoch", "expert_epochs", "syn_steps"))
    start_P = trajectory_EP[start]
    if option("weight_perturb"):
        start_P = perturbed(net, start_P, torch.from_numpy(vectors[f"{run}_noise"]))
    batches = _batches(vectors, run, int(option("batch_syn")))
    assert len(batches) == steps
    image_NCHW = torch.from_numpy(vectors[f"{run}_images"]).double().requires_grad_(True)
    lr = torch.from_numpy(np.asarray(vectors[f"{run}_syn_lr"], dtype=np.float64)).requires_grad_(True)
    middle = "equal" if option("agg") else "none"
    factor = balance_factor(start, int(option("max_start_epoch"))) if option("balance_loss") else 1.0
    found = matched(
        net, image_NCHW, torch.from_numpy(vectors[f"{run}_labels"]), lr, start_P, trajectory_EP[start + 1 : start + epochs + 1], batches,
        momentum=option("mom"), factor=factor, middle=middle,
    )  # fmt: skip
    grad_NCHW, grad_lr = torch.autograd.grad(found.loss, (image_NCHW, lr))
    return {
        "start_params": start_P.numpy(),
        "final_params": found.final_P.detach().numpy(),
        "ce_unscaled": found.cross_entropy_T.numpy(),
        "match_steps": np.asarray(match_steps(steps, epochs, middle)),
        "middle_loss": np.asarray([ratio.item() for ratio in found.middle] or [np.nan]),
        "param_loss": found.end.detach().numpy(),
        "grand_loss": found.loss.detach().numpy(),
        "grad_images": grad_NCHW.numpy(),
        "grad_lr": grad_lr.numpy(),
    }


def _batches(vectors: Mapping[str, np.ndarray], run: str, batch_size: int) -> list[torch.Tensor]:
    """The inner batches by our own cutting, from the orders that the recorded batches were cut from."""
    drawn = list(torch.from_numpy(vectors[f"{run}_batch_index"]).split(vectors[f"{run}_batch_len"].tolist()))
    total = len(vectors[f"{run}_labels"])
    orders, waiting = [], []
    for rows in drawn:
        waiting.insert(0, rows)
        if sum(map(len, waiting)) == total:
            orders.append(torch.cat(waiting))
            waiting = []
    # Of the last order only chunks of its end are known; what stands before them is never taken.
    if waiting:
        known = torch.cat(waiting)
        rest = torch.tensor([row for row in range(total) if row not in set(known.tolist())], dtype=torch.int64)
        orders.append(torch.cat([rest, known]))
    cut = chunks(iter(orders), batch_size)
    return [next(cut) for _ in drawn]
