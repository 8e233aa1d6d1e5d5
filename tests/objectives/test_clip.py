"""CLIP's loss: its definition, its four distributed variants on real processes, and the clamp."""

from __future__ import annotations

import math

import pytest
import torch
from _ranks import run_ranks
from torch import Tensor
from torch.nn.functional import normalize

from diptych.core.errors import ConfigError
from diptych.core.points import Encoded
from diptych.objectives.clip import Clip, Config, clamp_logit_scale, clip_logits, clip_loss

N, D = 4, 6
WORLD_SIZE = 2
VARIANTS = [(local, grad) for local in (False, True) for grad in (False, True)]


def batch(pairs: int = WORLD_SIZE * N) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    image, text = (torch.randn(pairs, D, generator=generator, dtype=torch.float64) for _ in range(2))
    return normalize(image + text), normalize(text)


def by_definition(image: Tensor, text: Tensor, scale: float) -> float:
    """The loss in a few loops, as a check on the vectorised one."""
    sums = 0.0
    for queries, keys in ((image, text), (text, image)):
        for i, query in enumerate(queries):
            scores = [scale * float(query @ key) for key in keys]
            sums -= scores[i] - math.log(sum(map(math.exp, scores)))
    return sums / (2 * len(image))


def gradients(image: Tensor, text: Tensor, **switches: bool) -> dict[str, Tensor]:
    image, text = image.clone().requires_grad_(), text.clone().requires_grad_()
    log_scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    loss = clip_loss(image, text, log_scale.exp(), **switches)
    grads = torch.autograd.grad(loss, [image, text, log_scale])
    return {"loss": loss.detach(), **dict(zip(("image", "text", "scale"), grads, strict=True))}


def on_a_rank(rank: int, ranks: int) -> dict[str, object]:
    own = slice(rank * N, (rank + 1) * N)
    image, text = batch()
    results: dict[str, object] = {
        f"{local}-{grad}": gradients(image[own], text[own], local_loss=local, gather_with_grad=grad) for local, grad in VARIANTS
    }
    results["shapes"] = [
        tuple(clip_logits(image[own], text[own], torch.tensor(1.0), local_loss=local, gather_with_grad=True).image.shape)
        for local in (True, False)
    ]
    results["accuracy"] = float(Clip()(Encoded(image[own], text[own], torch.tensor(4.0)))["accuracy"])
    return results


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, dict[str, Tensor]]]:
    return run_ranks(WORLD_SIZE, on_a_rank)


def test_the_loss_is_the_mean_of_both_cross_entropies() -> None:
    image, text = batch()
    for local, grad in VARIANTS:
        loss = clip_loss(image, text, torch.tensor(7.0, dtype=torch.float64), local_loss=local, gather_with_grad=grad)
        assert float(loss) == pytest.approx(by_definition(image, text, 7.0), rel=1e-12)


def test_features_are_used_as_they_are() -> None:
    image, text = batch()
    loss = clip_loss(3 * image, text, torch.tensor(2.0, dtype=torch.float64))
    assert float(loss) == pytest.approx(by_definition(image, text, 6.0), rel=1e-12)


def test_duplicated_captions_set_a_floor() -> None:
    image = torch.eye(D)[[0, 0, 1, 1]]
    loss = clip_loss(image, image, torch.tensor(100.0))
    assert float(loss) == pytest.approx(math.log(2), rel=1e-5)


@pytest.mark.parametrize(("local", "grad"), VARIANTS)
def test_values_over_ranks(ranks: list[dict[str, dict[str, Tensor]]], local: bool, grad: bool) -> None:
    single = gradients(*batch())["loss"]
    losses = torch.stack([result[f"{local}-{grad}"]["loss"] for result in ranks])
    torch.testing.assert_close(losses.mean(), single)
    assert (losses[0] == losses[1]) == (not local)


@pytest.mark.parametrize(("local", "grad", "factor"), [(False, True, 1), (True, True, 1), (False, False, WORLD_SIZE)])
def test_averaged_gradients_over_ranks(ranks: list[dict[str, dict[str, Tensor]]], local: bool, grad: bool, factor: int) -> None:
    single = gradients(*batch())
    for side in ("image", "text"):
        own = torch.cat([result[f"{local}-{grad}"][side] for result in ranks])
        torch.testing.assert_close(own / WORLD_SIZE * factor, single[side])


def test_local_loss_without_gradient_is_biased(ranks: list[dict[str, dict[str, Tensor]]]) -> None:
    own = torch.cat([result["True-False"]["image"] for result in ranks]).flatten()
    assert torch.cosine_similarity(own, gradients(*batch())["image"].flatten(), dim=0) < 0.99


@pytest.mark.parametrize(("local", "grad"), VARIANTS)
def test_the_scale_learns_the_same_in_all_variants(ranks: list[dict[str, dict[str, Tensor]]], local: bool, grad: bool) -> None:
    scale = torch.stack([result[f"{local}-{grad}"]["scale"] for result in ranks]).mean()
    torch.testing.assert_close(scale, gradients(*batch())["scale"])


def test_the_default_builds_no_square_logits(ranks: list[dict[str, object]]) -> None:
    for result in ranks:
        assert result["shapes"] == [(N, WORLD_SIZE * N), (WORLD_SIZE * N, WORLD_SIZE * N)]


def test_accuracy_counts_own_text_among_all_texts(ranks: list[dict[str, float]]) -> None:
    image, text = batch()
    top = (image @ text.T).argmax(dim=1) == torch.arange(len(image))
    assert 0 < int(top.sum()) < len(top)
    assert [result["accuracy"] for result in ranks] == [float(half.double().mean()) for half in top.split(N)]


def test_the_objective_gives_loss_and_detached_accuracy() -> None:
    image, text = batch()
    image.requires_grad_()
    parts = Config(method="clip").build()(Encoded(image, text, torch.tensor(4.0)))
    assert set(parts) == {"loss", "accuracy"}
    assert parts["loss"].requires_grad
    assert not parts["accuracy"].requires_grad
    assert list(Clip().parameters()) == []


def test_a_wrong_configuration_is_refused() -> None:
    with pytest.raises(ConfigError, match="local_los"):
        Config.parse({"method": "clip", "local_los": True})


def test_the_clamp_moves_the_data_and_leaves_the_gradient() -> None:
    for start, end in [(-1.0, 0.0), (2.0, 2.0), (9.0, math.log(100))]:
        parameter = torch.nn.Parameter(torch.tensor(start, dtype=torch.float64))
        clamp_logit_scale(parameter)
        assert float(parameter.detach()) == end
        (3 * parameter.exp()).backward()
        assert float(parameter.grad) == pytest.approx(3 * math.exp(end))
    parameter = torch.nn.Parameter(torch.tensor(9.0))
    clamp_logit_scale(parameter, maximum=4.6052)
    assert float(parameter.detach()) == pytest.approx(4.6052)
