"""Towers whose last block works for the token that is read: features and gradients of the whole block."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from diptych.models import readout
from diptych.models.clip import DualEncoder, build
from diptych.models.tokenizer import EOT, SOT

TEXT = {"context_length": 12, "vocab_size": EOT + 1, "width": 24, "heads": 3, "layers": 2}
VISION = {"image_size": 16, "layers": 2, "width": 32, "head_width": 8, "patch_size": 8}
TEXT_NL = torch.tensor([[SOT, 7, 9, 11, EOT, 0], [SOT, EOT, 0, 0, 0, 0], [SOT, 5, 6, 7, 8, EOT]])


def model_of(vision: dict[str, object] | None = None, text: dict[str, object] | None = None) -> DualEncoder:
    torch.manual_seed(0)
    return build({"embed_dim": 16, "vision_cfg": VISION | (vision or {}), "text_cfg": TEXT | (text or {})}).double()


def worked_out(model: DualEncoder) -> dict[str, Tensor]:
    """Features of both towers and the gradients of a function of them."""
    image_NCHW = torch.linspace(-2, 2, 3 * 3 * 16 * 16, dtype=torch.float64).view(3, 3, 16, 16).sin()
    model.zero_grad()
    image_ND, text_ND = model.encode_image(image_NCHW), model.encode_text(TEXT_NL)
    (image_ND @ text_ND.T).square().sum().backward()
    return {"image": image_ND, "text": text_ND} | {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


def no_hook(*_: object) -> None:
    """Looks on."""


def watch(model: DualEncoder) -> None:
    """Makes both towers work whole, as for anybody who looks inside."""
    for transformer in (model.clip.transformer, model.clip.visual.transformer):
        transformer.resblocks[-1].mlp.register_forward_hook(no_hook)


@pytest.mark.parametrize("vision", [{}, {"final_ln_after_pool": True}, {"ls_init_value": 0.1}, {"no_ln_pre": True}], ids=str)
def test_features_and_gradients_are_those_of_the_whole_block(vision: dict[str, object]) -> None:
    model = model_of(vision)
    assert readout.reads_class_token(model.clip.visual)
    cut = worked_out(model)
    watch(model)
    assert not readout.can_be_cut(model.clip.transformer)
    whole = worked_out(model)
    assert cut.keys() == whole.keys()
    for name, expected in whole.items():
        torch.testing.assert_close(cut[name], expected, rtol=1e-9, atol=1e-12, msg=name)


def test_the_last_mlp_sees_one_token_a_sequence() -> None:
    model = model_of()
    seen: list[tuple[int, ...]] = []
    activation = model.clip.transformer.resblocks[-1].mlp.gelu
    activation.register_full_backward_hook(lambda _module, grad, _out: seen.append(tuple(grad[0].shape)))
    worked_out(model)
    assert seen == [(3, 1, 96)]


def test_checkpointed_blocks_give_the_same() -> None:
    model = model_of()
    plain = worked_out(model)
    model.clip.set_grad_checkpointing(True)
    for name, value in worked_out(model).items():
        torch.testing.assert_close(value, plain[name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.clip.visual.transformer.resblocks[-1].attn.register_forward_pre_hook(no_hook),
        lambda model: setattr(model.clip.visual.transformer.resblocks[-1].attn, "forward", no_hook),
        lambda model: setattr(model.clip.visual.transformer, "_compiled_call_impl", no_hook),
        lambda model: setattr(model.clip.visual.transformer, "batch_first", False),
    ],
    ids=["hook", "forward", "compiled", "tokens first"],
)
def test_whoever_changes_what_a_block_does_gets_the_whole_block(change: Callable[[DualEncoder], object]) -> None:
    model = model_of()
    assert readout.can_be_cut(model.clip.visual.transformer)
    change(model)
    assert not readout.can_be_cut(model.clip.visual.transformer)


@pytest.mark.parametrize(
    "vision", [{"pool_type": "avg"}, {"attentional_pool": True, "attn_pooler_queries": 4}, {"output_tokens": True}], ids=str
)
def test_towers_that_pool_otherwise_are_left_alone(vision: dict[str, object]) -> None:
    assert not readout.reads_class_token(model_of(vision).clip.visual)
