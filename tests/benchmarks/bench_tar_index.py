"""How fast the members of a tar are found, beside the standard library's `tarfile`.

python tests/benchmarks/bench_tar_index.py
"""

from __future__ import annotations

import io
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from diptych.pairs.tar import index_tar

SAMPLES, ROUNDS, TARGET = 10_000, 5, 2.0

Index = list[tuple[str, int, int]]


def build(path: Path) -> None:
    """A tar of pictures, captions and metadata, as img2dataset writes them."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(SAMPLES):
            for ending, size in (("jpg", 4000), ("txt", 60), ("json", 400)):
                info = tarfile.TarInfo(f"{number:09d}.{ending}")
                info.size = size
                tar.addfile(info, io.BytesIO(bytes(size)))


def ours(path: Path) -> Index:
    """Our index."""
    return [(member.name, member.offset, member.size) for member in index_tar(path)]


def peer(path: Path) -> Index:
    """The standard library's."""
    with tarfile.open(path, "r:") as tar:
        return [(member.name, member.offset_data, member.size) for member in tar]


def cpu_s(work: Callable[[Path], Index], path: Path) -> float:
    """CPU seconds of one run."""
    start = time.process_time()
    work(path)
    return time.process_time() - start


def main() -> None:
    """Prints one line; fails if the two indexes differ."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.tar"
        build(path)
        assert ours(path) == peer(path)
        rounds = [(cpu_s(ours, path), cpu_s(peer, path)) for _ in range(ROUNDS)]
    mine, theirs = (min(values) for values in zip(*rounds, strict=True))
    print(f"BENCH tar_index: ours {mine:.3f} s, peer {theirs:.3f} s, ratio {theirs / mine:.2f}, target {TARGET}")


if __name__ == "__main__":
    main()
