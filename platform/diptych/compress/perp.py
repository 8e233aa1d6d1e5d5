"""PERP: after pruning, only biases, norms and low-rank updates that keep the zeros are retrained, or fitted block by block.

Source: Zimmer, Andoni, Spiegel, Pokutta, PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs (arXiv 2312.15230), sections 3 and 4.
The updates are in `compress/adapters.py`. AdamW without decay; the rate rises over the first tenth of the steps and falls to zero, both linearly
(`compress/retrain.py`).

- `retrain` takes a model that was pruned before it (its masks, or else its exact zeros, say where) and minimises the contrastive loss.
- `reconstruct` prunes blocks itself, in order: each is fitted to what it gave before it was pruned, on the inputs that pruned and fitted
  predecessors give it. One tower after the other; padded text positions do not count.

For a dual encoder, where the source is silent: the head are the two projections, with plain LoRA unless they are pruned, and the logit scale.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from diptych.compress import masks
from diptych.compress.adapters import Form, Selection
from diptych.compress.blocks import Batch, Inputs, evaluating, matrices, towers, walk
from diptych.compress.calibration import Calibrated, input_norms, required
from diptych.compress.magnitude import PATTERN, apply_masks, masks_of, prunable, sparsity
from diptych.compress.retrain import Pool, clamp_scale, pair_loss, train
from diptych.core.errors import ConfigError
from diptych.models.store import MASK

HEADS = ("visual.proj", "visual.head.proj.weight", "text_projection", "text_projection.weight", "text.proj.weight")
"""Ends of the names of projections into the shared space: open_clip's own, timm's and Hugging Face's."""


class Config(Calibrated):
    """PERP."""

    method: Literal["perp"] = "perp"
    mode: Literal["retrain", "reconstruct"] = Field("retrain", description="train the pruned model, or prune and fit it block by block")
    form: Literal["none", "lora", "lora_prune", "mask_lora", "scale_lora", "full"] = Field(
        "mask_lora",
        description="low-rank update of pruned weights; `lora` leaves a dense model; `full` trains all weights, as the baseline",
    )
    biases: bool = Field(True, description="train every bias")
    norms: bool = Field(True, description="train the normalisation layers")
    head: bool = Field(False, description="retrain: train both projections, by a low-rank update, and the logit scale")
    rank: int = Field(16, ge=1, description="rank of the updates")
    alpha: float = Field(32.0, gt=0, description="the updates are scaled by alpha / rank")
    lr: float = Field(5e-4, gt=0, description="highest learning rate")
    steps: int = Field(100, ge=1, description="updates: of the whole model, or of each block")
    seed: int = Field(0, ge=0, lt=2**63, description="names the draws of batches and of the updates' first values")
    score: Literal["magnitude", "wanda"] = Field("magnitude", description="reconstruct: what is pruned by, within each matrix")
    sparsity: float | None = Field(None, ge=0, lt=1, description="reconstruct: share of the weights that become zero")
    pattern: str = Field("unstructured", description="reconstruct: `unstructured`, or n:m: n of every m weights along a row stay")
    calibration_pairs: int = Field(4096, ge=2, description="training pairs, the first by key hash; kept in memory as they are given")
    calibration_batch: int = Field(64, ge=2, description="pairs a batch, of training too")

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        found = PATTERN.match(self.pattern)
        if self.pattern != "unstructured" and not (found and 0 < int(found[1]) < int(found[2])):
            raise ValueError("pattern is `unstructured`, or n:m with 0 < n < m, e.g. 2:4")
        if self.mode == "retrain" and (self.sparsity is not None or found or self.score != "magnitude"):
            raise ValueError("retrain takes a model that a method before it has pruned: score, sparsity and pattern are of reconstruct")
        if self.mode == "reconstruct" and (self.sparsity is None) == (found is None):
            raise ValueError("reconstruct prunes: it needs a sparsity or an n:m pattern, and not both")
        if self.mode == "reconstruct" and (self.head or self.form in ("lora", "full")):
            raise ValueError("reconstruct fits biases, norms and updates that keep the zeros, inside blocks")
        if self.form == "none" and not (self.biases or self.norms or self.head):
            raise ValueError("nothing is left to train: biases, norms, head or a form")
        return self

    def build(self) -> PERP:
        """The compressor."""
        return PERP(self)


class PERP:
    """The compressor. After `compress`, `report` says what was trained, and from which loss to which."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._figures: dict[str, Any] = {}

    def compress(self, model: nn.Module, calibration: Iterable[Batch]) -> nn.Module:
        """Retrains or reconstructs, in place, and gives the model back, as plain and as sparse as a pruner leaves it.

        Raises ConfigError where low-rank updates have nothing pruned to work on, a tower has no blocks, or a row does not divide into
        the pattern's groups; DataError without calibration pairs.
        """
        batches = required(calibration, "perp")
        with evaluating(model):
            if self.config.mode == "reconstruct":
                self._reconstruct(model, batches)
            else:
                self._retrain(model, batches)
        return model

    def report(self, model: nn.Module) -> dict[str, Any]:
        """`trained` parameters and their `trained_share`, losses, and the share of zeros in each matrix and in all of them."""
        return {**self._figures, **sparsity(model, self.config.towers)}

    def _retrain(self, model: Any, batches: Sequence[Batch]) -> None:
        config = self.config
        masked = infer_masks(model, config.towers)
        if config.form not in ("none", "full") and not masked:
            fix = "put a pruner before perp, or choose `form: none` or `form: full`"
            raise ConfigError.at("Nothing of the model is pruned", "form", config.form, "a model with masks, or with exact zeros", fix)
        heads = [name for name, _ in model.named_parameters() if f".{name}".endswith(tuple(f".{end}" for end in HEADS))]
        total = sum(parameter.numel() for parameter in model.parameters())
        selection = select(model, masked, heads if config.head else [], config)
        trained = selection.parameters()
        pool = Pool(model, batches, config.calibration_batch, config.seed)

        def loss(step: int) -> Tensor:
            return pair_loss(model, pool.at(step))

        def after() -> None:
            clamp_scale(model)
            if config.form == "full":
                apply_masks(model)

        losses = train(list(trained.values()), loss, config.steps, config.lr, after)
        selection.merge()
        if config.form == "lora":
            _drop_masks(model, masked)
        self._note(trained, total, {"first_loss": losses[0], "last_loss": sum(losses[-10:]) / len(losses[-10:])})

    def _reconstruct(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        errors: dict[str, dict[str, float]] = {}
        trained: dict[str, nn.Parameter] = {}
        total = sum(parameter.numel() for parameter in model.parameters())
        for tower in towers(model, self.config.towers):
            for name, block, states in walk(model, tower, batches):
                with torch.no_grad():
                    targets = [inputs.call(block) for inputs in states]
                prune(block, name, states, self.config)
                before, after, chosen = reconstruct(block, states, targets, self.config)
                errors[name] = {"pruned": before, "reconstructed": after}
                trained |= {f"{name}.{leaf}": parameter for leaf, parameter in chosen.items()}
        self._note(trained, total, {"errors": errors})

    def _note(self, trained: Mapping[str, nn.Parameter], total: int, figures: Mapping[str, Any]) -> None:
        count = sum(parameter.numel() for parameter in trained.values())
        self._figures = {"trained": count, "trained_share": count / total, **figures}


def select(model: nn.Module, masked: Mapping[str, Tensor], heads: Sequence[str], config: Config) -> Selection:
    """Freezes a model but for what the configuration trains.

    Args:
        model: pruned.
        masked: masks of its weights by name; only matrices get updates.
        heads: names of matrices that get plain LoRA unless they are masked; with any, the logit scale is trained too.
        config: form, rank and the rest.
    """
    if config.form == "full":
        names = tuple(name for name, parameter in model.named_parameters() if parameter.requires_grad)
        return Selection(model, {}, also=names, biases=False, norms=False)
    parameters = dict(model.named_parameters())
    targets: dict[str, Tensor | None] = dict.fromkeys(heads)
    form: Form = "mask_lora" if config.form == "none" else config.form
    if config.form != "none":
        targets |= {name: mask for name, mask in masked.items() if parameters[name].ndim > 1}
    scale = tuple(name for name in parameters if heads and name.rpartition(".")[2] == "logit_scale")
    return Selection(
        model, targets, form, config.rank, config.alpha, biases=config.biases, norms=config.norms, also=scale, seed=config.seed
    )


def infer_masks(model: nn.Module, which: Literal["both", "image", "text"] = "both") -> dict[str, Tensor]:
    """The masks of a model by parameter name; a matrix without one that has exact zeros gets one, and keeps it."""
    found = masks_of(model)
    for name, weight in prunable(model, which):
        if name not in found and bool((weight == 0).any()):
            owner, _, leaf = name.rpartition(".")
            found[name] = weight.detach() != 0
            model.get_submodule(owner).register_buffer(leaf + MASK, found[name])
    return found


def _drop_masks(model: nn.Module, masked: Iterable[str]) -> None:
    for name in masked:
        owner, _, leaf = name.rpartition(".")
        delattr(model.get_submodule(owner), leaf + MASK)


def prune(block: nn.Module, prefix: str, states: Sequence[Inputs], config: Config) -> None:
    """Prunes a block by magnitude or by Wanda's score, within each matrix."""
    norms = input_norms(block, prefix, states) if config.score == "wanda" else {}
    for matrix in matrices(block, prefix):
        score = matrix.weight.detach().abs()
        score = score * norms[matrix.name] if norms else score
        masks.put(matrix, masks.by_pattern(score, config.sparsity or 0.0, config.pattern, rows=False, name=matrix.name))


def reconstruct(
    block: nn.Module, states: Sequence[Inputs], targets: Sequence[Tensor], config: Config
) -> tuple[float, float, dict[str, nn.Parameter]]:
    """Fits a pruned block to the outputs it had: mean squared error before and after, and what was trained, by name within the block.

    Args:
        block: with masks.
        states: its inputs, batch by batch.
        targets: `[N, L, D]` each, of the dense block on the same inputs.
        config: form, rank, steps and the rest.
    """
    before = _error(block, states, targets)
    selection = select(block, masks_of(block), [], config)
    trained = selection.parameters()

    def loss(step: int) -> Tensor:
        place = step % len(states)
        inputs = states[place]
        return (inputs.tokens(inputs.call(block)) - inputs.tokens(targets[place])).square().mean()

    train(list(trained.values()), loss, config.steps, config.lr)
    selection.merge()
    return before, _error(block, states, targets), trained


@torch.no_grad()
def _error(block: nn.Module, states: Sequence[Inputs], targets: Sequence[Tensor]) -> float:
    """The mean over batches of the mean squared error over tokens that count."""
    errors = [
        float((inputs.tokens(inputs.call(block)) - inputs.tokens(target)).square().mean())
        for inputs, target in zip(states, targets, strict=True)
    ]
    return sum(errors) / len(errors)
