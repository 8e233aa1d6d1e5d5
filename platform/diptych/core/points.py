"""The plug-in points: everything a paper can be to Diptych, in one file.

A method is a `Config` (frozen, strict, owned by the method's file) whose `build` gives an object of one of these shapes.
The catalogue (`core/catalogue.py`) maps the method's name to that `Config`.

Shape legend: N pairs in a batch, D feature width, L tokens, C classes, P parameters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    import numpy as np
    import polars as pl
    import torch
    from numpy.typing import NDArray
    from torch import nn

Need = Literal["captions", "pixels", "features", "text features"]


# ---------------------------------------------------------------- pairs: ingest, curate, prune, caption


@dataclass(frozen=True)
class RawPair:
    """A pair as a source hands it over, before anything was checked. A `fault` says why it cannot be used."""

    key: str
    image: bytes | None
    captions: Sequence[tuple[object, str]]  # (text, source)
    extra: Mapping[str, Any] = field(default_factory=dict)
    split: str = "train"
    fault: str | None = None


class Source(ABC):
    """Where pairs come from. `parts` cuts the work; `read` yields the pairs of one part, in a stable order."""

    @abstractmethod
    def parts(self) -> Sequence[str]:
        """Names of the independent parts (files, shards), sorted."""

    @abstractmethod
    def read(self, part: str) -> Iterator[RawPair]:
        """The pairs of one part; a broken one is yielded with its `fault`, never skipped."""

    def report(self) -> Mapping[str, Any]:
        """Plain facts about the source as a whole, for the dataset's manifest, e.g. the `card` of an evaluation set. Small."""
        return {}


@dataclass(frozen=True)
class Verdict:
    """What a method decided on a batch. Every row of the batch is in exactly one of the two frames.

    Attributes:
        kept: the rows that stay, with the columns they came with; captions, new columns and, for a method that paints, `pixels` may differ.
        rejected: `key` (str), `reason` (str, short and countable), `score` (float, may be null); optionally `twin` (str, may be null):
            the key of the pair that it was found to be a copy of.
    """

    kept: pl.DataFrame
    rejected: pl.DataFrame


class Fold(ABC):
    """A reduction over all pairs: `finish(merge(map(batch), …))`. Folds of a method run in turn, each seeing the state so far."""

    @abstractmethod
    def map(self, batch: pl.DataFrame, state: Any) -> Any:
        """The partial result of one batch; picklable, bounded in size by the method and not by the rows."""

    @abstractmethod
    def merge(self, left: Any, right: Any) -> Any:
        """Joins two partial results. Associative; partials are always merged in the order of the input shards."""

    def finish(self, partial: Any, state: Any) -> Any:
        """The state after this fold; by default the merged partial itself."""
        del state
        return partial


class Labour(NamedTuple):
    """Work on features: how often a row is looked at, and inner products of two rows."""

    looks: float = 0.0
    products: float = 0.0


class PairMethod(ABC):
    """A curate, prune or caption method: zero or more folds, an optional grouping, then a verdict on every pair.

    A batch is a polars frame of the pair table (`pairs/schema.py`). `needs` lists what else it must hold:
    `"pixels"` adds the column `pixels` (the encoded image, binary), `"features"` adds the column `feature`
    (`Array(Float32, D)`, L2-normalised), `"text features"` the column `text_feature` of the pair's first caption by the same model (all 0
    without a caption). Decisions depend on `(seed, key)` and content, never on order.

    A method that `paints` may give a kept row another picture: what its `pixels` then hold is packed into shards of the new dataset.
    A method that must group in more than one way, or mark pairs before it groups them, is a chain: its `Config` has a method `steps()` that
    gives the configurations to run in its place, one after another, under its name.
    """

    needs: frozenset[Need] = frozenset({"captions"})
    paints: bool = False

    def folds(self) -> Sequence[Fold]:
        """The reductions to run before `apply`, in order."""
        return ()

    def group(self, batch: pl.DataFrame, state: Any) -> NDArray[np.int64] | None:
        """A group id `[N]` a row. If not None, `apply` sees whole groups, whichever shards their rows came from."""
        del batch, state
        return None

    @abstractmethod
    def apply(self, batch: pl.DataFrame, state: Any) -> Verdict:
        """The verdict on a batch (or, with `group`, on one or more whole groups: the column `group` tells them apart)."""

    def labour(self, rows: int) -> Labour:
        """The work on features that does not grow in step with the pairs, for `rows` of them: a plan, which sees only a few, asks for it."""
        del rows
        return Labour()

    def report(self, state: Any) -> Mapping[str, Any]:
        """Plain figures for the report: counts, thresholds, histograms. Small."""
        del state
        return {}

    def tally(self, kept: pl.LazyFrame) -> Mapping[str, int]:
        """Counts for the report over a table of pairs that the method has kept; those of all tables are added up."""
        del kept
        return {}


# ---------------------------------------------------------------- training


Tower = Literal["image", "text"]


@dataclass(frozen=True)
class Wants:
    """What an objective wants beside, or in place of, the features of its pairs. It says so in attributes of these names.

    All of them are optional: an objective that declares none gets one picture and one caption a pair, both encoded. One that runs the model
    itself says `encodes = ()`, and `whole_batch = True` if it does so on the batch at once, which then cannot be cut into micro-batches. One
    that looks inside the towers, or keeps a copy of them, says `whole_weights = True`: it is refused where weights are shared out.

    Attributes:
        views: recipes (`train/views.py`, e.g. `"weak"`, `"strong"`) of further augmented pictures of each pair: `view0_NCHW`, …, uint8.
        boxes: whether to tell where each picture was cut out: `image_box_N5`, `view0_box_N5`, …, int64: left, top, width and height in
            pixels of the whole picture, and 1 if it was mirrored.
        columns: numbers of the pair table, delivered as `<column>_N`: integers as int64 with -1 for null, floats as float32 with NaN.
        captions: further captions of each pair, `text1_NL`, …: others than the first and each other as far as the pair has as many.
        sources: kinds of captions, e.g. `"synthetic"`, of each of which one is delivered beside as `<source>_NL`: one whose source is
            that or begins with it and a colon. The pair's own captions above are then drawn from those of no such source.
        reinforced: the pair's picture is one of its stored augmentations (`pairs/reinforced.py`), and with it comes what teachers made of
            it and of the captions that were delivered: `teacher_image_NKD`, `teacher_text_NKD`, `teacher_<source>_NKD`, float32, a row a
            teacher, zero-padded where their widths differ.
        encodes: the towers whose features it reads from `Encoded`.
    """

    views: tuple[str, ...] = ()
    boxes: bool = False
    columns: tuple[str, ...] = ()
    captions: int = 0
    sources: tuple[str, ...] = ()
    reinforced: bool = False
    encodes: tuple[Tower, ...] = ("image", "text")

    @classmethod
    def of(cls, objective: object) -> Wants:
        """What an objective declares, with the defaults for what it does not."""
        return cls(**{each.name: getattr(objective, each.name) for each in fields(cls) if hasattr(objective, each.name)})


@dataclass
class Encoded:
    """What an objective sees of one batch on one rank.

    Attributes:
        image_ND, text_ND: L2-normalised features, float; `[0, 0]` for a tower that the objective does not ask for.
        logit_scale: scalar, already exponentiated (`exp` of the parameter).
        batch: whatever else the loader delivered (`image_NCHW` uint8, `text_NL` int64, `row_N` int64, …; see `Wants`).
        model: the dual encoder, for objectives that need more than features.
        step: optimizer updates made so far.
        encoder: encodes as the loop does, in its precision and its micro-batches; None: the model itself.
    """

    image_ND: torch.Tensor
    text_ND: torch.Tensor
    logit_scale: torch.Tensor
    batch: Mapping[str, torch.Tensor] = field(default_factory=dict)
    model: nn.Module | None = None
    step: int = 0
    encoder: Any = None

    def arithmetic(self, device: torch.device) -> AbstractContextManager[Any]:
        """What an objective that runs the model itself wraps it in: the precision in which the loop encodes."""
        arithmetic: Any = getattr(self.encoder, "arithmetic", None)
        context: AbstractContextManager[Any] = nullcontext() if arithmetic is None else arithmetic(device)
        return context

    @property
    def _encoder(self) -> Any:
        return self.model if self.encoder is None else self.encoder

    def encode_image(self, image_NCHW: torch.Tensor, normalize: bool = True) -> torch.Tensor:
        """Features `[N, D]` of further pictures, of unit norm with `normalize`."""
        feature_ND: torch.Tensor = self._encoder.encode_image(image_NCHW, normalize=normalize)
        return feature_ND

    def encode_text(self, text_NL: torch.Tensor, normalize: bool = True) -> torch.Tensor:
        """Features `[N, D]` of further captions, of unit norm with `normalize`."""
        feature_ND: torch.Tensor = self._encoder.encode_text(text_NL, normalize=normalize)
        return feature_ND


@dataclass(frozen=True)
class TrainContext:
    """What an objective may look at once, before the first step. All of it is the same on every rank but `rank`.

    Attributes:
        model: the dual encoder with the weights that it starts from; a frozen tower's parameters do not require gradients.
        tokenizer: the model's: `encode_cut(texts)` gives int64 `[N, L]`.
        rows: training pairs; `row_N` lies in [0, rows).
        class_names: label -> name, by rising label, from the columns `label` and `label_name`; empty unless `label` is asked for.
        total_steps: optimizer updates of the whole run.
        captions: gives the captions of each training pair, by row.
        rank, world, device, seed: this process's place, and what names the run's draws.
    """

    model: nn.Module
    tokenizer: Any
    rows: int
    class_names: Mapping[int, str]
    total_steps: int
    rank: int = 0
    world: int = 1
    device: str = "cpu"
    seed: int = 0
    captions: Callable[[], Sequence[Sequence[str]]] = tuple


class Objective(Protocol):
    """A loss: an `nn.Module` that may own parameters, teachers, queues and tables, and gathers only through `objectives.gather`.

    Beside `__call__`, all optional: the attributes of `Wants`, one more, and two methods.

    - `lr_scales` maps the first part of a name among its own parameters to a factor of the learning rate there, read after `start`.
    - `start(context: TrainContext)` is called once, before the optimizer is built: what it makes (parameters, buffers) is
      broadcast from rank 0, trained, and kept in checkpoints by its `state_dict`. What is not in there must follow from what is.
    - `after_step(step: int, model: nn.Module)` is called after every update, `step` updates made in all. The model is handed over,
      since an objective that kept it as an attribute would own its parameters.
    """

    def __call__(self, encoded: Encoded) -> dict[str, torch.Tensor]:
        """A dictionary with the scalar `loss` and any named parts worth a curve."""
        ...


Curvature = Literal["none", "hutchinson", "gauss-newton-bartlett"]


class OptimizerConfig(Protocol):
    """Builds a standard `torch.optim.Optimizer`; says what curvature the loop must supply."""

    @property
    def lr(self) -> float:
        """The peak learning rate."""
        ...

    @property
    def curvature(self) -> Curvature:
        """What the loop must supply beside gradients."""
        ...

    def build(self, groups: Iterable[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimizer over parameter groups (`optimizers/groups.py` makes them)."""
        ...


class BatchSize(Protocol):
    """Chooses the next global batch size from gradient statistics of the step just made."""

    def next(self, statistics: Mapping[str, float]) -> int:
        """The global batch size of the next step."""
        ...


class TrainingTask(Protocol):
    """What the loop trains: turns a collated batch into losses. The default is contrastive (`train/contrastive.py`)."""

    def losses(self, batch: Mapping[str, torch.Tensor], step: int) -> dict[str, torch.Tensor]:
        """The scalar `loss` of a collated batch, with any named parts."""
        ...

    def after_step(self) -> None:
        """Called after every optimizer update, e.g. to clamp the logit scale."""
        ...


# ---------------------------------------------------------------- compress


class Compressor(Protocol):
    """Makes a model smaller or sparser. Masks stay with the model as buffers, so that they are saved with it.

    Its configuration may have the fields `calibration_pairs` and `calibration_batch`: how many pairs it wants to see, 256 by default, and how
    many of them a batch, 128 by default. A `report(model)`, where there is one, gives plain figures after `compress`.
    """

    def compress(self, model: nn.Module, calibration: Iterable[Mapping[str, torch.Tensor]]) -> nn.Module:
        """The compressed model; `calibration` holds batches (`image_NCHW` uint8, `text_NL` int64) from the training pairs.

        It may be gone through any number of times, is the same each time, and decodes pictures anew each time.
        """
        ...


# ---------------------------------------------------------------- evaluate


@dataclass(frozen=True)
class Metric:
    """One row of the evaluation matrix in long form. `low`, `high` bound the 95 % bootstrap interval over examples.

    Attributes:
        set, task, metric: make the MLflow key `eval/<set>/<task>/<metric>`.
        value: in the metric's own unit; recalls and accuracies are fractions in [0, 1].
        n: examples behind the value.
        settings: what must be equal for two rows to be comparable (templates, class-name digest, preprocessing).
        per_example: float32 `[n]`, the value's summands in the order of `keys`; what paired tests work from.
        method, shots, seed: the adapter or score, its labelled examples a class, and its draw, where the row has them.
    """

    set: str
    task: str
    metric: str
    value: float
    n: int
    low: float
    high: float
    settings: Mapping[str, Any] = field(default_factory=dict)
    keys: Sequence[str] = ()
    per_example: NDArray[np.float32] | None = None
    method: str = ""
    shots: int | None = None
    seed: int | None = None


class PictureTransform(Protocol):
    """A change of decoded pictures before they are encoded, e.g. a corruption. It depends on key and content, never on order."""

    @property
    def tag(self) -> str:
        """Names the change in digests: equal tags, equal pictures."""
        ...

    def __call__(self, keys: Sequence[str], image_NHWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The changed pictures of some pairs, in the shape and dtype given; the input stays as it is."""
        ...


class Encoder(Protocol):
    """A checkpoint as benchmarks see it: features, stored or made on demand. All features are float32 and L2-normalised."""

    @property
    def logit_scale(self) -> float:
        """The factor of the cosine in the logits."""
        ...

    def images(self, pairs: pl.DataFrame, transform: PictureTransform | None = None) -> NDArray[np.float32]:
        """`[n, D]`, a row a pair, in the order of the frame; of the pictures as `transform` leaves them, if one is given."""
        ...

    def texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """`[m, D]`, a row a text."""
        ...


@dataclass(frozen=True)
class Examples:
    """Pictures of a labelled set as stored features; rows of all arrays belong together.

    Attributes:
        feature_ND: image features, float32, L2-normalised.
        label_N: class numbers, int64 in [0, C); None where labels are unknown or must not be seen.
        picture_N: int64, rows of one picture (its augmented views) share a number; None: every row is a picture of its own.
        caption_ND: L2-normalised features of the row's own caption.
        auxiliary_NE: features of a second encoder, one that never saw a label of this set.
    """

    feature_ND: NDArray[np.float32]
    label_N: NDArray[np.int64] | None = None
    picture_N: NDArray[np.int64] | None = None
    caption_ND: NDArray[np.float32] | None = None
    auxiliary_NE: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Support:
    """What an adapter may learn from.

    Attributes:
        text_CD: the zero-shot weights, float32, L2-normalised, a row a class.
        logit_scale: the checkpoint's factor of the cosine.
        labelled: the few shots.
        validation: labelled examples for choosing hyper-parameters, never for fitting; None if there are none.
        unlabelled: examples of the target without labels, for methods that use them.
        seed: names the adapter's draws.
    """

    text_CD: NDArray[np.float32]
    logit_scale: float
    labelled: Examples | None = None
    validation: Examples | None = None
    unlabelled: Examples | None = None
    seed: int = 0


class Adapter(Protocol):
    """Adaptation on stored features, in scikit-learn's shape: `fit`, then `predict`.

    `needs` names the parts of `Support` without which it cannot work (`"labelled"`, `"validation"`, `"unlabelled"`, `"captions"`,
    `"auxiliary"`). An online method also has `update(test)`: `predict` scores a batch of the stream, then `update` learns from it.
    """

    needs: frozenset[str]

    def fit(self, support: Support) -> Adapter:
        """Learns from the support; gives itself back. Raises DataError where the support does not suffice."""
        ...

    def predict(self, test: Examples) -> NDArray[np.float32]:
        """Scores `[N, C]`: the larger, the likelier. Looks at no label."""
        ...


class Benchmark(Protocol):
    """Measures a checkpoint on a set of pairs."""

    def run(self, encoder: Encoder, pairs: pl.DataFrame, name: str, seed: int) -> list[Metric]:
        """The rows for the set called `name`; `seed` names the bootstrap's draws."""
        ...
