"""GBLM-Pruner: a weight's importance is its magnitude times the norm of its input and of its gradient. With the baselines it is compared with.

Source: Das, Ma, Shen, Beyond Size: How Gradients Shape Pruning Decisions in Large Language Models (arXiv 2311.04902), section 3.
S = |W| (||X|| + alpha ||G||): X are the inputs of a matrix, blocks in order, each seeing the pruned ones before it; G are the gradients
of the dense model. Wanda (Sun et al., ICLR 2024) is the case without G. Rows are compared within themselves.

For a dual encoder, where the source is silent: a contrastive loss has no gradient of one sample, so G has one gradient a calibration batch.
A picture or a caption is a sample of X; padding behind a caption's end is left out. What is pruned: the matrices inside the blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from diptych.compress import masks
from diptych.compress.blocks import Batch, Inputs, Tower, checkpointed, device_of, evaluating, matrices, towers, walk
from diptych.compress.calibration import OneShot, input_norms, required
from diptych.compress.magnitude import sparsity
from diptych.models.contrastive import contrastive_loss

Score = Literal["gblm", "wanda", "gradient", "magnitude"]
Norm = Literal["l2", "l1"]


class Config(OneShot):
    """GBLM-Pruner, or one of its parts."""

    method: Literal["gblm"] = "gblm"
    score: Score = Field("gblm", description="what importance is made of: `gradient` leaves the inputs out, `wanda` the gradients")
    norm: Norm = Field("l2", description="how the gradients of the batches are joined: root of the sum of squares, or sum of magnitudes")
    alpha: float = Field(
        10.0, ge=0, description="factor of the gradients; the paper has 100 for language models, 1 to 10 suit a small CLIP"
    )

    def build(self) -> GBLM:
        """The compressor."""
        return GBLM(self, self.score, self.norm, self.alpha)


class WandaConfig(OneShot):
    """Wanda: magnitude times the norm of the input."""

    method: Literal["wanda"] = "wanda"
    variant: bool = Field(False, description="rows lose what makes up an equal share of their sum, not an equal count; unstructured only")

    def build(self) -> GBLM:
        """The compressor."""
        return GBLM(self, "wanda", variant=self.variant)


class GBLM:
    """The compressor. Memory: beside the model, the gradients' norms of one tower and the inputs of one block."""

    def __init__(self, config: OneShot, score: Score, norm: Norm = "l2", alpha: float = 1.0, variant: bool = False) -> None:
        self.config, self.score, self.norm, self.alpha, self.variant = config, score, norm, alpha, variant

    def compress(self, model: nn.Module, calibration: Iterable[Batch]) -> nn.Module:
        """Zeroes weights in place, keeps the masks with the model and gives it back.

        Raises ConfigError for a tower without blocks, or a row that does not divide into the pattern's groups; DataError without pairs.
        """
        batches = required(calibration, self.score)
        with evaluating(model):
            chosen = towers(model, self.config.towers)
            # Taken before anything is pruned: the gradients of a tower need the other one's features, not its weights.
            features = _features(model, batches) if self._needs_gradients else []
            for tower in chosen:
                gradients = self._gradients(model, tower, batches, features) if self._needs_gradients else {}
                for name, block, states in walk(model, tower, batches):
                    self.prune(block, name, states, gradients)
                del gradients  # before the next tower's are made
        return model

    def report(self, model: nn.Module) -> dict[str, Any]:
        """The share of zeros in each matrix of the model and in all of them."""
        return sparsity(model, self.config.towers)

    @property
    def _needs_gradients(self) -> bool:
        return self.score in ("gblm", "gradient")

    def prune(self, block: nn.Module, prefix: str, states: Sequence[Inputs], gradients: Mapping[str, Tensor]) -> None:
        """Prunes one block by its inputs and by `gradients`, the norms of its matrices' gradients by name."""
        norms = input_norms(block, prefix, states) if self.score in ("gblm", "wanda") else {}
        config = self.config
        for matrix in matrices(block, prefix):
            score = importance(matrix.weight.detach(), norms.get(matrix.name), gradients.get(matrix.name))
            if self.variant and config.pattern == "unstructured":
                masks.put(matrix, masks.by_share_of_sum(score, config.sparsity))
            else:
                masks.put(matrix, masks.by_pattern(score, config.sparsity, config.pattern, name=matrix.name))

    def _gradients(
        self, model: Any, tower: Tower, batches: Sequence[Batch], features: Sequence[tuple[Tensor, Tensor]]
    ) -> dict[str, Tensor]:
        scale = model.logit_scale.detach().exp()

        def losses() -> Iterator[Callable[[], Tensor]]:
            for batch, (image_ND, text_ND) in zip(batches, features, strict=True):
                other_ND = text_ND if tower.kind == "image" else image_ND
                yield partial(_loss, model, tower, batch, other_ND, scale)

        parameters = {matrix.name: matrix.weight for matrix in tower.matrices()}
        with _only(model, parameters.values()), checkpointed(tower.blocks.values()):
            return gradient_norms(parameters, losses(), self.norm, self.alpha)


def importance(weight_OI: Tensor, input_norm_I: Tensor | None = None, gradient_norm_OI: Tensor | None = None) -> Tensor:
    """`|W| ||X|| + |W| ||G||`, float32 `[O, I]`; a norm that is None is left out, and without both it is `|W|`.

    Args:
        weight_OI: outputs x inputs.
        input_norm_I: of each input feature, >= 0.
        gradient_norm_OI: of each weight, >= 0, with alpha in it.
    """
    size = weight_OI.abs().float()
    if input_norm_I is None and gradient_norm_OI is None:
        return size
    score = torch.zeros_like(size) if input_norm_I is None else size * input_norm_I
    return score if gradient_norm_OI is None else score.addcmul_(size, gradient_norm_OI.float())


def gradient_norms(
    parameters: Mapping[str, nn.Parameter],
    losses: Iterable[Callable[[], Tensor]],
    norm: Norm = "l2",
    scale: float = 1.0,
    half: bool = False,
) -> dict[str, Tensor]:
    """The norm over losses of each weight's gradient times `scale`, by name, in the weight's shape, float32.

    A gradient is added and freed as soon as backward has made it, so that never more than one is held beside the sums.

    Args:
        parameters: what to differentiate by; they require gradients, and have none.
        losses: each called once, backward after it.
        norm: root of the sum of squares, or sum of magnitudes.
        scale: of the gradients.
        half: float16 as the published code has it: l2 rounded at the end, l1 summed in it.
    """
    dtype = torch.float16 if half and norm == "l1" else torch.float32
    sums = {name: torch.zeros_like(parameter, dtype=dtype, requires_grad=False) for name, parameter in parameters.items()}

    def adder(name: str) -> Callable[[Tensor], None]:
        def add(parameter: Tensor) -> None:
            assert parameter.grad is not None
            gradient = parameter.grad.float().mul_(scale)
            sums[name] += (gradient.square_() if norm == "l2" else gradient.abs_()).to(dtype)
            parameter.grad = None

        return add

    handles = [parameter.register_post_accumulate_grad_hook(adder(name)) for name, parameter in parameters.items()]  # type: ignore[no-untyped-call]
    try:
        with torch.enable_grad():
            for loss in losses:
                loss().backward()  # type: ignore[no-untyped-call]
    finally:
        for handle in handles:
            handle.remove()
    if norm == "l2":
        for total in sums.values():
            total.sqrt_()
    return {name: total.half() for name, total in sums.items()} if half else sums


def _loss(model: nn.Module, tower: Tower, batch: Batch, other_ND: Tensor, scale: Tensor) -> Tensor:
    return contrastive_loss(tower.encode(model, batch), other_ND, scale)


@torch.no_grad()
def _features(model: Any, batches: Sequence[Batch]) -> list[tuple[Tensor, Tensor]]:
    device = device_of(model)
    return [(model.encode_image(batch["image_NCHW"].to(device)), model.encode_text(batch["text_NL"].to(device))) for batch in batches]


class _only:
    """While open, nothing of a model requires gradients but these parameters; their earlier gradients come back afterwards."""

    def __init__(self, model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
        self._before = [(each, each.requires_grad, each.grad) for each in model.parameters()]
        self._wanted = list(parameters)

    def __enter__(self) -> None:
        for each, _, _ in self._before:
            each.requires_grad_(False)
            each.grad = None
        for each in self._wanted:
            each.requires_grad_(True)

    def __exit__(self, *_: object) -> None:
        for each, trained, grad in self._before:
            each.requires_grad_(trained)
            each.grad = grad
