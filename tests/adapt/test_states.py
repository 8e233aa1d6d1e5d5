"""States are refused with names and shapes when they do not fit; a compressed model stays compressed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from diptych.adapt import states
from diptych.core.errors import DataError
from diptych.models import clip


def test_names_and_shapes_that_differ_are_named() -> None:
    with pytest.raises(DataError, match=r"other names(.|\n)*'b'"):
        states.require_alike({"a": torch.zeros(2)}, {"a": torch.zeros(2), "b": torch.zeros(1)}, "models.0")
    with pytest.raises(DataError, match=r"models\.0(.|\n)*\[2\], \[3\]"):
        states.require_alike({"a": torch.zeros(2)}, {"a": torch.zeros(3)}, "models.0")
    states.require_alike({"a": torch.zeros(2), "b": torch.zeros(1)}, {"a": torch.ones(2)}, "models.0", names=["a"])


def test_a_directory_gives_the_weights_and_another_architecture_is_refused(tmp_path: Path) -> None:
    model, other = clip.create("digits-16", 0), clip.create("digits-16", 1)
    clip.save(other, tmp_path / "other", {})
    found = states.of_directory(str(tmp_path / "other"), model)
    assert all(torch.equal(tensor, found[name]) for name, tensor in other.clip.state_dict().items())
    with pytest.raises(DataError, match="other names"):
        states.of_directory(str(tmp_path / "other"), clip.create("rn-nano-64", 0))
    with pytest.raises(DataError, match="missing"):
        states.of_directory(str(tmp_path / "nothing"), model)


def test_installing_keeps_pruned_weights_at_zero() -> None:
    layer = nn.Linear(3, 2)
    layer.register_buffer("weight_mask", torch.tensor([[True, False, True], [False, True, True]]))
    assert set(states.of_module(layer)) == {"weight", "bias"}
    states.install(layer, {"weight": torch.full((2, 3), 5.0), "bias": torch.ones(2)})
    assert torch.equal(layer.weight.detach(), 5.0 * layer.get_buffer("weight_mask"))
    assert torch.equal(layer.bias.detach(), torch.ones(2))
    with pytest.raises(DataError, match="other names"):
        states.install(layer, {"weight": torch.ones(2, 3)})


def test_evaluation_mode_gives_every_module_its_own_mode_back() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Dropout())
    model[0].eval()
    with states.evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in (model, model[0], model[1])] == [True, False, True]
