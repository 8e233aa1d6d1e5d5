"""Small stand-ins that need no open_clip: a dataset of drawings, a dual encoder, an objective."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import polars as pl
import torch
from PIL import Image, ImageDraw
from torch import nn

from diptych.core.points import Encoded
from diptych.pairs.schema import PAIRS

COLOURS = ("red", "green", "blue", "gold", "black")
SHAPES = ("disc", "box")


def drawing(row: int, side: int = 24) -> Image.Image:
    """A coloured shape whose place depends on the row."""
    shift = row % 5
    image = Image.new("RGB", (side, side + 4), "white")
    box = (2 + shift, 3, side - 8 + shift, side - 4)
    draw = ImageDraw.Draw(image)
    (draw.ellipse if SHAPES[row % 2] == "disc" else draw.rectangle)(box, fill=COLOURS[row % 5])
    return image


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


class MemoryReader:
    """Pictures in memory, behind the interface of a shard reader; counts what is read."""

    def __init__(self, pictures: Sequence[bytes]) -> None:
        self.data = b"".join(pictures)
        self.reads = 0

    def read(self, shard: str, offset: int, size: int) -> bytes:
        assert shard == "s"
        self.reads += 1
        return self.data[offset : offset + size]


def table(images: Sequence[Image.Image], pictures: Sequence[bytes], captions: Sequence[Sequence[str]]) -> pl.DataFrame:
    offsets = np.cumsum([0, *map(len, pictures)])
    rows = [
        {
            "key": f"pair-{row}",
            "image": {"shard": "s", "offset": int(offsets[row]), "size": len(pictures[row]), "width": image.width, "height": image.height},
            "captions": [{"text": text, "source": "alt", "score": None} for text in captions[row]],
            "split": "train",
        }
        for row, image in enumerate(images)
    ]
    frame = pl.DataFrame(rows, schema=PAIRS)
    return frame.with_columns(label=pl.Series([row % 10 for row in range(len(rows))]))


def drawings(rows: int) -> tuple[pl.DataFrame, MemoryReader]:
    images = [drawing(row) for row in range(rows)]
    pictures = [encoded(image) for image in images]
    captions = [[f"a {COLOURS[row % 5]} {SHAPES[row % 2]}", f"number {row} of many drawings"] for row in range(rows)]
    return table(images, pictures, captions), MemoryReader(pictures)


def write_dataset(root: Path, rows: int, extra: Mapping[str, pl.Expr] | None = None) -> None:
    """A pair dataset of drawings on disk, with `extra` columns."""
    from diptych.pairs.manifest import PhaseRecord, ShardEntry
    from diptych.pairs.write import DatasetWriter

    frame, reader = drawings(rows)
    frame = frame.with_columns(**(extra or {}))
    shard = root.parent / "s.tar"  # readers look at (offset, size) only
    shard.parent.mkdir(parents=True, exist_ok=True)
    shard.write_bytes(reader.data)
    shards = {"s": ShardEntry(uri=str(shard), size_bytes=len(reader.data), sha256=None)}
    with DatasetWriter(root, PhaseRecord(phase="ingest"), shards=shards, pairs_in=rows) as writer:
        writer.add(frame)
        writer.finish()


class WordTokenizer:
    """Words to ids by length and first letter; cut to the longest, as the real one."""

    def encode_cut(self, texts: Sequence[str]) -> np.ndarray:
        ids = [[1 + (ord(word[0]) + 7 * len(word)) % 60 for word in text.split()] for text in texts]
        text_NL = np.zeros((len(ids), max(map(len, ids))), dtype=np.int64)
        for row, words in enumerate(ids):
            text_NL[row, : len(words)] = words
        return text_NL


class TinyEncoder(nn.Module):
    """A linear image tower and a bag of words, with dropout so that random draws matter."""

    image_size = 8
    tokenizer = WordTokenizer()

    def __init__(self, seed: int = 0, dropout: float = 0.1) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.image = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 32), nn.GELU(), nn.Dropout(dropout), nn.Linear(32, 16))
        self.words = nn.Embedding(64, 16)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.calls = 0

    def encode_image(self, image_NCHW: torch.Tensor, normalize: bool = True) -> torch.Tensor:
        self.calls += 1
        feature_ND = self.image(image_NCHW.to(self.words.weight.dtype) / 255)
        return nn.functional.normalize(feature_ND, dim=-1) if normalize else feature_ND

    def encode_text(self, text_NL: torch.Tensor, normalize: bool = True) -> torch.Tensor:
        feature_ND = (self.words(text_NL) * (text_NL > 0).unsqueeze(-1)).sum(dim=1)
        return nn.functional.normalize(feature_ND, dim=-1) if normalize else feature_ND


class TinyLoss(nn.Module):
    """The symmetric cross-entropy over the pairs of one rank, with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, encoded: Encoded) -> dict[str, torch.Tensor]:
        logits = encoded.logit_scale * encoded.image_ND @ encoded.text_ND.T + self.bias * torch.eye(len(encoded.image_ND))
        label = torch.arange(len(logits))
        loss = (nn.functional.cross_entropy(logits, label) + nn.functional.cross_entropy(logits.T, label)) / 2
        return {"loss": loss, "accuracy": (logits.argmax(dim=1) == label).float().mean()}
