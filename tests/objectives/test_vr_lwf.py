"""VR-LwF: its sentences, what it holds and what it lets move, later sessions, the variant, refusals."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from sharded import Scaled, batch, context, encoded, started
from torch.nn.functional import cross_entropy, kl_div
from worlds import Letters

from diptych.core.errors import ConfigError
from diptych.core.points import Wants
from diptych.models.tokenizer import EOT, SOT, Tokenizer
from diptych.objectives.teacher import Teacher
from diptych.objectives.vr_lwf import FIRST_EXCLUDED, Config, VrLwf, pseudo_sentences, supervised_loss

SETTINGS = {"method": "vr-lwf", "sentences": 20, "words": 3}


def moved(model: Scaled) -> Scaled:
    """The student some steps later."""
    with torch.no_grad():
        for parameter in (model.image, model.words):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64))
    return model


def test_sentences_are_random_words_between_the_special_tokens() -> None:
    made = Config(sentences=500, words=6).build()
    text_PL = made.sentences(0)
    assert text_PL.shape == (500, 8)
    assert set(text_PL[:, 0]) == {SOT}
    assert set(text_PL[:, -1]) == {EOT}
    words = text_PL[:, 1:-1]
    assert words.min() >= 0
    assert FIRST_EXCLUDED - 1000 < words.max() < FIRST_EXCLUDED
    assert np.array_equal(text_PL.argmax(axis=1), np.full(500, 7)), "the end token is what is pooled"
    draw = np.arange(8).reshape(2, 4)
    assert pseudo_sentences(draw, 90, 91).tolist() == [[90, 1, 2, 91], [90, 5, 6, 91]]
    assert draw[0, 0] == 0, "the draw is left alone"


def test_sentences_are_new_each_step_and_of_the_seed_alone() -> None:
    made, other = Config().build(), Config().build()
    assert np.array_equal(made.sentences(3), other.sentences(3))
    assert not np.array_equal(made.sentences(3), made.sentences(4))
    other.seed = 1
    assert not np.array_equal(made.sentences(3), other.sentences(3))
    once = Config(variant="zscl").build()
    assert np.array_equal(once.sentences(3), once.sentences(4))


def test_at_the_start_there_is_nothing_to_keep_and_later_there_is() -> None:
    objective, model = started({**SETTINGS, "replay": ["vocabulary", "classes"]})
    parts = objective(encoded(model, batch()))
    assert float(parts["vocabulary"]) == pytest.approx(0, abs=1e-12)
    assert float(parts["classes"]) == pytest.approx(0, abs=1e-12)
    parts = objective(encoded(moved(model), batch()))
    assert float(parts["vocabulary"]) > 0.01
    assert float(parts["classes"]) > 0.001
    expected = parts["supervised"] + parts["vocabulary"] + parts["classes"]
    assert float(parts["loss"].detach()) == pytest.approx(float(expected))


def test_the_parts_are_those_of_the_definition() -> None:
    objective, model = started({**SETTINGS, "alpha": 0.5})
    teacher = Scaled().double()
    given = encoded(moved(model), batch(), step=7)
    parts = objective(given)
    text_PL = torch.from_numpy(objective.sentences(7))
    now = (model.logit_scale.exp() * given.image_ND @ model.encode_text(text_PL).T).log_softmax(dim=1)
    was = (4.0 * teacher.encode_image(given.batch["image_NCHW"]) @ teacher.encode_text(text_PL).T).log_softmax(dim=1)
    kept = kl_div(now, was, reduction="batchmean", log_target=True)
    logits = model.logit_scale.exp() * given.image_ND @ objective.prompts.weights(given).T
    assert float(parts["vocabulary"]) == pytest.approx(float(kept.detach()))
    assert float(parts["supervised"]) == pytest.approx(float(cross_entropy(logits, given.batch["label_N"]).detach()))
    assert float(parts["loss"].detach()) == pytest.approx(float(parts["supervised"] + 0.5 * parts["vocabulary"]))


def test_the_vocabulary_holds_both_towers() -> None:
    objective, model = started(SETTINGS)
    unlabelled = {**batch(), "label_N": torch.full((8,), -1)}
    parts = objective(encoded(moved(model), unlabelled))
    assert float(parts["supervised"]) == 0
    parts["loss"].backward()
    assert all(parameter.grad.any() for parameter in (model.image, model.words, model.logit_scale))
    zscl, model = started({**SETTINGS, "variant": "zscl"})
    zscl(encoded(moved(model), unlabelled))["loss"].backward()
    assert model.image.grad.any()
    assert not model.words.grad.any(), "the variant holds pictures alone"


def test_nothing_replayed_is_fine_tuning() -> None:
    objective, model = started({**SETTINGS, "replay": []})
    model.texts_encoded = 0
    parts = objective(encoded(model, batch()))
    assert set(parts) == {"loss", "supervised"}
    assert model.texts_encoded == 2, "the captions of this test, and the class prompts"


def test_a_later_session_keeps_earlier_classes_and_takes_no_answer_from_them() -> None:
    first, model = started({**SETTINGS, "replay": ["classes"]})
    later, _ = started({**SETTINGS, "replay": ["classes"], "earlier": ["bee", "elk"]})
    given = encoded(moved(model), batch())
    one, two = first(given), later(given)
    assert float(two["supervised"]) == pytest.approx(float(one["supervised"]))
    assert float(two["classes"]) != pytest.approx(float(one["classes"]))
    assert len(later.prompts) == 6


def test_unlabelled_pictures_are_no_answer_but_are_kept() -> None:
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    label = torch.tensor([1, -1, 3, 0, -1, -3])
    known = label >= 0
    torch.testing.assert_close(supervised_loss(logits, label), cross_entropy(logits[known], label[known]))
    torch.testing.assert_close(
        supervised_loss(logits, label, smoothing=0.2), cross_entropy(logits[known], label[known], label_smoothing=0.2)
    )


def test_the_teacher_is_the_start_and_no_part_of_the_state() -> None:
    objective, model = started(SETTINGS)
    assert objective.state_dict() == {}
    assert list(objective.parameters()) == []
    assert objective.teacher.digest == Teacher(Scaled().double(), "t").digest
    named, _ = started({**SETTINGS, "teacher": "."})
    assert named.teacher.digest != objective.teacher.digest
    assert repr(named) != repr(objective)
    resumed = VrLwf(objective.config)
    resumed.start(context(Scaled().double()))
    resumed.load_state_dict(objective.state_dict())
    given = encoded(moved(model), batch(), step=5)
    assert float(resumed.double()(given)["loss"].detach()) == float(objective(given)["loss"].detach())


def test_what_it_wants() -> None:
    assert Wants.of(Config().build()) == Wants(columns=("label",), encodes=("image",))
    assert Config.directories == ("teacher",)


def test_what_cannot_be_is_refused() -> None:
    for wrong, hint in (
        ({"replay": ["vocabulary", "vocabulary"]}, "at most once"),
        ({"earlier": ["cat"]}, "no effect unless"),
        ({"variant": "zscl", "replay": ["classes"]}, "replays the vocabulary"),
        ({"teacher": "digits-16"}, "weights are random"),
    ):
        with pytest.raises(ConfigError, match=hint):
            Config.parse({"method": "vr-lwf", **wrong})
    there, made = context(Scaled()), Config(replay=("classes",), earlier=("owl",)).build()
    with pytest.raises(ConfigError, match="among the new ones"):
        made.start(there)
    with pytest.raises(ConfigError, match="no classes to name"):
        Config().build().start(dataclasses.replace(there, class_names={}))
    with pytest.raises(ConfigError, match="no vocabulary"):
        Config().build().start(dataclasses.replace(there, tokenizer=Letters()))
    with pytest.raises(ConfigError, match="longer than the context"):
        Config(words=7).build().start(dataclasses.replace(there, tokenizer=Tokenizer(8)))
