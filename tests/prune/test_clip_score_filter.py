from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from diptych.core.errors import ConfigError, DataError
from diptych.prune.clip_score_filter import COLUMN, Config


def pool(angles: list[float | None]) -> pl.DataFrame:
    """Pairs whose picture and caption lie at these angles; None: no caption."""
    text = [[0.0, 0.0] if angle is None else [np.cos(angle), np.sin(angle)] for angle in angles]
    kind = pl.Array(pl.Float32, 2)
    columns = {"feature": pl.Series([[1.0, 0.0]] * len(angles), dtype=kind), "text_feature": pl.Series(text, dtype=kind)}
    return pl.DataFrame({"key": [f"p{row}" for row in range(len(angles))], **columns})


def test_threshold(run_pass) -> None:
    verdict = Config(threshold=0.5).build(0).apply(pool([0.1, 1.0, 1.2, None]), None)
    assert verdict.kept["key"].to_list() == ["p0", "p1"]
    np.testing.assert_allclose(verdict.kept[COLUMN], np.cos([0.1, 1.0]), rtol=1e-6)
    assert verdict.rejected["reason"].to_list() == ["low CLIP score", "no CLIP score"]
    assert verdict.rejected["score"][0] == pytest.approx(np.cos(1.2), abs=1e-6)


def test_share(cut) -> None:
    angles = np.random.default_rng(0).uniform(0, 3, 400).tolist()
    method = Config(keep=0.25).build(0)
    state = None
    for fold in method.folds():
        left, right = (fold.map(batch, state) for batch in cut(pool(angles), [150], 2))
        state = fold.finish(fold.merge(left, right), state)
    kept = method.apply(pool(angles), state).kept
    assert kept["key"].to_list() == [f"p{row}" for row in sorted(np.argsort(angles)[:100])]
    assert method.report(state)["scored"] == 400
    assert method.state_bytes(10**9, 512) < 2**21


def test_refusals() -> None:
    with pytest.raises(DataError, match="text_feature"):
        Config(threshold=0.1).build(0).apply(pool([0.0]).drop("text_feature"), None)
    for wrong in ({"threshold": 0.3, "features": "pixels"}, {}, {"threshold": 0.3, "keep": 0.2}):
        with pytest.raises(ConfigError):
            Config.parse(wrong)
    assert Config(threshold=0.3).build(0).needs == {"captions", "features", "text features"}
