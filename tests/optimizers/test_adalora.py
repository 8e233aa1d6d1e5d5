"""AdaLoRA: where the budget goes, that it resumes, and what it leaves for peft."""

from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from diptych.core.errors import ConfigError
from diptych.optimizers.adalora import AdaLoRA, Config, orthogonality
from diptych.optimizers.peft_export import export_peft, lora_pairs
from diptych.optimizers.rank_budget import RankAllocator, Schedule, Triplets


class Parallel(nn.Module):
    """Linear maps side by side, each with its own target of planted rank."""

    def __init__(self, ranks: list[int], side: int = 12) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.maps = nn.ModuleList(nn.Linear(side, side, bias=False) for _ in ranks)
        self.x = torch.randn(512, side, generator=generator)
        shifts = [torch.randn(side, r, generator=generator) @ torch.randn(r, side, generator=generator) for r in ranks]
        self.targets = [linear.weight.detach() + shift for linear, shift in zip(self.maps, shifts, strict=True)]

    def loss(self, rows: slice) -> Tensor:
        x = self.x[rows]
        parts = [nn.functional.mse_loss(linear(x), x @ W.T) for linear, W in zip(self.maps, self.targets, strict=True)]
        return torch.stack(parts).mean()


def train(model: Parallel, optimizer: torch.optim.Optimizer, steps: range, total: int, lr: float = 0.02) -> None:
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / total)
        optimizer.zero_grad()
        start = step * 64 % 512
        model.loss(slice(start, start + 64)).backward()
        optimizer.step()


def test_the_budget_finds_the_planted_ranks() -> None:
    ranks, total = [4, 0, 2, 0], 300
    torch.manual_seed(0)
    model = Parallel(ranks)
    optimizer = AdaLoRA(
        model.named_parameters(), rank=6, target_rank=1.5, init_warmup=30, final_warmup=120, mask_interval=5, total_steps=total
    )
    with torch.no_grad():
        before = model.loss(slice(None)).item()
    train(model, optimizer, range(total), total)
    assert [kept for [kept] in optimizer.ranks().values()] == ranks
    assert model.loss(slice(None)).item() < 0.02 * before


def test_resumed_it_goes_on_to_the_bit() -> None:
    torch.manual_seed(0)
    one, other = Parallel([2, 0]), Parallel([2, 0])
    other.load_state_dict(one.state_dict())
    hyper = {"rank": 4, "target_rank": 1, "init_warmup": 2, "final_warmup": 4, "mask_interval": 2, "total_steps": 16}
    optimizer, resumed = AdaLoRA(one.named_parameters(), **hyper), AdaLoRA(other.named_parameters(), **hyper)
    train(one, optimizer, range(8), 16)
    file = io.BytesIO()
    torch.save({"model": one.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    train(one, optimizer, range(8, 16), 16)
    other.targets = one.targets
    train(other, resumed, range(8, 16), 16)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert optimizer.ranks() == resumed.ranks()


def test_the_penalty_and_its_gradients_are_autograds() -> None:
    generator = torch.Generator().manual_seed(0)
    pairs = [(torch.randn(p, 3, 5, generator=generator).double(), torch.randn(p, 7, 3, generator=generator).double()) for p in (1, 3)]
    leaves = [(A.clone().requires_grad_(), B.clone().requires_grad_()) for A, B in pairs]
    eye = torch.eye(3).double()
    norms = [torch.linalg.matrix_norm(X @ X.mT - eye) for A, B in leaves for X in (A, B.mT)]
    expected = torch.cat(norms).mean()
    expected.backward()
    found, grads = orthogonality(pairs)
    torch.testing.assert_close(found, expected.detach())
    for (A, B), grad in zip(leaves, grads, strict=True):
        torch.testing.assert_close(grad["A"], A.grad)
        torch.testing.assert_close(grad["B"], B.grad)
    _, [at_rest] = orthogonality([(torch.eye(3, 5).unsqueeze(0), torch.eye(7, 3).unsqueeze(0))])
    assert torch.equal(at_rest["A"], torch.zeros(1, 3, 5))


def test_the_schedule_and_its_edges() -> None:
    schedule = Schedule(initial=12, target=6, total_steps=26, init_warmup=4, final_warmup=6, mask_interval=3)
    assert [schedule.at(step) for step in (0, 4, 6, 20, 21, 25)] == [(12, False), (12, False), (10, True), (6, False), (6, True), (6, True)]
    for wrong in ({"init_warmup": 20}, {"target": 13}):
        with pytest.raises(ConfigError):
            Schedule(**{"initial": 12, "target": 6, "total_steps": 26, "init_warmup": 4, "final_warmup": 6, "mask_interval": 3, **wrong})
    whole = Triplets(torch.ones(1, 2, 3), torch.ones(1, 2, 1), torch.ones(1, 3, 2))
    allocator = RankAllocator(Schedule(2, 2, 4, 0, 1, 1))
    assert allocator.after_step(3, [whole], [{"A": whole.A, "E": whole.E, "B": whole.B}]) is None  # nothing to cut is not an error
    assert whole.E.count_nonzero() == 2


def test_others_stay_or_train_and_objectives_always_do() -> None:
    def built(others: str) -> tuple[dict[str, nn.Parameter], dict[str, Tensor]]:
        named = {
            name: nn.Parameter(torch.ones(shape))
            for name, shape in (("a.weight", (4, 4)), ("a.bias", (4,)), ("objective.head.weight", (3, 3)))
        }
        optimizer = Config(rank=2, target_rank=1, others=others).build([{"params": list(named.items())}])  # type: ignore[arg-type]
        optimizer.plan(10)
        start = {name: value.detach().clone() for name, value in named.items()}
        for _ in range(2):
            for value in named.values():
                value.grad = torch.randn(value.shape, generator=torch.Generator().manual_seed(0))
            optimizer.step()
        return named, start

    for others, changed in (("freeze", {"a.weight", "objective.head.weight"}), ("train", {"a.weight", "a.bias", "objective.head.weight"})):
        named, start = built(others)
        assert {name for name in named if not torch.equal(named[name], start[name])} == changed


def test_refusals() -> None:
    weight = nn.Parameter(torch.ones(4, 4))
    optimizer = AdaLoRA([weight], rank=2, target_rank=1)
    weight.grad = torch.ones(4, 4)
    with pytest.raises(ConfigError, match="plan"):
        optimizer.step()
    with pytest.raises(ConfigError, match="float32"):
        AdaLoRA([nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))])
    with pytest.raises(ConfigError, match="nothing to adapt"):
        Config().build([{"params": [nn.Parameter(torch.ones(4))]}])


# ---------------------------------------------------------------- export


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.attn(x, x, x, need_weights=False)[0])
        return out


def adapted(model: Small) -> AdaLoRA:
    optimizer = Config(lr=0.05, rank=3, target_rank=2, init_warmup=1, final_warmup=2, mask_interval=1).build(
        [{"params": list(model.named_parameters())}]
    )
    optimizer.plan(8)
    for step in range(8):
        optimizer.zero_grad()
        model(torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(step))).square().sum().backward()
        optimizer.step()
    return optimizer


def test_the_adapters_add_up_to_what_was_learnt(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Small()
    base = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = adapted(model)
    assert sum(map(sum, optimizer.ranks().values())) == 2 * 5  # five maps: q, k, v, the output, the linear layer
    for name, pair in lora_pairs(optimizer, model).items():
        torch.testing.assert_close(base[name] + pair.B @ pair.A, model.get_parameter(name).detach(), rtol=1e-5, atol=1e-6)
    export_peft(optimizer, model, tmp_path / "adapter", "small")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert config["peft_type"] == "LORA"
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert set(config["target_modules"]) == {"attn", "fc"}
    assert {name.split(".lora_")[0] for name in tensors} == {
        f"base_model.model.{name}" for name in ("attn", "attn.base_layer.out_proj", "fc")
    }
    for name, weight in (("attn", "attn.in_proj_weight"), ("attn.base_layer.out_proj", "attn.out_proj.weight"), ("fc", "fc.weight")):
        A, B = (tensors[f"base_model.model.{name}.lora_{factor}.weight"] for factor in "AB")
        assert len(A) == config["rank_pattern"]["attn" if "attn" in name else "fc"]
        torch.testing.assert_close(base[weight] + B @ A, model.get_parameter(weight).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
def test_peft_opens_it(tmp_path: Path) -> None:
    import peft

    torch.manual_seed(0)
    model = Small()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = adapted(model)
    x, distances = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(9)), []
    for doubles_output in (False, True):  # one of the two is what this version of peft takes it for
        export_peft(optimizer, model, tmp_path, "small", doubles_output=doubles_output)
        fresh = Small()
        fresh.load_state_dict(start)
        wrapped = peft.PeftModel.from_pretrained(fresh, tmp_path).eval()
        with torch.no_grad():
            distances.append(float((wrapped(x) - model.eval()(x)).abs().max()))
    assert min(distances) < 1e-5 < max(distances)


def test_what_peft_cannot_reach_is_refused(tmp_path: Path) -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Parameter(torch.randn(4, 4))

    model = Bare()
    optimizer = AdaLoRA(model.named_parameters(), rank=2, target_rank=1, total_steps=9)
    with pytest.raises(ConfigError, match="no rank left"):
        export_peft(optimizer, model, tmp_path)
    model.proj.grad = torch.ones(4, 4)
    optimizer.step()
    with pytest.raises(ConfigError, match="projections"):
        export_peft(optimizer, model, tmp_path)
    kept = Config(projections=False, rank=2, target_rank=1)
    with pytest.raises(ConfigError, match="nothing to adapt"):
        kept.build([{"params": list(model.named_parameters())}])
