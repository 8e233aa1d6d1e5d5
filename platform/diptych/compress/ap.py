"""AP, activating while pruning: part of each pruning round goes to negative weights that hardly moved, so that fewer nodes are dead.

Source: Liu, Ghosh, Tan, Motani, AP: Selective Activation for De-sparsifying Pruned Neural Networks (TMLR 2023), sections 3 and 4. A round:
train with pruned weights held at zero; prune the smallest weights of all matrices together; prune, of the negative weights left, those that
moved least in this round; rewind what is left to its first values. A negative weight on a non-negative input only pushes the node down.

Where the published code errs, this does not: after a bias it counts the weights before it twice, in its percentiles too, and what moved
equally little, such as a dead channel, goes all at once (`official_copies` and `official_activate`, for parity); rewound biases are copies; what is pruned is known by masks, not by being zero.
For a dual encoder, where the source is silent: first values are those of the model handed over, the loss is the contrastive one, and
with activations that never give exact zeros only the matrices in front of an activation take part in step three (`activated`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from diptych.compress import masks
from diptych.compress.activation import DeadNodes, activations, dead_nodes, is_activation
from diptych.compress.blocks import Batch, device_of, evaluating
from diptych.compress.calibration import Calibrated, required
from diptych.compress.magnitude import apply_masks, masks_of, prunable, sparsity, tower_of
from diptych.compress.retrain import Pool, clamp_scale, pair_loss, train

FIRST_OF_MLP = ("mlp.c_fc.weight", "mlp.fc1.weight", "intermediate.dense.weight")
EXACT = (nn.ReLU, nn.ReLU6)


class Config(Calibrated):
    """AP inside iterative magnitude pruning with rewinding."""

    method: Literal["ap"] = "ap"
    percent: float = Field(20.0, gt=0, lt=100, description="of the alive weights, in percent, go in a round")
    ap_percent: float = Field(
        2.0, ge=0, lt=100, description="of the alive weights, in percent, are AP's part of it; 0: plain magnitude pruning"
    )
    rounds: int = Field(3, ge=1, description="rounds of training, pruning and rewinding; the last is followed by one more training")
    steps: int = Field(100, ge=1, description="updates of each training")
    lr: float = Field(1e-3, gt=0, description="highest learning rate of each training")
    seed: int = Field(0, ge=0, lt=2**63, description="names the draws of batches")
    calibration_pairs: int = Field(4096, ge=2, description="training pairs, the first by key hash; kept in memory as they are given")
    calibration_batch: int = Field(64, ge=2, description="pairs a batch")

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.ap_percent >= self.percent:
            raise ValueError(f"ap_percent is a part of percent: {self.ap_percent} must be below {self.percent}")
        return self

    def build(self) -> AP:
        """The compressor."""
        return AP(self)


class AP:
    """The compressor. After `compress`, `report` has the dead-node rates of both towers and the loss, round by round."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._rounds: list[dict[str, Any]] = []

    def compress(self, model: nn.Module, calibration: Iterable[Batch]) -> nn.Module:
        """Prunes and retrains in place, keeps the masks with the model and gives it back. Raises DataError without pairs."""
        config = self.config
        batches = required(calibration, "ap")
        pool = Pool(model, batches, config.calibration_batch, config.seed)
        weights = dict(prunable(model, config.towers))
        first = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        own = activated(model, weights)
        masks_now = {name: masks_of(model).get(name, torch.ones_like(weight, dtype=torch.bool)) for name, weight in weights.items()}
        self._rounds = []
        with evaluating(model):
            for number in range(config.rounds):
                start = {name: weight.detach().clone() for name, weight in weights.items()}
                losses = self._train(model, pool, number)
                masks_now = pruned(weights, start, masks_now, config.percent - config.ap_percent, config.ap_percent, own)
                rewind(model, first, masks_now)
                self._note(model, batches[0], losses, masks_now)
            losses = self._train(model, pool, config.rounds)
            self._note(model, batches[0], losses, masks_now)
        return model

    def report(self, model: nn.Module) -> dict[str, Any]:
        """`rounds`, and the share of zeros in each matrix and in all of them."""
        return {"rounds": self._rounds, **sparsity(model, self.config.towers)}

    def _train(self, model: Any, pool: Pool, number: int) -> list[float]:
        config = self.config

        def loss(step: int) -> Tensor:
            return pair_loss(model, pool.at(number * config.steps + step))

        def after() -> None:
            clamp_scale(model)
            apply_masks(model)

        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return train(parameters, loss, config.steps, config.lr, after)

    def _note(self, model: Any, batch: Batch, losses: Sequence[float], found: Mapping[str, Tensor]) -> None:
        rates = dead_node_rates(model, batch)
        alive = sum(int(mask.sum()) for mask in found.values()) / max(1, sum(mask.numel() for mask in found.values()))
        self._rounds.append({"alive": alive, "loss": losses[-1], **{f"{tower}_dynamic_dnr": rate.dynamic for tower, rate in rates.items()}})


def dead_node_rates(model: Any, batch: Batch) -> dict[str, DeadNodes]:
    """The dead-node rates of each tower with activations on the pairs of a batch, in the model's present mode."""
    device = device_of(model)
    runs = {
        "image": lambda: model.encode_image(batch["image_NCHW"].to(device)),
        "text": lambda: model.encode_text(batch["text_NL"].to(device)),
    }
    found = {tower: activations(model, run) for tower, run in runs.items()}
    return {tower: dead_nodes(outputs) for tower, outputs in found.items() if outputs}


def activated(model: nn.Module, weights: Mapping[str, Tensor]) -> frozenset[str]:
    """The weights that AP may take negative ones of, tower by tower: all, if its activations give exact zeros; else those in front of one."""
    chosen: set[str] = set()
    for tower in ("image", "text"):
        kinds = [module for name, module in model.named_modules() if is_activation(module) and tower_of(name) == tower]
        own = [name for name in weights if tower_of(name) == tower]
        exact = all(isinstance(module, EXACT) for module in kinds)
        chosen.update(own if exact else (name for name in own if name.endswith(FIRST_OF_MLP)))
    return frozenset(chosen)


def pruned(
    weights: Mapping[str, Tensor],
    start: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
    percent: float,
    ap_percent: float,
    own: frozenset[str] | None = None,
) -> dict[str, Tensor]:
    """The masks after one round: by magnitude, then by AP. See `by_magnitude` and `activate`."""
    alive = sum(int(mask.sum()) for mask in before.values())
    after, _ = by_magnitude(weights, before, percent)
    if not ap_percent:
        return after
    chosen = {name: weights[name] for name in weights if own is None or name in own}
    changed = activate(chosen, start, {name: after[name] for name in chosen}, int(alive * ap_percent / 100))
    return {**after, **changed}


def by_magnitude(
    weights: Mapping[str, Tensor], before: Mapping[str, Tensor], percent: float, copies: Mapping[str, int] | None = None
) -> tuple[dict[str, Tensor], float]:
    """The masks without the smallest of the alive weights of all tensors together, and the threshold below which they lay.

    Args:
        weights: by name.
        before: masks of what is alive, True stays.
        percent: of the alive weights, in [0, 100); the threshold is that percentile, linear between two weights.
        copies: how often each tensor is counted; None: once.
    """
    alive = {name: weight.detach()[before[name]].abs().cpu().numpy().ravel() for name, weight in weights.items()}
    counted = [np.tile(values, 1 if copies is None else copies[name]) for name, values in alive.items()]
    limit = float(np.percentile(np.concatenate(counted), percent))
    return {name: before[name] & (weight.detach().abs() >= limit) for name, weight in weights.items()}, limit


def activate(weights: Mapping[str, Tensor], start: Mapping[str, Tensor], alive: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """The masks without the `count` negative weights that moved least since the round began; of equal movements the earlier go first.

    Args:
        weights: after the round's training.
        start: the same weights before it.
        alive: masks after ordinary pruning.
    """
    negative = torch.cat([(alive[name] & (weight.detach() < 0)).flatten() for name, weight in weights.items()])
    moved = torch.cat([(weight.detach() - start[name]).abs().flatten() for name, weight in weights.items()])
    candidates = negative.nonzero()[:, 0]
    goes = candidates[moved[candidates].argsort(stable=True)[:count]]
    kept = torch.cat([alive[name].flatten() for name in weights]).index_fill_(0, goes, False)
    parts = torch.split_with_sizes(kept, [weight.numel() for weight in weights.values()])
    return {name: part.view_as(weight) for (name, weight), part in zip(weights.items(), parts, strict=True)}


def official_activate(
    weights: Mapping[str, Tensor], start: Mapping[str, Tensor], alive: Mapping[str, Tensor], count: int, copies: Mapping[str, int]
) -> tuple[dict[str, Tensor], float]:
    """`activate` as the published code has it, and the movement up to which weights go: the one at place `count`, with all that equal it."""
    negative = {name: alive[name] & (weight.detach() < 0) for name, weight in weights.items()}
    moved = {name: (weight.detach() - start[name]).abs() for name, weight in weights.items()}
    ordered = torch.cat([moved[name][negative[name]].flatten().repeat(copies[name]) for name in weights]).sort().values
    limit = float(ordered[count])
    return {name: alive[name] & ~(negative[name] & (moved[name] <= limit)) for name in weights}, limit


def official_copies(names: Iterable[str], weights: Iterable[str]) -> dict[str, int]:
    """How often the published code counts each weight tensor: once more for every tensor behind it that is no weight, up to the next weight.

    Args:
        names: of all parameters, in the model's order.
        weights: those of them that are weights.
    """
    copies: dict[str, int] = {}
    last = None
    known = set(weights)
    for name in names:
        last = name if name in known else last
        if last is not None:
            copies[last] = copies.get(last, 0) + 1
    return copies


@torch.no_grad()
def rewind(model: nn.Module, first: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Puts every tensor of a model back to its first value, what the masks say to zero; keeps the masks with the model."""
    own = model.state_dict()
    for name, tensor in first.items():
        own[name].copy_(tensor)
    for name, mask in found.items():
        owner, _, leaf = name.rpartition(".")
        masks.put_on(model.get_submodule(owner), leaf, mask)
