"""A-CLIP: what is kept, whose attention decides, the averages, the figures, and what it asks of the data and of the model."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize
from whole_models import batch, context, encoded, model, started

from diptych.core.errors import ConfigError
from diptych.core.points import Wants
from diptych.models import clip
from diptych.models.image_tokens import attended, normalized, see
from diptych.objectives.a_clip import Config, momentum_at, simclr
from diptych.objectives.token_selection import places
from diptych.train.contrastive import Contrastive

SMALL: dict[str, Any] = {"method": "a-clip", "hidden": 12, "width": 6}


def run(objective: Any, dual: Any, step: int = 0, **changes: Any) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = objective(encoded(dual, {**batch(), **changes}, step, Wants.of(objective)))
    return found


def test_with_all_tokens_the_tower_gives_the_features_of_evaluation() -> None:
    objective, dual = started({**SMALL, "kept": 1.0, "simclr": 0.0, "byol": 0.0})
    tensors = batch()
    parts = run(objective, dual)
    text_ND, label = dual.encode_text(tensors["text_NL"]), torch.arange(8)
    logits = [dual.logit_scale.exp() * dual.encode_image(tensors[name]) @ text_ND.T for name in ("image_NCHW", "view0_NCHW")]
    expected = sum(cross_entropy(each, label) + cross_entropy(each.T, label) for each in logits) / 4
    torch.testing.assert_close(parts["loss"], expected)
    assert float(parts["kept"]) == 1


def test_dropped_tokens_cannot_matter_and_kept_ones_do() -> None:
    dual = model()
    image_NCHW = normalized(dual, batch()["image_NCHW"])
    kept_NP = torch.zeros(8, 16, dtype=torch.bool)
    kept_NP[:, [0, 5, 6]] = True
    found = see(dual.clip.visual, image_NCHW, places(kept_NP))
    assert found.patch_NKW.shape == (8, 3, 8)
    for column, same in ((4, True), (0, False)):
        other = image_NCHW.clone()
        other[:, :, :4, column : column + 4] += 1
        again = see(dual.clip.visual, other, places(kept_NP)).feature_ND
        assert torch.equal(again, found.feature_ND) == same
    assert not dual.clip.visual.ln_pre._forward_pre_hooks


def test_the_map_is_that_of_torchs_attention_and_leaves_the_features_alone() -> None:
    dual = model()
    image_NCHW = normalized(dual, batch()["image_NCHW"])
    map_NP, class_NW = attended(dual.clip.visual, image_NCHW)
    assert map_NP.shape == (8, 16)
    assert not map_NP.requires_grad
    assert ((map_NP > 0) & (map_NP < 1)).all()
    torch.testing.assert_close(class_NW @ dual.clip.visual.proj, dual.encode_image(image_NCHW, normalize=False))


def test_the_average_decides_and_the_student_does_not() -> None:
    objective, dual = started({**SMALL, "cell": 1})
    map_NP, _ = attended(objective.average, normalized(dual, batch()["view1_NCHW"]))
    kept_MP = objective.select(map_NP, batch(), 0)
    assert kept_MP.shape == (16, 16)
    assert (kept_MP.sum(dim=1) == 9).all()
    assert (objective.select(-map_NP, batch(), 0) != kept_MP).any()
    worst, _ = started({**SMALL, "cell": 1, "select": "inattentive"})
    assert torch.equal(worst.select(-map_NP, batch(), 0), kept_MP)
    parts = run(objective, dual)
    parts["loss"].backward()
    assert all(parameter.grad is None for parameter in objective.average.parameters())
    before = parts["loss"].detach()
    with torch.no_grad():
        objective.average.transformer.resblocks[0].attn.in_proj_weight.mul_(-3)
    assert run(objective, dual)["loss"].detach() != before


def test_random_tokens_are_drawn_by_row_and_step() -> None:
    objective, _ = started({**SMALL, "select": "random", "cell": 1})
    whole = objective.select(torch.zeros(8, 16), batch(), 3)
    part = objective.select(torch.zeros(4, 16), {name: value[4:] for name, value in batch().items()}, 3)
    assert torch.equal(whole[4:8], part[:4])
    assert torch.equal(whole[12:], part[4:])
    assert (whole[:8] != whole[8:]).any()
    assert (objective.select(torch.zeros(8, 16), batch(), 4) != whole).any()


def test_the_averages_follow_by_the_schedule_and_are_the_weights_at_first() -> None:
    objective, dual = started({**SMALL, "momentum": 0.5}, total_steps=4)
    start = dual.clip.visual.conv1.weight.detach().clone()
    assert torch.equal(objective.average.conv1.weight, start)
    with torch.no_grad():
        dual.clip.visual.conv1.weight.add_(1.0)
        objective.projector[0].weight.add_(1.0)
    projector = objective.average_projector[0].weight.clone()
    objective.after_step(2, dual)
    momentum = momentum_at(2, 4, 0.5)
    assert momentum == pytest.approx(0.75)
    torch.testing.assert_close(objective.average.conv1.weight, start + 1 - momentum)
    torch.testing.assert_close(objective.average_projector[0].weight, projector + 1 - momentum)
    assert momentum_at(4, 4, 0.5) == 1
    names = set(objective.state_dict())
    assert {"average.conv1.weight", "average_projector.0.weight", "predictor.3.weight", "ssl_head.6.bias"} <= names
    assert not any(parameter.requires_grad for parameter in (*objective.average.parameters(), *objective.average_projector.parameters()))


def test_simclr_compares_the_two_views_and_never_a_row_with_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(5, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    rows = normalize(torch.cat([first, second]), dim=1)
    logits = (rows @ rows.T / 0.5).fill_diagonal_(-math.inf)
    expected = cross_entropy(logits, (torch.arange(10) + 5) % 10)
    torch.testing.assert_close(simclr(first, second, 0.5), expected)
    assert simclr(first, first, 0.1) < 0.1 * simclr(first, second, 0.1), "the released call would be nearly constant"


def test_what_it_wants() -> None:
    assert Wants.of(Config().build()) == Wants(views=("weak", "around"), boxes=True, encodes=("text",))
    with pytest.raises(ConfigError, match="whole batch"):
        Contrastive(model(), Config().build(), accumulate=2)


def test_impossible_settings_are_refused() -> None:
    for wrong in ({"kept": 0.0}, {"momentum": 1.5}, {"select": "object"}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Config.parse({"method": "a-clip", **wrong})
    with pytest.raises(ConfigError, match="do not divide into cells"):
        started({**SMALL, "cell": 3})
    with pytest.raises(ConfigError, match="no class token"):
        Config(hidden=4, width=4).build().start(context(clip.create("rn-nano-64", 0)))
    objective, dual = started(SMALL)
    with pytest.raises(ConfigError, match="image_sizes"):
        run(objective, dual, view1_NCHW=torch.zeros(8, 3, 12, 12, dtype=torch.uint8))
