"""Dense prediction on a frozen image tower: one linear layer tells from a place's own features what is to be seen there.

What captions do to a backbone, in small: segmentation and depth become a grid of class numbers or of values, and the decoder one layer.
Report it beside zero-shot figures: captions that describe better can name worse.

Source: Vasu et al., CLIP with Quality Captions: A Strong Pretraining for Vision Tasks (2024), section 4. There is no official code; frozen
features and a single layer are our small version of the paper's decoders.

Shape legend: N pictures, D feature width, h x w the tower's last feature map, G x G cells of the labels, K classes, M places or cells.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field

from diptych.core.chance import key_hashes, uniform
from diptych.core.config import Config as BaseConfig
from diptych.core.errors import ConfigError, DataError
from diptych.core.points import Encoder, Metric
from diptych.evaluate.rows import Rows, of_split, preprocessing

if TYPE_CHECKING:
    import torch

    from diptych.models.clip import DualEncoder

Floats = NDArray[np.float32]

TASK = "dense-probe"
READ = 256
LEAST_STD = 1e-6


class Config(BaseConfig):
    """A linear probe on the last feature map of the frozen image tower, fitted to one split and measured on another."""

    method: Literal["quality-captions"] = "quality-captions"
    cells: str = Field(
        "meta.cells", min_length=1, description="the column of dense labels: G x G integers (classes) or floats (values) a picture"
    )
    fit: str = Field(
        "pool", min_length=1, description="the split that the probe learns from; its pictures should be none of the training's"
    )
    split: str = Field("test", min_length=1, description="the split to predict")
    shots: tuple[int, ...] | None = Field(
        None, min_length=1, description="labelled pictures to fit with, drawn by key, one probe each; null: all"
    )
    l2: float = Field(1e-2, gt=0, description="weight of the squared norm of the layer's weights, of standardised features")
    size_px: int | None = Field(
        None, ge=8, le=2048, description="side of the pictures in pixels, if not the model's own: its position table is resized (ViT only)"
    )
    task: str = Field(TASK, pattern=r"^[a-z0-9][a-z0-9-]*$", description="the figures' name between set and metric")

    def build(self) -> DenseProbe:
        """The benchmark."""
        return DenseProbe(self)


# ---------------------------------------------------------------- the features of places


def dense_features(model: DualEncoder, image_NCHW: NDArray[np.uint8], batch_size: int = 64) -> Floats:
    """The image tower's last feature map, float32 `[N, h, w, D]`, every place's vector of length one; no class token among them.

    A few places of a CLIP ViT have outsized norms, hence the length of one. Raises DataError for a tower without such a map.
    """
    import torch

    from diptych.models.maps import image_map

    maps, home, was_training = [], model.mean.device, model.training
    model.eval()
    with torch.inference_mode():
        for at in range(0, len(image_NCHW), batch_size):
            map_NDhw, _ = image_map(model, torch.from_numpy(image_NCHW[at : at + batch_size]).to(home))
            maps.append(torch.nn.functional.normalize(map_NDhw.float(), dim=1).permute(0, 2, 3, 1).cpu().numpy())
    model.train(was_training)
    return np.concatenate(maps)


def by_place(label_NG: NDArray[Any], height: int, width: int) -> NDArray[Any]:
    """The label of the cell in which each place of the map lies, `[N, h, w]`. Raises DataError where cells cut places."""
    grid = int(label_NG.shape[1] ** 0.5)
    if height % grid or width % grid:
        raise DataError.at(
            "The feature map does not divide into the cells of the labels",
            "cells",
            f"{grid} x {grid} cells",
            f"divisors of {height} x {width}",
        )
    return np.asarray(label_NG.reshape(-1, grid, grid).repeat(height // grid, axis=1).repeat(width // grid, axis=2))


def by_cell(value_NhwK: Floats, grid: int) -> Floats:
    """The mean over the places of each cell, `[N, G * G, K]`."""
    count, height, width, size = value_NhwK.shape
    parts = value_NhwK.reshape(count, grid, height // grid, grid, width // grid, size)
    return np.asarray(parts.mean(axis=(2, 4)).reshape(count, grid * grid, size))


# ---------------------------------------------------------------- the probe


def standardised(fit_MD: Floats, test_MD: Floats) -> tuple[Floats, Floats]:
    """Both by mean and deviation of the first, so that nothing of the test is used. Features that do not vary are left at zero."""
    mean_D, std_D = fit_MD.mean(axis=0), fit_MD.std(axis=0)
    scale_D = np.where(std_D > LEAST_STD, 1 / np.maximum(std_D, LEAST_STD), 0.0).astype(np.float32)
    return (fit_MD - mean_D) * scale_D, (test_MD - mean_D) * scale_D


def fit_classes(feature_MD: Floats, label_M: NDArray[np.int64], classes: int, l2: float) -> tuple[Floats, Floats]:
    """Multinomial logistic regression by L-BFGS: weights `[D, K]` and biases `[K]`. The bias is not drawn to zero."""
    import torch

    x, y = torch.from_numpy(feature_MD), torch.from_numpy(label_M)
    weight, bias = torch.zeros(x.shape[1], classes, requires_grad=True), torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(x @ weight + bias, y) + l2 * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weight.detach().numpy(), bias.detach().numpy()


def fit_values(feature_MD: Floats, value_M: NDArray[np.floating[Any]], l2: float) -> tuple[Floats, float]:
    """Ridge regression: weights `[D]` and the bias, for values of any unit."""
    mean = float(value_M.mean())
    x, y = feature_MD.astype(np.float64), np.asarray(value_M, np.float64) - mean
    weight_D = np.linalg.solve(x.T @ x / len(x) + l2 * np.eye(x.shape[1]), x.T @ y / len(x))
    return weight_D.astype(np.float32), mean


def mean_iou(predicted_M: NDArray[np.int64], label_M: NDArray[np.int64], classes: int) -> float:
    """Intersection over union, averaged over the classes that occur in either."""
    pair_KK = np.zeros((classes, classes), np.int64)
    np.add.at(pair_KK, (label_M, predicted_M), 1)
    union_K = pair_KK.sum(axis=0) + pair_KK.sum(axis=1) - np.diag(pair_KK)
    return float((np.diag(pair_KK)[union_K > 0] / union_K[union_K > 0]).mean())


def dense_labels(rows: pl.DataFrame, column: str) -> NDArray[Any]:
    """The labels `[N, G * G]`, int64 or float32. Raises DataError for a column that holds no square grids of numbers."""
    kind = rows.schema.get(column)
    inner = kind.inner if isinstance(kind, pl.List | pl.Array) else None
    lengths = rows[column].list.len().unique().to_list() if isinstance(kind, pl.List) else [kind.size] if isinstance(kind, pl.Array) else []
    square = len(lengths) == 1 and lengths[0] and int(lengths[0] ** 0.5) ** 2 == lengths[0]
    if inner is None or not inner.is_numeric() or not square:
        got = f"{kind}, {lengths} cells" if kind is not None else "no such column"
        raise DataError.at("The pairs have no dense labels", column, got, "the same square number of numbers in every row")
    values = np.asarray(rows[column].to_list())
    return values.astype(np.float32 if inner.is_float() else np.int64)


# ---------------------------------------------------------------- the benchmark


class DenseProbe:
    """The benchmark.

    Metrics of classes: `acc1` and `miou` over all cells (`miou` has no summands, so no interval and no `per_example`); of values: `mse` with
    its `per_example`, and `rmse`. With `shots` each name ends in `_<shots>`.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def run(self, encoder: Encoder, pairs: pl.DataFrame, name: str, seed: int) -> list[Metric]:
        """The rows for the set `name`. Raises DataError as `of_split`, `dense_labels`, `dense_features` and `by_place` do."""
        config = self.config
        fit, test = of_split(pairs, config.fit), of_split(pairs, config.split)
        fit_NG, test_NG = dense_labels(fit, config.cells), dense_labels(test, config.cells)
        fit_NhwD, test_NhwD = self._maps(encoder, fit), self._maps(encoder, test)
        settings = {**config.model_dump(exclude={"method", "task", "shots"}), **preprocessing(encoder)}
        metrics = []
        order = np.argsort(uniform(seed, key_hashes(fit["key"])), kind="stable")
        for shots in config.shots or (len(fit),):
            if shots > len(fit):
                raise ConfigError.at("More shots than labelled pictures", "shots", shots, f"at most {len(fit)}")
            rows = Rows(name, config.task, test["key"].to_list(), seed, {**settings, "pictures": shots})
            chosen, ending = np.sort(order[:shots]), f"_{shots}" if config.shots else ""
            metrics += self._measured(rows, fit_NhwD[chosen], fit_NG[chosen], test_NhwD, test_NG, ending)
        return metrics

    def _measured(
        self, rows: Rows, fit_NhwD: Floats, fit_NG: NDArray[Any], test_NhwD: Floats, test_NG: NDArray[Any], ending: str
    ) -> list[Metric]:
        """One probe's figures; `ending` is that of their names. The layer sees one place at a time; a cell gets the mean of its places."""
        _, height, width, size = test_NhwD.shape
        label_M = by_place(fit_NG, height, width).ravel()
        fit_MD, test_MD = standardised(fit_NhwD.reshape(-1, size), test_NhwD.reshape(-1, size))
        grid, shape = int(test_NG.shape[1] ** 0.5), test_NhwD.shape[:3]
        if np.issubdtype(fit_NG.dtype, np.floating):
            weight_D, bias = fit_values(fit_MD, label_M, self.config.l2)
            error_NG = by_cell((test_MD @ weight_D + bias).reshape(*shape, 1), grid)[..., 0] - test_NG
            mse = rows.mean(f"mse{ending}", (error_NG.astype(np.float64) ** 2).mean(axis=1))
            root = [float(np.sqrt(value)) for value in (mse.value, mse.low, mse.high)]
            return [mse, Metric(rows.set, rows.task, f"rmse{ending}", root[0], mse.n, root[1], root[2], rows.settings)]
        names = np.union1d(fit_NG, test_NG)
        weight_DK, bias_K = fit_classes(fit_MD, np.searchsorted(names, label_M), len(names), self.config.l2)
        predicted_NG = by_cell((test_MD @ weight_DK + bias_K).reshape(*shape, len(names)), grid).argmax(axis=-1)
        index_NG = np.searchsorted(names, test_NG)
        iou = mean_iou(predicted_NG.ravel(), index_NG.ravel(), len(names))
        return [
            rows.mean(f"acc1{ending}", (predicted_NG == index_NG).mean(axis=1)),
            Metric(rows.set, rows.task, f"miou{ending}", iou, len(rows.keys), iou, iou, rows.settings),
        ]

    def _maps(self, encoder: Encoder, rows: pl.DataFrame) -> Floats:
        """The feature maps `[N, h, w, D]` of the rows' pictures."""
        model, load_pixels = getattr(encoder, "model", None), getattr(encoder, "load_pixels", None)
        if model is None or load_pixels is None:
            raise DataError.at(
                "The encoder gives no model to look into", "encoder", type(encoder).__name__, "one with model and load_pixels"
            )
        return np.concatenate([self._map(model, load_pixels(rows[at : at + READ])) for at in range(0, len(rows), READ)])

    def _map(self, model: DualEncoder, image_NCHW: NDArray[np.uint8]) -> Floats:
        """The feature maps of pictures at `size_px`."""
        import copy

        import torch

        from diptych.models.resize import interpolated

        size = self.config.size_px
        if size is None or size == model.image_size:
            return dense_features(model, image_NCHW)
        tower: Any = model.clip.visual
        if not hasattr(tower, "positional_embedding"):
            raise ConfigError.at("This image tower takes one size only", "size_px", size, f"{model.image_size}, or a ViT")
        larger = copy.copy(model)  # its modules are shared; only the visual tower is replaced
        larger._modules = {**model._modules, "clip": copy.copy(model.clip)}
        larger.clip._modules = {**model.clip._modules, "visual": copy.deepcopy(tower)}
        grid = size // tower.patch_size[0]
        positions = interpolated(tower.positional_embedding.detach(), (grid, grid))
        larger.clip.visual.positional_embedding = torch.nn.Parameter(positions, requires_grad=False)
        resized = torch.nn.functional.interpolate(torch.from_numpy(image_NCHW), (size, size), mode="bicubic", antialias=True)
        return dense_features(larger, resized.numpy())
