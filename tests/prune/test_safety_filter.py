from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from safetensors.numpy import save_file

from diptych.core.errors import ConfigError, DataError
from diptych.prune import safety_filter
from diptych.prune.safety_filter import Config


def pool(scores: list[float | None]) -> pl.DataFrame:
    feature = pl.Series([[score or 0.0, 1.0] for score in scores], dtype=pl.Array(pl.Float32, 2))
    return pl.DataFrame({"key": [f"p{row}" for row in range(len(scores))], "meta.punsafe": scores, "feature": feature})


def test_a_column() -> None:
    verdict = Config(column="meta.punsafe", threshold=0.4).build(0).apply(pool([0.1, 0.4, 0.41, None]), None)
    assert verdict.kept["key"].to_list() == ["p0", "p1"]
    assert verdict.rejected["reason"].to_list() == ["unsafe", "no safety score"]
    assert verdict.rejected["score"].to_list() == [pytest.approx(0.41), None]
    kept = Config(column="meta.punsafe", threshold=0.4, unscored="keep").build(0).apply(pool([0.1, None]), None).kept
    assert kept["key"].to_list() == ["p0", "p1"]


def test_a_head_on_features(tmp_path: Path) -> None:
    path = tmp_path / "head.safetensors"
    save_file({"weight": np.array([[10.0, 0.0]], np.float32), "bias": np.array([-5.0], np.float32)}, path)
    method = Config(head=str(path), features="pixels").build(0)
    assert method.needs == {"captions", "features"}
    verdict = method.apply(pool([0.0, 0.49, 0.51, 1.0]), None)
    assert verdict.kept["key"].to_list() == ["p0", "p1"]
    np.testing.assert_allclose(verdict.rejected["score"], 1 / (1 + np.exp(-(np.array([5.1, 10]) - 5))), rtol=1e-5)


def test_wrong_heads(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not there"):
        Config(head=str(tmp_path / "no.safetensors"), features="pixels").build(0)
    two = tmp_path / "two.safetensors"
    save_file({"weight": np.zeros((2, 4), np.float32), "bias": np.zeros(2, np.float32)}, two)
    with pytest.raises(DataError, match="no linear head"):
        Config(head=str(two), features="pixels").build(0)
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    with pytest.raises(DataError, match="cannot be read"):
        Config(head=str(tmp_path / "junk.safetensors"), features="pixels").build(0)
    wide = tmp_path / "wide.safetensors"
    save_file({"weight": np.zeros(5, np.float32), "bias": np.zeros((), np.float32)}, wide)
    with pytest.raises(DataError, match="width 2"):
        Config(head=str(wide), features="pixels").build(0).apply(pool([0.1]), None)


class Point:
    name = "mine"

    def load(self):
        return lambda batch: batch["meta.punsafe"].to_numpy()[: getattr(self, "rows", None)]


def test_a_scorer_of_another_package(monkeypatch: pytest.MonkeyPatch) -> None:
    point = Point()
    monkeypatch.setattr(safety_filter, "entry_points", lambda group: [point] if group == "diptych.safety" else [])
    assert Config(scorer="mine").build(0).apply(pool([0.1, 0.9]), None).kept["key"].to_list() == ["p0"]
    with pytest.raises(ConfigError, match="mine"):
        Config(scorer="mien").build(0)
    point.rows = 1
    with pytest.raises(DataError, match="no score a pair"):
        Config(scorer="mine").build(0).apply(pool([0.1, 0.9]), None)


@pytest.mark.parametrize("values", [{}, {"column": "a", "scorer": "b"}, {"head": "x"}, {"column": "a", "features": "pixels"}])
def test_wrong_configurations(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        Config.parse(values)


def test_a_column_that_holds_no_numbers_is_explained() -> None:
    pairs = pool([0.1]).with_columns(pl.lit("x").alias("meta.nsfw"))
    with pytest.raises(DataError) as text:
        Config(column="meta.nsfw").build(0).apply(pairs, None)
    assert (text.value.problems[0].got, text.value.problems[0].fix) == ("<String>", "mend what is not a number in the source")
    with pytest.raises(DataError) as missing:
        Config(column="meta.punsave").build(0).apply(pairs, None)
    assert missing.value.problems[0].expected == "a column of numbers: meta.punsafe"
    assert missing.value.problems[0].fix == "did you mean 'meta.punsafe'?"


def test_a_missing_column_is_named() -> None:
    with pytest.raises(DataError, match=r"meta\.nsfw"):
        Config(column="meta.nsfw").build(0).apply(pool([0.1]), None)
