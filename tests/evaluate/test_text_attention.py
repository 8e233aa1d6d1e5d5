from __future__ import annotations

import pytest
import torch

from diptych.core.errors import ConfigError, DataError
from diptych.evaluate.text_attention import attention_gradients
from diptych.models.clip import DualEncoder, build

TEXTS = ["a photo of a red circle", "two cats", "a very small green triangle on a blue ground near a tree"]


def tower(**text) -> DualEncoder:
    config = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 4, "layers": 1, "width": 8, "head_width": 8, "patch_size": 4},
        "text_cfg": {"context_length": 20, "width": 16, "heads": 2, "layers": 4, "mlp_ratio": 2.0, **text},
    }
    own = {key: config["text_cfg"].pop(key) for key in ("quick_gelu", "custom_text") if key in text}
    torch.manual_seed(0)
    model = build({**config, **own}).double()
    with torch.no_grad():
        for parameter in model.clip.parameters():  # away from the small numbers of the start, where attention is flat
            parameter.normal_(std=0.4)
    return model


@pytest.fixture(scope="module")
def model():
    return tower()


@pytest.fixture(scope="module")
def image():
    return torch.randn(len(TEXTS), 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def ids(model, texts=TEXTS):
    return torch.from_numpy(model.tokenizer.encode(texts))


def cosine(model, image, text):
    with torch.no_grad():
        return torch.nn.functional.cosine_similarity(model.encode_text(text), image)


@pytest.mark.parametrize(
    "text", [{}, {"quick_gelu": True}, {"custom_text": True, "ls_init_value": 0.5}, {"proj_bias": True, "custom_text": True}]
)
def test_the_towers_own_cosine_comes_out(image, text):
    model = tower(**text)
    found = attention_gradients(model, image, ids(model), -3)
    assert torch.allclose(found.cosine_N, cosine(model, image, ids(model)), atol=1e-12)
    assert [tuple(map_NHLL.shape) for map_NHLL in found.attention] == [(3, 2, 20, 20)] * 3
    assert all(torch.allclose(map_NHLL.sum(-1), torch.ones(3, 2, 20, dtype=torch.float64)) for map_NHLL in found.attention)
    assert all((map_NHLL.triu(1) == 0).all() for map_NHLL in found.attention)


def nudged(model, layer, nudge, image, text):
    """The cosines with something added to the attention maps of one layer: the tower as it is, its attention replaced from outside."""
    attn = model.clip.transformer.resblocks[layer].attn

    def explicit(_module, args, kwargs, _output):
        query, key, value = (
            part.unflatten(-1, (2, 8)).transpose(1, 2) for part in (args[0] @ attn.in_proj_weight.T + attn.in_proj_bias).chunk(3, -1)
        )
        maps = (query @ key.transpose(-1, -2) / 8**0.5 + kwargs["attn_mask"]).softmax(-1) + nudge
        return attn.out_proj((maps @ value).transpose(1, 2).flatten(2)), None

    handle = attn.register_forward_hook(explicit, with_kwargs=True)
    try:
        return cosine(model, image, text)
    finally:
        handle.remove()


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_gradients_are_slopes_of_the_cosine(model, image, layer):
    text = ids(model)
    gradient = attention_gradients(model, image, text, 0).gradient[layer]
    direction = torch.randn(gradient.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(layer))
    step = 1e-5
    slope = (nudged(model, layer, step * direction, image, text) - nudged(model, layer, -step * direction, image, text)) / (2 * step)
    assert slope.abs().min() > 1e-4
    assert torch.allclose((gradient * direction).sum((1, 2, 3)), slope, rtol=1e-5)


def test_captions_of_a_batch_do_not_meet(model, image):
    whole = attention_gradients(model, image, ids(model), -3)
    for row in range(len(TEXTS)):
        alone = attention_gradients(model, image[[row]], ids(model)[[row]], -3)
        for layer in range(3):
            assert torch.allclose(whole.gradient[layer][row], alone.gradient[layer][0], atol=1e-12)


def test_a_cut_batch_has_the_corner_of_the_full_one(model, image):
    full, cut = ids(model), torch.from_numpy(model.tokenizer.encode_cut(TEXTS))
    length = cut.shape[1]
    assert length < full.shape[1]
    for wide, narrow in zip(
        attention_gradients(model, image, full, -3).gradient, attention_gradients(model, image, cut, -3).gradient, strict=True
    ):
        assert torch.allclose(wide[..., :length, :length], narrow, atol=1e-12)
        assert (wide[..., length:, :] == 0).all()


def test_frozen_weights_and_no_grad_make_no_difference_and_weights_get_no_gradient(image):
    model = tower()
    expected = attention_gradients(model, image, ids(model), -2).gradient
    assert all(parameter.grad is None for parameter in model.parameters())
    model.requires_grad_(False)
    with torch.no_grad():
        found = attention_gradients(model, image, ids(model), -2).gradient
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-15) for a, b in zip(expected, found, strict=True))


def test_start_layers(model, image):
    text = ids(model)
    assert [len(attention_gradients(model, image, text, start).attention) for start in (-3, -1, 0, 2, -9)] == [3, 1, 4, 2, 4]
    with pytest.raises(ConfigError, match="No layer"):
        attention_gradients(model, image, text, 4)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ({"custom_text": True, "no_causal_mask": True}, "causal end token"),
        ({"custom_text": True, "pool_type": "last"}, "causal end token"),
        ({"qk_norm": True}, "attention of the kind"),
    ],
)
def test_other_towers_are_refused(image, text, fault):
    model = tower(**text)
    with pytest.raises(DataError, match=fault):
        attention_gradients(model, image, ids(model), -3)


def test_half_precision_is_refused(image):
    model = tower().bfloat16()
    with pytest.raises(DataError, match="half precision"):
        attention_gradients(model, image, ids(model), -3)
