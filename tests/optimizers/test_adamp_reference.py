"""AdamP and SGDP beside a slow, literal reference: random shapes and groups, gradients that come and go, and a real dual encoder."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from diptych.core.points import Encoded
from diptych.models.clip import DualEncoder, create
from diptych.models.decay import decays
from diptych.objectives.clip import Clip
from diptych.optimizers.adamp import SGDP, AdamP, Config
from diptych.optimizers.groups import decay_groups
from diptych.optimizers.projection import View

STEPS = 5


class Literal:
    """One tensor of one group, stepped as the algorithm is written; keeps its own count of steps."""

    def __init__(self, weight: Tensor, hyper: Mapping[str, Any]) -> None:
        self.p, self.hyper, self.t, self.view = weight.detach().clone(), hyper, 0, View.VECTOR
        self.m, self.v = torch.zeros_like(self.p), torch.zeros_like(self.p)

    def step(self, g: Tensor) -> None:
        h, self.t = self.hyper, self.t + 1
        if "betas" in h:
            beta1, beta2 = h["betas"]
            self.m = beta1 * self.m + (1 - beta1) * g
            self.v = beta2 * self.v + (1 - beta2) * g * g
            denominator = self.v.sqrt() / math.sqrt(1 - beta2**self.t) + h["eps"]
            u = (beta1 * self.m + (1 - beta1) * g if h["nesterov"] else self.m) / denominator
            size, decay = h["lr"] / (1 - beta1**self.t), h["lr"] * h["weight_decay"]
        else:
            self.m = h["momentum"] * self.m + (1 - h["dampening"]) * g
            u = g + h["momentum"] * self.m if h["nesterov"] else self.m
            size, decay = h["lr"], h["lr"] * h["weight_decay"] / (1 - h["momentum"])
        u, ratio = self.project(g, u)
        if "momentum" in h and not h["nesterov"]:
            self.m = u  # the official step and its buffer are one tensor
        self.p = self.p * (1 - decay * ratio) - size * u

    def project(self, g: Tensor, u: Tensor) -> tuple[Tensor, float]:
        if self.p.ndim < 2:
            return u, 1.0
        eps = self.hyper["eps"]
        for view, rows in ((View.CHANNEL, len(self.p)), (View.LAYER, 1)):
            p, grad, update = (tensor.reshape(rows, -1) for tensor in (self.p, g, u))
            norm, grad_norm = p.norm(dim=1, keepdim=True), grad.norm(dim=1, keepdim=True)
            cosine = (p * grad).sum(1, keepdim=True).abs() / (norm.clamp(min=eps) * grad_norm.clamp(min=eps))
            if cosine.max() < self.hyper["delta"] / math.sqrt(p.shape[1]):
                unit = p / (norm + eps)
                self.view = view
                return (update - unit * (unit * update).sum(1, keepdim=True)).reshape(u.shape), self.hyper["wd_ratio"]
        self.view = View.NONE
        return u, 1.0


class Twins:
    """An optimizer, and the reference of every parameter of it."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.literals = {parameter: Literal(parameter, group) for group in optimizer.param_groups for parameter in group["params"]}
        self.seen: Counter[View] = Counter()

    def step(self) -> None:
        for parameter, literal in self.literals.items():
            if parameter.grad is not None:
                literal.step(parameter.grad)
        self.optimizer.step()

    def check(self, **tolerance: float) -> None:
        for parameter, literal in self.literals.items():
            shape = tuple(parameter.shape)
            if parameter.grad is not None:
                assert self.optimizer.views[parameter] is literal.view, shape
                self.seen[literal.view] += 1
            else:
                assert parameter not in self.optimizer.views, shape
            torch.testing.assert_close(parameter.detach(), literal.p, **tolerance, msg=lambda text, shape=shape: f"{shape}: {text}")


def random_shapes(generator: torch.Generator) -> Iterator[tuple[int, ...]]:
    """Every number of dimensions, sizes drawn; rows of one element and single rows among them."""

    def size() -> int:
        return int(torch.randint(1, 7, (), generator=generator))

    for ndim in (0, 1, 2, 2, 3, 4, 4, 5):
        yield tuple(size() for _ in range(ndim))
    yield from ((size() + 1, 1), (1, size() + 1), (size() + 1, 1, 1, 1), (1, 1))


def gradient(weight: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    """A gradient without radial part by row ("channel") or only as a whole ("layer"), with one in every row ("free"), or any ("random")."""
    noise = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
    if kind == "random" or weight.ndim < 2:
        return noise
    if kind == "free":
        return weight + 0.1 * noise
    p, g = (tensor.reshape(len(weight) if kind == "channel" else 1, -1) for tensor in (weight, noise))
    squared = p.square().sum(1, keepdim=True).clamp(min=1e-300)
    return (g - (g * p).sum(1, keepdim=True) / squared * p).reshape(weight.shape)


def grouped(seed: int) -> tuple[list[dict[str, Any]], torch.Generator]:
    """Random float64 tensors in three groups of different hyperparameters; one more of each shape starts at zero."""
    generator = torch.Generator().manual_seed(seed)
    groups: list[dict[str, Any]] = [
        {"params": []},
        {"params": [], "weight_decay": 0.0, "lr": 0.003},
        {"params": [], "wd_ratio": 0.7, "delta": 0.3},
    ]
    for index, shape in enumerate(random_shapes(generator)):
        for fill in (torch.randn(shape, generator=generator, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)):
            groups[index % 3]["params"].append(nn.Parameter(fill))
    return groups, generator


ADAMP = {"lr": 0.02, "betas": (0.8, 0.95), "weight_decay": 0.2}
SGDP_ = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.05}
CASES = [
    pytest.param(AdamP, {**ADAMP, "nesterov": nesterov, "eps": eps}, id=f"adamp-nesterov={nesterov}-eps={eps}")
    for nesterov in (False, True)
    for eps in (1e-8, 1e-3)
] + [
    pytest.param(SGDP, {**SGDP_, "nesterov": nesterov, "dampening": dampening}, id=f"sgdp-nesterov={nesterov}-dampening={dampening}")
    for nesterov, dampening in ((False, 0.0), (False, 0.2), (True, 0.0))
]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("optimizer_class", "hyper"), CASES)
def test_random_shapes_groups_and_absent_gradients(optimizer_class: type[Optimizer], hyper: dict[str, Any], seed: int) -> None:
    groups, generator = grouped(seed)
    twins = Twins(optimizer_class(groups, **hyper))
    for _ in range(STEPS):
        for index, parameter in enumerate(twins.literals):
            kind = ("channel", "layer", "free", "random")[int(torch.randint(4, (), generator=generator))]
            absent = bool(torch.rand((), generator=generator) < 0.2) or index == 5
            parameter.grad = None if absent else gradient(parameter.detach(), kind, generator)
        twins.step()
        twins.check(rtol=1e-10, atol=1e-11)
    assert set(twins.seen) == set(View), f"the draw leaves views untried: {twins.seen}"
    untouched = list(twins.literals)[5]
    assert untouched not in twins.optimizer.state, "a parameter that never had a gradient has a state"


@pytest.mark.parametrize("optimizer_class", [AdamP, SGDP])
def test_orthogonal_vectors_keep_their_radial_step_and_their_full_decay(optimizer_class: type[Optimizer]) -> None:
    vector = nn.Parameter(torch.tensor([3.0, 0.0, 0.0, 4.0], dtype=torch.float64))
    row = nn.Parameter(vector.detach().clone()[None])
    scalar = nn.Parameter(torch.zeros((), dtype=torch.float64))
    start = vector.detach().clone()
    optimizer = optimizer_class([vector, row, scalar], lr=0.1, weight_decay=0.5, wd_ratio=0.0)
    for first in (torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.tensor([4.0, 0.0, 0.0, -3.0])):  # radial first, so that AdamP's momentum is
        vector.grad, row.grad = first.double(), first.double()[None]
        scalar.grad = torch.ones((), dtype=torch.float64)
        optimizer.step()
    assert optimizer.views == {vector: View.VECTOR, row: View.CHANNEL, scalar: View.VECTOR}
    assert not torch.allclose(vector, row[0])
    # Two decays of 5 %; a projected row is spared the second.
    assert float(vector.detach() @ start) < float(row[0].detach() @ start)


@pytest.fixture(scope="module")
def encoder() -> DualEncoder:
    return create("digits-16", 0)


def lose(encoder: DualEncoder, seed: int) -> Tensor:
    """CLIP's loss of eight pairs of noise."""
    generator = torch.Generator().manual_seed(seed)
    image_NCHW = torch.randint(0, 256, (8, 3, 16, 16), generator=generator, dtype=torch.uint8)
    text_NL = torch.from_numpy(encoder.tokenizer.encode([f"the digit {row}" for row in range(8)]))
    image_ND, text_ND, logit_scale = encoder(image_NCHW, text_NL)
    return Clip()(Encoded(image_ND, text_ND, logit_scale))["loss"]


def train(encoder: DualEncoder, optimizer: Optimizer, steps: range) -> Iterator[Tensor]:
    for step in steps:
        optimizer.zero_grad()
        loss = lose(encoder, step)
        loss.backward()
        yield loss.detach()


def test_a_dual_encoder_steps_as_the_reference_does(encoder: DualEncoder) -> None:
    model = copy.deepcopy(encoder)
    config = Config.parse({"method": "adamp", "lr": 1e-3, "weight_decay": 0.2})
    twins = Twins(config.build(decay_groups(model.named_parameters(), config.weight_decay)))
    for loss in train(model, twins.optimizer, range(3)):
        assert torch.isfinite(loss)
        for parameter, literal in twins.literals.items():
            literal.p = parameter.detach().clone()  # single precision: compare step by step
        twins.step()
        twins.check(rtol=1e-5, atol=2e-6)
    assert twins.seen[View.VECTOR]
    assert twins.seen[View.CHANNEL] + twins.seen[View.LAYER], f"nothing in a CLIP was projected: {twins.seen}"
    assert twins.seen[View.NONE], f"everything in a CLIP was projected: {twins.seen}"
    moved = {
        name for (name, after), before in zip(model.named_parameters(), encoder.parameters(), strict=True) if not torch.equal(after, before)
    }
    assert {"visual.proj", "text_projection", "logit_scale"} <= {name.removeprefix("clip.") for name in moved}


def test_a_dual_encoder_goes_on_to_the_bit(encoder: DualEncoder) -> None:
    def build(model: DualEncoder) -> AdamP:
        return Config(weight_decay=0.2).build(decay_groups(model.named_parameters(), 0.2))

    model = copy.deepcopy(encoder)
    optimizer = build(model)
    for _ in train(model, optimizer, range(2)):
        optimizer.step()
    resumed_model = copy.deepcopy(model)
    resumed = build(resumed_model)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for loss, resumed_loss in zip(train(model, optimizer, range(2, 4)), train(resumed_model, resumed, range(2, 4)), strict=True):
        assert torch.equal(loss, resumed_loss)
        optimizer.step()
        resumed.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed_model.parameters(), strict=True))


def test_projections_of_a_dual_encoder_decay_and_its_temperature_does_not(encoder: DualEncoder) -> None:
    rule = {name.removeprefix("clip."): decays(name, parameter) for name, parameter in encoder.named_parameters()}
    assert all(
        rule[name] for name in ("visual.proj", "text_projection", "visual.conv1.weight", "token_embedding.weight", "positional_embedding")
    )
    assert not any(rule[name] for name in ("logit_scale", "visual.class_embedding", "visual.ln_pre.weight", "ln_final.bias"))
