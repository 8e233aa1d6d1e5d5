"""What a plan reads to foretell a phase: little of a large dataset, spread over it, the same pairs every time."""

from __future__ import annotations

import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
from tests.workflow.conftest import WORKFLOW

from diptych.core import catalogue
from diptych.core.chance import key_hashes
from diptych.core.points import Labour
from diptych.engine import features
from diptych.engine.pipeline import StageState
from diptych.pairs.dataset import PairDataset
from diptych.pairs.manifest import Ledger, Left, PhaseRecord, ShardEntry
from diptych.pairs.schema import CAPTIONS, IMAGE
from diptych.pairs.write import DatasetWriter
from diptych.workflow import costs, plan, probes, spec
from diptych.workflow.spec import Workflow


def dataset(folder: Path, tables: int, rows: int) -> PairDataset:
    tarfile.open(folder / "s.tar", "w").close()
    shards = {"s": ShardEntry(uri=str(folder / "s.tar"), size_bytes=(folder / "s.tar").stat().st_size)}
    record = PhaseRecord(phase="ingest", methods=(), seed=0, code="test", version="0")
    with DatasetWriter(folder / "pairs", record, shards=shards, pairs_in=None) as writer:
        for table in range(tables):
            image = pl.struct(shard=pl.lit("s"), offset=pl.lit(512), size=pl.lit(9), width=pl.lit(1), height=pl.lit(1)).cast(IMAGE)
            caption = pl.struct(text=pl.lit("a dog"), source=pl.lit("alt"), score=pl.lit(None, pl.Float32))
            splits = ["test" if row % 4 == 3 else "train" for row in range(rows)]
            frame = pl.DataFrame({"key": [f"{table}-{row}" for row in range(rows)], "split": splits})
            writer.add(frame.with_columns(image=image, captions=pl.concat_list(caption).cast(CAPTIONS)))
        return writer.finish()


def test_a_probe_takes_the_first_training_pairs_by_key_hash(tmp_path: Path) -> None:
    pairs = dataset(tmp_path, tables=3, rows=20)
    train = pairs.read().filter(pl.col("split") == "train")["key"]
    first = train[key_hashes(train).argsort()[:10]]
    assert probes.few(pairs, tmp_path / "few", 10).read(["key"])["key"].to_list() == first.to_list()


def test_a_probe_reads_few_of_many_tables_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = dataset(tmp_path, tables=50, rows=4)
    read: list[int] = []

    def table(self: PairDataset, index: int, own: object = PairDataset.table) -> pl.DataFrame:
        read.append(index)
        return own(self, index)  # type: ignore[operator, no-any-return]

    monkeypatch.setattr(PairDataset, "table", table)
    monkeypatch.setattr(PairDataset, "read", lambda *_: pytest.fail("all pairs in memory"))
    assert len(probes.few(pairs, tmp_path / "few", 1000)) == 3 * len(read)
    assert len(read) <= probes.PROBE_TABLES
    assert read[-1] >= 45


@pytest.mark.parametrize(
    ("method", "why"),
    [
        ({"method": "laclip", "rewriter": "endpoint", "endpoint": {"base_url": "http://127.0.0.1:9/v1", "model": "m"}}, "a server"),
        (
            {"method": "veclip", "captioner": "endpoint", "vision": {"base_url": "http://127.0.0.1:9", "model": "m", "api": "chat"}},
            "a server",
        ),
        ({"method": "cfg-captioning", "captioner": "endpoint", "endpoint": {"base_url": "http://127.0.0.1:9", "model": "m"}}, "a server"),
        ({"method": "clip-score-filter", "keep": 0.5}, "a scout"),
    ],
)
def test_a_probe_asks_no_server_and_trains_no_scout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: dict[str, object], why: str
) -> None:
    pairs = dataset(tmp_path, tables=1, rows=8)
    monkeypatch.setattr(probes, "_run", lambda *_: pytest.fail("probed"))
    config = catalogue.config_class(catalogue.find(str(method["method"]))).parse(method)
    store = SimpleNamespace(workflow=SimpleNamespace(methods=lambda _: (config,)))
    cost = costs._pass("caption", store, pairs)  # type: ignore[arg-type]
    assert (cost.rows, cost.seconds) == (6, None)
    assert cost.unmeasured.startswith(why)
    state = StageState("caption", ("never ran",))
    named = SimpleNamespace(name="n", workflow=SimpleNamespace(digest="sha256:0"))
    lines = [plan.Line("caption", state, cost), plan.Line("train", state, costs.Cost())]
    said = plan.text(named, lines).splitlines()[-1]  # type: ignore[arg-type]
    assert said == f"  0.0 s expected; without caption: {cost.unmeasured}; without train: nothing to measure on yet"


@pytest.mark.parametrize(
    ("rows", "each_s", "expected"),
    [
        (20_000, 0.0, [128, 512]),
        (30_000, 0.0, [128, 512, 2048]),
        (10**9, 1e-4, [128, 512, 2048, 8192, 32768]),
        (10**9, 1e-2, [128, 512]),
    ],
)
def test_many_pairs_are_probed_with_more_of_them_unless_they_take_long(rows: int, each_s: float, expected: list[int]) -> None:
    done: list[probes.Probe] = []
    while (count := probes.next_probe(rows, done)) is not None:
        done.append(probes.Probe(count, count * each_s, 0.0, 0))
    assert [probe.rows for probe in done] == expected


def test_what_grows_otherwise_than_the_pairs_is_foretold_by_its_labour(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = [{"method": "random-subset", "keep": 0.5}, {"method": "semantic-dedup", "clusters": 4, "iterations": 2, "sample": 100}]
    configs = [catalogue.config_class(catalogue.find(str(value["method"]), "prune")).parse(value) for value in chain]
    ledger = Ledger(
        pairs_in=64, kept=30, left=(Left(method="random-subset", reason="r", count=32), Left(method="semantic-dedup", reason="r", count=2))
    )
    record = SimpleNamespace(report={"0-random-subset": {}, "1-semantic-dedup": {"width": 8}})
    probed = SimpleNamespace(manifest=SimpleNamespace(ledger=ledger, phase=record))
    monkeypatch.setattr(probes, "_pace", lambda width: Labour(looks=width, products=1))
    for rows, half in ((100, 50), (10_000, 5_000)):
        looks = 2 * min(100, half) + half
        assert probes.uneven_s(configs, 0, probed, rows) == 8 * looks + 4 * looks + half**2 / 8  # type: ignore[arg-type]
    assert probes.uneven_s(configs[:1], 0, probed, 10**9) == 0  # type: ignore[arg-type]


def workflow_of(chain: list[dict[str, object]]) -> Workflow:
    return spec.check({**WORKFLOW, "curate": [], "prune": chain}, Path("small.yaml"))


def test_a_phase_into_which_no_pair_comes_has_a_plan(tmp_path: Path) -> None:
    nobody = dataset(tmp_path, tables=1, rows=0)
    cost = costs._pass("prune", SimpleNamespace(workflow=workflow_of([{"method": "random-subset", "keep": 0.5}])), nobody)  # type: ignore[arg-type]
    assert (cost.rows, cost.unmeasured) == (0, "")
    assert cost.seconds is not None


def test_a_chain_with_clusters_is_probed_with_a_share_of_its_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = dataset(tmp_path, tables=2, rows=2000)  # of which 3,000 are for training

    def made_up(spec: object, frame: pl.DataFrame, reader: object) -> np.ndarray:
        values = np.random.default_rng(frame.height).standard_normal((frame.height, 8)).astype(np.float32)
        return values / np.linalg.norm(values, axis=1, keepdims=True)

    samples: list[tuple[int, int]] = []
    own = probes._run

    def watched(phase: str, workflow: Workflow, sample: PairDataset, folder: Path) -> tuple[float, PairDataset]:
        samples.append((len(sample), workflow.prune[0].sample))  # type: ignore[attr-defined]
        return own(phase, workflow, sample, folder)

    monkeypatch.setattr(features, "compute", made_up)
    monkeypatch.setattr(probes, "_run", watched)
    monkeypatch.setattr(probes, "_pace", lambda width: Labour(looks=0.0, products=width * 1e-3))
    workflow = workflow_of([{"method": "semantic-dedup", "sample": 3000, "clusters": 2, "iterations": 2}])
    seconds, memory_bytes = probes.foretold("prune", workflow, pairs, 3000)
    assert samples == [(128, 2048), (128, 2048), (512, 2048)], "the smallest goes first once more"
    products = 2 * (2 * 3000 + 3000) + 3000**2 / 4
    assert seconds == pytest.approx(products * 8e-3, abs=60), "of so slow products nothing else is seen"
    assert memory_bytes > 10**8
