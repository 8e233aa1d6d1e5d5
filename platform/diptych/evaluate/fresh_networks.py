"""What the training pairs alone teach: small classifiers are trained anew on them and measured on a split that they never saw.

The measure of data-set distillation. The checkpoint plays no part in it; only the pairs that it was trained on do. What is reported is
the accuracy after the last epoch: the best of several epochs would be chosen on the test split.

Source: Cazenavette et al., Dataset Distillation by Matching Training Trajectories (CVPR 2022), section 4.

Shape legend: N pictures, C channels, H x W pixels, E epochs, P parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field

from diptych.core.chance import generator
from diptych.core.config import Config as BaseConfig
from diptych.core.errors import ConfigError, DataError
from diptych.core.points import Encoder, Metric
from diptych.evaluate.rows import Rows, of_split
from diptych.models.siamese import Kind
from diptych.models.trajectories import ExpertConfig
from diptych.pairs.decode import decode_square

if TYPE_CHECKING:
    import torch

    from diptych.models.convnet import NetShape
    from diptych.pairs.dataset import PairDataset

TASK = "fresh-networks"
LR = "meta.distilled_lr"


class Config(BaseConfig):
    """Trains `networks` small classifiers on the training pairs and classifies a split with them."""

    method: Literal["fresh-networks"] = "fresh-networks"
    split: str = Field("test", min_length=1, description="the split to classify")
    networks: int = Field(3, ge=1, le=100, description="classifiers, each with weights of its own")
    size_px: int = Field(32, ge=8, le=128, description="side of the pictures, pixels")
    channels: Literal[1, 3] = Field(3, description="1: grey pictures; 3: coloured ones")
    width: int = Field(128, ge=1, description="filters a block of the network")
    depth: int = Field(3, ge=1, le=6, description="blocks of the network; each halves the picture")
    training: ExpertConfig = Field(
        default=ExpertConfig(epochs=1000, decay=0.5, clipping=False, gradient_penalty=0.0), description="how a classifier is trained"
    )
    distilled_lr: bool = Field(True, description="take the learning rate from `meta.distilled_lr` where the pairs have that column")
    augment: tuple[Kind, ...] = Field((), description="augmentations of the training pictures, one a batch")
    task: str = Field(TASK, pattern=r"^[a-z0-9][a-z0-9-]*$", description="the figures' name between set and metric")

    def build(self) -> FreshNetworks:
        """The benchmark."""
        return FreshNetworks(self)


class Labelled(NamedTuple):
    """Pictures uint8 `[N, C, H, W]` with their class names' numbers int64 `[N]` and keys."""

    image_NCHW: NDArray[np.uint8]
    label_N: NDArray[np.int64]
    keys: Sequence[str]


def labelled(rows: pl.DataFrame, dataset: PairDataset, config: Config) -> Labelled:
    """The pictures of the rows that have a label. Raises DataError if none has."""
    rows = rows.filter(pl.col("label").is_not_null()) if "label" in rows.columns else rows.clear()
    if rows.is_empty():
        raise DataError.at("There are no labelled pictures", "label", "<no row has one>", "a column of class numbers")
    keys = rows["key"].to_list()
    data = dataset.reader().read_column(rows["image"])
    pictures = [decode_square(picture, config.size_px, config.channels, key) for key, picture in zip(keys, data, strict=True)]
    return Labelled(np.stack(pictures), rows["label"].cast(pl.Int64).to_numpy(), keys)


class FreshNetworks:
    """The benchmark.

    Metrics: `acc1`, the share of pictures that a classifier gets right, averaged over the classifiers; `movement`, the mean length of their
    parameters' step an epoch, over the first four epochs (no interval, no `per_example`).
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def run(self, encoder: Encoder, pairs: pl.DataFrame, name: str, seed: int) -> list[Metric]:
        """The rows for the set `name`.

        Raises ConfigError if the encoder does not know its training pairs, DataError for classes that they lack.
        """
        trained_on: PairDataset | None = getattr(encoder, "trained_on", None)
        dataset: PairDataset | None = getattr(encoder, "dataset", None)
        if trained_on is None or dataset is None:
            raise ConfigError.at(
                "The training pairs are not at hand",
                "evaluate.benchmarks",
                TASK,
                "the evaluation of a workflow's own model",
                "not a matrix or a sweep",
            )
        rows = trained_on.read().filter(pl.col("split") == "train")
        train, test = labelled(rows, trained_on, self.config), labelled(of_split(pairs, self.config.split), dataset, self.config)
        classes = np.unique(train.label_N)
        if unknown := sorted(set(test.label_N.tolist()) - set(classes.tolist())):
            raise DataError.at("The training pairs lack classes of the test", "label", unknown[:10], "all classes of the test")
        training = self.config.training
        if self.config.distilled_lr and LR in rows.columns:
            training = training.model_copy(update={"lr": float(rows[LR].drop_nulls().mean())})  # type: ignore[arg-type]
        correct_N, movements = np.zeros(len(test.keys)), []
        for number in range(self.config.networks):
            predicted_N, moved = self._trained(train, test, classes, training, generator(seed, "fresh network", number))
            correct_N += (classes[predicted_N] == test.label_N) / self.config.networks
            movements.append(moved)
        settings = {**self.config.plain(), "training": training.plain(), "pictures": len(train.keys)}
        found = Rows(name, self.config.task, test.keys, seed, settings)
        moved = float(np.mean(movements))
        return [
            found.mean("acc1", correct_N),
            Metric(name, self.config.task, "movement", moved, len(movements), moved, moved, settings),
        ]

    def _trained(
        self, train: Labelled, test: Labelled, classes: NDArray[np.int64], training: ExpertConfig, draw: np.random.Generator
    ) -> tuple[NDArray[np.int64], float]:
        """What a new network predicts after its training, int64 `[N]` in [0, classes), and how far its parameters moved."""
        import torch

        from diptych.models import convnet, siamese
        from diptych.models.trajectories import movement, record

        config = self.config
        net = convnet.create(self.shape(len(classes)), int(draw.integers(2**63)))
        train_NCHW, test_NCHW = normalised(train.image_NCHW, test.image_NCHW)
        class_N = torch.from_numpy(np.searchsorted(classes, train.label_N))

        def batches(_: int) -> Sequence[torch.Tensor]:
            return torch.split(torch.from_numpy(draw.permutation(len(class_N))), training.batch_size)

        recorded = record(net, train_NCHW, class_N, batches, training, lambda batch: siamese.augment(batch, config.augment, draw))
        with torch.no_grad():
            predicted_N = torch.cat([net(part).argmax(dim=1) for part in torch.split(test_NCHW, 256)])
        return predicted_N.numpy(), movement(recorded.flat_EP)

    def shape(self, classes: int) -> NetShape:
        """What the classifiers are built from."""
        from diptych.models.convnet import NetShape

        return NetShape(self.config.channels, classes, self.config.width, self.config.depth, self.config.size_px)


def normalised(train_NCHW: NDArray[np.uint8], test_NCHW: NDArray[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as floats of the training pictures' mean 0 and deviation 1 a channel."""
    import torch

    train, test = (torch.from_numpy(np.ascontiguousarray(image)).float() / 255 for image in (train_NCHW, test_NCHW))
    mean, std = train.mean(dim=(0, 2, 3), keepdim=True), train.std(dim=(0, 2, 3), keepdim=True).clamp(min=1e-3)
    return (train - mean) / std, (test - mean) / std
