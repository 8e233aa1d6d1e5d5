"""CPU seconds of a matrix of four checkpoints on three sets: beside running its towers alone, and beside four times one checkpoint.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_matrix.py [--pictures 200] [--rounds 2]

Three sets of JPEGs in CLIP_benchmark's layout, four ViTs of 224 px, one thread. Registering the sets (indexing and hashing the tars, checking
labels, names and templates), decoding, both towers, the metrics with their intervals and the features on disk are all counted on our side.
The towers alone get pixels and texts that lie in memory. A second run asks for one more metric: no picture is decoded and no tower runs.
"""

from __future__ import annotations

import argparse
import io
import shutil
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from diptych.engine import evaluation, features
from diptych.evaluate.encode import encode_images, encode_texts
from diptych.models import clip
from diptych.workflow import matrix, phases, sets

CHECKPOINTS, SETS, CLASSES = 4, 3, 20
TARGETS = {"cold": "<= 1.3", "alone": ">= 1", "second": ">= 10"}
WIDTH, LAYERS, SIDE_PX = 192, 12, 224
ARCHITECTURE: dict[str, Any] = {
    "embed_dim": WIDTH,
    "vision_cfg": {"image_size": SIDE_PX, "patch_size": 32, "width": WIDTH, "head_width": 64, "layers": LAYERS},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": WIDTH, "heads": 3, "layers": LAYERS},
}
"""A ViT-Ti/32: smaller than what is in common use, so that decoding weighs more here than it will elsewhere."""
NAMES = [f"thing number {number}" for number in range(CLASSES)]
TEMPLATES = ["a photo of a {c}.", "a drawing of a {c}.", "a {c} seen from afar.", "a close view of one {c}."]


def write_set(folder: Path, pictures: int, seed: int) -> None:
    """JPEGs of 320 x 256 px with coarse colours and fine grain."""
    rng = np.random.default_rng(seed)
    (folder / "test").mkdir(parents=True)
    with tarfile.open(folder / "test" / "0.tar", "w") as tar:
        for number in range(pictures):
            coarse = Image.fromarray(rng.integers(0, 256, (8, 10, 3), dtype=np.uint8)).resize((320, 256), Image.Resampling.BICUBIC)
            grain = rng.integers(-12, 13, (256, 320, 1))
            buffer = io.BytesIO()
            Image.fromarray(np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
            for ending, data in (("jpg", buffer.getvalue()), ("cls", str(number % CLASSES).encode())):
                info = tarfile.TarInfo(f"s{number:07d}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    (folder / "test" / "nshards.txt").write_text("1\n")
    (folder / "classnames.txt").write_text("\n".join(NAMES) + "\n")
    (folder / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES) + "\n")


def described(home: Path, models: dict[str, Path], topk: tuple[int, ...] = (1, 5)) -> matrix.Matrix:
    """The matrix of some models on the three sets."""
    return matrix.check(
        {
            "name": "bench",
            "models": {name: str(path) for name, path in models.items()},
            "sets": {f"set{n}": {"data": {"source": "clip-benchmark", "path": str(home / f"set{n}")}} for n in range(SETS)},
            "benchmarks": [{"method": "zero-shot", "templates": "set", "topk": list(topk)}],
        }
    )


def run(described: matrix.Matrix, cache: Path) -> dict[tuple[str, str], phases.Measured]:
    """Registers and measures, as the verb does."""
    return matrix.measure(described, [sets.register(one, cache) for one in described.sets], cache / "encoded")


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of this process, and what the work gave."""
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


class Counted:
    """Counts decoded pictures while it is in force."""

    def __enter__(self) -> Counted:
        self.pictures, self._original = 0, features.View.of

        def of(view: features.View, data: bytes) -> Any:
            self.pictures += 1
            return self._original(view, data)

        features.View.of = of  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        features.View.of = self._original  # type: ignore[method-assign]


def fresh(cache: Path) -> Path:
    """An empty cache."""
    shutil.rmtree(cache, ignore_errors=True)
    return cache


def prepared(home: Path, pictures: int) -> tuple[dict[str, Path], Callable[[], None]]:
    """Sets and models on disk; and the towers alone, every picture and prompt once a checkpoint and set."""
    models = {}
    for number in range(CHECKPOINTS):
        with torch.random.fork_rng():
            torch.manual_seed(number)
            clip.save(clip.build(ARCHITECTURE), home / f"model{number}", {})
        models[f"model{number}"] = home / f"model{number}"
    pixels = []
    for number in range(SETS):
        write_set(home / f"set{number}", pictures, number)
        dataset = sets.register(described(home, models).sets[number], home / "prepared").dataset
        pixels.append(np.concatenate(list(features.pictures(dataset.read(), dataset.reader(), SIDE_PX))))
    prompts = [template.format(c=name) for name in NAMES for template in TEMPLATES]
    loaded = [clip.load(path).eval() for path in models.values()]

    def towers() -> None:
        for model in loaded:
            for image_NCHW in pixels:
                encode_images(model, [image_NCHW])
                encode_texts(model, prompts)

    return models, towers


def figures(cells: dict[tuple[str, str], phases.Measured]) -> dict[tuple[str, str], dict[str, dict[str, float]]]:
    """Every figure of every cell."""
    return {key: evaluation.figures(cell.metrics) for key, cell in sorted(cells.items())}


def main() -> None:
    """Runs all sides in turn, and prints the best of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=200, help="a set")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    best: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        models, towers = prepared(home, options.pictures)
        whole, more = described(home, models), described(home, models, (1, 3, 5))
        singles = [described(home, {name: path}) for name, path in models.items()]
        for _ in range(options.rounds):
            spent = {"towers": timed(towers)[0]}
            with Counted() as once:
                spent["cold"], together = timed(lambda: run(whole, fresh(home / "cache")))
            with Counted() as none:
                spent["second"], again = timed(lambda: run(more, home / "cache"))
            with Counted() as often:
                spent["alone"], apart = 0.0, {}
                for number, single in enumerate(singles):
                    seconds, cells = timed(lambda single=single, number=number: run(single, fresh(home / f"alone{number}")))
                    spent["alone"] += seconds
                    apart |= cells
            best = {name: min(seconds, best.get(name, np.inf)) for name, seconds in spent.items()}
    equal = figures(together) == figures(apart)
    added = all({**found, **before} == found for found, before in zip(figures(again).values(), figures(together).values(), strict=True))
    print(
        f"pictures decoded: matrix {once.pictures:,}, second run {none.pictures:,}, four times one {often.pictures:,}; figures equal: {equal and added}"
    )
    report("cold", best["cold"], best["towers"], best["cold"] / best["towers"], "over its towers alone")
    report("alone", best["cold"], best["alone"], best["alone"] / best["cold"], "four times one")
    report("second", best["second"], best["cold"], best["cold"] / best["second"], "one more metric; no picture decoded")
    if not (equal and added and once.pictures == SETS * options.pictures and none.pictures == 0):
        sys.exit("pictures were decoded more than once, or figures differ")


def report(name: str, ours: float, peer: float, ratio: float, remark: str) -> None:
    """One line a figure."""
    print(f"BENCH matrix-{name}: ours {ours:.2f} CPU s, peer {peer:.2f} CPU s, ratio {ratio:.2f}, target {TARGETS[name]} ({remark})")


if __name__ == "__main__":
    main()
