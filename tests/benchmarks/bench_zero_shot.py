"""CPU seconds of a zero-shot evaluation: ours beside CLIP_benchmark 1.6.2, the same weights, pictures and prompts, one thread.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_zero_shot.py [--pictures 2000] [--rounds 2]

50 classes x 80 templates, 2,000 pictures of 224 px in memory, a ViT of width 128. The peer is installed without its dependencies into a
cache folder ($DIPTYCH_BENCH_CACHE, else ~/.cache/diptych-bench); its `evaluate` needs NumPy < 2.4, the functions it is made of do not.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from PIL import Image

from diptych.evaluate.encode import ModelEncoder
from diptych.evaluate.zero_shot import Config, logits
from diptych.models import clip
from diptych.pairs.schema import CAPTIONS

PEER = "clip-benchmark==1.6.2"
TARGETS = {"zero-shot-text": 8.0, "zero-shot-total": 2.5}

WIDTH, LAYERS, SIDE_PX = 128, 6, 224
ARCHITECTURE: dict[str, Any] = {
    "embed_dim": WIDTH,
    "vision_cfg": {"image_size": SIDE_PX, "patch_size": 32, "width": WIDTH, "head_width": 64, "layers": LAYERS},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": WIDTH, "heads": 2, "layers": LAYERS},
}

NAMES = """apple, armchair, banana, bicycle, blue whale, brown bear, camera, cargo ship, castle, chess board, clock,
coffee mug, crow, daisy, drum, elephant, espresso, fire truck, fountain pen, fox, frying pan, giraffe,
goldfish, grand piano, guitar, hammer, hot air balloon, jellyfish, kettle, lighthouse, lion, mailbox, mountain
goat, mushroom, owl, parachute, pineapple, rain coat, red wine, sea lion, ski, snail, stone wall, sunflower,
teapot, traffic light, umbrella, violin, water tower, zebra""".replace("\n", " ").split(", ")
MEDIA = """photo, drawing, painting, sketch, sculpture, picture, close photo, dark photo, bright photo, blurred photo,
small picture, large print, cartoon, rendering, embroidery, old photo""".replace("\n", " ").split(", ")
FORMS = ("a {} of a #.", "a {} of the #.", "one {} with many #.", "a {} that shows the clean #.", "the {} of my #.")
TEMPLATES = [form.replace("{}", medium).replace("#", "{}") for medium in MEDIA for form in FORMS]


def peer(cache: Path) -> ModuleType:
    """The peer's functions, from the cache folder; installs them there on first use."""
    site = cache / PEER
    if not (site / "clip_benchmark").is_dir():
        builder = cache / "pip"
        venv.create(builder, with_pip=True)
        command = [str(builder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), PEER]
        subprocess.run(command, check=True)
    sys.path.append(str(site))
    return importlib.import_module("clip_benchmark.metrics.zeroshot_classification")


def cpu_s(work: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of this process, and what the work gave."""
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def pictures(count: int) -> list[Image.Image]:
    """Noise with low frequencies, so that features differ."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (count, 7, 7, 3), dtype=np.uint8)
    return [Image.fromarray(picture).resize((SIDE_PX, SIDE_PX), Image.Resampling.BILINEAR) for picture in coarse]


class Held(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """What the peer reads: pictures in memory, prepared as open_clip prepares them."""

    def __init__(self, images: list[Image.Image], labels: NDArray[np.int64], transform: Callable[[Image.Image], torch.Tensor]) -> None:
        self.images, self.labels, self.transform = images, labels, transform
        self.classes = NAMES

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.images[row]), int(self.labels[row])


def main() -> None:
    """Runs both sides in turn and prints the best of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    theirs = peer(Path(os.environ.get("DIPTYCH_BENCH_CACHE", Path.home() / ".cache" / "diptych-bench")))
    torch.set_num_threads(1)

    import open_clip
    from open_clip.transform import image_transform

    torch.manual_seed(0)
    reference = open_clip.CLIP(**ARCHITECTURE).eval()
    model = clip.build(ARCHITECTURE).eval()
    model.clip.load_state_dict(reference.state_dict())
    images, labels = pictures(options.pictures), np.arange(options.pictures) % len(NAMES)
    loader = torch.utils.data.DataLoader(Held(images, labels, image_transform(SIDE_PX, is_train=False)), batch_size=64)
    tokenizer = open_clip.SimpleTokenizer()
    pairs = pl.DataFrame(
        {
            "key": [f"{row}" for row in range(len(images))],
            "row": range(len(images)),
            "captions": [[]] * len(images),
            "split": ["test"] * len(images),
            "label": labels,
            "label_name": [NAMES[label] for label in labels],
        },
        schema_overrides={"captions": CAPTIONS},
    )

    def load_pixels(rows: pl.DataFrame) -> NDArray[np.uint8]:
        return np.ascontiguousarray(np.stack([np.asarray(images[row]) for row in rows["row"]]).transpose(0, 3, 1, 2))

    encoder = ModelEncoder(model, load_pixels)
    benchmark = Config(templates=tuple(TEMPLATES)).build()
    prompts = [template.replace("{}", "{c}") for template in TEMPLATES]

    def their_text() -> torch.Tensor:
        return theirs.zero_shot_classifier(reference, tokenizer, NAMES, prompts, "cpu", amp=False)

    def their_total() -> NDArray[np.int64]:
        logits, _ = theirs.run_classification(reference, their_text(), loader, "cpu", amp=False)
        return logits.argmax(dim=1).numpy()

    def our_text() -> NDArray[np.float32]:
        return benchmark.weights(encoder, NAMES)[0]

    def our_total() -> NDArray[np.bool_]:
        """The whole benchmark, intervals included; its hits."""
        return benchmark.run(encoder, pairs, "bench", seed=0)[0].per_example > 0

    sides: dict[str, Callable[[], Any]] = {
        "our text": our_text,
        "their text": their_text,
        "our total": our_total,
        "their total": their_total,
    }
    best: dict[str, float] = {}
    result: dict[str, Any] = {}
    for _ in range(options.rounds):
        for name, work in sides.items():
            spent, result[name] = cpu_s(work)
            best[name] = min(spent, best.get(name, np.inf))
    predicted = logits(encoder.images(pairs), result["our text"]).argmax(axis=1)
    gap = float(np.abs(result["our text"] - result["their text"].numpy()).max())
    equal = bool((predicted == result["their total"]).all() and (result["our total"] == (result["their total"] == labels)).all())
    print(f"weights differ by at most {gap:.1e}, {len(np.unique(predicted))} classes predicted, predictions equal: {equal}")
    for part in ("text", "total"):
        ours, peers, target = best[f"our {part}"], best[f"their {part}"], TARGETS[f"zero-shot-{part}"]
        print(f"BENCH zero-shot-{part}: ours {ours:.2f} CPU s, peer {peers:.2f} CPU s, ratio {peers / ours:.1f}, target {target}")
    if not equal:
        sys.exit("the two sides do not predict the same classes")


if __name__ == "__main__":
    main()
