"""Evaluation sets in CLIP_benchmark's layout, written small for tests."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

TEMPLATES = ("a photo of a {c}.", "{c}, a pet")


def png(seed: int, side_px: int = 24) -> bytes:
    """A picture of its own for every seed, with coarse shapes."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((side_px, side_px), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


def write_set(
    folder: Path,
    *,
    labels: Sequence[int | str | None] = (),
    names: Sequence[str] = (),
    captions: Sequence[str] = (),
    templates: Sequence[str] | None = TEMPLATES,
    split: str = "test",
    shards: int = 1,
    count_on: bool = True,
    seed: int = 0,
) -> Path:
    """A classification set with these labels, or a retrieval set with these caption files, cut into tars.

    With `count_on`, samples are numbered through all tars, as CLIP_benchmark's exporter does; else each tar counts from zero.
    """
    (folder / split).mkdir(parents=True)
    members = [[("cls", str(label).encode())] if label is not None else [] for label in labels] or [
        [("txt", text.encode())] for text in captions
    ]
    size = -(-len(members) // shards)
    for shard in range(shards):
        with tarfile.open(folder / split / f"{shard}.tar", "w") as tar:
            for place, sidecars in enumerate(members[shard * size : (shard + 1) * size]):
                number = shard * size + place
                own = [("png", png(seed * 1000 + number + (500 if split == "train" else 0))), *sidecars]
                for ending, data in own:
                    info = tarfile.TarInfo(f"s{number if count_on else place:07d}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    (folder / split / "nshards.txt").write_text(f"{shards}\n")
    if captions:
        (folder / "dataset_type.txt").write_text("retrieval\n")
    else:
        (folder / "classnames.txt").write_text("".join(f"{name}\n" for name in names))
    if templates is not None and not captions:
        (folder / "zeroshot_classification_templates.txt").write_text("".join(f"{line}\n" for line in templates))
    return folder
