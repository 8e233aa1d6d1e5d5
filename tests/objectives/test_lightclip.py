"""LightCLIP's three parts by their definitions, beside CLIP and the exact matching, and what it asks of the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize
from whole_models import CAPTIONS, batch, context, encoded, model, started

from diptych.core.errors import ConfigError
from diptych.core.points import Encoded, Wants
from diptych.models import clip
from diptych.models.maps import text_tokens
from diptych.objectives.clip import Logits, clip_loss
from diptych.objectives.lightclip import Config, assignment, exact, relaxed, soft_loss, soft_targets, softness, token_loss
from diptych.objectives.masked_words import mask_words, words_of
from diptych.train.contrastive import Contrastive

SMALL: dict[str, Any] = {"method": "lightclip", "vocabulary": "seen"}


def run(objective: Any, dual: Any, step: int = 0, **changes: torch.Tensor) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = objective(encoded(dual, {**batch(), **changes}, step, Wants.of(objective)))
    return found


def features(seed: int = 0, rows: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image, text = (normalize(torch.randn(rows, 5, generator=generator, dtype=torch.float64), dim=1) for _ in range(2))
    return image, text


def logits_of(image: torch.Tensor, text: torch.Tensor, scale: float = 5.0) -> Logits:
    return Logits(scale * image @ text.T, scale * text @ image.T, torch.arange(len(image)))


def test_without_softening_tokens_and_words_it_is_clip() -> None:
    objective, dual = started({**SMALL, "alpha": 0.0, "token": 0.0, "mlm": 0.0})
    given = encoded(dual, batch())
    torch.testing.assert_close(
        run(objective, dual, 7)["loss"], clip_loss(given.image_ND, given.text_ND, given.logit_scale), rtol=1e-12, atol=0
    )
    soft, _ = started({**SMALL, "token": 0.0, "mlm": 0.0})
    assert run(soft, dual, 0)["loss"] == run(objective, dual, 0)["loss"], "the ramp starts at 0"
    assert run(soft, dual, 7)["loss"] != run(objective, dual, 7)["loss"]


def test_targets_are_distributions_and_their_gradient_is_none() -> None:
    image, text = features()
    logits = (image @ text.T).requires_grad_()
    for kind in ("similarity", "uniform"):
        target = soft_targets(logits, torch.arange(6), 0.2, kind)  # type: ignore[arg-type]
        assert not target.requires_grad
        torch.testing.assert_close(target.sum(dim=1), torch.ones(6, dtype=torch.float64))
        torch.testing.assert_close(target.diagonal(), torch.full((6,), 0.8, dtype=torch.float64))
    assert torch.equal(soft_targets(logits[:1, :1], torch.zeros(1, dtype=torch.int64), 0.2), torch.ones(1, 1, dtype=torch.float64))
    assert [softness(step, 10, 0.2) for step in (0, 5, 10, 20)] == [0.0, 0.1, 0.2, 0.2]


def test_a_doubled_caption_is_pushed_away_a_quarter_less() -> None:
    image, other = features()
    text = normalize(image + 0.5 * other, dim=1)
    text[1] = text[0]
    pushes = []
    for alpha in (0.0, 0.2):
        logits = (8 * image @ text.T).requires_grad_()
        soft_loss(Logits(logits, logits.detach().T, torch.arange(6)), alpha).backward()
        assert logits.grad is not None
        pushes.append(float(logits.grad[0, 1]))
    assert 0 < pushes[1] < 0.75 * pushes[0]


def tokens(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    patch, word = (normalize(torch.randn(4, count, 6, generator=generator, dtype=torch.float64), dim=2) for count in (7, 5))
    return patch, word, torch.arange(5) < torch.tensor([[5], [2], [1], [3]])


def test_relaxing_only_adds_and_padding_is_no_word() -> None:
    patch, word, words = tokens()
    loose, strict = relaxed(patch, word, words, chunk=3), exact(patch, word, words)
    assert (loose >= strict - 1e-12).all()
    assert (loose > strict + 1e-9).any()
    torch.testing.assert_close(loose[:, 2], strict[:, 2])
    changed = torch.where(words[..., None], word, 9.0)
    torch.testing.assert_close(relaxed(patch, changed, words), loose)
    by_hand = torch.stack([torch.stack([(w[m] @ p.T).amax(dim=1).mean() for w, m in zip(word, words, strict=True)]) for p in patch])
    torch.testing.assert_close(loose, by_hand)
    found = assignment(patch[0], word[0], words[0])
    assert len(set(found.tolist())) == 5
    assert assignment(patch[0, :2], word[0], words[0]).tolist().count(-1) == 3


def test_token_loss_trains_what_was_matched_alone() -> None:
    patch, word, words = tokens()
    patch.requires_grad_()
    loss = token_loss(patch, word, words, torch.tensor(5.0))
    similarity, label = relaxed(patch, word, words), torch.arange(4)
    torch.testing.assert_close(loss, (cross_entropy(5 * similarity, label) + cross_entropy(5 * similarity.T, label)) / 2)
    (grad,) = torch.autograd.grad(loss, patch)
    best = torch.einsum("npd,mld->nmlp", patch, word).argmax(dim=3)
    for row in range(4):
        used = set(best[row][words].tolist())
        assert {index for index in range(7) if grad[row, index].any()} == used


def test_words_are_neither_start_nor_end_nor_padding() -> None:
    dual = model()
    text_NL = batch()["text_NL"]
    words_NL = words_of(text_tokens(dual, text_NL)[2])
    assert [dual.tokenizer.decode([row[kept].tolist()])[0] for row, kept in zip(text_NL, words_NL, strict=True)] == list(CAPTIONS)


def test_masks_are_drawn_by_row_and_step_in_the_right_shares() -> None:
    text_NL, row_N = torch.full((4000, 8), 5), torch.arange(4000)
    words_NL = torch.zeros_like(text_NL, dtype=torch.bool)
    words_NL[:, 1:6] = True
    token_V = torch.arange(1000, 1100)
    masked = mask_words(text_NL, words_NL, 0.15, token_V, seed=0, row_N=row_N, step=2)
    assert not masked.told_NL[~words_NL].any()
    assert float(masked.told_NL[words_NL].float().mean()) == pytest.approx(0.15, abs=0.01)
    told = masked.told_NL
    other = (masked.text_NL != text_NL) & told
    assert float(masked.token_NL[told].float().mean()) == pytest.approx(0.8, abs=0.03)
    assert float(other[told].float().mean()) == pytest.approx(0.1, abs=0.03)
    assert torch.equal(masked.text_NL[~other], text_NL[~other])
    assert torch.isin(masked.text_NL[other], token_V).all()
    part = mask_words(text_NL[:50, :7], words_NL[:50, :7], 0.15, token_V, seed=0, row_N=row_N[100:150], step=2)
    assert torch.equal(part.told_NL, told[100:150, :7])
    again = mask_words(text_NL, words_NL, 0.15, token_V, seed=0, row_N=row_N, step=3)
    assert (again.told_NL != told).any()


def test_the_picture_reaches_the_words_through_the_gate_alone() -> None:
    objective, dual = started({**SMALL, "alpha": 0.0, "token": 0.0, "mask": 1.0})
    other = {"image_NCHW": 255 - batch()["image_NCHW"]}
    assert run(objective, dual)["mlm"] == run(objective, dual, **other)["mlm"], "the gate starts at 0"
    with torch.no_grad():
        objective.words.fusions["1"].gate.fill_(1.0)
    parts = run(objective, dual)
    assert parts["mlm"] != run(objective, dual, **other)["mlm"]
    objective.config = Config.parse({**SMALL, "alpha": 0.0, "token": 0.0, "mask": 1.0, "mlm": 50.0})
    grads = [torch.autograd.grad(run(each, dual)["loss"], dual.clip.visual.conv1.weight)[0] for each in (objective, started(SMALL)[0])]
    assert grads[0].norm() > 2 * grads[1].norm(), "what is told trains the image tower"


def test_masked_words_see_both_sides_and_their_own_caption_only() -> None:
    objective, dual = started({**SMALL, "fusion": [], "mask": 1.0})
    words, text_NL = objective.words, batch()["text_NL"]
    real_NL = text_tokens(dual, text_NL)[2]
    told_NL = torch.zeros_like(real_NL)
    told_NL[2, 2] = True
    seen = torch.zeros(8, 16, 8, dtype=torch.float64)

    def state(ids: torch.Tensor) -> torch.Tensor:
        from diptych.objectives.masked_words import Masked

        found: torch.Tensor = words.states(dual.clip, Masked(ids, told_NL, told_NL), real_NL, seen)[2, 2]
        return found

    before, later, hidden, padding = state(text_NL), text_NL.clone(), text_NL.clone(), text_NL.clone()
    later[2, 4], hidden[2, 2] = 320, 320
    padding[~real_NL] = 320
    padding[3] = 320
    assert not torch.equal(state(later), before), "what follows is seen"
    assert torch.equal(state(hidden), before), "what is masked is not"
    torch.testing.assert_close(state(padding), before)


def test_it_tells_words_that_the_picture_decides() -> None:
    objective, dual = started({**SMALL, "probe": ["red", "blue"], "mlm": 1.0, "mask": 0.5, "alpha": 0.0}, total_steps=150)
    dual.clip.token_embedding.requires_grad_(False)  # large, and not needed
    trained = [each for each in (*dual.parameters(), *objective.parameters()) if each.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.005)
    assert "told" in run(objective, dual)
    for step in range(150):
        optimizer.zero_grad()
        parts = run(objective, dual, step)
        parts["loss"].backward()
        optimizer.step()
    assert float(parts["told"]) > float(parts["told_other"])
    assert float(parts["told"]) == 1


def test_a_caption_without_words_and_a_batch_without_masks_do_no_harm() -> None:
    objective, dual = started({**SMALL, "mask": 1e-9, "probe": ["red"]})
    text_NL = torch.from_numpy(dual.tokenizer.encode_cut(["", *["a disc"] * 7]))
    parts = run(objective, dual, text_NL=text_NL)
    parts["loss"].backward()
    assert float(parts["mlm"]) == 0
    assert "told" not in parts
    assert all(parameter.grad.isfinite().all() for parameter in dual.parameters() if parameter.grad is not None)


def test_impossible_settings_are_refused() -> None:
    for wrong, hint in (({"alpha": 0.5}, "alpha"), ({"probe": ["red"], "mlm": 0.0}, "mlm is 0"), ({"fusion": [1, 1]}, "twice")):
        with pytest.raises(ConfigError, match=hint):
            Config.parse({"method": "lightclip", **wrong})
    with pytest.raises(ConfigError, match="no such layer"):
        started({**SMALL, "fusion": [2]})
    with pytest.raises(ConfigError, match="no class token"):
        Config().build().start(context(clip.create("rn-nano-64", 0)))
    with pytest.raises(ConfigError, match="whole batch"):
        Contrastive(model(), Config().build(), accumulate=2)


def test_it_runs_in_the_loops_precision() -> None:
    dual = model().float()
    objective = Config(vocabulary="seen").build()
    objective.start(context(dual))
    full, half = (Contrastive(dual, objective, precision=name).losses(batch(), 3) for name in ("fp32", "bf16"))
    assert full["loss"].dtype == half["loss"].dtype == torch.float32
    assert full["mlm"] != half["mlm"]
    torch.testing.assert_close(half["loss"], full["loss"], rtol=0.05, atol=0)
    assert isinstance(encoded(dual, batch()), Encoded)
