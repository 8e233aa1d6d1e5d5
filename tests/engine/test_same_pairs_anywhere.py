"""Curation and pruning keep the same pairs in one process, on two workers and on a cluster of three nodes, however tars are named and filled."""

from __future__ import annotations

import io
import random
import shutil
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diptych.core import catalogue
from diptych.core.config import Config
from diptych.engine import passes
from diptych.engine.features import FeatureSpec
from diptych.engine.progress import Progress
from diptych.engine.session import Session
from diptych.pairs.dataset import PairDataset
from diptych.pairs.ingest import ingest_all

PAIRS, TARS = 400, 4
CURATE: tuple[dict[str, Any], ...] = ({"method": "metaclip", "threshold": 25},)
PRUNE: tuple[dict[str, Any], ...] = (
    {"method": "semantic-dedup", "epsilon": 0.02, "clusters": 5},
    {"method": "concept-pruning", "keep": 0.7, "clusters": 4},
)
WORDS = ("dog", "dog", "dog", "cat", "cat", "bicycle", "lighthouse")

Sample = tuple[str, bytes, str]


def samples() -> list[Sample]:
    """Key, picture and caption of every pair; every fifth picture is a near copy of the one before, captions name few concepts often."""
    rng = np.random.default_rng(0)
    found, picture = [], np.zeros((8, 8, 3), dtype=np.uint8)
    for number in range(PAIRS):
        if number % 5:
            picture = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
        else:
            picture = np.clip(picture.astype(np.int64) + rng.integers(-2, 3, picture.shape), 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "PNG")
        found.append((f"pair-{number:04d}", file.getvalue(), f"a {WORDS[number % len(WORDS)]} number {number}"))
    return found


def pack(folder: Path, names: Sequence[str], found: Sequence[Sample]) -> Path:
    """The samples in tars of these names, about as many in each."""
    folder.mkdir()
    for index, name in enumerate(names):
        with tarfile.open(folder / f"{name}.tar", "w") as tar:
            for key, picture, caption in found[index :: len(names)]:
                for ending, data in (("png", picture), ("txt", caption.encode())):
                    info = tarfile.TarInfo(f"{key}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return folder


def config(values: dict[str, Any]) -> Config:
    return catalogue.config_class(catalogue.find(str(values["method"]))).parse(values)


def kept(tars: Path, out: Path, session: Session) -> PairDataset:
    """What ingest, curation and pruning leave of a folder of tars."""
    source = config({"method": "webdataset", "path": f"{tars}/*.tar"}).build()  # type: ignore[attr-defined]
    dataset = ingest_all(source, out / "ingest", map=session.map, version="0")
    assert len(dataset.tables()) == TARS
    for phase, chain in (("curate", CURATE), ("prune", PRUNE)):
        dataset = passes.run(
            dataset, [config(values) for values in chain], phase, out / phase, seed=3, session=session, scratch=out / "scratch", code="c",
            version="0", progress=Progress(quiet=True), feature_specs={"pixels": FeatureSpec(name="pixels")},
        )  # fmt: skip
    return dataset


def keys(dataset: PairDataset) -> list[str]:
    return sorted(dataset.read(["key"])["key"])


def reasons(dataset: PairDataset) -> dict[str, str]:
    rejects = dataset.rejects()
    return dict(zip(rejects["key"].to_list(), rejects["reason"].to_list(), strict=True))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The pairs in tars in order, and the same pairs shuffled over tars of other names."""
    root, found = tmp_path_factory.mktemp("tars"), samples()
    shuffled = random.Random(1).sample(found, len(found))
    return (
        pack(root / "ordered", [f"{index:05d}" for index in range(TARS)], found),
        pack(root / "shuffled", ["zebra", "10", "9", "apple"], shuffled),
    )


@pytest.fixture(scope="module")
def expected(folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[PairDataset, PairDataset]:
    """What one process makes of both."""
    ordered, shuffled = (kept(tars, tmp_path_factory.mktemp("here") / "run", Session(in_process=True)) for tars in folders)
    return ordered, shuffled


def test_names_and_order_of_tars_change_no_verdict(expected: tuple[PairDataset, PairDataset]) -> None:
    ordered, shuffled = expected
    assert keys(ordered) == keys(shuffled)
    assert reasons(ordered) == reasons(shuffled)
    assert set(Counter(reasons(ordered).values())) == {"near copy", "over the concept's budget"}, "every method had something to do"
    assert len(ordered) < ordered.manifest.ledger.pairs_in < PAIRS
    assert ordered.digest != shuffled.digest, "tables say where the pictures lie"


@pytest.mark.ray
def test_two_workers_write_the_same_dataset(folders: tuple[Path, Path], expected: tuple[PairDataset, PairDataset], tmp_path: Path) -> None:
    with Session(cores=2) as session:
        assert kept(folders[0], tmp_path / "run", session).digest == expected[0].digest


@pytest.fixture
def three_nodes() -> Iterator[str]:
    """The address of a cluster of three nodes on loopback, each with one core and object store of its own, in a folder of their own."""
    from ray.cluster_utils import Cluster

    folder = tempfile.mkdtemp(prefix="dc")  # a short name: Ray's sockets lie below it
    node = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "temp_dir": folder, "include_dashboard": False})
    try:
        for _ in range(2):
            cluster.add_node(**node)
        cluster.wait_for_nodes(timeout=120)
        yield cluster.address
    finally:
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_cluster_of_three_nodes_keeps_the_same_pairs_of_renamed_and_shuffled_tars(
    folders: tuple[Path, Path], expected: tuple[PairDataset, PairDataset], tmp_path: Path, three_nodes: str
) -> None:
    with Session(address=three_nodes) as session:
        assert len([node for node in session.ray().nodes() if node["Alive"]]) == session.parallelism == 3
        shuffled = kept(folders[1], tmp_path / "shuffled", session)
    assert shuffled.digest == expected[1].digest
    assert keys(shuffled) == keys(expected[0])
