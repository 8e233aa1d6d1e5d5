"""The safety filter: pairs that some score calls unsafe leave. The score is a column, a linear head on features, or another package's.

- `column`: a number of the pair table, e.g. the `meta.punsafe` that LAION's tables carry;
- `head`: a safetensors file with `weight` `[D]` or `[1, D]` and `bias` (a number), applied to the features that `features` names, through
  a sigmoid: the form of the published NSFW heads on CLIP features once they are linear;
- `scorer`: an entry point of the group `diptych.safety`: a callable `(batch) -> float [N]`, higher is less safe, NaN where it cannot tell.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import polars as pl
from pydantic import Field, model_validator

from diptych.core.config import Config as BaseConfig
from diptych.core.errors import ConfigError, DataError, nearest
from diptych.core.points import Need, PairMethod, Verdict
from diptych.prune.scores import Floats

GROUP = "diptych.safety"
REASON, MISSING = "unsafe", "no safety score"


class Config(BaseConfig):
    """Where the score comes from (exactly one of column, head, scorer), and from which on a pair leaves."""

    method: Literal["safety-filter"] = "safety-filter"
    threshold: float = Field(0.5, description="a pair leaves if its score is above this; of a head the probability that it is unsafe")
    column: str | None = Field(None, min_length=1, description="a column of numbers")
    head: str | None = Field(None, min_length=1, description="a safetensors file with `weight` and `bias`, on the features")
    scorer: str | None = Field(None, min_length=1, description=f"the name of an entry point of the group {GROUP}")
    features: str | None = Field(None, min_length=1, description="with head: `pixels`, `scout`, or an open_clip model by name or directory")
    unscored: Literal["reject", "keep"] = Field("reject", description="what becomes of pairs without a score")

    @model_validator(mode="after")
    def _one_of_three(self) -> Self:
        if sum(value is not None for value in (self.column, self.head, self.scorer)) != 1:
            raise ValueError("exactly one of column, head and scorer")
        if (self.head is None) != (self.features is None):
            raise ValueError("features belong to a head, and a head needs the features that it was made for")
        return self

    def build(self, seed: int) -> PairMethod:
        """The method; nothing is drawn. Raises ConfigError for a head or a scorer that is not there."""
        del seed
        if self.head is not None:
            return HeadFilter(self, linear_head(self.head))
        return SafetyFilter(self, of_column(self.column) if self.column is not None else scorer(str(self.scorer)))


@dataclass(frozen=True)
class SafetyFilter(PairMethod):
    """Rejects pairs whose score is above the threshold (reason `unsafe`), and those without one unless `unscored: keep`."""

    config: Config
    score_of: Callable[[pl.DataFrame], Floats]
    needs = frozenset[Need]({"captions"})

    def apply(self, batch: pl.DataFrame, state: Any) -> Verdict:
        """The verdict on a batch; a rejected pair's score is the safety score."""
        del state
        score_N = np.asarray(self.score_of(batch), np.float64)
        if score_N.shape != (batch.height,):
            raise DataError.at("A safety scorer gave no score a pair", "scorer", score_N.shape, f"({batch.height},)")
        none_N = np.isnan(score_N)
        left_N = (score_N > self.config.threshold) | (none_N if self.config.unscored == "reject" else np.zeros_like(none_N))
        why = pl.when(pl.Series(none_N)).then(pl.lit(MISSING)).otherwise(pl.lit(REASON))
        rejected = batch.select("key", reason=why, score=pl.Series(score_N, dtype=pl.Float32).fill_nan(None)).filter(left_N)
        return Verdict(kept=batch.filter(~left_N), rejected=rejected)

    def report(self, state: Any) -> Mapping[str, Any]:
        """The threshold and where the score came from."""
        del state
        source = {name: value for name in ("column", "head", "scorer") if (value := getattr(self.config, name)) is not None}
        return {"threshold": self.config.threshold, **source}


class HeadFilter(SafetyFilter):
    """The filter by a head, which needs features."""

    needs = frozenset[Need]({"captions", "features"})


def of_column(name: str) -> Callable[[pl.DataFrame], Floats]:
    """Scores from a column of numbers; null is no score."""

    def score_of(batch: pl.DataFrame) -> Floats:
        if name not in batch.columns or not batch.schema[name].is_numeric():
            known = [column for column, kind in batch.schema.items() if kind.is_numeric()]
            found = f"<{batch.schema[name]}>" if name in batch.columns else "<no such column>"
            fix = "mend what is not a number in the source" if name in batch.columns else nearest(name, known)
            raise DataError.at("The pairs have no such score", f"column {name!r}", found,
                               f"a column of numbers: {', '.join(known) or 'there is none'}", fix)  # fmt: skip
        return np.asarray(batch[name].cast(pl.Float64).fill_null(np.nan).to_numpy())

    return score_of


@lru_cache(maxsize=4)
def linear_head(path: str) -> Callable[[pl.DataFrame], Floats]:
    """Scores `sigmoid(feature . weight + bias)`, in [0, 1]. Raises ConfigError without the file, DataError if it is no such head."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not Path(path).is_file():
        raise ConfigError.at("The safety head is not there", "head", path, "a .safetensors file with `weight` and `bias`")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise DataError.at("The safety head cannot be read", path, f"<{error}>", "a safetensors file") from None
    if set(tensors) != {"weight", "bias"} or tensors["bias"].size != 1 or tensors["weight"].size != max(tensors["weight"].shape, default=0):
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        raise DataError.at("This is no linear head", path, shapes, "`weight` of shape [D] or [1, D], and `bias` of one number")
    weight_D, bias = tensors["weight"].astype(np.float64).ravel(), float(tensors["bias"].ravel()[0])

    def score_of(batch: pl.DataFrame) -> Floats:
        feature_ND = batch["feature"].to_numpy().astype(np.float64).reshape(batch.height, -1)
        if batch.height and feature_ND.shape[1] != len(weight_D):
            raise DataError.at("The safety head is for other features", path, len(weight_D), f"a weight of width {feature_ND.shape[1]}")
        with np.errstate(over="ignore"):
            return np.asarray(1 / (1 + np.exp(-(feature_ND @ weight_D + bias)))) if batch.height else np.empty(0)

    return score_of


def scorer(name: str) -> Callable[[pl.DataFrame], Floats]:
    """The callable behind an entry point. Raises ConfigError with those there are."""
    known = {point.name: point for point in entry_points(group=GROUP)}
    if name not in known:
        raise ConfigError.at("There is no such safety scorer", "scorer", name, f"one of {', '.join(sorted(known)) or 'none installed'}",
                             nearest(name, known) or f"install a package with an entry point of the group {GROUP}")  # fmt: skip
    loaded: Callable[[pl.DataFrame], Floats] = known[name].load()
    return loaded
