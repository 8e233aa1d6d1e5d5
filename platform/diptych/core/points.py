"""The plug-in points: everything a paper can be to Diptych, in one file.

A method is a `Config` (frozen, strict, owned by the method's file) whose `build` gives an object of one of these shapes.
The catalogue (`core/catalogue.py`) maps the method's name to that `Config`.

Shape legend: N pairs in a batch, D feature width, L tokens, C classes, P parameters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import numpy as np
    import polars as pl
    import torch
    from numpy.typing import NDArray
    from torch import nn

Need = Literal["captions", "pixels", "features"]


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


@dataclass(frozen=True)
class Verdict:
    """What a method decided on a batch. Every row of the batch is in exactly one of the two frames.

    Attributes:
        kept: the rows that stay, with the columns they came with; captions or new columns may differ.
        rejected: `key` (str), `reason` (str, short and countable), `score` (float, may be null).
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


class PairMethod(ABC):
    """A curate, prune or caption method: zero or more folds, an optional grouping, then a verdict on every pair.

    A batch is a polars frame of the pair table (`pairs/schema.py`). `needs` lists what else it must hold:
    `"pixels"` adds the column `pixels` (the encoded image, binary), `"features"` adds the column `feature`
    (`Array(Float32, D)`, L2-normalised). Decisions depend on `(seed, key)` and content, never on order.
    """

    needs: frozenset[Need] = frozenset({"captions"})

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

    def report(self, state: Any) -> Mapping[str, Any]:
        """Plain figures for the report: counts, thresholds, histograms. Small."""
        del state
        return {}


# ---------------------------------------------------------------- training


@dataclass
class Encoded:
    """What an objective sees of one batch on one rank.

    Attributes:
        image_ND, text_ND: L2-normalised features, float.
        logit_scale: scalar, already exponentiated (`exp` of the parameter).
        batch: whatever else the loader delivered (`image_NCHW` uint8, `text_NL` int64, `row_N` int64, …).
        model: the dual encoder, for objectives that need more than features.
        step: optimizer updates made so far.
    """

    image_ND: torch.Tensor
    text_ND: torch.Tensor
    logit_scale: torch.Tensor
    batch: Mapping[str, torch.Tensor] = field(default_factory=dict)
    model: nn.Module | None = None
    step: int = 0


class Objective(Protocol):
    """A loss: an `nn.Module` that may own parameters, teachers and queues, and gathers only through `objectives.gather`."""

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
    """Makes a model smaller or sparser. Masks stay with the model as buffers, so that they are saved with it."""

    def compress(self, model: nn.Module, calibration: Iterable[Mapping[str, torch.Tensor]]) -> nn.Module:
        """The compressed model; `calibration` holds batches (`image_NCHW` uint8, `text_NL` int64) from the training pairs."""
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


class Encoder(Protocol):
    """A checkpoint as benchmarks see it: features, stored or made on demand. All features are float32 and L2-normalised."""

    @property
    def logit_scale(self) -> float:
        """The factor of the cosine in the logits."""
        ...

    def images(self, pairs: pl.DataFrame) -> NDArray[np.float32]:
        """`[n, D]`, a row a pair, in the order of the frame."""
        ...

    def texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """`[m, D]`, a row a text."""
        ...


class Adapter(Protocol):
    """Adaptation on stored features, in scikit-learn's shape. Test-time methods also have `update(features)`."""

    def fit(self, features_ND: NDArray[np.float32], label_N: NDArray[np.int64], text_CD: NDArray[np.float32]) -> Adapter:
        """Learns from labelled features, starting from the zero-shot weights."""
        ...

    def predict(self, features_ND: NDArray[np.float32]) -> NDArray[np.float32]:
        """Scores `[N, C]`."""
        ...


class Benchmark(Protocol):
    """Measures a checkpoint on a set of pairs."""

    def run(self, encoder: Encoder, pairs: pl.DataFrame, name: str, seed: int) -> list[Metric]:
        """The rows for the set called `name`; `seed` names the bootstrap's draws."""
        ...
