"""AdamP and SGDP beside a plain transcription of the papers' algorithms, and what an optimizer owes its users."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from diptych.core.errors import ConfigError
from diptych.optimizers import projection
from diptych.optimizers.adamp import SGDP, AdamP, Config
from diptych.optimizers.projection import View, choose_views

SHAPES: dict[str, tuple[int, ...]] = {
    "scalar": (),
    "vector": (5,),
    "free": (4, 6),
    "channel": (5, 7),
    "layer": (4, 8),
    "conv": (3, 2, 2, 2),
    "row": (1, 9),
}
EXPECTED = {
    "scalar": View.VECTOR,
    "vector": View.VECTOR,
    "free": View.NONE,
    "channel": View.CHANNEL,
    "layer": View.LAYER,
    "conv": View.CHANNEL,
}

Make = Callable[[list[Tensor]], torch.optim.Optimizer]


# ---------------------------------------------------------------- the reference: one tensor at a time, one line a formula


def project(p: Tensor, g: Tensor, u: Tensor, delta: float, wd_ratio: float, eps: float) -> tuple[Tensor, float]:
    for rows in (len(p), 1) if p.ndim > 1 else ():
        pr, gr, ur = p.reshape(rows, -1), g.reshape(rows, -1), u.reshape(rows, -1)
        cosine = (pr * gr).sum(1).abs() / (pr.norm(dim=1).clamp(min=eps) * gr.norm(dim=1).clamp(min=eps))
        if cosine.max() < delta / math.sqrt(pr.shape[1]):
            unit = pr / (pr.norm(dim=1, keepdim=True) + eps)
            return (ur - unit * (unit * ur).sum(1, keepdim=True)).reshape(p.shape), wd_ratio
    return u, 1.0


class Reference:
    def __init__(self, weights: list[Tensor], kind: str, hyper: dict[str, float]) -> None:
        self.weights, self.kind, self.hyper, self.t = weights, kind, hyper, 0
        self.first, self.second = ([torch.zeros_like(w) for w in weights] for _ in range(2))

    def step(self, grads: list[Tensor]) -> None:
        self.t += 1
        for index, g in enumerate(grads):
            (self.adamp if self.kind == "adamp" else self.sgdp)(index, g)

    def adamp(self, index: int, g: Tensor) -> None:
        h, p, (b1, b2) = self.hyper, self.weights[index], (0.9, 0.99)
        m = self.first[index] = b1 * self.first[index] + (1 - b1) * g
        v = self.second[index] = b2 * self.second[index] + (1 - b2) * g * g
        u = ((b1 * m + (1 - b1) * g) if h["nesterov"] else m) / (v.sqrt() / math.sqrt(1 - b2**self.t) + h["eps"])
        u, ratio = project(p, g, u, h["delta"], h["wd_ratio"], h["eps"])
        self.weights[index] = p * (1 - h["lr"] * h["weight_decay"] * ratio) - h["lr"] / (1 - b1**self.t) * u

    def sgdp(self, index: int, g: Tensor) -> None:
        h, p = self.hyper, self.weights[index]
        buffer = self.first[index] = h["momentum"] * self.first[index] + (1 - h["dampening"]) * g
        u, ratio = project(p, g, g + h["momentum"] * buffer if h["nesterov"] else buffer, h["delta"], h["wd_ratio"], h["eps"])
        if h["alias_buffer"] and not h["nesterov"]:
            self.first[index] = u
        self.weights[index] = p * (1 - h["lr"] * h["weight_decay"] * ratio / (1 - h["momentum"])) - h["lr"] * u


def gradient(name: str, weight: Tensor, generator: torch.Generator) -> Tensor:
    """Orthogonal to the weight per row ("channel", "conv") or as a whole only ("layer"); with a plain radial part ("free")."""
    noise = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
    if name in ("scalar", "vector", "row"):
        return noise
    if name == "free":
        return 0.1 * noise + weight
    rows = len(weight) if name in ("channel", "conv") else 1
    p, g = weight.reshape(rows, -1), noise.reshape(rows, -1).clone()
    if name == "layer":  # radial in the first half of the rows, anti-radial in the second: orthogonal only in sum
        half = p.numel() // 2
        g = 0.1 * g
        g[:, :half] += p[:, :half]
        g[:, half:] -= p[:, half:] * p[:, :half].square().sum() / p[:, half:].square().sum()
    return (g - (g * p).sum(1, keepdim=True) / p.square().sum(1, keepdim=True) * p).reshape(weight.shape)


def initial() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}


ADAMP = {"lr": 0.01, "eps": 1e-8, "weight_decay": 0.1, "delta": 0.1, "wd_ratio": 0.2}
SGDP_ = {"lr": 0.01, "momentum": 0.9, "eps": 1e-8, "weight_decay": 0.1, "delta": 0.1, "wd_ratio": 0.2}
CASES = [
    ("adamp", {**ADAMP, "nesterov": False}),
    ("adamp", {**ADAMP, "nesterov": True}),
    ("adamp", {**ADAMP, "nesterov": False, "weight_decay": 0.0}),
    *[
        ("sgdp", {**SGDP_, "nesterov": n, "dampening": d, "alias_buffer": a})
        for n, d, a in [(False, 0.0, True), (False, 0.3, False), (True, 0.3, True)]
    ],
]


@pytest.mark.parametrize("chunk", [1, 1 << 18])
@pytest.mark.parametrize(("kind", "hyper"), CASES)
def test_steps_are_the_papers(kind: str, hyper: dict[str, float], chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(projection.CHUNK_ELEMENTS, "cpu", chunk)
    weights = initial()
    parameters = {name: nn.Parameter(weight.clone()) for name, weight in weights.items()}
    optimizer = AdamP(parameters.values(), betas=(0.9, 0.99), **hyper) if kind == "adamp" else SGDP(parameters.values(), **hyper)
    reference = Reference(list(weights.values()), kind, hyper)
    generator = torch.Generator().manual_seed(4)
    for _ in range(6):
        grads = [gradient(name, parameter.detach(), generator) for name, parameter in parameters.items()]
        for parameter, grad in zip(parameters.values(), grads, strict=True):
            parameter.grad = grad
        optimizer.step()
        reference.step(grads)
        for name, view in EXPECTED.items():
            assert optimizer.views[parameters[name]] is view, name
        for name, parameter, expected in zip(parameters, parameters.values(), reference.weights, strict=True):
            torch.testing.assert_close(parameter.detach(), expected, rtol=1e-11, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


def test_a_projected_step_does_not_lengthen_the_weight_and_an_adam_step_does() -> None:
    lengths = {}
    for delta in (0.1, 0.0):  # with delta 0 nothing fires
        weight = nn.Parameter(initial()["channel"])
        optimizer = AdamP([weight], lr=0.05, delta=delta)
        generator = torch.Generator().manual_seed(0)
        for _ in range(30):
            weight.grad = gradient("channel", weight.detach(), generator)
            optimizer.step()
        lengths[delta] = float(weight.detach().norm() / initial()["channel"].norm()) - 1
    assert 0 <= lengths[0.1] < 0.5 * lengths[0.0]


# ---------------------------------------------------------------- the choice of the view


def test_one_radial_row_switches_the_channel_view_off() -> None:
    weight = initial()["channel"]
    grad = gradient("channel", weight, torch.Generator().manual_seed(0))
    assert choose_views([weight], [grad]) == [View.CHANNEL]
    grad[2] += weight[2]
    assert choose_views([weight], [grad]) == [View.NONE]


def test_edges_of_the_choice() -> None:
    zero, column, empty = torch.zeros(3, 4), torch.tensor([[1.0], [2.0]]), torch.empty(0, 4)
    assert choose_views([zero], [torch.ones(3, 4)]) == [View.CHANNEL]
    assert choose_views([column], [torch.tensor([[1.0], [1.0]])]) == [View.NONE]
    assert choose_views([empty, torch.ones(2)], [empty, torch.ones(2)]) == [View.NONE, View.VECTOR]
    assert choose_views([torch.ones(2, 2)], [torch.full((2, 2), math.nan)]) == [View.NONE]


def test_the_choice_is_the_same_alone_and_among_others() -> None:
    weights = list(initial().values())
    generator = torch.Generator().manual_seed(5)
    grads = [gradient(name, weight, generator) for name, weight in initial().items()]
    weights, grads = weights + [w.float() for w in weights], grads + [g.float() for g in grads]
    together = choose_views(weights, grads)
    assert together == [choose_views([w], [g])[0] for w, g in zip(weights, grads, strict=True)]
    assert together[:6] == list(EXPECTED.values())


# ---------------------------------------------------------------- what an optimizer owes


@pytest.fixture(params=["adamp", "adamp-nesterov", "sgdp"])
def make(request: pytest.FixtureRequest) -> Make:
    makers: dict[str, Make] = {
        "adamp": lambda params: AdamP(params, lr=0.01, weight_decay=0.1),
        "adamp-nesterov": lambda params: AdamP(params, lr=0.01, nesterov=True),
        "sgdp": lambda params: SGDP(params, lr=0.01, momentum=0.9),
    }
    return makers[request.param]


def run(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for name, parameter in parameters.items():
            parameter.grad = gradient(name, parameter.detach(), generator)
        optimizer.step()


def test_saved_and_loaded_goes_on_to_the_bit(make: Make) -> None:
    parameters = {name: nn.Parameter(weight) for name, weight in initial().items()}
    optimizer = make(list(parameters.values()))
    run(optimizer, parameters, range(3))
    others = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in parameters.items()}
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = make(list(others.values()))
    resumed.load_state_dict(torch.load(file, weights_only=True))
    run(optimizer, parameters, range(3, 6))
    run(resumed, others, range(3, 6))
    assert all(torch.equal(parameters[name], others[name]) for name in SHAPES)


def test_a_state_with_whole_steps_is_read() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = AdamP([weight])
    weight.grad = torch.ones(2, 2)
    optimizer.step()
    state = optimizer.state_dict()
    other = copy.deepcopy(state)
    other["state"][0]["step"] = 1
    optimizer.load_state_dict(other)
    assert torch.equal(optimizer.state[weight]["step"], state["state"][0]["step"])


def test_parameters_without_gradient_stay(make: Make) -> None:
    trained, frozen = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer = make([trained, frozen])
    trained.grad = torch.ones(2, 2)
    optimizer.step()
    assert torch.equal(frozen, torch.ones(2, 2))
    assert frozen not in optimizer.state
    assert not torch.equal(trained, torch.ones(2, 2))


def test_layouts_do_not_matter(make: Make) -> None:
    weight = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    layouts = [weight.clone(), weight.to(memory_format=torch.channels_last), torch.stack([weight, weight], -1)[..., 0]]
    ended = []
    for layout in layouts:
        parameter = nn.Parameter(layout)
        optimizer = make([parameter])
        for step in range(3):
            parameter.grad = gradient("conv", parameter.detach(), torch.Generator().manual_seed(step))
            optimizer.step()
        ended.append(parameter.detach())
    torch.testing.assert_close(ended[1], ended[0])
    torch.testing.assert_close(ended[2], ended[0])


def test_half_precision_follows_single(make: Make) -> None:
    generator = torch.Generator().manual_seed(0)
    grads = {name: gradient(name, weight, generator) for name, weight in initial().items()}
    ended, views = [], []
    for dtype in (torch.float32, torch.bfloat16):
        parameters = {name: nn.Parameter(weight.to(dtype)) for name, weight in initial().items()}
        optimizer = make(list(parameters.values()))
        for _ in range(3):
            for name, parameter in parameters.items():
                parameter.grad = grads[name].to(dtype)
            optimizer.step()
        ended.append([parameter.detach().float() for parameter in parameters.values()])
        views.append(list(optimizer.views.values()))
    assert views[0] == views[1]
    for single, half, start in zip(*ended, initial().values(), strict=True):
        torch.testing.assert_close(half, single, rtol=0.02, atol=0.01)
        assert not torch.equal(half, start.bfloat16().float())


def test_groups_have_their_own_values() -> None:
    fast, still = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer = AdamP([{"params": [fast]}, {"params": [still], "lr": 0.0}], lr=0.1)
    fast.grad, still.grad = torch.ones(2, 2), torch.ones(2, 2)
    loss = optimizer.step(lambda: 3.0)
    assert loss == 3.0
    assert torch.equal(still, torch.ones(2, 2))
    torch.testing.assert_close(fast.detach(), torch.full((2, 2), 0.9))


def test_sparse_gradients_are_refused_before_anything_moves(make: Make) -> None:
    dense, sparse = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer = make([dense, sparse])
    dense.grad, sparse.grad = torch.ones(2, 2), torch.ones(2, 2).to_sparse()
    with pytest.raises(ConfigError, match="dense"):
        optimizer.step()
    assert torch.equal(dense, torch.ones(2, 2))


@pytest.mark.parametrize("wrong", [{"lr": -1.0}, {"betas": (0.9, 1.0)}, {"delta": -0.1}])
def test_impossible_values_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        AdamP([nn.Parameter(torch.ones(1))], **wrong)
    with pytest.raises(ConfigError):
        Config.parse({"method": "adamp", **{key: list(value) if isinstance(value, tuple) else value for key, value in wrong.items()}})
    with pytest.raises(ConfigError):
        SGDP([nn.Parameter(torch.ones(1))], lr=0.1, momentum=1.0)


def test_the_configuration_builds_what_it_says() -> None:
    config = Config.parse({"method": "adamp", "lr": 0.02, "betas": [0.8, 0.9], "nesterov": True})
    optimizer = config.build([{"params": [nn.Parameter(torch.ones(1))], "weight_decay": 0.5}])
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["nesterov"], group["weight_decay"]) == (0.02, (0.8, 0.9), True, 0.5)
    assert config.curvature == "none"
    defaults = Config()
    assert (defaults.betas, defaults.eps, defaults.delta, defaults.wd_ratio, defaults.weight_decay) == ((0.9, 0.999), 1e-8, 0.1, 0.1, 0.0)
