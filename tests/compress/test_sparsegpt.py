"""SparseGPT prunes exactly what it says and makes up for it: its error on the inputs is below that of the same mask without the update."""

from __future__ import annotations

import pytest
import torch
from tests.compress.pairs import batches_of
from torch import Tensor

from diptych.compress.blocks import towers
from diptych.compress.magnitude import masks_of
from diptych.compress.sparsegpt import Config, reconstruct
from diptych.core.errors import ConfigError, DataError
from diptych.models import clip


def layer(outputs: int = 12, inputs: int = 32) -> tuple[Tensor, Tensor]:
    """A weight and correlated inputs `[T, I]`."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(inputs, inputs, generator=generator)
    return torch.randn(outputs, inputs, generator=generator), torch.randn(200, inputs, generator=generator) @ mixing


@pytest.mark.parametrize(("pattern", "columns"), [("unstructured", 128), ("unstructured", 8), ("2:4", 16), ("1:4", 128)])
def test_the_update_lowers_the_error_of_its_own_mask(pattern: str, columns: int) -> None:
    weight, x = layer()
    keep, updated = reconstruct(weight, 2 * x.T @ x / len(x), 0.5, pattern, columns)
    assert not updated[~keep].any()
    error, without = ((x @ (weight - other).T).square().mean() for other in (updated, weight * keep))
    assert error < (0.9 if pattern == "1:4" else 0.7) * without
    if pattern == "unstructured":
        assert float((~keep).float().mean()) == pytest.approx(0.5, abs=0.01)
    else:
        assert (keep.view(12, -1, 4).sum(-1) == int(pattern[0])).all()


def test_one_column_is_the_exact_solution() -> None:
    """Removing one weight: the optimal brain surgeon's formula, w_j / [H^-1]_jj times its column, on the later columns."""
    weight, x = layer(1, 6)
    weight[0, 0] = 1e-6  # the smallest, and first: all others may still move
    hessian = 2 * x.T @ x / len(x)
    keep, updated = reconstruct(weight, hessian, 1 / 6, damping=1e-9)
    assert keep.tolist() == [[False] + [True] * 5]
    inverse = torch.linalg.inv(hessian.double())
    expected = weight.double() - weight[0, 0] / inverse[0, 0] * inverse[0]
    torch.testing.assert_close(updated.double(), expected, rtol=1e-4, atol=1e-8)


def test_features_that_never_occur_lose_their_weights() -> None:
    weight, x = layer()
    x[:, 3] = 0
    keep, updated = reconstruct(weight, 2 * x.T @ x, 0.25)
    assert not keep[:, 3].any()
    assert not updated[:, 3].any()
    assert torch.isfinite(updated).all()


def test_the_official_threshold_takes_one_more_a_block() -> None:
    weight, x = layer()
    exact, _ = reconstruct(weight, x.T @ x, 0.5, columns=32)
    official, _ = reconstruct(weight, x.T @ x, 0.5, columns=32, official_threshold=True)
    assert int((~official).sum()) == int((~exact).sum()) + 1


def test_a_model_is_pruned_in_its_blocks_and_keeps_its_masks() -> None:
    model = clip.create("digits-16", 0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    batches = batches_of(model)
    Config(sparsity=0.5).build().compress(model, batches)
    masks = masks_of(model)
    assert masks.keys() == {matrix.name for tower in towers(model) for matrix in tower.matrices()}
    for name, parameter in model.named_parameters():
        if name in masks:
            assert not parameter[~masks[name]].any()
            assert float((~masks[name]).float().mean()) == pytest.approx(0.5, abs=0.01)
            assert not torch.equal(parameter, before[name] * masks[name]), "what stays has moved"
        else:
            assert torch.equal(parameter, before[name])


def test_refusals() -> None:
    model = clip.create("digits-16", 0)
    with pytest.raises(DataError, match="no calibration pairs"):
        Config().build().compress(model, [])
    with pytest.raises(ConfigError, match="does not divide"):
        Config(pattern="2:4", columns=6).build().compress(model, batches_of(model, 1))
    with pytest.raises(ConfigError, match="greater than 0"):
        Config.parse({"method": "sparsegpt", "damping": 0})
