from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from diptych.core.errors import ConfigError, DataError
from diptych.core.points import TrainContext
from diptych.models import clip
from diptych.models.captioner import Captioner
from diptych.models.clip import DualEncoder
from diptych.objectives.cgt_gan import CgtGan, Config, Discriminator, ended
from diptych.train.contrastive import Contrastive

CORPUS = ["the number seven", "a handwritten three", "digit one in white"]


@pytest.fixture
def model() -> DualEncoder:
    return clip.create("coca-digits-16-bottleneck", 0)


def started(model: DualEncoder, captions: Any = None, **fields: Any) -> CgtGan:
    objective = Config(**{"samples": 3, "max_length": 5, "discriminator_width": 8, **fields}).build()
    torch.manual_seed(0)
    objective.start(TrainContext(model, model.tokenizer, 3, {}, 10, seed=4, captions=captions or (lambda: [[text] for text in CORPUS])))
    return objective


def batch(model: DualEncoder) -> dict[str, Tensor]:
    image = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return {"image_NCHW": image, "text_NL": torch.from_numpy(model.tokenizer.encode_cut(CORPUS)), "row_N": torch.arange(3)}


def test_sentences_are_learnt_from_their_own_features_and_the_towers_stay(model: DualEncoder) -> None:
    objective = started(model, stage="text")
    trained = [name for name, parameter in model.clip.named_parameters() if parameter.requires_grad]
    assert trained
    assert all(name.startswith("text_decoder.") for name in trained)
    task, given = Contrastive(model, objective), batch(model)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=3e-3)
    for step in range(60):
        optimizer.zero_grad()
        task.losses(given, step)["loss"].backward()
        optimizer.step()
    captioner = Captioner(model)
    following = captioner.following(captioner.of_feature(model.encode_text(given["text_NL"])))
    from diptych.models.decoding import decode

    assert captioner.texts(decode(following, 3, captioner.vocabulary, 8).token_NL) == CORPUS


def test_each_loss_reaches_its_own_parameters_alone(model: DualEncoder) -> None:
    objective = started(model, wait=0, ramp=0)
    found = Contrastive(model, objective).losses(batch(model), 0)
    torch.testing.assert_close(found["loss"].detach(), found["generator"] + found["discriminator"])
    assert objective.discriminator is not None
    critic = list(objective.discriminator.parameters())
    found["loss"].backward()
    both = [parameter.grad.clone() for parameter in critic]  # type: ignore[union-attr]
    assert model.clip.text_decoder.text_projection.grad.abs().sum() > 0
    assert all(parameter.grad is None for name, parameter in model.clip.named_parameters() if not name.startswith("text_decoder."))
    captioner = Captioner(model, objective.token_V)
    drawn_ML = objective._sampled(captioner, captioner.see(batch(model)["image_NCHW"])[1], batch(model)["row_N"], 0)
    sample_ML = ended(drawn_ML, captioner.vocabulary.eos)
    real_ML = objective.corpus_TL[objective._drawn(batch(model)["row_N"], 3, 0)]
    from diptych.objectives.cgt_reward import discriminator_loss

    loss = discriminator_loss(objective._score(real_ML, captioner), objective._score(sample_ML, captioner))
    for mine, alone in zip(both, torch.autograd.grad(loss, critic), strict=True):
        torch.testing.assert_close(mine, alone)


def test_the_pairs_own_captions_are_never_looked_at(model: DualEncoder) -> None:
    task = Contrastive(model, started(model))
    one, other = batch(model), batch(model)
    other["text_NL"] = other["text_NL"].flip(0)
    assert float(task.losses(one, 5)["loss"].detach()) == float(task.losses(other, 5)["loss"].detach())


def test_draws_follow_rows_and_steps_not_places(model: DualEncoder) -> None:
    objective, given = started(model), batch(model)
    captioner = Captioner(model, objective.token_V)
    seen_NSW = captioner.see(given["image_NCHW"])[1]
    samples = objective._sampled(captioner, seen_NSW, given["row_N"], 2).view(3, 3, -1)
    turned = objective._sampled(captioner, seen_NSW.flip(0), given["row_N"].flip(0), 2).view(3, 3, -1)
    assert torch.equal(samples, turned.flip(0))
    assert not torch.equal(samples, objective._sampled(captioner, seen_NSW, given["row_N"], 3).view(3, 3, -1))
    assert len({tuple(row) for row in samples.view(9, -1).tolist()}) > 3


def test_a_sample_at_the_limit_is_ended_for_its_judges_alone() -> None:
    assert ended(torch.tensor([[0, 3, 4, 3], [0, 1, 1, 1]]), 1).tolist() == [[0, 3, 4, 1], [0, 1, 1, 1]]


def test_rewards_weigh_as_the_schedule_says(model: DualEncoder) -> None:
    task = Contrastive(model, started(model, wait=2, ramp=4, weight=0.8))
    assert [float(task.losses(batch(model), step)["weight"]) for step in (0, 2, 4, 9)] == pytest.approx([0, 0, 0.4, 0.8])
    clip_only = Contrastive(model, started(model, wait=0, ramp=0, weight=1.0)).losses(batch(model), 0)
    critic_only = Contrastive(model, started(model, weight=0.0)).losses(batch(model), 0)
    assert float(clip_only["generator"]) != float(critic_only["generator"])


@pytest.mark.parametrize("fields", [{"baseline": "sample"}, {"top_k": 2, "temperature": 0.7}, {"image_weight": 1.0}])
def test_variants_are_finite_and_train(model: DualEncoder, fields: dict[str, Any]) -> None:
    loss = Contrastive(model, started(model, wait=0, ramp=0, **fields)).losses(batch(model), 0)["loss"]
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(model.clip.text_decoder.text_projection.grad).all()
    assert model.clip.text_decoder.text_projection.grad.abs().sum() > 0


def test_the_discriminator_does_not_look_behind_the_end() -> None:
    torch.manual_seed(0)
    critic = Discriminator(6, 8)
    one, other = torch.tensor([[3, 4, 1, 1, 1]]), torch.tensor([[3, 4, 1, 5, 2]])
    torch.testing.assert_close(critic(one, 1), critic(other, 1))
    assert not torch.allclose(critic(one, 1), critic(torch.tensor([[3, 5, 1, 1, 1]]), 1))


def test_refusals(model: DualEncoder) -> None:
    with pytest.raises(ConfigError, match="looks at a picture's tokens"):
        started(clip.create("coca-digits-16", 0))
    with pytest.raises(DataError, match="no corpus"):
        started(model, captions=lambda: [[], []])
