"""What settings change about the towers: same gradients from less memory, fewer patches, learning rates by depth, compiled code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_run import log, run, weights

from diptych.core.errors import ConfigError, ResourceError
from diptych.models import clip
from diptych.train import towers
from diptych.train.config import TrainConfig
from diptych.train.run import _first_state, parameter_groups

MODEL = "vit-micro-40"


def config(**settings: Any) -> TrainConfig:
    return TrainConfig.parse({"steps": 2, **settings})


def test_layers_learn_the_slower_the_deeper() -> None:
    model = clip.create(MODEL, 0)
    scales = towers.layer_scales(model, 0.5)
    assert scales.keys() == dict(model.named_parameters()).keys()
    layers = len(model.clip.visual.transformer.resblocks)
    assert scales["clip.visual.proj"] == scales["clip.text_projection"] == scales["clip.logit_scale"] == 1.0
    assert scales[f"clip.visual.transformer.resblocks.{layers - 1}.mlp.c_fc.weight"] == 0.5
    assert scales["clip.visual.conv1.weight"] == scales["clip.visual.positional_embedding"] == 0.5 ** (layers + 1)
    assert scales["clip.token_embedding.weight"] == 0.5 ** (len(model.clip.transformer.resblocks) + 1)
    residual = towers.layer_scales(clip.create("rn-nano-64", 0), 0.5)
    assert residual["clip.visual.layer4.0.conv1.weight"] == 0.5
    assert residual["clip.visual.conv1.weight"] == residual["clip.visual.bn1.weight"] == 0.5**5
    assert residual["clip.visual.attnpool.q_proj.weight"] == 1.0


def test_every_parameter_is_in_one_group_with_its_scale() -> None:
    model = clip.create(MODEL, 0)
    scales = towers.layer_scales(model, 0.5)
    groups = parameter_groups(model.named_parameters(), (), scales)
    names = [name for group in groups for name in group["param_names"]]
    assert sorted(names) == sorted(scales)
    for group in groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            assert group.get("layer_scale", 1.0) == scales[name]
            assert parameter is dict(model.named_parameters())[name]
            assert (group.get("weight_decay") != 0.0) == (parameter.ndim >= 2 and "ln" not in name)


def test_an_objective_sets_rates_for_what_it_owns() -> None:
    model = clip.create(MODEL, 0)
    objective: Any = torch.nn.Module()
    objective.critic, objective.head = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    objective.lr_scales = {"critic": 10.0}

    def build(groups: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(list(groups), lr=0.1)

    for decay in (None, 0.5):
        state = _first_state(model, objective, build, config(layer_decay=decay), 1, 2)
        scale = {name: group["lr_scale"] for group in state.optimizer.param_groups for name in group["param_names"]}
        assert scale["objective.critic.weight"] == scale["objective.critic.bias"] == 10
        assert scale["objective.head.weight"] == scale["clip.visual.proj"] == 1
        assert (scale["clip.visual.conv1.weight"] < 1) == (decay is not None)


def test_unknown_layers_are_refused() -> None:
    model = clip.create(MODEL, 0)
    model.clip.visual.trunk = torch.nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="layers of this tower are not known"):
        towers.layer_scales(model, 0.9)


def test_a_run_with_layer_decay_moves_deep_layers_less(dataset_root: Path, tmp_path: Path) -> None:
    moved = {}
    start = {name: value.numpy() for name, value in clip.create(MODEL, 0).clip.state_dict().items()}
    for name, decay in (("flat", None), ("decayed", 0.1)):
        run(dataset_root, tmp_path / name, changes={"steps": 2, "epochs": None, "layer_decay": decay})
        moved[name] = {key: float(np.abs(value - start[key]).max()) for key, value in weights(tmp_path / name).items()}
    layers = len(clip.create(MODEL, 0).clip.visual.transformer.resblocks)
    assert moved["decayed"]["visual.proj"] == pytest.approx(moved["flat"]["visual.proj"], rel=0.1)
    assert moved["decayed"]["visual.conv1.weight"] < 2 * 0.1 ** (layers + 1) * moved["flat"]["visual.conv1.weight"]


def test_activation_checkpoints_change_no_gradient() -> None:
    found = []
    image_NCHW = torch.randint(0, 256, (4, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for settings in ({}, {"checkpoint_activations": True}):
        model = clip.create(MODEL, 0).train()
        towers.prepare(model, config(**settings))
        text_NL = torch.from_numpy(model.tokenizer.encode_cut(["one", "two", "three", "four"]))
        (model.encode_image(image_NCHW) * model.encode_text(text_NL)).sum().backward()
        found.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
        assert model.clip.visual.transformer.grad_checkpointing == model.clip.transformer.grad_checkpointing == bool(settings)
    assert all(torch.equal(left, right) for left, right in zip(*found, strict=True))


def test_patches_are_dropped_in_training_only() -> None:
    model = clip.create(MODEL, 0)
    towers.prepare(model, config(patch_dropout=0.5))
    seen: list[int] = []
    model.clip.visual.transformer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    image_NCHW = torch.zeros(2, 3, 40, 40, dtype=torch.uint8)
    for training in (True, False):
        model.train(training).encode_image(image_NCHW)
    patches = (40 // model.clip.visual.patch_size[0]) ** 2
    assert seen == [1 + patches // 2, 1 + patches]
    assert model.clip.state_dict().keys() == clip.create(MODEL, 0).clip.state_dict().keys()


@pytest.mark.parametrize("settings", [{"patch_dropout": 0.5}, {"checkpoint_activations": True}])
def test_towers_without_the_means_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="ModifiedResNet"):
        towers.prepare(clip.create("rn-nano-64", 0), config(**settings))


GROWING = {"image_sizes": [{"size": 24, "share": 0.5}], "text_lengths": [{"tokens": 4, "share": 0.5}], "patch_dropout": 0.25}


def test_growing_pictures_stop_and_go_on_exactly(dataset_root: Path, tmp_path: Path) -> None:
    run(dataset_root, tmp_path / "straight", changes=GROWING)
    steps = iter(range(100))
    run(dataset_root, tmp_path / "stopped", changes=GROWING, should_stop=lambda: next(steps) == 1)
    run(dataset_root, tmp_path / "stopped", changes=GROWING)
    ours, theirs = weights(tmp_path / "stopped"), weights(tmp_path / "straight")
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    assert np.isfinite(log(tmp_path / "straight")[-1]["loss"])


def test_no_compiler_is_said_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ResourceError, match="no-such-compiler"):
        towers.compiled(clip.create(MODEL, 0), "cpu")


def test_compiled_towers_have_no_second_derivative() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    optimizer.curvature = "hutchinson"  # type: ignore[attr-defined]
    towers.refuse_second_derivatives(config(), optimizer)
    with pytest.raises(ConfigError, match="differentiated twice"):
        towers.refuse_second_derivatives(config(compile=True), optimizer)


@pytest.mark.slow
def test_compiled_towers_train_as_plain_ones(dataset_root: Path, tmp_path: Path) -> None:
    for name, settings in (("plain", {}), ("compiled", {"compile": True})):
        run(dataset_root, tmp_path / name, changes={"steps": 3, "epochs": None, "log_every": 1, **settings})
    for ours, theirs in zip(log(tmp_path / "compiled"), log(tmp_path / "plain"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
    assert weights(tmp_path / "compiled").keys() == weights(tmp_path / "plain").keys()
