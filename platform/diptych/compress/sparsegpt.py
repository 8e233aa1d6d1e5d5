"""SparseGPT: one-shot pruning that lets the weights that stay make up for those that go, a matrix at a time.

Source: Frantar, Alistarh, SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot (ICML 2023), algorithm 1.
The objective is |W X - W' X|^2 on the calibration inputs of each matrix, blocks in order, each seeing the pruned ones before it.
What is pruned: the matrices inside the transformer blocks of both towers.

Shape legend: O outputs, I inputs of a matrix, B columns of a block.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from diptych.compress import masks
from diptych.compress.blocks import Batch, evaluating, matrices, towers, walk
from diptych.compress.calibration import OneShot, input_moments, required
from diptych.compress.magnitude import PATTERN, largest, n_of_m, sparsity
from diptych.core.errors import ConfigError


class Config(OneShot):
    """SparseGPT."""

    method: Literal["sparsegpt"] = "sparsegpt"
    columns: int = Field(128, ge=1, description="columns of a matrix that are chosen among and updated together; a multiple of m")
    damping: float = Field(0.01, gt=0, description="added to the Hessian's diagonal, as a share of its mean")

    def build(self) -> SparseGPT:
        """The compressor."""
        return SparseGPT(self)


class SparseGPT:
    """The compressor. Pruned and updated in place; masks stay with the model."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def compress(self, model: nn.Module, calibration: Iterable[Batch]) -> nn.Module:
        """Prunes the blocks of the chosen towers and gives the model back.

        Raises ConfigError for a tower without blocks, or a row that does not divide into the pattern's groups; DataError without pairs.
        """
        config, batches = self.config, required(calibration, "sparsegpt")
        with evaluating(model):
            for tower in towers(model, config.towers):
                for name, block, states in walk(model, tower, batches):
                    moments = input_moments(block, name, states)
                    for matrix in matrices(block, name):
                        hessian = moments.pop(matrix.name)
                        keep, weight = reconstruct(
                            matrix.weight.detach(), hessian, config.sparsity, config.pattern, config.columns, config.damping, matrix.name
                        )
                        with torch.no_grad():
                            matrix.weight.copy_(weight)
                        masks.put(matrix, keep)
        return model

    def report(self, model: nn.Module) -> dict[str, Any]:
        """The share of zeros in each matrix of the model and in all of them."""
        return sparsity(model, self.config.towers)


def reconstruct(
    weight_OI: Tensor, hessian_II: Tensor, sparsity: float, pattern: str = "unstructured", columns: int = 128, damping: float = 0.01,
    name: str = "weight", official_threshold: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The mask and the updated weights, zeros in place, in the weight's dtype.

    Args:
        weight_OI: `[O, I]`.
        hessian_II: `2 X X^T` up to a factor, of its inputs. Features that never occur (a zero on the diagonal) lose all their weights.
        sparsity: share of every block of columns that goes; unused with a pattern.
        pattern: `unstructured` or n:m.
        columns: B.
        damping: share of the mean of the diagonal that is added to it.
        name: for complaints.
        official_threshold: let `masks.above_threshold` choose, as the published code does: one weight a block more goes, and all ties.

    Raises ConfigError where rows or blocks do not divide into the pattern's groups, or the damped Hessian is not positive definite.
    """
    found = PATTERN.match(pattern)
    group = int(found[2]) if found else 0
    if found and (weight_OI.shape[1] % group or columns % group):
        expected = f"rows and blocks ({columns} columns) of a multiple of {group} weights"
        raise ConfigError.at("A matrix does not divide into the pattern", name, list(weight_OI.shape), expected)
    weight, hessian = weight_OI.detach().float().clone(), hessian_II.float().clone()
    upper_II = _inverse_factor(weight, hessian, damping, name)
    keep_OI = torch.ones_like(weight, dtype=torch.bool)
    for start in range(0, weight.shape[1], columns):
        end = min(start + columns, weight.shape[1])
        block_OB, factor_BB, keep_OB = weight[:, start:end], upper_II[start:end, start:end], keep_OI[:, start:end]
        diagonal_B = factor_BB.diagonal()
        if not found:
            choose = masks.above_threshold if official_threshold else largest
            keep_OB.copy_(choose((block_OB / diagonal_B).square(), sparsity))
        error_OB = torch.zeros_like(block_OB)
        for column in range(end - start):
            if found and column % group == 0:
                ahead = slice(column, column + group)
                keep_OB[:, ahead] = n_of_m((block_OB[:, ahead] / diagonal_B[ahead]).square(), int(found[1]), group, name)
            error_OB[:, column] = torch.where(keep_OB[:, column], 0, block_OB[:, column]) / diagonal_B[column]
            block_OB[:, column:] -= error_OB[:, column, None] * factor_BB[None, column, column:]
            block_OB[:, column] *= keep_OB[:, column]
        weight[:, end:] -= error_OB @ upper_II[start:end, end:]
    return keep_OI & (hessian_II.diagonal() != 0), weight.to(weight_OI.dtype)


def _inverse_factor(weight: Tensor, hessian: Tensor, damping: float, name: str) -> Tensor:
    """The upper Cholesky factor of the damped Hessian's inverse; columns of features that never occur are zeroed in the weight."""
    dead_I = hessian.diagonal() == 0
    hessian.diagonal()[dead_I] = 1
    weight[:, dead_I] = 0
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    lower, failed = torch.linalg.cholesky_ex(hessian)
    if not failed:
        factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if failed:
        fix = "raise `damping`, or `calibration_pairs`"
        raise ConfigError.at("The inputs' second moments cannot be inverted", name, f"damping {damping}", "a positive definite matrix", fix)
    found: Tensor = factor
    return found
