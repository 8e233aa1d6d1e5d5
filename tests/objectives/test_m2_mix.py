"""Slerp at its edges, the mixed losses by their definition, the draws, the fading, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from sharded import ROWS, batch, encoded, started
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from diptych.core.errors import ConfigError
from diptych.objectives.m2_mix import Config, mixed_target_loss, slerp


def features(pairs: int = 6, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    image, other = (normalize(torch.randn(pairs, 5, generator=generator, dtype=torch.float64)) for _ in range(2))
    return image.to(dtype), normalize(image + other).to(dtype)


def test_slerp_walks_along_the_great_circle() -> None:
    a, b = features()
    angle = (a * b).sum(dim=1).acos()
    for share in (0.0, 0.25, 1.0):
        mixed = slerp(a, b, share)
        torch.testing.assert_close(mixed.norm(dim=1), torch.ones(6, dtype=torch.float64))
        torch.testing.assert_close((mixed * b).sum(dim=1).clamp(max=1).acos(), share * angle, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close((mixed * a).sum(dim=1).clamp(max=1).acos(), (1 - share) * angle, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("apart", [0.0, 1e-5, 1e-3])
def test_slerp_of_nearly_the_same_has_finite_gradients(dtype: torch.dtype, apart: float) -> None:
    a, noise = features(dtype=dtype)
    b = normalize(a + apart * noise)
    a, b = a.requires_grad_(), b.detach().requires_grad_()
    mixed = slerp(a, b, 0.3)
    grads = torch.autograd.grad((mixed * noise).sum(), [a, b])
    assert all(grad.isfinite().all() for grad in grads)
    torch.testing.assert_close(mixed, normalize(0.3 * a + 0.7 * b), rtol=0, atol=1e-3 * max(apart, 1e-3))


def test_negatives_are_mixed_and_positives_are_not() -> None:
    image, text = features()
    made = Config(tau=0.1, tau2=0.2, multimodal=0.5).build()
    parts = made.terms(image, text, torch.tensor(10.0, dtype=torch.float64), {"multimodal": 0.3})
    mixed, expected = slerp(image, text, 0.3), 0.0
    for side in (image, text):
        for i, query in enumerate(side):
            scores = [float(query @ mixed[j] if i != j else image[i] @ text[i]) / 0.2 for j in range(len(side))]
            expected += (math.log(sum(map(math.exp, scores))) - scores[i]) / len(side)
    assert float(parts["mix_multimodal"]) == pytest.approx(expected)
    logits = 10 * image @ text.T
    own = torch.arange(6)
    assert float(parts["contrastive"]) == pytest.approx(float(cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2)
    shared = Config(tau=0.1, tau2=None).build().terms(image, text, torch.tensor(10.0, dtype=torch.float64), {"multimodal": 0.3})
    assert float(shared["mix_multimodal"]) != pytest.approx(expected)


def test_an_odd_batch_has_a_row_that_is_its_own_partner() -> None:
    image, text = features(5)
    image.requires_grad_()
    made = Config(tau=0.1, joint=0.1, visual=0.1).build()
    parts = made.terms(image, text, torch.tensor(10.0, dtype=torch.float64), {"visual": 0.4, "joint": 0.4})
    grad = torch.autograd.grad(made.total({**parts, "mix_multimodal": torch.tensor(0.0)}, 0), image)[0]
    assert grad.isfinite().all()
    assert grad.any()


def test_at_the_whole_share_nothing_is_mixed() -> None:
    image, text = features()
    made, scale = Config(tau=0.1).build(), torch.tensor(10.0, dtype=torch.float64)
    parts = made.terms(image, text, scale, {"visual": 1.0, "language": 1.0})
    torch.testing.assert_close(parts["mix_visual"], parts["contrastive"])
    torch.testing.assert_close(parts["mix_language"], parts["contrastive"])


def test_soft_targets() -> None:
    logits, own = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    target = 0.3 * torch.eye(4) + 0.7 * torch.eye(4).flip(0)
    torch.testing.assert_close(mixed_target_loss(logits, own, own.flip(0), 0.3, 0.7), cross_entropy(logits, target))


def test_shares_are_drawn_by_seed_step_and_kind_alone() -> None:
    made = Config(beta_joint=50.0).build()
    shares = [made.share("multimodal", step) for step in range(200)]
    assert shares == [made.share("multimodal", step) for step in range(200)]
    assert len(set(shares)) == 200
    assert sum(share < 0.1 or share > 0.9 for share in shares) > 50, "Beta(1/2, 1/2) favours the ends"
    assert all(0.2 < made.share("joint", step) < 0.8 for step in range(50))
    assert made.share("visual", 0) != made.share("language", 0)
    made.seed = 1
    assert made.share("multimodal", 0) != shares[0]


def test_mixing_fades_with_the_epochs() -> None:
    for fade, factor in ((True, 1 / 3), (False, 1.0)):
        objective, model = started({"method": "m2-mix", "multimodal": 0.5, "fade": fade})
        assert objective.rows == 40
        late = 2 * (objective.rows // ROWS)
        parts = objective(encoded(model, batch(), step=late))
        expected = parts["contrastive"] + factor * 0.5 * parts["mix_multimodal"]
        assert float(parts["loss"].detach()) == pytest.approx(float(expected))


def test_the_temperature_is_fixed_or_learnt() -> None:
    _, model = started({"method": "m2-mix", "tau": 0.05})
    assert float(model.logit_scale.detach().exp()) == pytest.approx(20.0)
    assert not model.logit_scale.requires_grad
    objective, model = started({"method": "m2-mix", "tau": None})
    objective(encoded(model, batch()))["loss"].backward()
    assert model.logit_scale.grad.abs() > 0
    assert objective.state_dict() == {}


def test_impossible_settings_are_refused() -> None:
    for wrong in ({"tau": 0.0}, {"beta_single": 0.0}, {"visual": -1.0}, {"mm": 1.0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Config.parse({"method": "m2-mix", **wrong})
