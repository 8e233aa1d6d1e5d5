"""CLOOB: retrieval and InfoLOOB by their definitions, what saturation does to gradients, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from sharded import Scaled, batch, built, context, encoded, started
from torch import Tensor
from torch.nn.functional import normalize

from diptych.core.errors import ConfigError
from diptych.objectives.cloob import Config, contrast, read


def features(pairs: int = 6, width: int = 5, cosine: float | None = None) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    image, other = (normalize(torch.randn(pairs, width, generator=generator, dtype=torch.float64)) for _ in range(2))
    if cosine is None:
        return image, normalize(image + other)
    across = normalize(other - (other * image).sum(dim=1, keepdim=True) * image)
    return image, cosine * image + math.sqrt(1 - cosine**2) * across


def own(pairs: int) -> Tensor:
    return torch.arange(pairs)


def by_definition(anchor: Tensor, sample: Tensor, inv_tau: float) -> float:
    total = 0.0
    for i, row in enumerate(anchor):
        scores = [inv_tau * float(row @ other) for other in sample]
        total += -scores[i] + math.log(sum(math.exp(score) for j, score in enumerate(scores) if j != i))
    return total / len(anchor) / inv_tau


def test_info_loob_leaves_the_partner_out() -> None:
    image, text = features()
    loss = contrast(image, text, torch.tensor(7.0, dtype=torch.float64), own(6))
    assert float(loss) == pytest.approx(by_definition(image, text, 7.0), rel=1e-12)
    with_it = contrast(image, text, torch.tensor(7.0, dtype=torch.float64), own(6), "infonce")
    assert float(with_it) > float(loss)


def test_two_pairs_have_one_negative() -> None:
    image, text = features(2)
    loss = contrast(image, text, torch.tensor(9.0, dtype=torch.float64), own(2))
    assert float(loss) == pytest.approx(float((image.flip(0) * text - image * text).sum() / 2), rel=1e-12)


def test_a_sharp_memory_gives_back_what_is_in_it_and_a_blunt_one_its_mean() -> None:
    image, _ = features()
    torch.testing.assert_close(read(image, image, 1e4), image)
    torch.testing.assert_close(read(image, image, 1e-9), normalize(image.mean(dim=0, keepdim=True)).expand_as(image))
    assert read(image, image, 3.0).norm(dim=1).sub(1).abs().max() < 1e-12


def test_a_single_memory_answers_every_question_with_itself() -> None:
    image, text = features()
    torch.testing.assert_close(read(image, text[:1], 5.0), text[:1].expand_as(image))


def test_the_order_of_the_pairs_does_not_matter() -> None:
    image, text = features()
    made, inv_tau, order = Config().build(), torch.tensor(30.0, dtype=torch.float64), torch.tensor([4, 0, 5, 2, 1, 3])
    for ours, theirs in zip(made.terms(image, text, inv_tau), made.terms(image[order], text[order], inv_tau), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_memories_differ_so_the_sides_are_not_interchangeable() -> None:
    image, text = features()
    made, inv_tau = Config().build(), torch.tensor(30.0, dtype=torch.float64)
    one, other = made.terms(image, text, inv_tau), made.terms(text, image, inv_tau)
    torch.testing.assert_close(one[0], other[1])
    assert float(one[0]) != pytest.approx(float(one[1]))


def gradient_norm(kind: str) -> float:
    image, text = features(64, 32, cosine=0.98)
    image.requires_grad_()
    loss = contrast(image, text, torch.tensor(14.3, dtype=torch.float64), own(64), kind)  # type: ignore[arg-type]
    return float(torch.autograd.grad(loss, image)[0].norm())


def test_info_loob_does_not_saturate() -> None:
    assert gradient_norm("infoloob") > 5 * gradient_norm("infonce")


def test_the_temperature_is_fixed_or_learnt() -> None:
    fixed, model = started({"method": "cloob", "inv_tau": 20.0})
    assert float(model.logit_scale.detach().exp()) == pytest.approx(20.0)
    assert not model.logit_scale.requires_grad
    fixed(encoded(model, batch()))["loss"].backward()
    assert model.logit_scale.grad is None
    learnt, model = started({"method": "cloob", "inv_tau": None})
    parts = learnt(encoded(model, batch()))
    parts["loss"].backward()
    assert float(model.logit_scale.detach().exp()) == pytest.approx(4.0)
    assert model.logit_scale.grad.abs() > 0
    assert float(parts["loss"].detach()) == pytest.approx(float(parts["image"] + parts["text"]))


def test_it_has_no_state() -> None:
    assert built({"method": "cloob"}).state_dict() == {}
    assert "beta=3.0" in repr(built({"method": "cloob", "beta": 3.0}))


def test_what_cannot_be_is_refused() -> None:
    made = Config().build()
    made.start(context(model := Scaled()))
    with pytest.raises(ConfigError, match="at least 2 pairs"):
        made(encoded(model.double(), batch(rows=1)))
    for wrong in ({"inv_tau": 101.0}, {"beta": 0.0}, {"tau": 1.0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Config.parse({"method": "cloob", **wrong})
