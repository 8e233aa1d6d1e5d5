from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Mapping

import pytest
import torch
from tiny import TinyEncoder, TinyLoss, WordTokenizer, drawings
from torch import nn

from diptych.train.config import TrainConfig
from diptych.train.contrastive import Contrastive
from diptych.train.loader import PairLoader


def batch() -> dict[str, torch.Tensor]:
    frame, reader = drawings(16)
    config = TrainConfig.parse({"steps": 1, "batch_size": 16})
    return PairLoader(frame, reader, WordTokenizer(), 8, config, seed=0).batch(0).tensors


def gradients(accumulate: int, dropout: float = 0.0) -> tuple[float, dict[str, torch.Tensor], TinyEncoder]:
    model, loss = TinyEncoder(dropout=dropout).double(), TinyLoss().double()
    torch.manual_seed(3)
    losses = Contrastive(model, loss, accumulate).losses(batch(), 0)
    losses["loss"].backward()
    named = {**dict(model.named_parameters()), **{f"loss.{name}": parameter for name, parameter in loss.named_parameters()}}
    return losses["loss"].item(), {name: parameter.grad for name, parameter in named.items() if parameter.grad is not None}, model


@pytest.mark.parametrize("accumulate", [2, 4, 16])
def test_micro_batches_give_the_loss_and_gradients_of_the_whole_batch(accumulate: int) -> None:
    whole_loss, whole, _ = gradients(1)
    loss, parts, _ = gradients(accumulate)
    assert loss == pytest.approx(whole_loss, rel=1e-6)
    assert parts.keys() == whole.keys()
    assert "loss.bias" in whole
    assert "logit_scale" in whole
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-5, atol=1e-8)
        assert whole[name].abs().max() > 0


def test_the_loss_is_not_the_mean_of_micro_batch_losses() -> None:
    """A loss per micro-batch would have fewer negatives, hence be smaller: what plain gradient accumulation gets wrong."""
    task, tensors = Contrastive(TinyEncoder(dropout=0.0), TinyLoss()), batch()
    halves = [task.losses({name: tensor[part] for name, tensor in tensors.items()}, 0)["loss"] for part in (slice(8), slice(8, 16))]
    assert gradients(2)[0] > (halves[0] + halves[1]).item() / 2 + 0.1


def test_dropout_repeats_its_draws_in_the_second_pass() -> None:
    """Finite differences of the loss with fixed draws agree with the gradient only if both passes drop the same units."""
    tensors = batch()

    def loss_at(shift: float) -> torch.Tensor:
        model = TinyEncoder(dropout=0.5).double()
        model.image[1].bias.data[0] += shift  # type: ignore[union-attr,operator]
        torch.manual_seed(11)
        loss = Contrastive(model, TinyLoss().double(), 4).losses(tensors, 0)["loss"]
        if shift == 0:
            loss.backward()
            return model.image[1].bias.grad[0]  # type: ignore[union-attr,index,return-value]
        return loss.detach()

    slope = (loss_at(1e-4) - loss_at(-1e-4)) / 2e-4
    assert loss_at(0.0).item() == pytest.approx(slope.item(), rel=1e-4)


def test_each_micro_batch_is_encoded_twice_and_only_one_is_held() -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    class Watched(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            nonlocal most
            gc.collect()
            hidden = x.exp()  # saved for the backward
            alive.append(weakref.ref(hidden))
            most = max(most, sum(ref() is not None for ref in alive))
            return hidden.log1p()

    model = TinyEncoder(dropout=0.0)
    model.image.insert(2, Watched())
    Contrastive(model, TinyLoss(), 4).losses(batch(), 0)["loss"].backward()
    assert model.calls == 8
    assert len(alive) == 8
    assert most <= 2


def test_bf16_encodes_in_bf16_and_compares_in_float32() -> None:
    seen: dict[str, torch.dtype] = {}

    class Loss(TinyLoss):
        def forward(self, encoded):  # type: ignore[no-untyped-def]
            seen["features"] = encoded.image_ND.dtype
            return super().forward(encoded)

    model = TinyEncoder(dropout=0.0)
    model.image[1].register_forward_hook(lambda _module, _args, output: seen.update(hidden=output.dtype))
    bf16 = Contrastive(model, Loss(), 2, "bf16").losses(batch(), 0)["loss"]
    bf16.backward()
    assert seen == {"hidden": torch.bfloat16, "features": torch.float32}
    assert bf16.dtype == torch.float32
    assert bf16.item() == pytest.approx(Contrastive(model, TinyLoss()).losses(batch(), 0)["loss"].item(), rel=0.02)


def test_the_objective_sees_the_batch_the_model_and_the_step() -> None:
    seen = []

    class Loss(TinyLoss):
        def forward(self, encoded):  # type: ignore[no-untyped-def]
            seen.append(encoded)
            return super().forward(encoded)

    model, tensors = TinyEncoder(), batch()
    Contrastive(model, Loss()).losses(tensors, 7)
    (encoded,) = seen
    assert encoded.model is model
    assert encoded.step == 7
    assert isinstance(encoded.batch, Mapping)
    assert encoded.logit_scale.item() == pytest.approx(1 / 0.07)
    assert encoded.logit_scale.requires_grad
    assert torch.equal(encoded.batch["row_N"], tensors["row_N"])


@pytest.mark.parametrize(("before", "after"), [(-1.0, 0.0), (5.0, math.log(100)), (2.0, 2.0)])
def test_the_logit_scale_is_clamped_after_the_step(before: float, after: float) -> None:
    model = TinyEncoder()
    model.logit_scale.data.fill_(before)
    Contrastive(model, TinyLoss()).after_step()
    assert model.logit_scale.item() == pytest.approx(after)
    assert model.logit_scale.requires_grad


class Picky(nn.Module):
    """Asks for one tower, encodes further pictures itself, and follows the model's temperature."""

    def __init__(self, *encodes: str) -> None:
        super().__init__()
        self.encodes, self.followed = encodes, []

    def forward(self, encoded):  # type: ignore[no-untyped-def]
        self.seen = encoded
        view_ND = encoded.encode_image(encoded.batch["image_NCHW"].flip(3), normalize=False)
        self.view_ND, self.text_ND = view_ND, encoded.encode_text(encoded.batch["text_NL"])
        return {"loss": view_ND.square().mean() + (encoded.image_ND**3).sum() + self.text_ND.sum()}

    def after_step(self, step: int, model: nn.Module) -> None:
        self.followed.append((step, model))


def test_only_the_towers_asked_for_are_encoded() -> None:
    tensors = batch()
    for encodes, shapes in (((), [(0, 0), (0, 0)]), (("image",), [(16, 16), (0, 0)]), (("text",), [(0, 0), (16, 16)])):
        objective = Picky(*encodes)
        Contrastive(TinyEncoder(), objective).losses(tensors, 0)
        assert [tuple(feature.shape) for feature in (objective.seen.image_ND, objective.seen.text_ND)] == shapes


def test_an_objective_encodes_further_pictures_as_the_loop_does() -> None:
    tensors = batch()
    found = {}
    for accumulate in (1, 4):
        model, objective = TinyEncoder(dropout=0.0), Picky("image")
        Contrastive(model, objective, accumulate).losses(tensors, 0)["loss"].backward()
        calls = model.calls
        found[accumulate] = (objective.view_ND.detach(), objective.text_ND.detach(), model.image[1].weight.grad)
        expected = model.encode_image(tensors["image_NCHW"].flip(3), normalize=False)
        torch.testing.assert_close(objective.view_ND, expected)
        assert expected.norm(dim=1).std() > 0
        assert calls == (2 if accumulate == 1 else 16)
    for whole, parts in zip(found[1], found[4], strict=True):
        torch.testing.assert_close(parts, whole)
    bf16 = Picky()
    Contrastive(TinyEncoder(dropout=0.0), bf16, 1, "bf16").losses({**tensors}, 0)
    assert bf16.view_ND.dtype == torch.float32
    assert not torch.equal(bf16.view_ND, found[1][0])
    torch.testing.assert_close(bf16.view_ND, found[1][0], rtol=0.05, atol=0.02)


def test_the_objective_is_told_of_every_update() -> None:
    model, objective = TinyEncoder(), Picky()
    task = Contrastive(model, objective)
    for step in (4, 5):
        task.losses(batch(), step)
        task.after_step()
    assert objective.followed == [(5, model), (6, model)]


def test_a_chunked_loss_over_micro_batches_gives_the_gradients_of_the_whole_batch() -> None:
    from diptych.objectives.clip import Clip

    found = []
    for accumulate, chunk in ((1, None), (4, 5)):
        model = TinyEncoder(dropout=0.0).double()
        losses = Contrastive(model, Clip(chunk=chunk), accumulate).losses(batch(), 0)
        losses["loss"].backward()
        found.append([losses["loss"].detach(), *(parameter.grad for parameter in model.parameters())])
    for ours, theirs in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-12)
