"""CPU time of the training loader beside open_clip_train's: read from a tar, decode, random crop to 224, tokenise, batch.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_loader.py

Photographs are variants of the two that scikit-learn ships: cut, mirrored, tinted, at 640 x 480 and at short side 256, JPEG
quality 90. The peer is `get_wds_dataset` (WebDataset, workers=0) with open_clip's training transform and tokenizer;
ours decodes every picture anew (`cache_bytes=0`) in line. Both draw a crop of 0.9 to 1.0 of the area.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from PIL import Image

from diptych.models.tokenizer import Tokenizer
from diptych.pairs.schema import PAIRS
from diptych.pairs.shards import ShardReader
from diptych.train.config import TrainConfig
from diptych.train.loader import PairLoader

PHOTOS, BATCH, SIZE, ROUNDS = 192, 64, 224, 5
SETS = {"full": (640, 480, 2.2), "s256": (341, 256, 3.5)}
WORDS = (
    "a",
    "an",
    "old",
    "red",
    "blue",
    "small",
    "large",
    "wooden",
    "dog",
    "flower",
    "temple",
    "roof",
    "sky",
    "under",
    "photo",
    "of",
    "the",
)


def photographs(width: int, height: int) -> Iterator[Image.Image]:
    """Variants of scikit-learn's two photographs; sharp detail like a camera's, no two alike."""
    from sklearn.datasets import load_sample_images

    sources = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    rng = np.random.default_rng(0)
    for index in range(PHOTOS):
        source = sources[index % 2]
        w = int(source.width * rng.uniform(0.75, 1.0))
        h = min(source.height, w * 3 // 4)
        left, top = rng.integers(0, source.width - w + 1), rng.integers(0, source.height - h + 1)
        part = source.crop((left, top, left + w, top + h)).resize((width, height), Image.Resampling.LANCZOS)
        if rng.random() < 0.5:
            part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        tinted = np.asarray(part) * rng.uniform(0.8, 1.15, 3)
        yield Image.fromarray(np.clip(tinted, 0, 255).astype(np.uint8))


def write_shard(path: Path, width: int, height: int) -> pl.DataFrame:
    """A WebDataset tar, and the pair table that points into it."""
    rng, rows = np.random.default_rng(1), []
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for index, photo in enumerate(photographs(width, height)):
            buffer = io.BytesIO()
            photo.save(buffer, "JPEG", quality=90)
            caption = " ".join(rng.choice(WORDS, rng.integers(8, 18)))
            for name, data in ((f"{index:06d}.jpg", buffer.getvalue()), (f"{index:06d}.txt", caption.encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                offset = tar.offset + tarfile.BLOCKSIZE
                tar.addfile(info, io.BytesIO(data))
                if name.endswith("jpg"):
                    image = {"shard": "s", "offset": offset, "size": len(data), "width": width, "height": height}
            rows.append(
                {"key": f"{index}", "image": image, "captions": [{"text": caption, "source": "alt", "score": None}], "split": "train"}
            )
    return pl.DataFrame(rows, schema=PAIRS)


def peer_loader(path: Path) -> Any:
    """open_clip_train's loader as its `main` makes it."""
    import open_clip
    from open_clip.transform import image_transform
    from open_clip_train.data import get_wds_dataset

    args = argparse.Namespace(
        train_data=str(path), train_num_samples=PHOTOS, dataset_resampled=False, train_data_upsampling_factors=None,
        seed=0, batch_size=BATCH, world_size=1, workers=0,
    )  # fmt: skip
    return get_wds_dataset(args, image_transform(SIZE, is_train=True), True, tokenizer=open_clip.get_tokenizer("ViT-B-32")).dataloader


def our_loader(path: Path, frame: pl.DataFrame) -> PairLoader:
    config = TrainConfig.parse({"epochs": 1, "batch_size": BATCH, "cache_bytes": 0})
    return PairLoader(frame, ShardReader({"s": str(path)}), Tokenizer(), SIZE, config, seed=0)


def check(ours: list[dict[str, torch.Tensor]], peer: list[Any], frame: pl.DataFrame) -> None:
    """The same captions, id for id, and pictures of the same brightness: both saw each pair once, uncut by more than the crop."""
    texts = [text for batch in ours for text in _full(batch["text_NL"])]
    assert sorted(texts) == sorted(tuple(row) for _, text_NL in peer for row in text_NL.tolist())
    assert sorted(row for batch in ours for row in batch["row_N"].tolist()) == list(range(frame.height))
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    our_level = torch.cat([batch["image_NCHW"] for batch in ours]).float().mean(dim=(0, 2, 3)) / 255
    peer_level = torch.cat([image for image, _ in peer]).mean(dim=(0, 2, 3)) * std + mean
    torch.testing.assert_close(our_level, peer_level, atol=0.01, rtol=0)


def _full(text_NL: torch.Tensor) -> list[tuple[int, ...]]:
    return [tuple(row) for row in torch.nn.functional.pad(text_NL, (0, 77 - text_NL.shape[1])).tolist()]


def measure(name: str, folder: Path) -> None:
    """One set of photographs; prints one line."""
    width, height, target = SETS[name]
    path = folder / f"{name}.tar"
    frame = write_shard(path, width, height)
    (folder / "sizes.json").write_text(json.dumps({path.name: PHOTOS}))
    ours, peer = our_loader(path, frame), peer_loader(path)
    best = {"ours": float("inf"), "peer": float("inf")}
    for round in range(ROUNDS):
        started = time.process_time()
        our_batches = [batch.tensors for batch in ours.batches(round * ours.steps_per_epoch, (round + 1) * ours.steps_per_epoch)]
        between = time.process_time()
        peer_batches = list(peer)
        best["ours"], best["peer"] = min(best["ours"], between - started), min(best["peer"], time.process_time() - between)
    check(our_batches, peer_batches, frame)
    our_rate, peer_rate = (PHOTOS / best[side] for side in ("ours", "peer"))
    print(
        f"BENCH loader-{name}: ours {our_rate:.0f} pictures/CPU s, peer {peer_rate:.0f} pictures/CPU s, "
        f"ratio {our_rate / peer_rate:.2f}, target {target}"
    )


def main() -> None:
    """Both sets."""
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as folder:
        for name in SETS:
            measure(name, Path(folder))


if __name__ == "__main__":
    main()
