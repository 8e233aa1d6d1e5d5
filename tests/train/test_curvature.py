"""Curvature as optimizers get it: against finite differences, in micro-batches, on ranks, and in the loop."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from _ranks import run_ranks
from fit_tiny import fit, start, weights
from tiny import TinyEncoder, TinyLoss
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from diptych.core.errors import ConfigError, DataError
from diptych.core.points import Encoded
from diptych.objectives.clip import Clip
from diptych.optimizers.adahessian import AdaHessian
from diptych.optimizers.diffgrad import DiffGrad
from diptych.optimizers.sophia import SophiaG, SophiaH
from diptych.train import curvature, sync
from diptych.train.contrastive import Contrastive

SEED, STEP, PAIRS = 7, 4, 8


class Recorder(torch.optim.SGD):
    """Asks for curvature and keeps what it gets."""

    def __init__(self, params: Any, kind: str, probe: str = "rademacher") -> None:
        super().__init__(params, lr=0.0)
        self.curvature, self.probe = kind, probe
        self.got: list[Mapping[Tensor, Tensor]] = []

    def curvature_due(self, step: int) -> bool:
        return step % 2 == 0

    def update_curvature(self, estimates: Mapping[Tensor, Tensor]) -> None:
        self.got.append(estimates)

    def figures(self) -> dict[str, float]:
        return {"estimates": len(self.got)}


def batch(part: slice = slice(None)) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    image_NCHW = torch.randint(0, 256, (PAIRS, 3, 8, 8), generator=generator, dtype=torch.uint8)
    text_NL = torch.randint(1, 64, (PAIRS, 3), generator=generator)
    return {"image_NCHW": image_NCHW[part], "text_NL": text_NL[part]}


def encoder(dropout: float = 0.0) -> TinyEncoder:
    model = TinyEncoder(dropout=dropout).double()
    model.logit_scale.data.fill_(1.0)  # a softmax that is neither flat nor sharp
    return model


Estimate = tuple[dict[str, Tensor], dict[str, Tensor], Tensor]


def estimate(kind: str, *, part: slice = slice(None), world: int = 1, seed: int = SEED, step: int = STEP, **how: Any) -> Estimate:
    """The estimate and the gradient of every parameter by name, and the loss."""
    model, accumulate, objective = how.get("model") or encoder(), how.get("accumulate", 1), how.get("objective") or Clip()
    named = dict(model.named_parameters()) | {f"objective.{name}": p for name, p in objective.named_parameters()}
    optimizer = Recorder(named.values(), kind, how.get("probe", "rademacher"))
    torch.manual_seed(3)
    backward = curvature.backward(optimizer, Contrastive(model, objective, accumulate, how.get("precision", "fp32")), seed)
    losses = backward(batch(part), step)
    sync.average_gradients(named.values(), world)
    sync.average(backward.to_average, world)
    backward.supply_curvature(step)
    (got,) = optimizer.got
    grads = {name: p.grad for name, p in named.items() if p.grad is not None}
    return {name: got[p] for name, p in named.items() if p in got}, grads, losses["loss"].detach()


def plain(model: nn.Module, objective: nn.Module, accumulate: int = 1) -> tuple[dict[str, Tensor], Tensor]:
    torch.manual_seed(3)
    model.zero_grad()
    loss = Contrastive(model, objective, accumulate).losses(batch(), STEP)["loss"]  # type: ignore[arg-type]
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, loss.detach()


@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_hutchinson_is_the_hessians_product(probe: str, accumulate: int) -> None:
    """Beside central differences of the gradient along the probe; with micro-batches, and with dropout's draws held."""
    found, grads, loss = estimate("hutchinson", probe=probe, accumulate=accumulate, model=encoder(dropout=0.3))
    model = encoder(dropout=0.3)
    expected_grads, expected_loss = plain(model, Clip(), accumulate)
    assert torch.equal(loss, expected_loss)
    for name, grad in expected_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-12, atol=1e-15)
    draws = dict(zip(dict(model.named_parameters()), curvature.probes(list(model.parameters()), probe, SEED, STEP), strict=True))
    sides = []
    for shift in (1e-5, -1e-5):
        moved = encoder(dropout=0.3)
        for name, p in moved.named_parameters():
            p.data += shift * draws[name]
        sides.append(plain(moved, Clip(), accumulate)[0])
    assert found.keys() == expected_grads.keys() == draws.keys()
    for name, z in draws.items():
        product = (sides[0][name] - sides[1][name]) / 2e-5
        assert product.abs().max() > 1e-4
        torch.testing.assert_close(found[name], z * product, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["hutchinson", "gauss-newton-bartlett"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_in_half_precision_the_estimate_is_nearly_the_same(kind: str, accumulate: int) -> None:
    """bf16 encodes; the estimate keeps the weights' precision and differs by rounding, in micro-batches too."""
    exact, _, _ = estimate(kind, model=encoder().float(), accumulate=accumulate)
    found, _, _ = estimate(kind, model=encoder().float(), accumulate=accumulate, precision="bf16")
    both = [torch.cat([each.flatten() for each in (part[name] for name in exact)]) for part in (exact, found)]
    assert both[1].dtype == torch.float32
    assert 0 < float((both[1] - both[0]).norm() / both[0].norm()) < 0.1


def test_sampled_labels_are_the_models_and_their_gradient_is_squared() -> None:
    found, grads, loss = estimate("gauss-newton-bartlett")
    model = encoder()
    expected_grads, expected_loss = plain(model, Clip())
    assert torch.equal(loss, expected_loss)
    for name, grad in expected_grads.items():
        assert torch.equal(grads[name], grad), "the sampled labels' gradient leaked"
    task = Contrastive(model, Clip())
    sampled, softmaxes = task.sampled_loss(batch(), STEP, curvature.generator(SEED, STEP))
    assert softmaxes == 2 * PAIRS
    assert sampled.item() != pytest.approx(expected_loss.item())
    for (name, p), grad in zip(model.named_parameters(), torch.autograd.grad(sampled, list(model.parameters())), strict=True):
        torch.testing.assert_close(found[name], 2 * PAIRS * grad**2, msg=str(p.shape))
    pieces, _, _ = estimate("gauss-newton-bartlett", accumulate=4)
    for name, value in found.items():
        torch.testing.assert_close(pieces[name], value)


def test_its_mean_is_the_gauss_newton_diagonal() -> None:
    """Of both towers and the temperature of a small model: J' H J with the softmaxes' exact H, by hand."""
    generator = torch.Generator().manual_seed(1)
    x_NK, y_NK = (torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    u, w = (torch.randn(4, 2, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    scale = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    flat = [u, w, scale]

    def logits(u: Tensor, w: Tensor, scale: Tensor) -> Tensor:
        return scale * (x_NK @ u) @ (y_NK @ w).T

    exact = [torch.zeros_like(p) for p in flat]
    jacobians = torch.autograd.functional.jacobian(logits, tuple(flat))
    for side in range(2):
        for row in range(3):
            scores = logits(*flat).detach()[row] if side == 0 else logits(*flat).detach()[:, row]
            p = scores.softmax(0)
            for total, jacobian in zip(exact, jacobians, strict=True):
                own = jacobian[row] if side == 0 else jacobian[:, row]  # [3, ...]
                mean = (p.view(-1, *[1] * (own.ndim - 1)) * own).sum(0)
                total.add_(((p.view(-1, *[1] * (own.ndim - 1)) * own**2).sum(0) - mean**2) / 6)
    sums, draws = [torch.zeros_like(p) for p in flat], 3000
    rng = torch.Generator().manual_seed(2)
    encoded = Encoded(x_NK @ u, y_NK @ w, scale)
    for _ in range(draws):
        loss, softmaxes = Clip().sampled_loss(encoded, rng)
        for total, g in zip(sums, torch.autograd.grad(loss, flat, retain_graph=True), strict=True):
            total.add_(softmaxes * g**2 / draws)
    error = torch.cat([(a - b).flatten() for a, b in zip(sums, exact, strict=True)]).norm()
    assert error < 0.08 * torch.cat([b.flatten() for b in exact]).norm()


def test_the_mean_over_probes_is_the_hessians_diagonal() -> None:
    """On a tanh network small enough for its exact Hessian; the error shrinks with the root of the number of probes."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = torch.randn(20, 4, dtype=torch.float64), torch.randn(20, 3, dtype=torch.float64)
    named, values = [name for name, _ in net.named_parameters()], list(net.parameters())

    def loss(*p: Tensor) -> Tensor:
        return (torch.func.functional_call(net, dict(zip(named, p, strict=True)), x) - y).square().mean()

    blocks = torch.autograd.functional.hessian(loss, tuple(values))
    exact = torch.cat([blocks[i][i].reshape(p.numel(), p.numel()).diagonal() for i, p in enumerate(values)])
    grads = torch.autograd.grad(loss(*values), values, create_graph=True)
    errors = {}
    total = torch.zeros_like(exact)
    for count in range(1, 1601):
        z = curvature.probes(values, "rademacher", 0, count)
        products = torch.autograd.grad(grads, values, z, retain_graph=True)
        total += torch.cat([(a * b).flatten() for a, b in zip(z, products, strict=True)])
        errors[count] = ((total / count - exact).norm() / exact.norm()).item()
    assert errors[1600] < 0.1
    assert errors[1600] < 0.75 * errors[400]


def test_draws_are_named_by_seed_and_step() -> None:
    for kind in ("hutchinson", "gauss-newton-bartlett"):
        first, again, other_step, other_seed = (
            estimate(kind, seed=seed, step=step)[0]["words.weight"] for seed, step in ((7, 4), (7, 4), (7, 6), (8, 4))
        )
        assert torch.equal(first, again)
        assert not torch.equal(first, other_step)
        assert not torch.equal(first, other_seed)
    parameters = [torch.zeros(3, 50), torch.zeros((), dtype=torch.float64), torch.zeros(50)]
    signs = curvature.probes(parameters, "rademacher", 0, 0)
    assert [(z.shape, z.dtype) for z in signs] == [(p.shape, p.dtype) for p in parameters]
    assert set(signs[0].flatten().tolist()) == {-1.0, 1.0}
    assert not torch.equal(signs[0][0], signs[0][1])
    gaussian = curvature.probes(parameters, "gaussian", 0, 0)[0]
    assert gaussian.std().item() == pytest.approx(1, abs=0.15)


def on_a_rank(rank: int, world: int) -> dict[str, Any]:
    part = slice(rank * PAIRS // world, (rank + 1) * PAIRS // world)
    found = {
        f"{kind} {local}": estimate(kind, part=part, world=world, objective=Clip(local_loss=local))[0]
        for kind in ("hutchinson", "gauss-newton-bartlett")
        for local in (True, False)
    }
    try:
        estimate("gauss-newton-bartlett", part=part, world=world, objective=Clip(gather_with_grad=False))
    except ConfigError as error:
        return {**found, "refused": str(error)}
    return found


def test_ranks_find_the_curvature_of_the_whole_batch() -> None:
    results = run_ranks(2, on_a_rank)
    for kind in ("hutchinson", "gauss-newton-bartlett"):
        whole = estimate(kind)[0]
        for result in results:
            for local in (True, False):
                found = result[f"{kind} {local}"]
                assert found.keys() == whole.keys()
                for name, value in whole.items():
                    torch.testing.assert_close(found[name], value, msg=f"{kind} {local} {name}")
    assert all("gather_with_grad" in result["refused"] for result in results)


def test_attention_is_differentiated_twice() -> None:
    from diptych.models.clip import create

    model, objective = create("digits-16", 0), Clip()
    optimizer = Recorder(model.parameters(), "hutchinson")
    generator = torch.Generator().manual_seed(0)
    image_NCHW = torch.randint(0, 256, (4, 3, 16, 16), generator=generator, dtype=torch.uint8)
    text_NL = torch.from_numpy(model.tokenizer.encode([f"the digit {row}" for row in range(4)]))
    backward = curvature.backward(optimizer, Contrastive(model, objective), 0)
    backward({"image_NCHW": image_NCHW, "text_NL": text_NL}, 0)
    backward.supply_curvature(0)
    names = {p: name for name, p in model.named_parameters()}
    flat = {names[p] for p, found in optimizer.got[0].items() if not found.abs().sum()}
    assert optimizer.got[0].keys() == names.keys()
    assert not {name for name in flat if "attn" in name}, f"no curvature in {flat}"


class Fused(nn.Module):
    """Insists on an attention kernel that has no second derivative."""

    def forward(self, encoded: Encoded) -> dict[str, Tensor]:
        heads = encoded.image_ND[None, None]
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            mixed = nn.functional.scaled_dot_product_attention(heads, heads, heads)
        return {"loss": (mixed[0, 0] * encoded.text_ND).sum()}


def test_what_cannot_be_supplied_is_refused() -> None:
    task = Contrastive(encoder(), TinyLoss())
    with pytest.raises(ConfigError, match="sampled from the model") as error:
        curvature.backward(SophiaG(task.model.parameters()), task, 0)
    assert "TinyLoss" in str(error.value)

    with pytest.raises(ConfigError, match="differentiated twice"):
        estimate("hutchinson", objective=Fused())


def test_a_linear_loss_has_no_curvature_and_unused_parameters_no_estimate() -> None:
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.slope, self.unused = (nn.Parameter(torch.ones((), dtype=torch.float64)) for _ in range(2))

        def forward(self, encoded: Encoded) -> dict[str, Tensor]:
            return {"loss": 3 * self.slope}

    found, grads, _ = estimate("hutchinson", objective=Linear())
    assert found == {"objective.slope": 0.0}
    assert grads == {"objective.slope": 3.0}


def test_curvature_that_is_not_finite_stops_before_the_optimizer_sees_it() -> None:
    optimizer = Recorder([nn.Parameter(torch.ones(1))], "hutchinson")
    backward = curvature.Hutchinson(Contrastive(encoder(), Clip()), optimizer, 0)
    backward.found = {optimizer.param_groups[0]["params"][0]: torch.tensor([float("inf")])}
    with pytest.raises(DataError, match="step 3"):
        backward.supply_curvature(3)
    assert not optimizer.got


def test_only_due_steps_pay() -> None:
    model = encoder()
    backward = curvature.backward(Recorder(model.parameters(), "gauss-newton-bartlett"), Contrastive(model, Clip()), 0)
    calls = []
    for step in range(3):
        model.calls = 0
        backward(batch(), step)
        backward.supply_curvature(step)
        calls.append(model.calls)
    assert calls == [2, 1, 2]
    assert backward.figures() == {"estimates": 2}
    assert type(curvature.backward(torch.optim.AdamW(model.parameters()), Contrastive(model, Clip()), 0)) is curvature.Backward


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "diffgrad": DiffGrad,
    "sophiag": partial(SophiaG, every=3),
    "sophiah": partial(SophiaH, every=3, delay=3),
    "adahessian": partial(AdaHessian, every=2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_stopping_and_going_on_changes_no_bit(name: str, tmp_path: Path) -> None:
    ended = []
    for folder, stops in (("straight", None), ("halted", 5)):
        run, state = start(tmp_path / folder, OPTIMIZERS[name], Clip, steps=8, epochs=None)
        if stops is not None:
            run.should_stop = lambda state=state, stops=stops: state.step == stops
            fit(run, state)
            assert state.step == stops
            run, state = start(tmp_path / folder, OPTIMIZERS[name], Clip, steps=8, epochs=None)
        fit(run, state)
        assert state.step == 8
        ended.append(weights(state))
    assert all(torch.equal(ended[0][key], ended[1][key]) for key in ended[0])
    record = json.loads((tmp_path / "straight" / "steps.jsonl").read_text().splitlines()[-1])
    assert ("win_rate" in record) == name.startswith("sophia")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_learns(name: str, tmp_path: Path) -> None:
    rates = {"adahessian": 0.003}
    build = partial(OPTIMIZERS[name], eps=1e-2) if name == "adahessian" else OPTIMIZERS[name]
    settings = {"epochs": 30, "clip_grad_norm": None, "checkpoint_every_steps": None, "caption": "first", "augment": {}}
    run, state = start(tmp_path, build, Clip, **settings)
    run.schedule = run.config.schedule.build(rates.get(name, 0.005), run.total_steps)
    fit(run, state)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert sum(losses[-5:]) < 0.85 * sum(losses[:5])
