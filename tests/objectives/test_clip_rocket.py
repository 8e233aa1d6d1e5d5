"""CLIP-rocket by its definition, each loss beside it, the words that captions lose, and what it asks of the data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize
from whole_models import batch, encoded, started

from diptych.core.errors import ConfigError
from diptych.core.points import Wants
from diptych.models.tokenizer import EOT
from diptych.objectives.clip import clip_loss
from diptych.objectives.clip_rocket import Config, Sides, barlow, contrast, drop_words, siamese, sinkhorn, swapped

SMALL: dict[str, Any] = {"method": "clip-rocket", "hidden": 12, "width": 6, "extra_width": 5}


def run(objective: Any, dual: Any, step: int = 0) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = objective(encoded(dual, batch(), step, Wants.of(objective)))
    return found


def sides(seed: int = 0, width: int = 5, rows: int = 6) -> Sides:
    generator = torch.Generator().manual_seed(seed)
    six = [torch.randn(rows, width, generator=generator, dtype=torch.float64) for _ in range(6)]
    return Sides(six[0], six[1], (six[2], six[3]), (six[4], six[5]))


def test_without_views_it_is_clip_and_the_sum_is_twice_that() -> None:
    objective, dual = started({**SMALL, "augment": False, "reduction": "avg"})
    given = encoded(dual, batch())
    expected = clip_loss(given.image_ND, given.text_ND, given.logit_scale)
    torch.testing.assert_close(run(objective, dual)["loss"], expected)
    summed, _ = started({**SMALL, "augment": False})
    torch.testing.assert_close(run(summed, dual)["loss"], 2 * expected)
    assert Wants.of(objective) == Wants()
    assert objective.state_dict() == {}


def test_strong_views_weigh_two_to_one_and_alone_are_smoothed() -> None:
    plain, strong, label = sides(0), sides(1), torch.arange(6)
    scale, own = torch.tensor(4.0), torch.tensor(9.0)

    def by_image(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, smoothing: float) -> torch.Tensor:
        return cross_entropy(scale * normalize(image, dim=1) @ normalize(text, dim=1).T, label, label_smoothing=smoothing)

    local = sum(by_image(image, text, own, 0.1) for image in strong.images for text in strong.texts) / 4
    expected = (by_image(plain.image, plain.text, scale, 0.0) + 2 * local) / 3
    torch.testing.assert_close(contrast(plain, strong, scale, own, 0.1).image, expected)


def test_heads_and_scale_are_the_strong_views_own() -> None:
    objective, dual = started(SMALL)
    run(objective, dual)["loss"].backward()
    assert objective.log_scale.grad.abs() > 0
    assert float(objective.log_scale.detach().exp()) == pytest.approx(10)
    with torch.no_grad():
        objective.log_scale.fill_(9.0)
    objective.after_step(1, dual)
    assert float(objective.log_scale.detach().exp()) == pytest.approx(100)
    shared, _ = started({**SMALL, "separate": False})
    assert list(shared.parameters()) == []
    shared.after_step(1, dual)


def test_targets_of_siamlip_get_no_gradient_and_equal_sides_no_loss() -> None:
    predicted, target = sides(0), sides(1)
    for side in (target.image, target.text, *target.images, *target.texts):
        side.requires_grad_()
    assert not siamese(predicted, target).requires_grad
    same = Sides(target.image, target.image, (target.image,) * 2, (target.image,) * 2)
    assert float(siamese(same, same).detach()) == pytest.approx(0)
    assert len(target.pairs()) == 5


def test_barlip_is_zero_for_standardised_equal_and_uncorrelated_sides() -> None:
    basis = torch.linalg.qr(torch.randn(8, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q * 8**0.5
    alike = Sides(basis, basis, (basis, basis), (basis, basis))
    assert float(barlow(alike, 1.0, 0.005)) == pytest.approx(0)
    doubled = Sides(2 * basis, basis, (2 * basis,) * 2, (basis,) * 2)
    assert float(barlow(doubled, 0.5, 0.005)) == pytest.approx(0.5 * 4)


def test_assignments_are_distributions_that_use_all_codes() -> None:
    similarity = torch.randn(12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tanh()
    similarity[:, 0] += 0.3
    found = sinkhorn(similarity, 0.05, 50)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(12, dtype=torch.float64))
    torch.testing.assert_close(found.sum(dim=0), torch.ones(12, dtype=torch.float64), rtol=1e-2, atol=0)
    assert sinkhorn(torch.full((4, 4), 0.9, dtype=torch.float16), 0.05, 3).isfinite().all()


def test_swalip_predicts_the_opposite_views_assignments() -> None:
    strong, scale = sides(3), torch.tensor(10.0)
    other = Sides(strong.image, strong.text, strong.images[::-1], strong.texts[::-1])
    torch.testing.assert_close(swapped(strong, scale, 0.05, 3), swapped(other, scale, 0.05, 3))
    same = Sides(strong.image, strong.text, (strong.images[0],) * 2, (strong.texts[0],) * 2)
    assert swapped(same, torch.tensor(20.0), 0.05, 3) < swapped(strong, torch.tensor(20.0), 0.05, 3)


@pytest.mark.parametrize("extra", ["siamlip", "byolip", "barlip", "swalip"])
def test_every_extra_adds_to_the_loss_and_trains_both_towers(extra: str) -> None:
    objective, dual = started({**SMALL, "extra": extra, "smoothing": 0.0})
    parts = run(objective, dual)
    weight = 0.2 if extra == "swalip" else 1.0
    torch.testing.assert_close(parts["loss"].detach(), 2 * parts["clip"] + weight * parts["extra"])
    parts["loss"].backward()
    grads = {name: value.grad for name, value in objective.named_parameters() if value.requires_grad}
    assert all(grad is not None for grad in grads.values()), grads
    assert dual.clip.visual.conv1.weight.grad.any()


def test_byolips_averages_follow_and_get_no_gradient() -> None:
    objective, dual = started({**SMALL, "extra": "byolip", "momentum": 0.9})
    before = objective.average.clip.visual.conv1.weight.clone()
    with torch.no_grad():
        dual.clip.visual.conv1.weight.add_(1.0)
    objective.after_step(1, dual)
    torch.testing.assert_close(objective.average.clip.visual.conv1.weight, before + 0.1)
    run(objective, dual)["loss"].backward()
    assert all(each.grad is None for each in (*objective.average.parameters(), *objective.averages.parameters()))
    assert "average.clip.visual.conv1.weight" in objective.state_dict()


def test_captions_lose_words_by_row_step_and_view_but_never_all() -> None:
    text_NL, row_N = batch()["text_NL"].repeat(50, 1), torch.arange(400)
    found = drop_words(text_NL, 0.4, seed=1, row_N=row_N, step=2, view=0)
    for before, after in zip(text_NL.tolist(), found.tolist(), strict=True):
        kept, rest = after[: after.index(EOT) + 1], after[after.index(EOT) + 1 :]
        assert not any(rest)
        assert len(kept) >= 3
        places = iter(before)
        assert all(token in places for token in kept), "what is left keeps its order"
    lost = 1 - ((found > 0).sum() - 800) / ((text_NL > 0).sum() - 800)
    assert 0.25 < float(lost) < 0.45
    part = drop_words(text_NL[40:50], 0.4, seed=1, row_N=row_N[40:50], step=2, view=0)
    assert torch.equal(part, found[40:50])
    assert (drop_words(text_NL, 0.4, seed=1, row_N=row_N, step=2, view=1) != found).any()
    assert torch.equal(drop_words(text_NL, 0.0, seed=1, row_N=row_N, step=2, view=0), text_NL)


def test_what_it_wants_and_refuses() -> None:
    assert Wants.of(Config().build()) == Wants(views=("simclr", "simclr"))
    assert Wants.of(Config(captions="several", view="crop").build()) == Wants(views=("crop", "crop"), captions=2)
    for wrong, hint in (({"extra": "swalip"}, "smoothing"), ({"view": "around"}, "view"), ({"drop_words": 1.0}, "drop_words")):
        with pytest.raises(ConfigError, match=hint):
            Config.parse({"method": "clip-rocket", **wrong})
