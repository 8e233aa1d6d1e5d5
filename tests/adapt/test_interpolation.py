"""WiSE-FT and soups: the arithmetic, the buffers, the recipe, and models from directories."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diptych.adapt import states
from diptych.adapt.interpolation import SoupConfig, WiseFTConfig, greedy_soup, interpolate, pairing_accuracy, soup
from diptych.adapt.layers import layers_of
from diptych.core.errors import ConfigError, DataError
from diptych.models import clip

A = {"w": torch.tensor([0.0, 2.0]), "count": torch.tensor(3), "logit_scale": torch.tensor(1.0)}
B = {"w": torch.tensor([1.0, 4.0]), "count": torch.tensor(8), "logit_scale": torch.tensor(3.0)}


def test_the_line_is_straight_in_what_is_stored_and_counters_are_the_fine_tuned_models() -> None:
    middle = interpolate(A, B, 0.25)
    assert middle["w"].tolist() == [0.25, 2.5]
    assert float(middle["logit_scale"]) == 1.5  # in log space: the scales themselves would give exp of another number
    assert int(middle["count"]) == 8


def test_the_ends_are_exact_in_every_dtype() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        ends = [{"w": torch.randn(50, generator=torch.Generator().manual_seed(seed)).to(dtype)} for seed in (0, 1)]
        for alpha, end in zip((0.0, 1.0), ends, strict=True):
            found = interpolate(*ends, alpha)["w"]
            assert found.dtype == dtype
            assert torch.equal(found, end["w"])


def test_states_of_other_kinds_are_refused() -> None:
    with pytest.raises(DataError, match="other names"):
        interpolate({"w": A["w"]}, B, 0.5)
    with pytest.raises(DataError, match="other shapes"):
        soup([A, {**B, "w": torch.zeros(3)}])
    with pytest.raises(DataError, match="nothing"):
        soup([])


def test_a_soup_is_the_mean_and_counters_are_the_first_ones() -> None:
    found = soup([A, B, B])
    assert torch.allclose(found["w"], torch.tensor([2 / 3, 10 / 3]))
    assert int(found["count"]) == 3
    assert torch.equal(soup([A])["w"], A["w"])


def test_the_greedy_recipe_takes_from_the_best_down_and_only_what_does_not_harm() -> None:
    goal = 1.0
    ingredients = [{"w": torch.tensor(value)} for value in (3.0, 0.6, 1.5, -9.0)]
    kept, chosen = greedy_soup(ingredients, lambda state: -abs(float(state["w"]) - goal))
    assert chosen == [1, 2]  # (0.6 + 1.5) / 2 is nearer to 1 than 0.6; with 3.0 or -9.0 it is further away
    assert float(kept["w"]) == pytest.approx(1.05)
    assert greedy_soup(ingredients, lambda state: 0.0)[1] == [0, 1, 2, 3]  # what does not lower the score is kept


@pytest.fixture
def pair(tmp_path: Path) -> tuple[clip.DualEncoder, clip.DualEncoder, str]:
    model, origin = clip.create("digits-16", 1), clip.create("digits-16", 0)
    clip.save(origin, tmp_path / "origin", {})
    return model, origin, str(tmp_path / "origin")


def test_wise_ft_moves_a_model_towards_the_one_in_a_directory(pair: tuple[clip.DualEncoder, clip.DualEncoder, str]) -> None:
    model, origin, directory = pair
    theta1 = {name: tensor.clone() for name, tensor in states.of_module(model).items()}
    assert WiseFTConfig(origin=directory, alpha=0.3).build().compress(model, ()) is model
    for name, tensor in states.of_module(model).items():
        assert torch.allclose(tensor, 0.7 * states.of_module(origin)[name] + 0.3 * theta1[name], atol=1e-6), name


def test_stragglers_can_be_made_sparse_on_the_way(pair: tuple[clip.DualEncoder, clip.DualEncoder, str]) -> None:
    model, origin, directory = pair
    theta1 = {name: tensor.clone() for name, tensor in states.of_module(model).items()}
    layer = "visual.transformer.resblocks.0"
    WiseFTConfig(origin=directory, alpha=1.0, sparse_layers=(layer,), sparsity=0.4).build().compress(model, ())
    members = layers_of(theta1)[layer]
    for name, tensor in states.of_module(model).items():
        back = (tensor == states.of_module(origin)[name]) & (tensor != theta1[name])
        if name.endswith("mlp.c_fc.weight"):
            assert float(back.float().mean()) == pytest.approx(0.4 if name in members else 0.0, abs=1e-3), name
        assert name in members or torch.equal(tensor, theta1[name])
    with pytest.raises(ConfigError, match=r"did you mean 'visual\.stem'"):
        WiseFTConfig(origin=directory, sparse_layers=("visual.stm",)).build().compress(model, ())


def batches(model: clip.DualEncoder, count: int = 2) -> list[dict[str, torch.Tensor]]:
    rng = torch.Generator().manual_seed(0)
    texts = torch.from_numpy(model.tokenizer.encode_cut(["one", "two", "three", "a four", "five", "the number six"]))
    size = model.image_size
    return [
        {"image_NCHW": torch.randint(0, 256, (6, 3, size, size), generator=rng, dtype=torch.uint8), "text_NL": texts} for _ in range(count)
    ]


def test_soups_from_directories(pair: tuple[clip.DualEncoder, clip.DualEncoder, str]) -> None:
    model, origin, directory = pair
    own = {name: tensor.clone() for name, tensor in states.of_module(model).items()}
    compressor = SoupConfig(models=(directory,)).build()
    compressor.compress(model, ())
    assert compressor.report(model) == {"models": ["(this workflow's)", directory]}
    name = "visual.conv1.weight"
    assert torch.allclose(states.of_module(model)[name], (own[name] + states.of_module(origin)[name]) / 2, atol=1e-6)


def test_a_greedy_soup_never_scores_below_its_best_ingredient(pair: tuple[clip.DualEncoder, clip.DualEncoder, str]) -> None:
    model, origin, directory = pair
    calibration = batches(model)
    singles = [pairing_accuracy(encoder, calibration) for encoder in (model, origin)]
    compressor = SoupConfig(models=(directory,), recipe="greedy").build()
    compressor.compress(model, iter(calibration))
    assert pairing_accuracy(model, calibration) >= max(singles)
    assert 1 <= len(compressor.report(model)["models"]) <= 2
    with pytest.raises(DataError, match="recipe: uniform"):
        compressor.compress(model, ())


def test_batch_norm_statistics_follow_the_new_weights(tmp_path: Path) -> None:
    model = clip.create("rn-nano-64", 1)
    clip.save(clip.create("rn-nano-64", 0), tmp_path / "origin", {})
    compressor = WiseFTConfig(origin=str(tmp_path / "origin")).build()
    compressor.compress(model, batches(model))
    assert states.of_module(model)["visual.bn1.running_mean"].abs().max() > 1e-4  # both ends have zeros there
    with pytest.raises(DataError, match="at least one batch"):
        compressor.compress(model, ())
