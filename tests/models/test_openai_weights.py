from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from torch.nn.functional import normalize

from diptych.core.errors import DataError
from diptych.models.openai_weights import build_openai

GOLDEN = Path(__file__).parents[1] / "golden" / "vectors" / "clip.npz"


@pytest.fixture(scope="module")
def case():
    with np.load(GOLDEN) as golden:
        return {key.removeprefix("model/"): golden[key] for key in golden.files if key.startswith("model/")}


@pytest.fixture(scope="module")
def state(case):
    return {key.removeprefix("sd/"): value for key, value in case.items() if key.startswith("sd/")}


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-6), (torch.float32, 1e-3)])
def test_features_of_the_original_implementation(case, state, dtype, rtol):
    model = build_openai(state, dtype, text_heads=int(case["in/transformer_heads"]))
    assert (model.image_size, model.context_length) == (int(case["in/image_resolution"]), int(case["in/context_length"]))
    with torch.no_grad():
        image_ND = model.encode_image(torch.tensor(case["in/image"], dtype=dtype), normalize=False)
        text_ND = model.encode_text(torch.tensor(case["in/tokens"]), normalize=False)
        logits = model.logit_scale.exp() * normalize(image_ND, dim=-1) @ normalize(text_ND, dim=-1).T
    for name, value in (("image_features", image_ND), ("text_features", text_ND), ("logits_per_image", logits)):
        np.testing.assert_allclose(value.numpy(), case[f"out/{name}"], rtol=rtol, atol=rtol * np.abs(case[f"out/{name}"]).max())


def test_resnets_too():
    config = {"image_size": 64, "layers": [1, 2, 1, 1], "width": 32}
    text = {"context_length": 8, "vocab_size": 50, "width": 64, "heads": 1, "layers": 1}
    torch.manual_seed(0)
    reference = open_clip.CLIP(24, config, text, quick_gelu=True).eval()
    model = build_openai(reference.state_dict(), torch.float32)
    image_NCHW = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(model.encode_image(image_NCHW), reference.encode_image(image_NCHW, normalize=True))


def test_other_states_are_refused(state):
    with pytest.raises(DataError, match="layout"):
        build_openai({name: value for name, value in state.items() if name != "text_projection"}, torch.float32)
    with pytest.raises(DataError, match="layout"):
        build_openai({name: value for name, value in state.items() if name != "visual.ln_pre.weight"}, torch.float32)
