"""Robust weight signatures: the projection, which layers are shallow, patching and taking off, and the whole way through directories."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from diptych.adapt import rws, states
from diptych.core.errors import ConfigError, DataError
from diptych.models import clip

State = dict[str, Tensor]


def plain_network(classes: int = 4) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, bias=False), nn.Conv2d(4, 2, 1), nn.Flatten(), nn.Linear(8, classes)
    )


def moved(state: Mapping[str, Tensor], seed: int, by: float = 0.1) -> State:
    rng = torch.Generator().manual_seed(seed)
    return {
        name: tensor + by * torch.randn(tensor.shape, generator=rng) if tensor.is_floating_point() else tensor.clone()
        for name, tensor in state.items()
    }


@pytest.fixture
def models() -> tuple[State, State, State, State]:
    origin = dict(plain_network().state_dict())
    return origin, moved(origin, 1), moved(origin, 2), moved(origin, 3)


def test_a_signature_is_orthogonal_to_the_clean_change_tensor_by_tensor(models: tuple[State, ...]) -> None:
    origin, standard, robust, _ = models
    names = rws.select(origin, 3)
    signature = rws.extract(origin, standard, robust, names)
    for name in names:
        clean, change = (state[name].double() - origin[name].double() for state in (standard, robust))
        assert abs(float((signature[name] * clean).sum())) < 1e-12
        share = (change - signature[name]) / clean  # what was taken off is a multiple of the clean change
        assert float(share.std(correction=0)) < 1e-9
        assert abs(float(share.mean())) > 1e-6


def test_a_tensor_that_clean_training_left_alone_keeps_its_whole_change(models: tuple[State, ...]) -> None:
    origin, standard, robust, _ = models
    standard["0.weight"] = origin["0.weight"].clone()
    signature = rws.extract(origin, standard, robust, ["0.weight"])
    assert torch.equal(signature["0.weight"], robust["0.weight"].double() - origin["0.weight"].double())


@pytest.mark.parametrize("square", [False, True])
def test_patched_then_unpatched_weights_are_the_old_ones(models: tuple[State, ...], square: bool) -> None:
    origin, standard, *robust = models
    names = rws.select(origin, 2)
    signatures = [rws.extract(origin, standard, state, names) for state in robust]
    patched = rws.apply(standard, signatures, [0.7, 0.4], square)
    assert not torch.equal(patched["0.weight"], standard["0.weight"])
    back = rws.remove(patched, signatures, [0.7, 0.4], square)
    assert all(torch.allclose(back[name], tensor, rtol=0, atol=1e-6) for name, tensor in standard.items())
    assert all(patched[name] is tensor for name, tensor in standard.items() if name not in names)


def test_strengths_are_linear_and_squared_only_on_demand(models: tuple[State, ...]) -> None:
    origin, standard, robust, _ = models
    signatures = [rws.extract(origin, standard, robust, ["0.weight"])]
    shift = {
        (strength, square): (rws.apply(standard, signatures, [strength], square)["0.weight"].double() - standard["0.weight"].double())
        for strength, square in [(1.0, False), (0.5, False), (0.5, True)]
    }
    assert torch.allclose(shift[0.5, False], 0.5 * shift[1.0, False], atol=1e-6)
    assert torch.allclose(shift[0.5, True], 0.25 * shift[1.0, False], atol=1e-6)
    with pytest.raises(ConfigError, match="do not match"):
        rws.apply(standard, signatures, [1.0, 1.0])


def test_a_model_of_other_shapes_is_refused_and_another_head_is_not(models: tuple[State, ...]) -> None:
    origin, standard, robust, _ = models
    signatures = [rws.extract(origin, standard, robust, rws.select(origin, 3))]
    other_head = dict(plain_network(classes=9).state_dict())
    patched = rws.apply(other_head, signatures)
    assert patched["5.weight"] is other_head["5.weight"]
    assert not torch.equal(patched["0.weight"], other_head["0.weight"])
    with pytest.raises(DataError, match=r"other shapes(.|\n)*0\.weight"):
        rws.apply({**standard, "0.weight": torch.zeros(4, 3, 3, 3)}, signatures)
    with pytest.raises(DataError, match="other names"):
        rws.extract(origin, standard, {}, ["0.weight"])


def test_convolutions_are_counted_in_order_with_their_biases(models: tuple[State, ...]) -> None:
    assert rws.select(models[0], 2) == ("0.weight", "0.bias", "2.weight")
    with pytest.raises(ConfigError, match="at most 3 convolutions"):
        rws.select(models[0], 4)


def test_of_a_vision_transformer_the_patches_and_first_blocks() -> None:
    model = clip.create("digits-16", 0)
    state = states.of_module(model)
    blocks = model.config["vision_cfg"]["layers"]
    names = rws.select(state, 1)
    in_block = [name for name in state if name.startswith("visual.transformer.resblocks.0.")]
    assert {"visual.conv1.weight", *in_block} <= set(names)
    assert all(name.startswith(("visual.conv1", "visual.ln_pre", "visual.transformer.resblocks.0.")) for name in names)
    everything = rws.select(state, blocks)
    assert not any(word in name for name in everything for word in ("visual.proj", "ln_post", "token_embedding", "logit_scale"))
    assert not any(name.startswith("transformer.") for name in everything)
    with pytest.raises(ConfigError, match=f"at most {blocks} transformer"):
        rws.select(state, blocks + 1)


def test_of_a_residual_tower_the_stem_and_first_blocks() -> None:
    state = states.of_module(clip.create("rn-nano-64", 0))
    stem, block = set(rws.select(state, 1)), set(rws.select(state, 2))
    assert {"visual.conv1.weight", "visual.bn1.weight", "visual.conv3.weight", "visual.bn3.bias"} <= stem
    assert not any(".layer" in name for name in stem)
    assert block - stem == {n for n in state if n.startswith("visual.layer1.0.") and not n.endswith(rws.STATISTICS)}
    assert not any("attnpool" in name for name in rws.select(state, 5))


def test_norms_are_averaged_at_any_depth_and_counters_stay() -> None:
    state = states.of_module(clip.create("rn-nano-64", 0))
    state["visual.bn1.num_batches_tracked"] = torch.tensor(11)
    robust = [moved(state, 1), moved(state, 2)]
    found = rws.average_norms(state, robust)
    for name in ("visual.layer4.0.bn2.running_var", "visual.layer2.0.downsample.0.weight", "visual.bn1.bias"):
        assert torch.allclose(found[name], (robust[0][name] + robust[1][name]) / 2, atol=1e-6)
    assert int(found["visual.bn1.num_batches_tracked"]) == 11
    assert found["visual.layer4.0.conv1.weight"] is state["visual.layer4.0.conv1.weight"]


Saver = Callable[[str, Mapping[str, Tensor]], str]


@pytest.fixture
def saver(tmp_path: Path) -> Saver:
    def save(name: str, state: Mapping[str, Tensor]) -> str:
        model = clip.create("digits-16", 0)
        states.install(model, state)
        clip.save(model, tmp_path / name, {})
        return str(tmp_path / name)

    return save


def test_a_model_is_patched_from_directories(saver: Saver) -> None:
    model = clip.create("digits-16", 0)
    origin = {name: tensor.clone() for name, tensor in states.of_module(model).items()}
    standard, robust = moved(origin, 1, 0.02), moved(origin, 2, 0.02)
    directories = {"pretrained": saver("pretrained", origin), "robust": (saver("robust", robust),)}
    states.install(model, standard)
    for quantise, close in (("none", 1e-6), ("linear", 1e-3)):
        states.install(model, standard)
        config = rws.Config(**directories, keep=1, strength=(0.5,), quantise=quantise, levels=256)
        compressor = config.build()
        assert compressor.compress(model, ()) is model
        names = rws.select(origin, 1)
        expected = rws.apply(standard, [rws.extract(origin, standard, robust, names)], [0.5])
        assert all(torch.allclose(tensor, expected[name], rtol=0, atol=close) for name, tensor in states.of_module(model).items())
        figures = compressor.report(model)
        assert figures["tensors"] == list(names)
        count = sum(origin[name].numel() for name in names)
        assert figures["signature_bytes"] == (4 * count if quantise == "none" else count + 16 * len(names))
        assert figures["weights_bytes"] > 4 * count


def test_another_architecture_is_refused(saver: Saver, tmp_path: Path) -> None:
    clip.save(clip.create("rn-nano-64", 0), tmp_path / "resnet", {})
    model = clip.create("digits-16", 0)
    good = saver("good", states.of_module(model))
    with pytest.raises(DataError, match=r"other names(.|\n)*resnet"):
        rws.Config(pretrained=good, robust=(str(tmp_path / "resnet"),)).build().compress(model, ())


@pytest.mark.parametrize(
    "wrong",
    [
        {"strength": [1.0, 0.5]},
        {"strength": [-1.0], "official_square": True},
        {"quantise": "log", "levels": 4},
        {"robust": []},
        {"keep": 0},
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        rws.Config.parse({"method": "rws", "pretrained": "a", "robust": ["b"], **wrong})
