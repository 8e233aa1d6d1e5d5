"""The chunked loss: value and gradients of the plain one, on any number of ranks, in memory that is linear in the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from _ranks import run_ranks
from torch import Tensor
from torch.nn.functional import normalize

from diptych.core.errors import ConfigError
from diptych.core.points import Encoded
from diptych.objectives.chunked import chunked_nll
from diptych.objectives.clip import Clip, Config

PAIRS, D = 24, 6
VARIANTS = [(local, grad) for local in (False, True) for grad in (False, True)]


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    image, text = (torch.randn(PAIRS, D, generator=generator, dtype=torch.float64) for _ in range(2))
    return normalize(image + text).to(dtype), normalize(text).to(dtype)


def measured(image: Tensor, text: Tensor, **settings: Any) -> dict[str, Tensor]:
    image, text = image.clone().requires_grad_(), text.clone().requires_grad_()
    log_scale = torch.tensor(3.0, dtype=image.dtype, requires_grad=True)
    parts = Clip(**settings)(Encoded(image, text, log_scale.exp()))
    gradients = torch.autograd.grad(parts["loss"], [image, text, log_scale])
    return {**{name: part.detach() for name, part in parts.items()}, **dict(zip(("image", "text", "scale"), gradients, strict=True))}


def on_a_rank(rank: int, ranks: int) -> dict[str, dict[str, Tensor]]:
    image, text = (side.chunk(ranks)[rank] for side in batch())
    return {
        f"{local}-{grad}-{chunk}": measured(image, text, local_loss=local, gather_with_grad=grad, chunk=chunk)
        for local, grad in VARIANTS
        for chunk in (None, 4)
    }


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_value_and_gradients_are_those_of_the_plain_global_loss(ranks: int) -> None:
    whole, found = measured(*batch()), run_ranks(ranks, on_a_rank)
    for part in ("loss", "accuracy", "scale"):
        mean = torch.stack([result["True-True-4"][part] for result in found]).mean()
        torch.testing.assert_close(mean, whole[part], rtol=1e-6, atol=0)
    for part in ("image", "text"):
        own = torch.cat([result["True-True-4"][part] for result in found]) / ranks  # gradients are averaged over the ranks
        torch.testing.assert_close(own, whole[part], rtol=1e-6, atol=1e-12)
    for result in found:
        for local, grad in VARIANTS:
            for part, value in result[f"{local}-{grad}-None"].items():
                torch.testing.assert_close(result[f"{local}-{grad}-4"][part], value, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 5, 24, 1000])
def test_the_size_of_the_chunks_does_not_matter(chunk: int) -> None:
    whole = measured(*batch())
    for part, value in measured(*batch(), chunk=chunk).items():
        torch.testing.assert_close(value, whole[part], rtol=1e-9, atol=1e-12)


def test_large_scores_in_single_precision_stay_exact() -> None:
    image, text = batch(torch.float32)
    exact = Clip()(Encoded(*batch(), torch.tensor(100.0, dtype=torch.float64)))["loss"]
    assert float(Clip(chunk=7)(Encoded(image, text, torch.tensor(100.0)))["loss"]) == pytest.approx(float(exact), rel=1e-4)
    learnt = Clip(chunk=2)(Encoded(torch.eye(8), torch.eye(8), torch.tensor(100.0)))["loss"]
    assert 0 <= float(learnt) < 1e-6


def test_keys_that_are_not_queries_get_their_gradient() -> None:
    image, text = batch()
    query, key = image[:8].clone().requires_grad_(), text.clone().requires_grad_()
    row_n, column_N, hit_n = chunked_nll(query, key, torch.tensor(5.0, dtype=torch.float64), offset=8, chunk=3, columns=False)
    plain_n = torch.nn.functional.cross_entropy(5.0 * query @ key.T, torch.arange(8, 16), reduction="none")
    torch.testing.assert_close(row_n, plain_n)
    assert column_N is None
    assert torch.equal(hit_n, (query @ key.T).argmax(dim=1) == torch.arange(8, 16))
    weight = torch.arange(8.0, dtype=torch.float64)
    for ours, theirs in zip(*(torch.autograd.grad(loss, [query, key], weight) for loss in (row_n, plain_n)), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("columns", [True, False])
def test_it_can_be_differentiated_twice(columns: bool) -> None:
    image, text = batch()
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    inputs = (image[:6].clone().requires_grad_(), text[:6].clone().requires_grad_(), scale)

    def paid(query: Tensor, key: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        row_n, column_N, _ = chunked_nll(query, key, scale, offset=0, chunk=4, columns=columns)
        return (row_n, column_N) if column_N is not None else (row_n,)

    assert torch.autograd.gradcheck(paid, inputs)
    assert torch.autograd.gradgradcheck(paid, inputs)


def test_frozen_features_need_no_gradient_when_differentiated_twice() -> None:
    image, text = batch()
    query = image.clone().requires_grad_()
    row_n, _, _ = chunked_nll(query, text, torch.tensor(3.0, dtype=torch.float64), offset=0, chunk=4, columns=False)
    (gradient,) = torch.autograd.grad(row_n.sum(), query, create_graph=True)
    assert torch.autograd.grad(gradient.square().sum(), query)[0].abs().sum() > 0


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Remembers the largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [tensor for tensor in torch.utils._pytree.tree_leaves(result) if isinstance(tensor, Tensor)]
        self.elements = max([self.elements, *(tensor.numel() for tensor in made)])
        return result


def test_no_tensor_is_as_large_as_the_logits() -> None:
    image, text = (side.repeat(4, 1) for side in batch(torch.float32))
    pairs, sizes = len(image), {}
    for chunk in (None, 4):
        with Largest() as largest:
            measured(image, text, chunk=chunk)
        sizes[chunk] = largest.elements
    assert sizes[None] == pairs * pairs
    assert sizes[4] <= max(4 * pairs, pairs * D)


def test_the_objective_hands_over_loss_and_detached_accuracy() -> None:
    image, text = batch()
    image.requires_grad_()
    parts = Config(chunk=8).build()(Encoded(image, text, torch.tensor(4.0, dtype=torch.float64)))
    assert parts["loss"].requires_grad
    assert not parts["accuracy"].requires_grad


@pytest.mark.parametrize("chunk", [0, -3, 2.5])
def test_a_chunk_without_rows_is_refused(chunk: float) -> None:
    with pytest.raises(ConfigError, match="chunk"):
        Config.parse({"method": "clip", "chunk": chunk})
