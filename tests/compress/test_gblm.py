"""GBLM and Wanda score as they say, on the inputs that pruned predecessors give; gradients are those of the dense model; memory stays bounded."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from tests.compress.pairs import batches_of, timm_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from diptych.compress.blocks import checkpointed, collect, towers, walk
from diptych.compress.calibration import input_moments, input_norms
from diptych.compress.gblm import Config, WandaConfig, gradient_norms, importance
from diptych.compress.magnitude import masks_of, n_of_m, prunable, sparsity
from diptych.compress.masks import above_threshold, by_share_of_sum, in_rows, n_of_m_by_topk
from diptych.core.errors import ConfigError, DataError
from diptych.models import clip


@pytest.fixture
def model() -> clip.DualEncoder:
    return clip.create("digits-16", 0)


def in_blocks(model: nn.Module) -> set[str]:
    return {matrix.name for tower in towers(model) for matrix in tower.matrices()}


@pytest.mark.parametrize("score", ["gblm", "gradient", "magnitude", "wanda"])
def test_every_row_of_every_matrix_loses_its_share_and_nothing_else_changes(model: clip.DualEncoder, score: Any) -> None:
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    Config(score=score, sparsity=0.3).build().compress(model, batches_of(model))
    masks = masks_of(model)
    assert masks.keys() == in_blocks(model)
    for name, parameter in model.named_parameters():
        kept = masks.get(name)
        assert torch.equal(parameter, before[name] if kept is None else before[name] * kept)
        if kept is not None:
            assert (~kept).sum(dim=1).tolist() == [int(0.3 * kept.shape[1])] * len(kept), name
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert model.training


def test_scores_are_what_the_paper_writes() -> None:
    weight, norm, gradient = torch.tensor([[1.0, -2.0]]), torch.tensor([3.0, 0.5]), torch.tensor([[0.1, 4.0]])
    torch.testing.assert_close(importance(weight, norm, gradient), torch.tensor([[3.1, 9.0]]))
    torch.testing.assert_close(importance(weight, norm), torch.tensor([[3.0, 1.0]]))
    torch.testing.assert_close(importance(weight, None, gradient), torch.tensor([[0.1, 8.0]]))
    torch.testing.assert_close(importance(weight), torch.tensor([[1.0, 2.0]]))


def test_masks_follow_the_inputs_of_pruned_predecessors(model: clip.DualEncoder) -> None:
    """Wanda by hand: a second model is pruned one block at a time, its inputs taken from a pass of its own each time."""
    batches, other = batches_of(model), copy.deepcopy(model).eval()
    WandaConfig(sparsity=0.5).build().compress(model, batches)
    for tower in towers(other):
        for name in tower.blocks:
            sums: dict[str, Tensor] = {}
            for current, block, states in walk(other, tower, batches):
                if current == name:
                    collect(
                        block, name, states, lambda matrix, inputs, x, sums=sums: sums.update(
                            {matrix: sums.get(matrix, 0) + inputs.tokens(x).double().square().sum(0)}
                        )
                    )  # fmt: skip
            for matrix in (matrix for matrix in tower.matrices() if matrix.name.startswith(f"{name}.")):
                score = matrix.weight.detach().abs() * (sums[matrix.name] / (8 * len(batches))).sqrt().float()
                matrix.weight.data.mul_(in_rows(score, 0.5))
    for (name, found), (_, expected) in zip(prunable(model), prunable(other), strict=True):
        assert float(((found != 0) == (expected != 0)).float().mean()) > 0.9999, name


def test_gradients_are_those_of_the_dense_contrastive_loss(model: clip.DualEncoder) -> None:
    batches = batches_of(model)
    expected: dict[str, Tensor] = {}
    names = in_blocks(model)
    model.eval()
    for batch in batches:
        image, text, scale = model(batch["image_NCHW"], batch["text_NL"])
        logits = scale * image @ text.T
        own = torch.arange(len(logits))
        loss = (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2
        parameters = {name: p for name, p in model.named_parameters() if name in names}
        for name, gradient in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
            expected[name] = expected.get(name, torch.zeros_like(gradient)) + (7 * gradient).square()
    seen: dict[str, Tensor] = {}
    compressor = Config(score="gblm", alpha=7.0, sparsity=0.5).build()
    original = compressor.prune

    def prune(block: Any, prefix: Any, states: Any, gradients: Any) -> None:
        seen.update(gradients)
        original(block, prefix, states, gradients)

    compressor.prune = prune  # type: ignore[method-assign]
    compressor.compress(model, batches)
    assert seen.keys() == names
    for name, total in expected.items():  # the text tower's too, though the image tower was pruned before
        torch.testing.assert_close(seen[name], total.sqrt(), rtol=1e-3, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_alpha_zero_is_wanda(model: clip.DualEncoder) -> None:
    batches, other = batches_of(model), copy.deepcopy(model)
    Config(alpha=0.0).build().compress(model, batches)
    WandaConfig().build().compress(other, batches)
    assert all(torch.equal(mask, masks_of(other)[name]) for name, mask in masks_of(model).items())


def test_scaling_a_norm_against_the_next_matrix_changes_no_mask_of_wanda_or_gblm_but_magnitudes(model: clip.DualEncoder) -> None:
    batches = batches_of(model)
    for parameter in model.parameters():  # biases and norms that are not all alike
        if parameter.ndim == 1:
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    scaled = copy.deepcopy(model)
    factor = torch.exp(torch.randn(64, generator=torch.Generator().manual_seed(1)))
    for tower in towers(scaled):
        for block in tower.blocks.values():
            for norm, weight in ((block.ln_1, block.attn.in_proj_weight), (block.ln_2, block.mlp.c_fc.weight)):  # type: ignore[union-attr]
                norm.weight.data.mul_(factor)
                norm.bias.data.mul_(factor)
                weight.data.div_(factor)
    agreement = {}
    for score in ("gblm", "wanda", "magnitude"):
        found = [Config(score=score).build().compress(copy.deepcopy(each), batches) for each in (model, scaled)]  # type: ignore[arg-type]
        one, other = (torch.cat([mask.flatten() for mask in masks_of(each).values()]) for each in found)
        agreement[score] = float((one == other).float().mean())
    assert agreement["wanda"] >= 0.999
    assert agreement["gblm"] >= 0.999
    assert agreement["magnitude"] < 0.95


def test_patterns_and_their_refusal(model: clip.DualEncoder) -> None:
    batches = batches_of(model, 1)
    Config(pattern="1:4").build().compress(model, batches)
    for name, mask in masks_of(model).items():
        assert (mask.view(len(mask), -1, 4).sum(-1) == 1).all(), name
    with pytest.raises(ConfigError, match="does not divide"):
        WandaConfig(pattern="2:7").build().compress(model, batches)
    with pytest.raises(ConfigError, match="n:m"):
        Config.parse({"method": "gblm", "pattern": "4:2"})
    with pytest.raises(DataError, match="no calibration pairs"):
        Config().build().compress(model, [])


def test_a_second_pruner_keeps_the_first_ones_zeros(model: clip.DualEncoder) -> None:
    batches = batches_of(model, 1)
    Config(pattern="2:4").build().compress(model, batches)
    first = masks_of(model)
    WandaConfig(sparsity=0.7).build().compress(model, batches)
    for name, mask in masks_of(model).items():
        assert not (mask & ~first[name]).any()
        assert not dict(model.named_parameters())[name][~first[name]].any()


def test_the_variant_reaches_the_sparsity_with_uneven_rows(model: clip.DualEncoder) -> None:
    score = torch.rand(40, 64, generator=torch.Generator().manual_seed(0)) ** torch.linspace(0.5, 4, 40)[:, None]
    mask = by_share_of_sum(score, 0.6)
    assert float((~mask).float().mean()) == pytest.approx(0.6, abs=0.01)
    assert len(set((~mask).sum(dim=1).tolist())) > 5
    WandaConfig(sparsity=0.6, variant=True).build().compress(model, batches_of(model, 1))
    assert max(len(set(mask.sum(dim=1).tolist())) for mask in masks_of(model).values()) > 1


def test_groups_by_topk_differ_in_ties_alone() -> None:
    score = torch.rand(6, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(n_of_m_by_topk(score, 1, 4), n_of_m(score, 1, 4))
    assert (n_of_m_by_topk(torch.ones(3, 8), 3, 8).sum(dim=1) == 3).all()


def test_thresholds_take_ties_along_and_rows_do_not() -> None:
    assert above_threshold(torch.tensor([[1.0, 1, 1, 2]]), 0.25).tolist() == [[False, False, False, True]]
    assert in_rows(torch.tensor([[1.0, 1, 1, 2]]), 0.25).tolist() == [[False, True, True, True]]


def test_sums_and_roots_of_gradients_and_half_precision() -> None:
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    factors = (torch.tensor([3.0, 0.0]), torch.tensor([-4.0, 1e-3]))
    losses = [partial(torch.dot, weight, factor) for factor in factors]
    assert gradient_norms({"w": weight}, losses, "l2", 2.0)["w"].tolist() == pytest.approx([10.0, 2e-3])
    assert gradient_norms({"w": weight}, losses, "l1", 2.0)["w"].tolist() == pytest.approx([14.0, 2e-3])
    assert gradient_norms({"w": weight}, losses, "l1", 2.0, half=True)["w"].dtype == torch.float16
    assert weight.grad is None
    assert not weight._post_accumulate_grad_hooks, "hooks are gone"  # type: ignore[attr-defined]


def test_statistics_leave_padding_out(model: clip.DualEncoder) -> None:
    (batch,) = batches_of(model, 1)
    padded = {**batch, "text_NL": nn.functional.pad(batch["text_NL"], (0, 5))}
    (tower,) = towers(model.eval(), "text")
    for statistic in (input_norms, input_moments):
        found = [
            {key: value for name, block, states in walk(model, tower, [each]) for key, value in statistic(block, name, states).items()}
            for each in (batch, padded)
        ]
        for name, value in found[0].items():
            torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-5)


def test_one_tower_and_timm() -> None:
    model = timm_model()
    Config(towers="image").build().compress(model, batches_of(model, 1))
    found = sparsity(model)["matrices"]
    assert {name for name, share in found.items() if share > 0.4} == {matrix.name for matrix in towers(model, "image")[0].matrices()}


def test_a_pruned_model_opens_in_open_clip(model: clip.DualEncoder, tmp_path: Path) -> None:
    WandaConfig().build().compress(model, batches_of(model, 1))
    clip.save(model, tmp_path / "model", {})
    assert masks_of(clip.load(tmp_path / "model")).keys() == masks_of(model).keys()
    theirs, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'model'}")
    image = torch.rand(1, 3, 16, 16)
    assert torch.allclose(theirs.eval().encode_image(image), model.eval().clip.encode_image(image), atol=1e-6)


def test_backward_keeps_one_block_at_a_time(model: clip.DualEncoder) -> None:
    """What autograd saves in the forward is the blocks' inputs and what lies outside of them, not what is inside."""
    (batch,) = batches_of(model, 1)
    (tower,) = towers(model.eval(), "image")

    def saved(keeping: bool) -> int:
        sizes: list[int] = []

        def pack(tensor: Tensor) -> Tensor:
            sizes.append(0 if isinstance(tensor, nn.Parameter) else tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            if keeping:
                tower.encode(model, batch)
            else:
                with checkpointed(tower.blocks.values()):
                    tower.encode(model, batch)
        return sum(sizes)

    assert saved(keeping=False) < 0.4 * saved(keeping=True)
