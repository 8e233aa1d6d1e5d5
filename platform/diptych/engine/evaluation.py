"""Measures a checkpoint: pictures are decoded and encoded once, kept under the digests that made them, and every benchmark works from there.

Shape legend: N pairs, M texts, D feature width.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from diptych.core import catalogue, digest
from diptych.core.config import Config
from diptych.core.points import Benchmark, Metric, PictureTransform
from diptych.engine import features
from diptych.pairs.dataset import PairDataset

if TYPE_CHECKING:
    from diptych.models.clip import DualEncoder

Features = NDArray[np.float32]


@dataclass
class StoredEncoder:
    """An `Encoder` over a model directory and a pair dataset, with image features kept in `cache` between runs.

    The model is loaded only when something is not in the cache.
    """

    model_dir: Path
    dataset: PairDataset
    cache: Path
    _text: dict[str, Features] = field(default_factory=dict)

    @cached_property
    def identity(self) -> str:
        """The digest of the model's weights and configuration."""
        names = ("open_clip_config.json", "open_clip_model.safetensors")
        return digest.of_plain([digest.of_file(self.model_dir / name) for name in names])

    @cached_property
    def model(self) -> DualEncoder:
        """The dual encoder, in evaluation mode."""
        from diptych.models import clip

        return clip.load(self.model_dir).eval()

    @property
    def settings(self) -> dict[str, Any]:
        """How pixels were prepared; rows that differ in it are not comparable. The size is the model's own and may differ."""
        return {"resize": "bicubic, short side, centre crop"}

    @property
    def logit_scale(self) -> float:
        """The factor of the cosine in the logits."""
        return float(self.model.logit_scale.detach().exp())

    def images(self, pairs: pl.DataFrame, transform: PictureTransform | None = None) -> Features:
        """`[N, D]`, a row a pair, in the order of the frame; from the cache where that very selection was encoded before.

        Features of transformed pictures are kept in half precision, for there are many: they are rounded before their first use too, so
        that a figure does not depend on whether the cache was warm.
        """
        path = self.cache / f"{self._features_name(pairs, transform).removeprefix('sha256:')}.npy"
        if path.exists():
            stored: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        else:
            encoded = self._encoded(pairs, transform)
            stored = encoded if transform is None else encoded.astype(np.float16)
            self.cache.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial.npy")
            np.save(partial, stored)
            partial.replace(path)
        return stored.astype(np.float32, copy=False)

    def _features_name(self, pairs: pl.DataFrame, transform: PictureTransform | None) -> str:
        selection = [self.identity, self.dataset.digest, digest.of_bytes("\0".join(pairs["key"]).encode())]
        return digest.of_plain(selection if transform is None else [*selection, transform.tag])

    def _encoded(self, pairs: pl.DataFrame, transform: PictureTransform | None) -> Features:
        from diptych.evaluate.encode import encode_images, transformed

        blocks = features.pictures(pairs, self.dataset.reader(), self.model.image_size)
        return encode_images(self.model, blocks if transform is None else transformed(blocks, pairs["key"].to_list(), transform))

    def texts(self, texts: Sequence[str]) -> Features:
        """`[M, D]`, a row a text; a text that was asked for before is not encoded again."""
        from diptych.evaluate.encode import encode_texts

        new = [text for text in dict.fromkeys(texts) if text not in self._text]
        if new:
            self._text |= dict(zip(new, encode_texts(self.model, new), strict=True))
        return np.stack([self._text[text] for text in texts])

    def auxiliary(self, pairs: pl.DataFrame, name: str) -> Features:
        """`[N, E]`, features of the same pictures by a second encoder: `pixels`, a model by name, or a model directory."""
        spec = features.FeatureSpec(name=name, pictures=self.dataset.digest, cache=str(self.cache / "auxiliary"))
        return features.compute(spec, pairs, self.dataset.reader())

    def load_pixels(self, pairs: pl.DataFrame) -> NDArray[np.uint8]:
        """`[N, 3, H, W]`, the pictures as the model sees them, for benchmarks that go through the model itself."""
        return np.concatenate(list(features.pictures(pairs, self.dataset.reader(), self.model.image_size)))


def build(parameters: Mapping[str, Any] | Config) -> Benchmark:
    """A benchmark from its resolved parameters."""
    config = parameters
    if not isinstance(config, Config):
        config = catalogue.config_class(catalogue.find(str(parameters["method"]), "evaluate")).parse(dict(parameters))  # type: ignore[index]
    benchmark: Benchmark = config.build()  # type: ignore[attr-defined]
    return benchmark


def measure(encoder: StoredEncoder, benchmarks: Iterable[Mapping[str, Any] | Config], name: str, seed: int) -> list[Metric]:
    """The rows of every benchmark on the encoder's data set, called `name` in the rows."""
    pairs = encoder.dataset.read()
    return [metric for benchmark in benchmarks for metric in build(benchmark).run(encoder, pairs, name, seed)]


def figures(metrics: Sequence[Metric]) -> dict[str, dict[str, float]]:
    """What is shown and tracked, by `<set>/<task>/<metric>`; a single draw's row stays in the table."""
    return {f"{m.set}/{m.task}/{m.metric}": {"value": m.value, "low": m.low, "high": m.high, "n": m.n} for m in metrics if m.seed is None}


def long_form(metrics: Sequence[Metric], provenance: Mapping[str, str]) -> pl.DataFrame:
    """The evaluation table: a row a metric, with its interval, settings and the digests that made it."""
    return pl.DataFrame(
        [
            {
                "set": m.set, "task": m.task, "method": m.method, "shots": m.shots, "seed": m.seed, "metric": m.metric, "value": m.value,
                "n": m.n, "low": m.low, "high": m.high, "settings": json.dumps(m.settings, sort_keys=True, default=str), **provenance,
            }
            for m in metrics
        ],
        schema_overrides={"shots": pl.Int64, "seed": pl.Int64},
    )  # fmt: skip


def per_example(metrics: Sequence[Metric]) -> pl.DataFrame:
    """What paired tests work from: a row an example and metric, `set, task, metric, key, value`; of draws, their mean alone."""
    frames = [
        pl.DataFrame({"key": list(m.keys), "value": m.per_example}).select(
            pl.lit(m.set).alias("set"),
            pl.lit(m.task).alias("task"),
            pl.lit(m.metric).alias("metric"),
            "key",
            pl.col("value").cast(pl.Float32),
        )
        for m in metrics
        if m.per_example is not None and m.seed is None
    ]
    schema = {"set": pl.String, "task": pl.String, "metric": pl.String, "key": pl.String, "value": pl.Float32}
    return pl.concat(frames) if frames else pl.DataFrame(schema=schema)
