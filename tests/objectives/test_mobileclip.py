"""MobileCLIP's loss by its definition, and what it asks of the pairs and of its settings."""

from __future__ import annotations

import pytest
import torch
from sharded import batch, encoded, started
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax, pad

from diptych.core.errors import ConfigError
from diptych.core.points import Wants
from diptych.objectives.clip import Logits
from diptych.objectives.mobileclip import Config, distillation, targets, transposed

SETTINGS = {"method": "mobileclip", "contrastive": 0.25, "distillation": 0.75, "teacher_scale": [7.0, 5.0]}


def by_hand(image_ND: Tensor, text_ND: Tensor, scale: Tensor, image_NKD: Tensor, text_NKD: Tensor) -> tuple[float, float]:
    """Contrastive and distillation loss, a pair at a time."""
    logit_NN, rows = scale * image_ND @ text_ND.T, len(image_ND)
    contrastive = (cross_entropy(logit_NN, torch.arange(rows)) + cross_entropy(logit_NN.T, torch.arange(rows))) / 2
    total = 0.0
    for student, queries, keys in ((logit_NN, image_NKD, text_NKD), (logit_NN.T, text_NKD, image_NKD)):
        for n in range(rows):
            target_N = sum((factor * keys[:, k] @ queries[n, k]).softmax(dim=0) for k, factor in enumerate((7.0, 5.0))) / 2
            total -= float((target_N * log_softmax(student[n], dim=0)).sum()) / rows / 2
    return float(contrastive), total


def test_the_loss_is_that_of_the_definition() -> None:
    objective, model = started(SETTINGS)
    tensors = batch()
    with torch.no_grad():
        given = encoded(model, tensors)
        parts = objective(given)
        image_NKD, text_NKD, synthetic_NKD = (tensors[f"teacher_{name}_NKD"].double() for name in ("image", "text", "synthetic"))
        raw = by_hand(given.image_ND, given.text_ND, given.logit_scale, image_NKD, text_NKD)
        synthetic_ND = model.encode_text(tensors["synthetic_NL"])
        synthetic = by_hand(given.image_ND, synthetic_ND, given.logit_scale, image_NKD, synthetic_NKD)
    assert float(parts["contrastive"]) == pytest.approx(raw[0] + synthetic[0]), "a sum over the kinds of captions, no mean"
    assert float(parts["distillation"]) == pytest.approx(raw[1] + synthetic[1])
    assert float(parts["loss"]) == pytest.approx(0.25 * (raw[0] + synthetic[0]) + 0.75 * (raw[1] + synthetic[1]))


def test_each_teacher_has_its_own_softmax() -> None:
    image_NKD, text_NKD = batch()["teacher_image_NKD"], batch()["teacher_text_NKD"]
    scale_2 = torch.tensor([100.0, 100.0])
    both = targets(image_NKD, text_NKD, image_NKD, text_NKD, scale_2)
    each = [targets(*(feature[:, k : k + 1] for feature in (image_NKD, text_NKD) * 2), scale_2[:1]) for k in range(2)]
    torch.testing.assert_close(both.image, (each[0].image + each[1].image) / 2)
    torch.testing.assert_close(both.text, (each[0].text + each[1].text) / 2)
    joined = targets(*(feature.flatten(1)[:, None] for feature in (image_NKD, text_NKD) * 2), scale_2[:1])
    assert (joined.image - both.image).abs().max() > 0.1
    padded = targets(*(pad(feature, (0, 3)) for feature in (image_NKD, text_NKD) * 2), scale_2)
    torch.testing.assert_close(padded.image, both.image)


def test_targets_add_up_to_one_and_those_of_the_released_code_do_not() -> None:
    image_NKD, text_NKD = batch()["teacher_image_NKD"], batch()["teacher_text_NKD"]
    found = targets(image_NKD, text_NKD, image_NKD, text_NKD, torch.tensor([30.0, 20.0]))
    for side in found:
        torch.testing.assert_close(side.sum(dim=1), torch.ones(len(side)))
    assert (transposed(found).text.sum(dim=1) - 1).abs().max() > 0.05


def test_nothing_is_better_than_the_teachers_own_similarities() -> None:
    image_NKD, text_NKD = (batch()[f"teacher_{name}_NKD"][:, :1].double() for name in ("image", "text"))
    logit_NN = 7.0 * image_NKD[:, 0] @ text_NKD[:, 0].T
    found = targets(image_NKD, text_NKD, image_NKD, text_NKD, torch.tensor([7.0]).double())
    student = logit_NN.clone().requires_grad_()
    distillation(Logits(student, student.T, torch.arange(len(student))), found).backward()
    torch.testing.assert_close(student.grad, torch.zeros_like(logit_NN), rtol=0, atol=1e-12)


def test_one_scale_serves_all_teachers_and_other_numbers_are_refused() -> None:
    (one, model), (two, _) = (started({**SETTINGS, "teacher_scale": scale}) for scale in ([6.0], [6.0, 6.0]))
    given = encoded(model, batch())
    assert float(one(given)["loss"].detach()) == float(two(given)["loss"].detach())
    three, _ = started({**SETTINGS, "teacher_scale": [6.0, 6.0, 6.0]})
    with pytest.raises(ConfigError, match="other numbers of scales"):
        three(given)


def test_weights_of_nothing_send_no_gradient() -> None:
    objective, model = started({"method": "mobileclip"})
    tensors = batch()
    same = {**tensors, "teacher_text_NKD": tensors["teacher_text_NKD"].flip(0)}
    plain, other = (float(objective(encoded(model, given))["loss"].detach()) for given in (tensors, same))
    assert plain != other
    alone, _ = started({"method": "mobileclip", "contrastive": 1.0, "distillation": 0.0})
    plain, other = (float(alone(encoded(model, given))["loss"].detach()) for given in (tensors, same))
    assert plain == other


def test_what_it_asks_of_the_pairs() -> None:
    assert Wants.of(Config().build()) == Wants(sources=("synthetic",), reinforced=True)


@pytest.mark.parametrize(
    ("wrong", "word"),
    [({"distillation": 0.0}, "nothing is learnt"), ({"teacher_scale": [0.0]}, "above 0"), ({"teacher_scale": []}, "teacher_scale")],
)
def test_impossible_settings_are_refused(wrong: dict[str, object], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        Config.parse({"method": "mobileclip", **wrong})
