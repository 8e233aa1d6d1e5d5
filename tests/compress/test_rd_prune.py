"""Rate-distortion pruning: exact allocation, curves that leave the model as it was, rules, budgets, refusals."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from tests.compress.pairs import batches_of, timm_model

from diptych.compress.blocks import evaluating, towers
from diptych.compress.magnitude import masks_of
from diptych.compress.rd_prune import Config, allocate, amounts, curve, erk_densities, from_each_block, share_out, uniform_plus
from diptych.core.errors import ConfigError, DataError
from diptych.models import clip


@pytest.fixture
def model() -> clip.DualEncoder:
    return clip.create("vit-nano-64", 0).eval()


@pytest.mark.parametrize(("seed", "unit", "prior"), [(0, 1, 0.0), (1, 1, 0.3), (2, 7, 0.0), (3, 16, 0.2)])
def test_the_allocation_is_the_best_of_all(seed: int, unit: int, prior: float) -> None:
    draw = np.random.default_rng(seed)
    sizes, levels = draw.integers(20, 200, 4), 6
    curves = draw.random((4, levels + 1)).cumsum(axis=1)
    gone = (sizes * prior).astype(int)
    found = allocate(curves, sizes, 0.55, gone, unit)
    counts = [amounts(int(size), levels) for size in sizes]
    budget = int(0.45 * sizes.sum()) // unit
    fits = []
    for chosen in itertools.product(range(levels + 1), repeat=4):
        removed = [counts[layer][level] for layer, level in enumerate(chosen)]
        kept = sum(-(-(int(size) - each) // unit) for size, each in zip(sizes, removed, strict=True))
        if kept <= budget and all(each + 1 >= least for each, least in zip(removed, gone, strict=True)):
            fits.append((sum(curves[layer, level] for layer, level in enumerate(chosen)), chosen))
    assert found.distortion == pytest.approx(min(fits)[0])
    assert (sizes - found.removed).sum() <= 0.45 * sizes.sum()


def test_a_layer_larger_than_the_budget_is_no_trouble() -> None:
    curves = np.linspace(0, 1, 11)[None].repeat(2, 0) * [[1.0], [100.0]]
    found = allocate(curves, np.asarray([10_000, 50]), 0.95)
    assert found.removed.tolist() == [10_000, 0]


def test_a_budget_that_nothing_fits_is_refused() -> None:
    with pytest.raises(ConfigError, match="No amounts of the layers fit"):
        allocate(np.full((1, 2), np.inf), np.asarray([10]), 0.5)


def test_the_smallest_distortion_decides_and_not_the_size() -> None:
    flat, steep = np.zeros(5), np.asarray([0, 10, 20, 30, 40.0])
    assert allocate(np.stack([flat, steep]), np.asarray([100, 100]), 0.5).removed.tolist() == [100, 0]


def test_blocks_later_on_give_the_same_features(model: clip.DualEncoder) -> None:
    batches = batches_of(model, 2)
    for each in (model, timm_model()):
        batches = batches_of(each, 2)
        for tower in towers(each):
            with torch.no_grad(), evaluating(each):
                whole = torch.cat([tower.encode(each, batch) for batch in batches])
                seen = []
                for matrices, outputs in from_each_block(each, tower, batches):
                    assert torch.allclose(outputs(), whole, atol=1e-6)
                    seen += [matrix.name for matrix in matrices]
                assert seen == [matrix.name for matrix in tower.matrices()]


def test_a_curve_starts_at_zero_and_puts_the_weight_back(model: clip.DualEncoder) -> None:
    batches = batches_of(model, 1)
    tower = towers(model, "text")[0]
    matrix = tower.matrices()[1]
    before, features = matrix.weight.detach().clone(), tower.encode(model, batches[0]).detach()
    found = curve(lambda: tower.encode(model, batches[0]), matrix.weight, features, amounts(before.numel(), 4))
    assert found[0] == 0.0
    assert (found[1:] > 0).all()
    assert torch.equal(matrix.weight, before)


@pytest.mark.parametrize("rule", ["distortion", "lamp", "erk", "uniform", "uniform-plus", "global"])
def test_every_rule_reaches_the_sparsity(model: clip.DualEncoder, rule: str) -> None:
    compressor = Config.parse({"method": "rd-prune", "sparsity": 0.6, "rule": rule, "levels": 4}).build()
    compressor.compress(model, batches_of(model, 1))
    masks = masks_of(model)
    zeros = sum(int((~mask).sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())
    assert 0.6 - 1e-3 <= zeros <= 0.61
    report = compressor.report(model)
    assert report["distortion"]["measured"] > 0
    assert set(report["amounts"]) == set(masks)


def test_earlier_zeros_stay_and_count(model: clip.DualEncoder) -> None:
    batches = batches_of(model, 1)
    settings = {"method": "rd-prune", "levels": 4}
    Config.parse({**settings, "sparsity": 0.3}).build().compress(model, batches)
    first = {name: mask.clone() for name, mask in masks_of(model).items()}
    Config.parse({**settings, "sparsity": 0.5}).build().compress(model, batches)
    second = masks_of(model)
    assert all(not bool((second[name] & ~first[name]).any()) for name in first)
    assert sum(int((~mask).sum()) for mask in second.values()) >= 0.5 * sum(mask.numel() for mask in second.values())


def test_rules_by_hand() -> None:
    assert erk_densities([(4, 4), (100, 100)], 0.9)[0] == 1.0  # a small layer stays dense
    assert uniform_plus(np.asarray([10, 10, 80]), 0.8, 0.2).tolist() == [0.0, 1.0, 0.8]
    weights = [torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0])]
    assert share_out(weights, 0.5, "global").removed.tolist() == [2, 0]
    assert share_out(weights, 0.5, "lamp").removed.tolist() == [1, 1]


def test_no_pairs_are_refused(model: clip.DualEncoder) -> None:
    with pytest.raises(DataError, match="no calibration pairs"):
        Config().build().compress(model, [])
