"""Small pictures and datasets that the tests of the pairs share."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import polars as pl
import pytest
from PIL import Image

from diptych.pairs.dataset import PairDataset
from diptych.pairs.manifest import PhaseRecord
from diptych.pairs.schema import PAIRS
from diptych.pairs.shards import ShardWriter
from diptych.pairs.write import DatasetWriter


def picture(
    colour: tuple[int, ...] = (200, 30, 40), size: tuple[int, int] = (12, 8), mode: str = "RGB", format: str = "PNG", **options: object
) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, colour if len(colour) > 1 else colour[0]).save(buffer, format, **options)
    return buffer.getvalue()


def rows(places: Sequence[dict[str, object]], keys: Sequence[str], **extra: Sequence[object]) -> pl.DataFrame:
    images = [{**place, "width": 12, "height": 8} for place in places]
    captions = [[{"text": f"a picture of {key}", "source": "alt", "score": None}] for key in keys]
    frame = pl.DataFrame({"key": keys, "image": images, "captions": captions, "split": ["train"] * len(keys)}, schema=PAIRS)
    return frame.with_columns(pl.Series(name, values) for name, values in extra.items())


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., PairDataset]:
    """`make(name, keys, ...)`: a dataset of one table, with a picture a key, below the test's folder."""

    def build(name: str, keys: Sequence[str], seed: int = 0, **extra: Sequence[object]) -> PairDataset:
        with DatasetWriter(tmp_path / name, PhaseRecord(phase="ingest", seed=seed), pairs_in=len(keys)) as writer:
            shards = ShardWriter(writer.shards_folder, f"images-{seed}")
            places = [shards.add(key, "png", picture((seed, index % 256, 7))) for index, key in enumerate(keys)]
            writer.add_shards(shards.done())
            writer.add(rows(places, keys, **extra), None)
            return writer.finish()

    return build
