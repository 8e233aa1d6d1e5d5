"""The path from a zero-shot to a fine-tuned dual encoder as a benchmark: pictures and class names in, rows with intervals out.

The weights that move are the image tower's, the head's (the zero-shot classifier: normalised mean of a class's prompts, from each end's own
text tower) and the logit scale's, in log space.

Shape legend: A points of the path, N pictures, C classes, D feature width, K figures, R replicates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from diptych.adapt import norms, states
from diptych.adapt import straggler_sharpness as method
from diptych.adapt.layers import HEAD, LOGIT_SCALE, layers_of, of_image_tower
from diptych.adapt.sharpness import Batch, Predict, Sharpness, predictor
from diptych.adapt.states import State
from diptych.core import digest
from diptych.core.chance import generator, key_hashes
from diptych.core.errors import DataError
from diptych.core.points import Encoder, Metric
from diptych.models import clip
from diptych.models.clip import DualEncoder

if TYPE_CHECKING:
    from diptych.adapt.straggler_sharpness import Config, Floats, PathReport

READ = 64
TEXT_BATCH = 256
RESAMPLES, CHUNK, LEVEL = 2000, 64, 0.95

Statistic = Callable[["Floats"], "Floats"]


class ImageTower(nn.Module):
    """A dual encoder as an image network: unit-norm features, `[N, D]`."""

    def __init__(self, encoder: DualEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, image_NCHW: Tensor) -> Tensor:
        """Features of pictures, uint8 or already normalised."""
        return self.encoder.encode_image(image_NCHW)


def zero_shot_weights(encoder: DualEncoder, text_CD: Tensor) -> dict[str, Tensor]:
    """The image tower's tensors under open_clip's names, `head` `[C, D]` and `logit_scale` (in log space)."""
    tower = {name: tensor for name, tensor in states.of_module(encoder).items() if of_image_tower(name)}
    return {**tower, HEAD: text_CD.to(encoder.logit_scale.device), LOGIT_SCALE: encoder.logit_scale.detach()}


def zero_shot_predictor(encoder: DualEncoder) -> Predict:
    """`predict(weights, pictures) -> logits` for weights as `zero_shot_weights` names them: `exp(logit_scale) * features @ head.T`."""
    features = predictor(ImageTower(encoder))

    def predict(weights: State, image_NCHW: Tensor) -> Tensor:
        tower = {f"encoder.clip.{name}": tensor for name, tensor in weights.items() if name not in (HEAD, LOGIT_SCALE)}
        logit_NC: Tensor = weights[LOGIT_SCALE].exp() * features(tower, image_NCHW) @ weights[HEAD].T
        return logit_NC

    return predict


def zero_shot_layers(encoder: DualEncoder) -> dict[str, tuple[str, ...]]:
    """The layers of those weights: the tower's blocks, stem and projection, and the head. Buffers belong to none."""
    parameters = [name for name, _ in encoder.clip.named_parameters() if of_image_tower(name)]
    return layers_of([*parameters, HEAD, LOGIT_SCALE])


@torch.no_grad()
def text_head(encoder: DualEncoder, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """The zero-shot classifier `[C, D]`: a class's prompts encoded, averaged, normalised (Radford et al. 2021, section 3.1.4)."""
    prompts = [template.replace("{}", name) for name in names for template in templates]
    device = encoder.logit_scale.device
    with states.evaluating(encoder):
        text_NL = torch.from_numpy(encoder.tokenizer.encode_cut(prompts)).to(device)
        feature_MD = torch.cat([encoder.encode_text(part_NL) for part_NL in torch.split(text_NL, TEXT_BATCH)])
    mean_CD = feature_MD.view(len(names), len(templates), -1).mean(dim=1)
    return nn.functional.normalize(mean_CD, dim=-1)


@dataclass(frozen=True)
class _Pictures:
    """Labelled pictures in memory: uint8 `[N, C, H, W]`, class numbers `[N]`, keys."""

    image_NCHW: Tensor
    label_N: Tensor
    keys: list[str]

    def batches(self, size: int) -> list[Batch]:
        return list(zip(torch.split(self.image_NCHW, size), torch.split(self.label_N, size), strict=True))


class PathBenchmark:
    """The benchmark.

    Metrics, with the point for <a>: `acc_alpha_<a>` and `loss_alpha_<a>` (nats), `sharpness_alpha_<a>` (rise of the normalised loss),
    `instability`, `inner_gain`; layer by layer `instability_<layer>` and `sharpness_<layer>_alpha_<a>`; and `correlation_<whole or layer>`
    of sharpness with accuracy, where there are at least 4 points and neither is constant. The settings of `instability` hold the ranking
    of the layers and the stragglers. Intervals are bootstraps over pictures, of sharpness over batches, of correlations over points.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def run(self, encoder: Encoder, pairs: pl.DataFrame, name: str, seed: int) -> list[Metric]:
        """The rows for the set `name`; `pairs` carries `label`, the class-name column and `split`.

        The encoder also needs `model` (a dual encoder, which is not changed) and `load_pixels(frame of n rows) -> uint8 [n, C, H, W]`.
        Raises DataError without them, for a split without rows or labels, and for an origin of another architecture.
        """
        theta1_model = _model_of(encoder)
        held_out, attacked, names = self._pictures(encoder, pairs)
        report = self._measure(theta1_model, held_out, attacked, names)
        rows = _Rows(report, name, self.config.task, held_out.keys, len(attacked.keys), seed, self._settings(encoder, names))
        return list(rows)

    def _pictures(self, encoder: Encoder, pairs: pl.DataFrame) -> tuple[_Pictures, _Pictures, list[str]]:
        config = self.config
        for column in ("label", config.classnames):
            if column not in pairs.columns:
                raise DataError.at("The set has no such column", column, pairs.columns, "a label and a class name a pair")
        table = _class_table(pairs, config.classnames)
        held_out = self._read(encoder, pairs, config.split, config.pictures, table)
        attacked = self._read(encoder, pairs, config.sharpness_split, config.batches * config.batch_size, table)
        return held_out, attacked, list(table.values())

    def _read(self, encoder: Encoder, pairs: pl.DataFrame, split: str, limit: int, table: Mapping[int, str]) -> _Pictures:
        rows = pairs.filter(pl.col("split") == split)
        if rows.is_empty() or rows["label"].null_count():
            known = sorted(pairs["split"].unique().drop_nulls())
            raise DataError.at("The split has no labelled pairs", "split", split, f"one of {known} with a label on every row")
        rows = rows[np.sort(key_hashes(rows["key"]).argsort(kind="stable")[:limit])]
        number = {label: position for position, label in enumerate(table)}
        load_pixels = cast(Any, encoder).load_pixels
        blocks = [load_pixels(rows[start : start + READ]) for start in range(0, len(rows), READ)]
        device = _model_of(encoder).logit_scale.device
        label_N = torch.tensor([number[label] for label in rows["label"]], device=device)
        return _Pictures(torch.from_numpy(np.concatenate(blocks)).to(device), label_N, rows["key"].to_list())

    def _measure(self, end: DualEncoder, held_out: _Pictures, attacked: _Pictures, names: Sequence[str]) -> PathReport:
        config = self.config
        start = clip.load(Path(config.origin)).to(end.logit_scale.device)
        states.require_alike(states.of_module(end), states.of_module(start), config.origin)
        theta0, theta1 = (zero_shot_weights(model, text_head(model, names, config.templates)) for model in (start, end))
        batches = attacked.batches(config.batch_size)
        return method.path_report(
            zero_shot_predictor(end),
            theta0,
            theta1,
            zero_shot_layers(end),
            config.alphas,
            held_out.batches(config.batch_size),
            batches,
            config.attack,
            layer_losses=config.layers != "none",
            layer_sharpness=config.layers == "sharpness",
            refresh=refresher(start, [image_NCHW for image_NCHW, _ in batches]),
        )

    def _settings(self, encoder: Encoder, names: Sequence[str]) -> dict[str, Any]:
        config = self.config
        return {
            **{key: value for key, value in config.plain().items() if key not in ("method", "task", "origin", "templates", "classnames")},
            "templates": digest.of_plain(list(config.templates)),
            "classnames": digest.of_plain(list(names)),
            "preprocessing": dict(getattr(encoder, "settings", {})),
        }


def refresher(scratch: DualEncoder, batches: Sequence[Tensor]) -> Callable[[State], State]:
    """Recomputes the batch-norm statistics of interpolated weights over pictures, in `scratch`, whose weights are lost; without any: `dict`."""
    if not norms.tracked(scratch):
        return dict

    def refresh(weights: State) -> State:
        tower = {name: tensor for name, tensor in weights.items() if name not in (HEAD, LOGIT_SCALE)}
        states.install(scratch, {**states.of_module(scratch), **tower})
        norms.recompute(scratch, batches, scratch.encode_image)
        renewed = states.of_module(scratch)
        return {**weights, **{name: renewed[name].clone() for name in tower}}

    return refresh


def _model_of(encoder: Encoder) -> DualEncoder:
    """The encoder's model. Raises DataError if it has none, or no way to its pictures: stored features are not enough here."""
    model = getattr(encoder, "model", None)
    if not isinstance(model, DualEncoder) or not callable(getattr(encoder, "load_pixels", None)):
        fix = "measure a model directory whose pictures can be read"
        raise DataError.at(
            "Sharpness needs the model and its pictures", "encoder", type(encoder).__name__, "`model` and `load_pixels`", fix
        )
    return model


def _class_table(pairs: pl.DataFrame, classnames: str) -> dict[int, str]:
    """Label -> class name over all pairs, in the order of the labels. Raises DataError unless either says the other."""
    table = pairs.select("label", classnames).filter(pl.col("label").is_not_null()).unique().sort("label", classnames)
    for column in table.columns:
        if table[column].null_count() or table[column].is_duplicated().any():
            raise DataError.at("Labels and class names do not match", column, table.head(4).rows(), "one name a label and one label a name")
    return dict(table.iter_rows())


# ---------------------------------------------------------------- rows


@dataclass(frozen=True)
class _Rows:
    """The rows of a report, one after the other."""

    report: PathReport
    set: str
    task: str
    keys: Sequence[str]
    attacked: int
    seed: int
    settings: Mapping[str, Any]

    def __iter__(self) -> Iterator[Metric]:
        report, points = self.report, [f"alpha_{alpha:g}" for alpha in self.report.alphas]
        yield from (self._mean(f"acc_{point}", hit_N) for point, hit_N in zip(points, report.hit_AN, strict=True))
        yield from (self._mean(f"loss_{point}", loss_N) for point, loss_N in zip(points, report.loss_AN, strict=True))
        yield self._of_path("inner_gain", report.hit_AN, method.inner_gain)
        yield self._of_path("instability", report.loss_AN, method.instability, self._ranking())
        for layer, loss_AN in report.layer_loss_AN.items():
            yield self._of_path(f"instability_{layer}", loss_AN, method.instability)
        for part, row in report.sharpness.items():
            middle = "" if part == method.WHOLE else f"{part}_"
            yield from (self._sharpness(f"sharpness_{middle}{point}", found) for point, found in zip(points, row, strict=True))
        for part, found in report.correlations().items():
            yield self._row(f"correlation_{part}", found.value, found.n, (found.low, found.high))

    def _ranking(self) -> dict[str, Any]:
        found = self.report.layer_instability
        return {"layers_ranked": method.ranking(found), "stragglers": method.stragglers(found)} if found else {}

    def _mean(self, metric: str, value_N: Floats) -> Metric:
        interval = _interval(bootstrap(value_N[:, None], self.seed)[:, 0])
        per_example = value_N.astype(np.float32)
        return Metric(self.set, self.task, metric, float(value_N.mean()), len(value_N), *interval, self.settings, self.keys, per_example)

    def _of_path(self, metric: str, value_AN: Floats, statistic: Statistic, more: Mapping[str, Any] | None = None) -> Metric:
        replicates_AR = bootstrap(value_AN.T, self.seed).T
        value = float(statistic(value_AN.mean(axis=1)))
        return self._row(metric, value, value_AN.shape[1], _interval(statistic(replicates_AR)), more)

    def _sharpness(self, metric: str, found: Sharpness) -> Metric:
        rise_B = found.rise_B.numpy()
        return self._row(metric, found.loss, self.attacked, _interval(bootstrap(rise_B[:, None], self.seed)[:, 0]))

    def _row(self, metric: str, value: float, n: int, interval: tuple[float, float], more: Mapping[str, Any] | None = None) -> Metric:
        return Metric(self.set, self.task, metric, value, n, *interval, {**self.settings, **(more or {})})


def bootstrap(value_NK: Floats, seed: int, resamples: int = RESAMPLES) -> Floats:
    """The bootstrapped means `[R, K]` of K figures over the same N examples, resampled together."""
    count = len(value_NK)
    rng = generator(seed, "bootstrap")
    sizes = [min(CHUNK, resamples - start) for start in range(0, resamples, CHUNK)]
    draws = (rng.multinomial(count, np.full(count, 1 / count), size=size) for size in sizes)
    return np.concatenate([drawn @ value_NK / count for drawn in draws])


def _interval(replicates: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.quantile(replicates, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
