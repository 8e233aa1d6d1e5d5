from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from _ranks import run_ranks
from torch import Tensor

from diptych.core.errors import ConfigError
from diptych.core.points import Encoded, TrainContext
from diptych.models import clip
from diptych.models.captioner import Captioner, said_tokens
from diptych.models.clip import DualEncoder
from diptych.objectives.clip import clip_loss
from diptych.objectives.coca import Coca, Config, caption_loss, hidden
from diptych.train.contrastive import Contrastive

TEXTS = ["the digit seven", "a digit", "a handwritten digit", "odd"]


@pytest.fixture
def model() -> DualEncoder:
    return clip.create("coca-digits-16", 0)


def context(model: DualEncoder) -> TrainContext:
    return TrainContext(model, model.tokenizer, len(TEXTS), {}, 10, captions=lambda: [[text] for text in TEXTS])


def batch(model: DualEncoder) -> dict[str, Tensor]:
    image = torch.randint(0, 256, (len(TEXTS), 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return {"image_NCHW": image, "text_NL": torch.from_numpy(model.tokenizer.encode_cut(TEXTS)), "row_N": torch.arange(len(TEXTS))}


def losses(model: DualEncoder, step: int = 0, **fields: Any) -> tuple[dict[str, Tensor], Coca]:
    objective = Config(**fields).build()
    objective.start(context(model))
    return Contrastive(model, objective).losses(batch(model), step), objective


def test_the_loss_is_captioning_and_contrast(model: DualEncoder) -> None:
    found, _ = losses(model, caption_weight=3.0, contrastive_weight=0.5)
    given = batch(model)
    features = model.encode_image(given["image_NCHW"]), model.encode_text(given["text_NL"])
    torch.testing.assert_close(found["contrastive"], clip_loss(*features, model.logit_scale.exp()))
    captioner = Captioner(model)
    logits = captioner.logits(captioner.see(given["image_NCHW"])[1], given["text_NL"][:, :-1]).log_softmax(dim=-1)
    target = given["text_NL"][:, 1:]
    own = torch.arange(target.shape[1]) < (given["text_NL"] == 49407).int().argmax(dim=1)[:, None]
    by_hand = -logits.gather(2, target[..., None])[..., 0][own].mean()
    torch.testing.assert_close(found["caption"], by_hand)
    torch.testing.assert_close(found["loss"], 3 * found["caption"] + 0.5 * found["contrastive"])


def test_a_pure_captioner_has_no_contrast_and_trains_no_feature_head(model: DualEncoder) -> None:
    found, _ = losses(model, contrastive_weight=0.0, vocabulary="seen")
    assert set(found) == {"loss", "caption"}
    found["loss"].backward()
    assert model.clip.text.text_projection.grad is None
    assert model.clip.visual.conv1.weight.grad.abs().sum() > 0


def test_hidden_pictures_are_zeros_and_drawn_by_row_and_step() -> None:
    row_N = torch.arange(2000)
    first = hidden(7, row_N, 3, 0.5)
    assert float(first.float().mean()) == pytest.approx(0.5, abs=0.05)
    assert torch.equal(first.flip(0), hidden(7, row_N.flip(0), 3, 0.5))
    assert not torch.equal(first, hidden(7, row_N, 4, 0.5))
    assert not torch.equal(first, hidden(8, row_N, 3, 0.5))
    assert not hidden(7, row_N, 3, 0.0).any()


def test_what_is_hidden_does_not_reach_the_captions(model: DualEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diptych.objectives.coca.hidden", lambda *_: torch.tensor([True] * len(TEXTS)))
    objective = Config(contrastive_weight=0.0, drop=0.5).build()
    objective.start(context(model))
    one, other = batch(model), batch(model)
    other["image_NCHW"] = 255 - other["image_NCHW"]
    task = Contrastive(model, objective)
    torch.testing.assert_close(task.losses(one, 0)["loss"], task.losses(other, 0)["loss"])
    captioner = Captioner(model)
    nothing = torch.zeros_like(captioner.see(one["image_NCHW"])[1])
    logits = captioner.logits(nothing, one["text_NL"][:, :-1])
    torch.testing.assert_close(task.losses(one, 0)["caption"], caption_loss(logits, one["text_NL"], captioner.token_V))


def test_seen_tokens_alone_are_trained_and_stay_alone(model: DualEncoder) -> None:
    found, objective = losses(model, vocabulary="seen")
    found["loss"].backward()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    optimizer.step()
    with torch.no_grad():
        model.clip.text_decoder.text_projection[:, 5] = 1.0
    objective.after_step(1, model)
    assert said_tokens(model.clip).tolist() == objective.token_V.tolist()
    assert 49408 > len(objective.token_V) == len(np.unique(model.tokenizer.encode_cut(TEXTS)[model.tokenizer.encode_cut(TEXTS) > 0]))


def test_it_learns_its_captions(model: DualEncoder) -> None:
    objective = Config(contrastive_weight=0.0, vocabulary="seen").build()
    objective.start(context(model))
    task, optimizer = Contrastive(model, objective), torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(40):
        optimizer.zero_grad()
        task.losses(batch(model), step)["loss"].backward()
        optimizer.step()
    assert Captioner(model.eval()).caption(batch(model)["image_NCHW"]) == TEXTS


def test_refusals(model: DualEncoder) -> None:
    with pytest.raises(ConfigError, match="nothing would be trained"):
        Config.parse({"caption_weight": 0.0, "contrastive_weight": 0.0})
    other = clip.create("digits-16", 0)
    with pytest.raises(ConfigError, match="no captioner"):
        Config().build().start(TrainContext(other, other.tokenizer, 4, {}, 1))
    with pytest.raises(ConfigError, match="whole batch"):
        Contrastive(model, Config().build(), accumulate=2)


def test_it_runs_the_model_in_the_loops_precision(model: DualEncoder) -> None:
    objective = Config(vocabulary="seen").build()
    objective.start(context(model))
    full, half = (float(Contrastive(model, objective, precision=name).losses(batch(model), 0)["caption"]) for name in ("fp32", "bf16"))
    assert full != half
    assert full == pytest.approx(half, rel=0.02)
    own = Encoded(torch.empty(0, 0), torch.empty(0, 0), model.logit_scale.exp(), batch(model), model)
    assert float(objective(own)["caption"]) == full  # without a loop: as it is


def test_the_loss_on_two_ranks_is_the_mean_over_all_tokens() -> None:
    whole = on_rank(0, 1)
    parts = run_ranks(2, on_rank)
    assert np.mean([part["loss"] for part in parts]) == pytest.approx(whole["loss"], rel=1e-6)
    np.testing.assert_allclose(np.mean([part["gradient"] for part in parts], axis=0), whole["gradient"], rtol=1e-5, atol=1e-7)


def on_rank(rank: int, world_size: int) -> dict[str, Any]:
    """The captioning loss of this rank's share of captions of unequal lengths, and its gradient in a bias shared by all logits."""
    text_NL = torch.tensor([[49406, 4, 49407, 0, 0], [49406, 5, 6, 4, 49407], [49406, 6, 5, 49407, 0], [49406, 49407, 0, 0, 0]])
    token_V = torch.tensor([4, 5, 6, 49406, 49407])
    logits_NLV = torch.randn(4, 4, 5, generator=torch.Generator().manual_seed(0))
    share = slice(rank * 4 // world_size, (rank + 1) * 4 // world_size)
    bias_V = torch.zeros(5, requires_grad=True)
    loss = caption_loss(logits_NLV[share] + bias_V, text_NL[share], token_V)
    return {"loss": loss.item(), "gradient": torch.autograd.grad(loss, bias_V)[0].numpy()}
