"""Which figures stay by what their articles say."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest

from diptych.core.errors import ConfigError, DataError
from diptych.curate.figure_filter import Config
from diptych.pairs.schema import CAPTIONS, IMAGE

ROWS: dict[str, dict[str, Any]] = {
    "good": {},
    "small": {"width": 20},
    "wordless": {"texts": []},
    "long": {"texts": ["a b c d e f g h", "a"]},
    "nc": {"meta.licence_class": "noncommercial"},
    "unknown": {"meta.licence_class": None},
    "pt": {"language": "pt"},
    "compound": {"meta.panels": 3},
    "review": {"meta.kind": "review-article"},
}


def frame() -> pl.DataFrame:
    rows = []
    for key, own in ROWS.items():
        row = {
            "width": 21,
            "texts": ["a b"],
            "meta.licence_class": "commercial",
            "language": "en",
            "meta.panels": 1,
            "meta.kind": "research",
        } | own
        image = {"shard": "s", "offset": 0, "size": 1, "width": row.pop("width"), "height": 50}
        captions = [{"text": text, "source": "alt", "score": None} for text in row.pop("texts")]
        rows.append({"key": key, "image": image, "captions": captions, **row})
    return pl.DataFrame(rows, schema_overrides={"image": IMAGE, "captions": CAPTIONS})


@pytest.mark.parametrize(
    ("values", "left"),
    [
        ({}, {"small": "picture too small", "wordless": "caption too short"}),
        ({"min_side": 1, "min_words": 0, "max_words": 7}, {"long": "caption too long"}),
        ({"min_side": 1, "min_words": 0, "licences": ["commercial"]}, {"nc": "licence not asked for", "unknown": "licence not asked for"}),
        ({"min_side": 1, "min_words": 0, "languages": ["en", "de"]}, {"pt": "language not asked for"}),
        ({"min_side": 1, "min_words": 0, "panels": "single"}, {"compound": "compound figure"}),
        ({"min_side": 1, "min_words": 0, "panels": "compound"}, {key: "single figure" for key in ROWS if key != "compound"}),
        ({"min_side": 1, "min_words": 0, "kinds": ["research"]}, {"review": "kind of article not asked for"}),
    ],
)
def test_what_leaves_and_why(values: dict[str, Any], left: dict[str, str]) -> None:
    verdict = Config.parse(values).build(0).apply(frame(), None)
    assert dict(verdict.rejected.select("key", "reason").iter_rows()) == left
    assert verdict.kept["key"].to_list() == [key for key in ROWS if key not in left]
    assert verdict.kept.columns == frame().columns


def test_scores_are_what_was_judged() -> None:
    rejected = Config.parse({"licences": ["commercial"]}).build(0).apply(frame(), None).rejected
    assert dict(rejected.select("key", "score").iter_rows()) == {"small": 20.0, "wordless": 0.0, "nc": None, "unknown": None}


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="max_words"):
        Config.parse({"min_words": 5, "max_words": 4})
    with pytest.raises(DataError, match="lack a column"):
        Config.parse({"panels": "single"}).build(0).apply(frame().drop("meta.panels"), None)
