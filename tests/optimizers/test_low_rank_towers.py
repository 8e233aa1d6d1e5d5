"""Low-rank optimizers on real towers: every linear map is named and reached, q, k, v and the output of fused attention included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diptych.models import clip
from diptych.optimizers import adalora, gradnormlorp
from diptych.optimizers.adalora import AdaLoRA
from diptych.optimizers.linears import is_linear, maps_in
from diptych.optimizers.low_rank import LowRankAdamW
from diptych.train.run import parameter_groups

IN_BLOCK = ("attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
BLOCKS = {"digits-16": (3, 2), "vit-micro-40": (3, 1)}
Make = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
MAKERS: dict[str, Make] = {
    "adalora": lambda groups: planned(adalora.Config(rank=4, target_rank=2, lr=0.01).build(groups)),
    "weight-norm": gradnormlorp.Config(rank=4, lr=0.01).build,
    "galore": gradnormlorp.Config(variant="galore", rank=4, lr=0.01).build,
    "dora": gradnormlorp.Config(variant="dora", rank=2, lora_rank=4, lr=0.01).build,
}


def planned(optimizer: AdaLoRA) -> AdaLoRA:
    optimizer.plan(20)
    return optimizer


def linears(name: str) -> list[str]:
    """Every linear map of both towers, written out from what the architecture is."""
    image, text = BLOCKS[name]
    found = [f"visual.transformer.resblocks.{block}.{part}" for block in range(image) for part in IN_BLOCK]
    found += [f"transformer.resblocks.{block}.{part}" for block in range(text) for part in IN_BLOCK]
    return [f"clip.{each}" for each in [*found, "visual.proj", "text_projection"]]


def steps(model: clip.DualEncoder, optimizer: torch.optim.Optimizer, count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    image_NCHW = torch.randint(0, 256, (6, 3, model.image_size, model.image_size), dtype=torch.uint8, generator=generator)
    text_NL = torch.randint(1, 1000, (6, 8), generator=generator)
    text_NL[:, -1] = 49407
    for _ in range(count):
        optimizer.zero_grad()
        image_ND, text_ND, scale = model(image_NCHW, text_NL)
        nn.functional.cross_entropy(scale * image_ND @ text_ND.T, torch.arange(6)).backward()
        optimizer.step()


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("name", BLOCKS)
def test_every_linear_map_of_both_towers_is_reached(name: str, kind: str) -> None:
    model = clip.create(name, seed=0)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = MAKERS[kind](parameter_groups(model.named_parameters()))
    steps(model, optimizer, 2)
    parameters = dict(model.named_parameters())
    assert {each for each, value in parameters.items() if is_linear(each, value)} == set(linears(name))
    for each in linears(name):
        count = maps_in(each, parameters[each])
        assert count == (3 if each.endswith("in_proj_weight") else 1)
        for part, (now, before) in enumerate(zip(parameters[each].chunk(count), start[each].chunk(count), strict=True)):
            assert not torch.equal(now, before), f"{each}, map {part}"
            if kind == "adalora":  # the change is that of an adapter: of its rank, and its own in each of q, k and v
                assert torch.linalg.matrix_rank((now - before).double().detach(), atol=1e-6) <= 4
            elif kind == "galore":
                assert "exp_avg" in optimizer.state[parameters[each]]
                assert optimizer.state[parameters[each]]["exp_avg"].numel() < now.numel() * count
    if kind == "adalora":
        frozen = set(parameters) - set(linears(name))
        assert all(torch.equal(parameters[each], start[each]) for each in frozen)
        assert set(optimizer.ranks()) == set(linears(name))  # type: ignore[attr-defined]


def test_the_adapters_gradients_are_those_of_a_parametrized_model() -> None:
    """The chain rule on the weight against autograd through torch's parametrization, in a fused attention."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
    names = ("in_proj_weight", "out_proj.weight")
    optimizer = AdaLoRA([(name, attention.get_parameter(name)) for name in names], rank=3, target_rank=2, penalty=0.0, total_steps=9)
    triplets = {name: optimizer.triplets(attention.get_parameter(name)) for name in names}
    scales = {name: optimizer.scale(optimizer.param_groups[0], attention.get_parameter(name)) for name in names}
    leaves = {}
    for name, each in triplets.items():
        each.E.normal_()
        leaves[name] = [value.clone().requires_grad_() for value in (each.A, each.E, each.B)]
        with torch.no_grad():
            weight = attention.get_parameter(name)
            weight.copy_(optimizer.state[weight]["base"] + adalora.delta(each.A, each.E, each.B, scales[name]).view_as(weight))
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    attention(x, x, x, need_weights=False)[0].square().sum().backward()
    found = {
        name: adalora.factor_gradients(parameter.grad.view(len(each.E), -1, 8), each.A, each.E, each.B, scales[name])
        for (name, each), parameter in zip(triplets.items(), map(attention.get_parameter, names), strict=True)
        if parameter.grad is not None
    }
    for name in names:
        owner = attention if name == "in_proj_weight" else attention.out_proj
        base = optimizer.state[attention.get_parameter(name)]["base"]
        owner.get_parameter(name.rpartition(".")[2]).data.copy_(base)
    for name in names:
        owner = attention if name == "in_proj_weight" else attention.out_proj
        nn.utils.parametrize.register_parametrization(owner, name.rpartition(".")[2], Added(leaves[name], scales[name]))
    attention(x, x, x, need_weights=False)[0].square().sum().backward()
    for name in names:
        for factor, leaf in zip("AEB", leaves[name], strict=True):
            torch.testing.assert_close(found[name][factor], leaf.grad, rtol=1e-9, atol=1e-12)


class Added(nn.Module):
    def __init__(self, factors: list[Tensor], scale: float) -> None:
        super().__init__()
        self.factors, self.scale = factors, scale

    def forward(self, weight: Tensor) -> Tensor:
        return weight + adalora.delta(*self.factors, self.scale).view_as(weight)


def test_a_timm_tower_is_reached_too() -> None:
    from timm.models.vision_transformer import VisionTransformer

    tower = VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=5, global_pool="map")
    named = [(f"visual.trunk.{name}", parameter) for name, parameter in tower.named_parameters()]
    start = {name: parameter.detach().clone() for name, parameter in named}
    optimizer = planned(adalora.Config(rank=4, target_rank=2, lr=0.01).build([{"params": named}]))
    blocks = [f"blocks.{block}.{part}.weight" for block in range(2) for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    pool = [f"attn_pool.{part}.weight" for part in ("q", "kv", "proj", "mlp.fc1", "mlp.fc2")]
    expected = {f"visual.trunk.{name}" for name in [*blocks, *pool, "head.weight"]}
    assert set(optimizer.ranks()) == expected
    maps = {name: len(ranks) for name, ranks in optimizer.ranks().items()}
    assert {name.rpartition("trunk.")[2] for name, count in maps.items() if count == 3} == {
        f"blocks.{block}.attn.qkv.weight" for block in range(2)
    }
    assert [name for name, count in maps.items() if count == 2] == ["visual.trunk.attn_pool.kv.weight"]
    for _ in range(2):
        optimizer.zero_grad()
        tower(torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))).square().sum().backward()
        optimizer.step()
    changed = {name for name, parameter in named if not torch.equal(parameter, start[name])}
    assert changed == expected


def test_low_rank_moments_take_little_memory() -> None:
    """Summed over the tensors of the states, linear maps only: GaLore under a quarter of AdamW's, weight-norm with no copy of v."""

    def state_bytes(optimizer: torch.optim.Optimizer) -> int:
        chosen = [
            p
            for group in optimizer.param_groups
            for p, name in zip(group["params"], group["param_names"], strict=True)
            if is_linear(name, p)
        ]
        return sum(each.nbytes for p in chosen for each in tensors(optimizer.state[p]))

    def tensors(value: Any) -> list[Tensor]:
        if isinstance(value, Tensor):
            return [value]
        return [
            each
            for part in (value.values() if isinstance(value, dict) else value if isinstance(value, list) else ())
            for each in tensors(part)
        ]

    found = {}
    for kind, make in {**MAKERS, "adamw": torch.optim.AdamW}.items():
        model = clip.create("digits-16", seed=0)
        optimizer = make(parameter_groups(model.named_parameters()))
        steps(model, optimizer, 1)
        found[kind] = state_bytes(optimizer)
    assert found["galore"] < 0.25 * found["adamw"]
    assert found["weight-norm"] < 0.30 * found["adamw"]
    assert found["dora"] < 1.0 * found["adamw"]
    assert found["adalora"] < 1.3 * found["adamw"]


def test_names_decide_and_without_names_the_shape_does() -> None:
    matrix, vector = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(3))
    optimizer = gradnormlorp.Config(variant="galore").build([{"params": [matrix, vector]}])
    assert isinstance(optimizer, LowRankAdamW)
    assert [group["rank"] for group in optimizer.param_groups] == [8, None]
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 1]
    tables = (
        "token_embedding.weight",
        "positional_embedding",
        "visual.trunk.pos_embed",
        "text.transformer.embed_tokens.weight",
        "objective.head.weight",
    )
    assert not any(is_linear(name, matrix) for name in tables)
