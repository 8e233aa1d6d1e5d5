"""Measures a checkpoint: pictures are decoded and encoded once, kept under the digests that made them, and every benchmark works from there.

Shape legend: N pairs, M texts, D feature width.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from diptych.core import catalogue, digest
from diptych.core.config import Config
from diptych.core.errors import DataError
from diptych.core.points import Benchmark, Metric, PictureTransform
from diptych.engine import feature_files, features
from diptych.evaluate.encode import Pixels, encode_blocks, encode_texts, transformed
from diptych.evaluate.templates import OF_THE_SET
from diptych.models.store import CONFIG, FOREIGN_WEIGHTS, MASKS, STRUCTURE, WEIGHTS
from diptych.pairs import files
from diptych.pairs.card import Card
from diptych.pairs.dataset import PairDataset

if TYPE_CHECKING:
    from diptych.models.clip import DualEncoder

Features = NDArray[np.float32]
Precision = Literal["full", "half"]


@dataclass
class Checkpoint:
    """A model directory, loaded only when a tower has to run; `cache` keeps what benchmarks ask of a model beside its features."""

    folder: Path
    cache: Path

    @cached_property
    def identity(self) -> str:
        """The digest of the model's weights and configuration. Raises DataError if there are none."""
        weights = [name for name in (WEIGHTS, *FOREIGN_WEIGHTS) if (self.folder / name).is_file()][:1]
        if not weights or not (self.folder / CONFIG).is_file():
            raise DataError.at("This is no model directory", self.folder, "a folder without model", f"{CONFIG} and {WEIGHTS}")
        more = [name for name in (MASKS, STRUCTURE) if (self.folder / name).is_file()]
        return digest.of_plain([digest.of_file(self.folder / name) for name in (CONFIG, *weights, *more)])

    @cached_property
    def model(self) -> DualEncoder:
        """The dual encoder, in evaluation mode."""
        from diptych.models import clip

        return clip.load(self.folder).eval()

    @cached_property
    def facts(self) -> dict[str, Any]:
        """`view` (how pictures become squares) and `logit_scale` (exponentiated), from the cache where the model was loaded before."""
        name = digest.of_plain([self.identity, feature_files.code()])
        path = self.cache / "facts" / f"{name.removeprefix('sha256:')}.json"
        if not path.exists():
            view = {name: self.model.preprocess_cfg[name] for name in features.View._fields}
            found = {"view": view, "logit_scale": float(self.model.logit_scale.detach().exp())}
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = files.partial_of(path)
            partial.write_text(json.dumps(found))
            partial.replace(path)
        facts: dict[str, Any] = json.loads(path.read_text())
        return facts

    @property
    def view(self) -> features.View:
        """How the model's pictures become squares."""
        return features.View(**self.facts["view"])

    def release(self) -> None:
        """Lets the loaded model go."""
        self.__dict__.pop("model", None)


@dataclass
class StoredEncoder:
    """An `Encoder` over a model directory and a pair dataset, with features kept in `cache` between runs.

    Features lie under a digest of checkpoint, pictures (or texts), preprocessing and the code that made them; the model is loaded only
    when some are missing. Class names and templates are no part of it: another wording asks for other texts and for no picture.

    Attributes:
        model_dir, dataset, cache: the checkpoint, the pictures, and where features are kept.
        precision: of the features of pictures as they are. Half precision takes half of the disk; classes that are all but tied may fall
            the other way, so figures agree with other programs to the last digit in full precision alone.
        companions: the same dataset under other checkpoints. A picture that is decoded for one is encoded for all that lack it.
        together: checkpoints that are held in memory at once.
        shared: the loaded checkpoint, where several datasets are measured with it.
        training: the folder of the pairs that the checkpoint was trained on, for benchmarks of the pairs themselves.
    """

    model_dir: Path
    dataset: PairDataset
    cache: Path
    precision: Precision = "full"
    companions: Sequence[StoredEncoder] = ()
    together: int = 8
    shared: Checkpoint | None = None
    training: Path | None = None

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The model and what is known of it without loading it."""
        return self.shared or Checkpoint(self.model_dir, self.cache)

    @cached_property
    def trained_on(self) -> PairDataset | None:
        """The pairs that the checkpoint was trained on, where it is known. Raises DataError if they are not there any more."""
        return None if self.training is None else PairDataset.open(self.training)

    @property
    def identity(self) -> str:
        """The digest of the model's weights and configuration."""
        return self.checkpoint.identity

    @property
    def model(self) -> DualEncoder:
        """The dual encoder, in evaluation mode."""
        return self.checkpoint.model

    @property
    def settings(self) -> dict[str, Any]:
        """How pixels were prepared; rows that differ in it are not comparable. The size is the model's own and may differ."""
        return {"resize": self.checkpoint.view.words, **({"features": "half precision"} if self.precision == "half" else {})}

    @property
    def logit_scale(self) -> float:
        """The factor of the cosine in the logits."""
        return float(self.checkpoint.facts["logit_scale"])

    def beside(self, model_dir: str) -> StoredEncoder:
        """The same pictures under another checkpoint, for benchmarks that compare models. Raises DataError if it is no model directory."""
        other = replace(self, model_dir=Path(model_dir.removeprefix("local-dir:")), companions=(), shared=None)
        other.checkpoint.identity  # noqa: B018 - asks for the files
        return other

    def images(self, pairs: pl.DataFrame, transform: PictureTransform | None = None) -> Features:
        """`[N, D]`, a row a pair, in the order of the frame; from the cache where that very selection was encoded before.

        Features of transformed pictures are kept in half precision, for there are many: they are rounded before their first use too, so
        that a figure does not depend on whether the cache was warm.
        """
        if pairs.is_empty():
            return np.empty((0, 0), np.float32)
        path = self.image_file(pairs, transform)
        if not path.exists():
            self._encode(pairs, transform)
        return feature_files.read(path)

    def image_file(self, pairs: pl.DataFrame, transform: PictureTransform | None = None) -> Path:
        """Where the features of a selection of pictures lie, or will."""
        made_from: list[Any] = [self.identity, feature_files.code(), feature_files.of_pictures(self.dataset, pairs), self.precision]
        return feature_files.path(self.cache, digest.of_plain(made_from if transform is None else [*made_from, transform.tag]))

    def _kept(self, transform: PictureTransform | None) -> type[np.float32 | np.float16]:
        return np.float32 if transform is None and self.precision == "full" else np.float16

    def _encode(self, pairs: pl.DataFrame, transform: PictureTransform | None) -> None:
        """Encodes a selection with this checkpoint and with the companions of its view that lack it."""
        sharing = self._sharing(pairs, transform)
        paths = [encoder.image_file(pairs, transform) for encoder in sharing]
        blocks = encode_blocks([encoder.model for encoder in sharing], self._pictures(pairs, transform))
        feature_files.write(paths, blocks, len(pairs), self._kept(transform))
        if len(self.companions) > self.together:
            for encoder in sharing[1:]:
                encoder.checkpoint.release()

    def _sharing(self, pairs: pl.DataFrame, transform: PictureTransform | None) -> list[StoredEncoder]:
        """This encoder and its companions that lack the selection and see pictures as it does, as many as may be held at once."""
        sharing = [self]
        for other in self.companions:
            if len(sharing) == self.together:
                break
            if other is self:
                continue
            if other.checkpoint.view == self.checkpoint.view and not other.image_file(pairs, transform).exists():
                sharing.append(other)
            elif len(self.companions) > self.together:
                other.checkpoint.release()
        return sharing

    def _pictures(self, pairs: pl.DataFrame, transform: PictureTransform | None) -> Iterable[Pixels]:
        blocks = features.pictures(pairs, self.dataset.reader(), self.checkpoint.view)
        return blocks if transform is None else transformed(blocks, pairs["key"].to_list(), transform)

    def texts(self, texts: Sequence[str]) -> Features:
        """`[M, D]`, a row a text; a list that was asked for before is not encoded again, in this run or a later one."""
        if not texts:
            return np.empty((0, 0), np.float32)
        path = feature_files.path(self.cache / "texts", digest.of_plain([self.identity, feature_files.code(), list(texts)]))
        if not path.exists():
            feature_files.write([path], [[encode_texts(self.model, texts)]], len(texts), np.float32)
        return feature_files.read(path)

    def auxiliary(self, pairs: pl.DataFrame, name: str) -> Features:
        """`[N, E]`, features of the same pictures by a second encoder: `pixels`, a model by name, or a model directory."""
        weights = digest.of_tree(Path(name)) if Path(name).is_dir() else ""
        spec = features.FeatureSpec(name=name, weights=weights, pictures=self.dataset.digest, cache=str(self.cache / "auxiliary"))
        return features.compute(spec, pairs, self.dataset.reader())

    def load_pixels(self, pairs: pl.DataFrame) -> Pixels:
        """`[N, 3, H, W]`, the pictures as the model sees them, for benchmarks that go through the model itself."""
        return np.concatenate(list(features.pictures(pairs, self.dataset.reader(), self.checkpoint.view)))


def build(parameters: Mapping[str, Any] | Config, card: Card | None = None) -> Benchmark:
    """A benchmark from its resolved parameters, with the class names and templates that a set brings where it asks for them.

    Raises ConfigError for `templates: set` where the set has none.
    """
    config = parameters
    if not isinstance(config, Config):
        config = catalogue.config_class(catalogue.find(str(parameters["method"]), "evaluate")).parse(dict(parameters))  # type: ignore[index]
    benchmark: Benchmark = _of_the_set(config, card or Card()).build()  # type: ignore[attr-defined]
    return benchmark


def _of_the_set(config: Config, card: Card) -> Config:
    """The configuration with the card's templates for `templates: set`, and its classes where none are given."""
    changes: dict[str, Any] = {}
    if getattr(config, "templates", None) == OF_THE_SET and card.templates:
        changes["templates"] = list(card.templates)
    if "classes" in type(config).model_fields and getattr(config, "classes") is None and card.classes:  # noqa: B009 - of some benchmarks
        changes["classes"] = list(card.classes)
    return type(config).parse({**config.plain(), **changes}) if changes else config


def measure(encoder: StoredEncoder, benchmarks: Iterable[Mapping[str, Any] | Config], name: str, seed: int) -> list[Metric]:
    """The rows of every benchmark on the encoder's data set, called `name` in the rows."""
    pairs, card = encoder.dataset.read(), Card.of(encoder.dataset)
    return [metric for benchmark in benchmarks for metric in build(benchmark, card).run(encoder, pairs, name, seed)]


def measure_noting(
    encoder: StoredEncoder, benchmarks: Iterable[Mapping[str, Any] | Config], name: str, seed: int
) -> tuple[list[Metric], list[str]]:
    """`measure`, and what benchmarks had to say of the set (that names seem to be in the wrong order), a sentence each, once."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        metrics = measure(encoder, benchmarks, name, seed)
    about = f"{name}: "
    for other in caught:
        if not str(other.message).startswith(about):
            warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
    said = [str(warning.message).removeprefix(about) for warning in caught if str(warning.message).startswith(about)]
    return metrics, list(dict.fromkeys(said))


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
