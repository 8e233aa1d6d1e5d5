"""The architectures that have a name: ours (`configs/*.json`) and open_clip's, all in open_clip's JSON format.

Ours may have two keys more. `init_std`: parameter -> standard deviation of its random weights; it is used up when a model is created. And
`captioner`: `{"condition": "tokens" | "embedding"}`, what the text decoder of a CoCa looks at (`captioner.py`); a saved model says it in a place of
its own. Neither is a part of `model_cfg`, which open_clip could not read otherwise.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from diptych.core.errors import ConfigError, nearest

OURS = Path(__file__).with_name("configs")
INIT_STD = "init_std"
CAPTIONER = "captioner"


@cache
def files() -> dict[str, Path]:
    """The JSON file of every architecture by name; open_clip's folder is read without importing it. Ours win over theirs."""
    spec = importlib.util.find_spec("open_clip")
    assert spec, "open_clip is a dependency of this package"
    assert spec.origin, "open_clip is installed as files"
    theirs = Path(spec.origin).with_name("model_configs")
    return {path.stem: path for folder in (theirs, OURS) for path in sorted(folder.glob("*.json"))}


def names() -> list[str]:
    """All architecture names, ours first. Costs milliseconds: no model code is imported."""
    return sorted(files(), key=lambda name: (files()[name].parent != OURS, name.lower()))


def find(name: str, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The configuration of an architecture, with `overrides` merged into it. Raises ConfigError with the nearest name."""
    if name not in files():
        raise ConfigError.at(
            "Unknown model", "model", name, "an architecture of ours or of open_clip, or a directory", nearest(name, files())
        )
    config: dict[str, Any] = json.loads(files()[name].read_text(encoding="utf-8"))
    return merge(config, overrides or {})


def merge(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with the values of `overrides`, mapping by mapping; neither is changed."""
    merged = dict(config)
    for key, value in overrides.items():
        inner = merged.get(key)
        merged[key] = merge(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return merged
