"""ALIP's gates by their definition, its history, its figures, and what it asks of the pairs."""

from __future__ import annotations

import math

import pytest
import torch
from sharded import batch, encoded, started
from torch.nn.functional import cross_entropy

from diptych.core.errors import ConfigError
from diptych.core.points import Wants
from diptych.objectives.alip import Config, gates


def test_the_gates_are_those_of_the_definition() -> None:
    similarity = torch.tensor([[0.2, 0.9, 0.1], [0.2, 0.1, 0.4], [0.8, 0.1, 0.1], [0.5, 0.0, 0.9]])
    history = torch.tensor([0.5, 0.4, 0.4])
    found = gates(similarity, history, 2.0, 2.0)
    for row, (tc, xt, xc) in enumerate(similarity.tolist()):
        gate = math.exp(tc - 0.5) ** 2
        assert float(found.sample_N[row]) == pytest.approx(min(gate, 1.0))
        assert float(found.raw_N[row]) == pytest.approx(math.exp(xt - 0.4) ** 2 if gate < 1 else 1.0)
        assert float(found.caption_N[row]) == pytest.approx(math.exp(xc - 0.4) ** 2 if gate < 1 else 1.0)
    assert float(found.raw_N[0]) > 1, "the weight of a pair is not capped"


def test_without_gates_it_is_two_contrastive_losses() -> None:
    objective, model = started({"method": "alip", "gates": False})
    given = encoded(model, batch())
    parts = objective(given)
    expected = 0.0
    for text_ND in (given.text_ND, model.encode_text(given.batch["synthetic_NL"])):
        logits = given.logit_scale * given.image_ND @ text_ND.T
        label = torch.arange(len(logits))
        expected += float((cross_entropy(logits, label) + cross_entropy(logits.T, label)).detach()) / 2
    assert float(parts["loss"].detach()) == pytest.approx(expected)
    assert float(parts["weight"]) == 1


def test_the_history_moves_before_the_gate_looks_at_it() -> None:
    objective, model = started({"method": "alip", "decay": 0.0})
    parts = objective(encoded(model, batch()))
    given = encoded(model, batch())
    cap_ND = model.encode_text(given.batch["synthetic_NL"])
    agreement_N = (given.text_ND * cap_ND).sum(dim=1).detach()
    assert float(objective.history_3[0]) == pytest.approx(float(agreement_N.mean()))
    assert float(parts["weight"]) > 0
    assert objective.weigh(given.image_ND, given.text_ND, cap_ND).sample_N.max() == 1, "some agree better than the mean"


def test_the_history_is_slow_and_starts_at_one_or_at_the_first_batch() -> None:
    cold, model = started({"method": "alip"})
    warm, _ = started({"method": "alip", "warm_start": True})
    cold_weight, warm_weight = (float(each(encoded(model, batch()))["weight"]) for each in (cold, warm))
    torch.testing.assert_close(cold.history_3, 0.99 + 0.01 * warm.history_3)
    assert cold_weight < warm_weight
    before = warm.history_3.clone()
    warm(encoded(model, batch(seed=1)))
    assert 0 < (warm.history_3 - before).abs().max() < 0.02


def test_weights_carry_no_gradient() -> None:
    objective, model = started({"method": "alip"})
    given = encoded(model, batch())
    terms = objective.terms(given.image_ND, given.text_ND, model.encode_text(given.batch["synthetic_NL"]), given.logit_scale)
    assert terms.raw.requires_grad
    assert not any(weight_N.requires_grad for weight_N in terms.gates)


def test_it_goes_on_where_it_was_saved() -> None:
    objective, model = started({"method": "alip"})
    for seed in range(3):
        objective(encoded(model, batch(seed=seed)))
    other, _ = started({"method": "alip"})
    fresh = float(other(encoded(model, batch(seed=9)))["loss"].detach())
    other.load_state_dict(objective.state_dict())
    losses = [float(each(encoded(model, batch(seed=9)))["loss"].detach()) for each in (objective, other)]
    assert losses[0] == losses[1] != fresh


def test_it_tells_the_weights_of_intact_and_broken_pairs() -> None:
    objective, model = started({"method": "alip", "intact": "meta.intact"})
    plain, _ = started({"method": "alip"})
    assert Wants.of(objective) == Wants(columns=("meta.intact",), sources=("synthetic",))
    assert Wants.of(plain).columns == ()
    tensors = {**batch(), "meta.intact_N": torch.tensor([1, 0, 1, 1, 1, 0, 1, 1])}
    parts, without = objective(encoded(model, tensors)), plain(encoded(model, tensors))
    assert float(parts["weight"]) == pytest.approx(float(0.75 * parts["weight_intact"] + 0.25 * parts["weight_broken"]))
    assert float(parts["loss"].detach()) == float(without["loss"].detach())
    everything = objective(encoded(model, {**batch(), "meta.intact_N": torch.ones(8)}))
    assert "weight_broken" not in everything


def test_impossible_settings_are_refused() -> None:
    for wrong in ({"decay": 1.0}, {"gamma_pair": -1.0}, {"momentum": 0.9}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Config.parse({"method": "alip", **wrong})
