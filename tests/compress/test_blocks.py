"""The walk reaches every weight matrix of both towers' blocks, with exactly the inputs that it is multiplied with."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests.compress.pairs import batch_of, timm_model
from torch import Tensor, nn

from diptych.compress.blocks import Inputs, checkpointed, collect, matrices, towers, walk, watched
from diptych.core.errors import ConfigError
from diptych.models import clip


@pytest.fixture(scope="module")
def native() -> clip.DualEncoder:
    return clip.create("digits-16", 0).eval()


@pytest.fixture(scope="module")
def timm() -> clip.DualEncoder:
    return timm_model()


def inputs_of(model: clip.DualEncoder, kind: Any, batch: dict[str, Tensor]) -> dict[str, tuple[Inputs, Tensor]]:
    """What the walk saw: for every matrix the block's inputs and its own."""
    (tower,) = towers(model, kind)
    found: dict[str, tuple[Inputs, Tensor]] = {}

    def add(name: str, inputs: Inputs, x_NLI: Tensor) -> None:
        assert name not in found, "used once a batch"
        found[name] = (inputs, x_NLI)

    for name, block, states in walk(model, tower, [batch]):
        collect(block, name, states, add)
    return found


def native_by_hand(tower: nn.Module, prefix: str, x: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    """open_clip's blocks written out: softmax attention a head at a time, GELU by its error function."""
    seen: dict[str, Tensor] = {}
    for i, block in enumerate(tower.resblocks):
        name, attn = f"{prefix}.{i}", block.attn
        h = nn.functional.layer_norm(x, (x.shape[-1],), block.ln_1.weight, block.ln_1.bias)
        seen[f"{name}.attn.in_proj_weight"] = h
        width = attn.head_dim
        q, k, v = (h @ attn.in_proj_weight.T + attn.in_proj_bias).split(h.shape[-1], dim=-1)
        heads = []
        for head in range(attn.num_heads):
            part = slice(head * width, (head + 1) * width)
            logits = q[..., part] @ k[..., part].transpose(-1, -2) / math.sqrt(width)
            heads.append((logits if mask is None else logits + mask).softmax(-1) @ v[..., part])
        merged = torch.cat(heads, dim=-1)
        seen[f"{name}.attn.out_proj.weight"] = merged
        x = x + merged @ attn.out_proj.weight.T + attn.out_proj.bias
        h = nn.functional.layer_norm(x, (x.shape[-1],), block.ln_2.weight, block.ln_2.bias)
        seen[f"{name}.mlp.c_fc.weight"] = h
        h = h @ block.mlp.c_fc.weight.T + block.mlp.c_fc.bias
        h = h * (1 + torch.erf(h / math.sqrt(2))) / 2
        seen[f"{name}.mlp.c_proj.weight"] = h
        x = x + h @ block.mlp.c_proj.weight.T + block.mlp.c_proj.bias
    return seen


def timm_by_hand(trunk: nn.Module, prefix: str, x: Tensor) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    for i, block in enumerate(trunk.blocks):
        name, attn = f"{prefix}.{i}", block.attn
        h = nn.functional.layer_norm(x, (x.shape[-1],), block.norm1.weight, block.norm1.bias, block.norm1.eps)
        seen[f"{name}.attn.qkv.weight"] = h
        q, k, v = (h @ attn.qkv.weight.T + attn.qkv.bias).split(h.shape[-1], dim=-1)
        heads = []
        for head in range(attn.num_heads):
            part = slice(head * attn.head_dim, (head + 1) * attn.head_dim)
            heads.append((q[..., part] @ k[..., part].transpose(-1, -2) / math.sqrt(attn.head_dim)).softmax(-1) @ v[..., part])
        merged = torch.cat(heads, dim=-1)
        seen[f"{name}.attn.proj.weight"] = merged
        x = x + merged @ attn.proj.weight.T + attn.proj.bias
        h = nn.functional.layer_norm(x, (x.shape[-1],), block.norm2.weight, block.norm2.bias, block.norm2.eps)
        seen[f"{name}.mlp.fc1.weight"] = h
        h = h @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
        h = h * (1 + torch.erf(h / math.sqrt(2))) / 2
        seen[f"{name}.mlp.fc2.weight"] = h
        x = x + h @ block.mlp.fc2.weight.T + block.mlp.fc2.bias
    return seen


def first_hidden(block: nn.Module, run: Any) -> Tensor:
    """The block's input, taken while the untouched model runs."""
    seen: list[Tensor] = []
    handle = block.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        run()
    handle.remove()
    return seen[0]


def assert_same(found: dict[str, tuple[Inputs, Tensor]], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected), "every matrix, in order"
    for name, x_NLI in expected.items():
        torch.testing.assert_close(found[name][1], x_NLI.detach(), rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_native_image_tower(native: clip.DualEncoder) -> None:
    batch, visual = batch_of(native), native.clip.visual
    x = first_hidden(visual.transformer.resblocks[0], lambda: native.encode_image(batch["image_NCHW"]))
    assert_same(inputs_of(native, "image", batch), native_by_hand(visual.transformer, "clip.visual.transformer.resblocks", x, None))


def test_native_text_tower(native: clip.DualEncoder) -> None:
    batch = batch_of(native)
    x = first_hidden(native.clip.transformer.resblocks[0], lambda: native.encode_text(batch["text_NL"]))
    mask = torch.full((x.shape[1], x.shape[1]), -math.inf).triu(1)
    assert_same(inputs_of(native, "text", batch), native_by_hand(native.clip.transformer, "clip.transformer.resblocks", x, mask))


def test_timm_image_tower_and_a_text_tower_of_its_own(timm: clip.DualEncoder) -> None:
    batch, trunk = batch_of(timm), timm.clip.visual.trunk
    x = first_hidden(trunk.blocks[0], lambda: timm.encode_image(batch["image_NCHW"]))
    assert_same(inputs_of(timm, "image", batch), timm_by_hand(trunk, "clip.visual.trunk.blocks", x))
    x = first_hidden(timm.clip.text.transformer.resblocks[0], lambda: timm.encode_text(batch["text_NL"]))
    mask = torch.full((x.shape[1], x.shape[1]), -math.inf).triu(1)
    assert_same(inputs_of(timm, "text", batch), native_by_hand(timm.clip.text.transformer, "clip.text.transformer.resblocks", x, mask))


def test_stages_of_a_hierarchical_image_tower() -> None:
    model = clip.create("shapes-swin-16", 0).eval()
    batch, trunk = batch_of(model), model.clip.visual.trunk
    seen: dict[str, Tensor] = {}
    inside = {name: module for name, module in trunk.layers.named_modules() if isinstance(module, nn.Linear)}

    def look(name: str, args: tuple[Tensor]) -> None:
        seen[name] = args[0]

    handles = [module.register_forward_pre_hook(lambda _, args, name=name: look(name, args)) for name, module in inside.items()]
    with torch.no_grad():
        model.encode_image(batch["image_NCHW"])
    for handle in handles:
        handle.remove()
    found = {name: x_NLI for name, (_, x_NLI) in inputs_of(model, "image", batch).items()}
    assert {name.removeprefix("clip.visual.trunk.layers.").removesuffix(".weight") for name in found} == set(inside)
    for name, x in seen.items():
        torch.testing.assert_close(found[f"clip.visual.trunk.layers.{name}.weight"], x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("which", ["native", "timm"])
def test_every_linear_parameter_inside_the_blocks_is_named(which: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(which)
    named = {matrix.name: matrix.weight for tower in towers(model) for matrix in tower.matrices()}
    blocks = tuple(f"{name}." for tower in towers(model) for name in tower.blocks)
    inside = {name: p for name, p in model.named_parameters() if p.ndim >= 2 and name.startswith(blocks)}
    assert named.keys() == inside.keys()
    assert all(named[name] is inside[name] for name in inside)
    assert len(named) == 4 * sum(len(tower.blocks) for tower in towers(model))


def test_padding_is_left_out(native: clip.DualEncoder) -> None:
    batch = batch_of(native)
    lengths = [2 + len(text.split()) for text in ("a", "two words and more of them", "three words here")]
    for inputs, x_NLI in inputs_of(native, "text", batch).values():
        assert inputs.valid_NL is not None
        assert inputs.valid_NL.sum(dim=1).tolist() == lengths
        assert inputs.tokens(x_NLI).shape == (sum(lengths), x_NLI.shape[-1])
    longer = {**batch, "text_NL": nn.functional.pad(batch["text_NL"], (0, 4))}
    short = {name: inputs.tokens(x_NLI) for name, (inputs, x_NLI) in inputs_of(native, "text", batch).items()}
    for name, (inputs, x_NLI) in inputs_of(native, "text", longer).items():
        torch.testing.assert_close(inputs.tokens(x_NLI), short[name])


def test_pictures_have_no_padding(native: clip.DualEncoder) -> None:
    assert all(inputs.valid_NL is None for inputs, _ in inputs_of(native, "image", batch_of(native)).values())


def test_later_blocks_see_what_was_done_to_earlier_ones(native: clip.DualEncoder) -> None:
    batch, (tower,) = batch_of(native), towers(native, "image")
    first, second = list(tower.blocks)[:2]
    hidden = {name: states[0].hidden_NLD.clone() for name, _, states in walk(native, tower, [batch])}
    weight = tower.blocks[first].mlp.c_proj.weight
    before = weight.detach().clone()
    try:
        changed = {}
        for name, block, states in walk(native, tower, [batch]):
            changed[name] = states[0].hidden_NLD.clone()
            if name == first:
                block.mlp.c_proj.weight.data.zero_()
        assert torch.equal(changed[first], hidden[first])
        assert not torch.allclose(changed[second], hidden[second])
    finally:
        weight.data.copy_(before)


def test_nothing_is_left_behind(native: clip.DualEncoder) -> None:
    batch = batch_of(native)
    before = native.encode_image(batch["image_NCHW"])
    inputs_of(native, "image", batch)
    with checkpointed([native.clip.visual.transformer.resblocks[0]]):
        pass
    assert torch.equal(native.encode_image(batch["image_NCHW"]), before)
    assert not any("forward" in vars(module) or module._forward_pre_hooks for module in native.modules())


def test_an_error_inside_leaves_nothing_behind(native: clip.DualEncoder) -> None:
    block = native.clip.visual.transformer.resblocks[0]
    with pytest.raises(ZeroDivisionError), watched(block, "b", lambda *_: None), checkpointed([block]):
        raise ZeroDivisionError
    assert not any("forward" in vars(module) or module._forward_pre_hooks for module in block.modules())


def test_a_resnet_has_no_blocks() -> None:
    resnet = clip.create("rn-nano-64", 0)
    assert len(towers(resnet, "text")) == 1
    with pytest.raises(ConfigError, match="image tower has no transformer blocks"):
        towers(resnet)


def test_matrices_of_a_block_that_is_a_layer_itself() -> None:
    assert [matrix.name for matrix in matrices(nn.Linear(2, 3), "head")] == ["head.weight"]
