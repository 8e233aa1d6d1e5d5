"""The best checkpoint of a run by a figure of its log. Only checkpoints by steps compete, so the choice does not depend on the clock."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from diptych.core.config import Config
from diptych.core.errors import ConfigError, nearest

VALIDATION = "val_loss"


class KeepBest(Config):
    """Keeps the checkpoint at which a smoothed figure was best, and makes the model of it."""

    metric: str = Field(default="loss", description="a figure of steps.jsonl, e.g. loss, or val_loss with validate_every_steps")
    mode: Literal["min", "max"] = Field(default="min", description="which values are better")
    smoothing: float = Field(default=0.9, ge=0, lt=1, description="share of the running mean that a record keeps; 0: the last value counts")


def follow(best: dict[str, float], record: Mapping[str, Any], keep: KeepBest) -> None:
    """Takes a record of the log into the running mean. Raises ConfigError if the log has no such figure."""
    if keep.metric not in record:
        if keep.metric == VALIDATION:
            return
        fix = nearest(keep.metric, record)
        raise ConfigError.at("The log has no such figure", "keep_best.metric", keep.metric, f"one of {', '.join(record)}", fix)
    best["sum"] = keep.smoothing * best.get("sum", 0.0) + (1 - keep.smoothing) * float(record[keep.metric])
    best["weight"] = keep.smoothing * best.get("weight", 0.0) + (1 - keep.smoothing)


def compete(best: dict[str, float], step: int, keep: KeepBest) -> bool:
    """Whether the checkpoint of this step is the best so far; if so, notes it."""
    if "weight" not in best:
        return False
    value = best["sum"] / best["weight"]
    if "value" in best and (value >= best["value"] if keep.mode == "min" else value <= best["value"]):
        return False
    best |= {"value": value, "step": step}
    return True
