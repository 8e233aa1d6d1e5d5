"""Averages of whole models: WiSE-FT between a zero-shot and a fine-tuned one, model soups over several fine-tuned ones.

Sources: Wortsman et al., Robust fine-tuning of zero-shot models (CVPR 2022), equation 1; Wortsman et al., Model soups (ICML 2022), recipe 1.
What is averaged: floating-point tensors, as they are stored, so the logit scale in log space. Integer buffers are the fine-tuned model's.
Running statistics of batch norms are recomputed over the calibration pictures; CLIP's vision transformers have none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from diptych.adapt import norms, states
from diptych.adapt.layers import layers_of
from diptych.adapt.sparsify import Target, sparsify
from diptych.adapt.states import State
from diptych.core.config import Config as BaseConfig
from diptych.core.errors import ConfigError, DataError, nearest

Calibration = Iterable[Mapping[str, Tensor]]


class WiseFTConfig(BaseConfig):
    """WiSE-FT: the straight line from a zero-shot model to the fine-tuned one, at `alpha`."""

    directories: ClassVar[tuple[str, ...]] = ("origin",)

    method: Literal["wise-ft"] = "wise-ft"
    origin: str = Field(min_length=1, description="directory of the zero-shot model, theta0; the model of this workflow is theta1")
    alpha: float = Field(0.5, ge=0, le=1, description="0 gives the zero-shot model, 1 the fine-tuned one")
    sparse_layers: tuple[str, ...] = Field(
        (), description="straggler layers to make sparse first, named as `straggler-sharpness` reports them"
    )
    sparsity: float = Field(0.3, gt=0, le=1, description="share of the sparse layers' weights that is zeroed")
    sparse_target: Target = Field("difference", description="zero the change from theta0, or the weights themselves")
    seed: int = Field(0, ge=0, lt=2**63, description="names the draw of the sparse layers' weights")

    def build(self) -> WiseFT:
        """The compressor."""
        return WiseFT(self)


class SoupConfig(BaseConfig):
    """A soup of the workflow's model and others of the same architecture, fine-tuned from one start."""

    directories: ClassVar[tuple[str, ...]] = ("models",)

    method: Literal["soup"] = "soup"
    models: tuple[str, ...] = Field(min_length=1, description="directories of the other models")
    recipe: Literal["uniform", "greedy"] = Field(
        "uniform",
        description="`greedy` keeps a model only where calibration accuracy does not fall; those are training pairs, not held out",
    )

    @model_validator(mode="after")
    def _distinct(self) -> SoupConfig:
        if len(set(self.models)) < len(self.models):
            raise ValueError("each directory once")
        return self

    def build(self) -> Soup:
        """The compressor."""
        return Soup(self)


# ---------------------------------------------------------------- the mathematics


def interpolate(theta0: State, theta1: State, alpha: float) -> dict[str, Tensor]:
    """`(1 - alpha) * theta0 + alpha * theta1`, alpha in [0, 1]; 0 and 1 give the ends exactly. Raises DataError if the states differ in kind."""
    return states.elementwise(lambda start, end: (1 - alpha) * start + alpha * end, theta0, theta1)


def soup(ingredients: Sequence[State]) -> dict[str, Tensor]:
    """The mean of one or more states; integer buffers are the first one's. Raises DataError if they differ in kind or there are none."""
    if not ingredients:
        raise DataError.at("A soup of nothing", "models", 0, "at least one model")
    first_last = [*ingredients[1:], ingredients[0]]
    return states.elementwise(lambda *tensors: torch.stack(tensors).mean(dim=0), *first_last)


def greedy_soup(ingredients: Sequence[State], score: Callable[[State], float]) -> tuple[dict[str, Tensor], list[int]]:
    """The soup that takes models from the best down and keeps each one that does not lower the score.

    Args:
        ingredients: one or more states.
        score: the larger, the better; called once a model and once a candidate soup.

    Returns the soup and the numbers of the models in it, in the order in which they were taken; of equal scores the earlier goes first.
    """
    scores = [score(state) for state in ingredients]
    order = sorted(range(len(ingredients)), key=lambda number: -scores[number])
    chosen = order[:1]
    kept, best = soup([ingredients[number] for number in chosen]), max(scores)
    for number in order[1:]:
        candidate = soup([ingredients[taken] for taken in [*chosen, number]])
        reached = score(candidate)
        if reached >= best:
            kept, best = candidate, reached
            chosen.append(number)
    return kept, chosen


@torch.no_grad()
def pairing_accuracy(model: nn.Module, calibration: Calibration) -> float:
    """The share of pictures and texts whose own partner is the nearest of their batch, in [0, 1]: what the greedy recipe compares."""
    hits = total = 0
    with states.evaluating(model):
        for batch in calibration:
            image_ND, text_ND, _ = model(batch["image_NCHW"], batch["text_NL"])
            similarity_NN = image_ND @ text_ND.T
            own_N = torch.arange(len(similarity_NN), device=similarity_NN.device)
            hits += sum(int((side.argmax(dim=1) == own_N).sum()) for side in (similarity_NN, similarity_NN.T))
            total += 2 * len(own_N)
    if not total:
        raise DataError.at("A greedy soup has nothing to compare models by", "calibration", 0, "batches of pairs", "use recipe: uniform")
    return hits / total


# ---------------------------------------------------------------- the compressors


def install(model: nn.Module, state: State, calibration: Calibration) -> None:
    """Puts averaged weights into a model, in place, and recomputes batch-norm statistics where it has any (DataError without batches)."""
    states.install(model, state)
    norms.recompute(model, (batch["image_NCHW"] for batch in calibration), getattr(model, "encode_image", None))


class WiseFT:
    """The compressor. The model keeps its architecture, its size and its masks."""

    def __init__(self, config: WiseFTConfig) -> None:
        self.config = config

    def compress(self, model: nn.Module, calibration: Calibration) -> nn.Module:
        """Moves the model towards the zero-shot one, in place; gives it back. Raises DataError for another architecture."""
        theta1 = states.of_module(model)
        theta0 = states.of_directory(self.config.origin, model)
        if self.config.sparse_layers:
            names = self._sparse_names(theta1)
            theta1 = sparsify(theta0, theta1, names, self.config.sparsity, self.config.seed, self.config.sparse_target)
        install(model, interpolate(theta0, theta1, self.config.alpha), calibration)
        return model

    def _sparse_names(self, theta: State) -> list[str]:
        layers = layers_of(name for name, tensor in theta.items() if tensor.is_floating_point())
        for layer in self.config.sparse_layers:
            if layer not in layers:
                expected = f"one of {', '.join(layers)}"
                raise ConfigError.at("No such layer", "sparse_layers", layer, expected, nearest(layer, layers))
        return [name for layer in self.config.sparse_layers for name in layers[layer]]


class Soup:
    """The compressor. After `compress`, `report` says which models are in the soup."""

    def __init__(self, config: SoupConfig) -> None:
        self.config = config
        self._chosen: list[str] = []

    def compress(self, model: nn.Module, calibration: Calibration) -> nn.Module:
        """Replaces the weights by the soup's, in place; gives the model back. Raises DataError for another architecture."""
        own = {name: tensor.clone() for name, tensor in states.of_module(model).items()}
        ingredients = [own, *(states.of_directory(directory, model) for directory in self.config.models)]
        if self.config.recipe == "uniform":
            state, chosen = soup(ingredients), list(range(len(ingredients)))
        else:
            batches = list(calibration)
            calibration = batches
            state, chosen = greedy_soup(ingredients, lambda candidate: _score(model, candidate, batches))
        self._chosen = [("(this workflow's)", *self.config.models)[number] for number in chosen]
        install(model, state, calibration)
        return model

    def report(self, model: nn.Module) -> dict[str, Any]:
        """`models`: what the soup was made of, in the order in which it was taken."""
        del model
        return {"models": self._chosen}


def _score(model: nn.Module, state: State, batches: Sequence[Mapping[str, Tensor]]) -> float:
    install(model, state, batches)
    return pairing_accuracy(model, batches)
