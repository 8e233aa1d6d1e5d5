"""The compressor fuses a tower, keeps what it gives, and says what it did."""

from __future__ import annotations

import pytest
import torch
from tests.models.fastvit import encoder

from diptych.compress.magnitude import Config as Magnitude
from diptych.compress.reparameterize import Config
from diptych.core.errors import ConfigError
from diptych.models import clip


def test_features_stay_and_parameters_go() -> None:
    model, compressor = encoder(), Config().build()
    image_NCHW = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    text_NL = torch.tensor([[49406, 5, 49407], [49406, 6, 49407]])
    with torch.no_grad():
        expected = model.encode_image(image_NCHW), model.encode_text(text_NL)
        assert compressor.compress(model, ()) is model
        found = model.encode_image(image_NCHW), model.encode_text(text_NL)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-5)
    assert torch.equal(found[1], expected[1])
    assert (expected[0][0] - expected[0][1]).abs().max() > 1e-3, "the pictures are told apart"
    figures = compressor.report(model)
    assert figures["parameters_after"] == sum(parameter.numel() for parameter in model.parameters()) < figures["parameters_before"]
    assert figures["fused"] == len(model.structure)


def test_towers_without_such_blocks_are_refused() -> None:
    with pytest.raises(ConfigError, match="nothing to fuse"):
        Config().build().compress(clip.create("digits-16", 0), ())


def test_pruned_blocks_are_refused_and_a_pruned_text_tower_is_not() -> None:
    model = encoder()
    Magnitude(sparsity=0.5, towers="image").build().compress(model, ())
    with pytest.raises(ConfigError, match="zeros would fill up"):
        Config().build().compress(model, ())
    model = encoder()
    Magnitude(sparsity=0.5, towers="text").build().compress(model, ())
    assert Config().build().compress(model, ()) is model
