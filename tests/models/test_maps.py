"""Feature maps and tokens: what the towers give before they pool, with the features of a plain pass beside."""

from __future__ import annotations

import pytest
import torch

from diptych.models import clip
from diptych.models.maps import image_map, real_tokens, text_tokens


@pytest.mark.parametrize("name", ["vit-nano-64", "rn-nano-64"])
def test_maps_stand_beside_the_features_of_a_plain_pass(name: str) -> None:
    model = clip.create(name, 0).eval()
    image_NCHW = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    map_NChw, feature_ND = image_map(model, image_NCHW)
    assert map_NChw.ndim == 4
    assert map_NChw.shape[-1] == map_NChw.shape[-2] > 1
    torch.testing.assert_close(feature_ND, model.encode_image(image_NCHW, normalize=False))


def test_tokens_stand_beside_the_features_and_padding_is_not_real() -> None:
    model = clip.create("vit-nano-64", 0).eval()
    text_NL = torch.from_numpy(model.tokenizer.encode_cut(["a", "two words and more of them"]))
    token_NLC, feature_ND, real_NL = text_tokens(model, text_NL)
    assert token_NLC.shape[:2] == text_NL.shape == real_NL.shape
    torch.testing.assert_close(feature_ND, model.encode_text(text_NL, normalize=False))
    assert real_NL.sum(dim=1).tolist() == [3, 8]  # with the start and the end
    assert torch.equal(real_NL, real_tokens(model.clip, text_NL))
    longer_NL = torch.nn.functional.pad(text_NL, (0, 3))
    again_NLC, _, longer = text_tokens(model, longer_NL)
    torch.testing.assert_close(again_NLC[:, : text_NL.shape[1]][real_NL], token_NLC[real_NL])
    assert not longer[:, -3:].any()
