"""The hard-concrete masks: what is likely, what is drawn, what is settled; and the penalty that holds them to a sparsity."""

from __future__ import annotations

import math

import pytest
import torch

from diptych.compress.hard_concrete import (
    BOUNDS,
    EPSILON,
    Lagrangian,
    Sizes,
    TowerMasks,
    mask_optimizer,
    sample,
    score,
    settle,
    sparsity,
    target,
)

SIZES = Sizes(8, (2, 0), 4, (6, 3))


def test_scores_are_how_often_draws_are_not_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    for value in (-3.0, -1.6, 0.0, 2.0):
        log_alpha = torch.full((20000,), value)
        drawn = sample(log_alpha, torch.rand(20000, generator=generator).clamp(EPSILON, 1 - EPSILON))
        assert float((drawn > 0).float().mean()) == pytest.approx(float(score(log_alpha)[0]), abs=0.015)
        assert 0 <= float(drawn.min()) <= float(drawn.max()) <= 1


def test_as_many_smallest_entries_are_settled_at_zero_as_are_expected() -> None:
    log_alpha = torch.tensor([4.0, -4.0, 3.0, -3.5, 3.5])
    mask = settle(log_alpha)
    assert (mask == 0).tolist() == [False, True, False, True, False]
    assert float(mask[0]) == pytest.approx(1 / (1 + math.exp(-0.8 * 4.0 * 1.5)))
    assert int((settle(torch.full((4,), -4.6)) != 0).sum()) == 0
    assert int((settle(torch.full((4,), -4.6), least=1) != 0).sum()) == 1
    assert len(settle(torch.zeros(0))) == 0


def test_sizes_count_the_parameters_that_can_go_heads_that_are_gone_included() -> None:
    per_head = (4 * 8 * 8 + 3 * 8 + 8) // 2
    assert [SIZES.per_head(layer) for layer in range(2)] == [per_head, 0]
    assert SIZES.total == 2 * per_head + (2 * 8 + 1) * 9 + 2 * 8
    masks = TowerMasks(SIZES)
    assert float(masks.expected().detach()) == pytest.approx(2 * per_head + 2 * 8 * 9, rel=1e-3)
    assert float(sparsity([masks, masks]).detach()) == pytest.approx(float(sparsity([masks]).detach()), abs=1e-6)


def test_the_width_stays_if_it_is_not_learnt() -> None:
    masks = TowerMasks(SIZES, width=False)
    drawn = masks.drawn(torch.Generator().manual_seed(0))
    assert drawn.hidden.tolist() == masks.settled().hidden.tolist() == [1.0] * 8
    masks.expected().backward()
    assert masks.hidden.grad is None
    assert all(each.grad.all() for each in (masks.heads[0], *masks.neurons))


def test_draws_are_fresh_and_named_by_their_generator() -> None:
    masks = TowerMasks(SIZES)
    masks.neurons[0].data.zero_()
    one, same, other = (masks.drawn(torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(one.neurons[0], same.neurons[0])
    assert not torch.equal(one.neurons[0], other.neurons[0])


def test_the_target_rises_and_stays() -> None:
    assert [target(step, 0.1, 0.5, 4) for step in (0, 2, 4, 9)] == pytest.approx([0.1, 0.3, 0.5, 0.5])
    assert target(0, 0.1, 0.5, 0) == 0.5


def test_the_penalty_is_one_sided_and_its_multipliers_climb() -> None:
    lagrangian = Lagrangian()
    assert float(lagrangian(0.2, torch.tensor(0.5)).detach()) == 0
    masks = TowerMasks(SIZES)
    optimizer = mask_optimizer([masks], lagrangian, lr=0.05)
    found = []
    for step in range(300):
        optimizer.zero_grad()
        found.append(sparsity([masks]))
        lagrangian(target(step, 0.0, 0.4, 270), found[-1]).backward()
        lagrangian.ascend()
        optimizer.step()
        masks.clamp()
    assert float(found[-1].detach()) == pytest.approx(0.4, abs=0.08)
    assert min(float(each.detach()) for each in lagrangian.parameters()) > 10.5
    assert all(
        BOUNDS[0] - 1e-6 <= float(each.detach().min()) <= float(each.detach().max()) <= BOUNDS[1] + 1e-6
        for each in masks.parameters()
        if each.numel()
    )
