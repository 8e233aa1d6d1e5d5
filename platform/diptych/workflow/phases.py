"""The seven phases, each as one function from inputs on disk to an output on disk and a few figures."""

from __future__ import annotations

import itertools
import json
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl

from diptych import __version__
from diptych.core import digest
from diptych.core.config import Config
from diptych.core.points import Metric
from diptych.engine import evaluation, passes, training
from diptych.engine.features import FeatureSpec
from diptych.engine.progress import Progress
from diptych.engine.session import Session
from diptych.pairs import files
from diptych.pairs.dataset import PairDataset
from diptych.workflow import identity, sets
from diptych.workflow.spec import PAIR_PHASES, Workflow

Figures = dict[str, Any]

SCOUT = "scout"
SCOUT_STEPS = 200


@dataclass(frozen=True)
class Bench:
    """What a phase works with: where inputs and outputs lie, where tasks run, where progress is shown."""

    workflow: Workflow
    folder: Callable[[str], Path]
    session: Session
    progress: Progress
    scratch: Path
    cache: Path

    def dataset(self, phase: str, verify: bool = False) -> PairDataset:
        """The pair dataset that a phase left; with `verify`, its tables are what the manifest says to the last byte."""
        return PairDataset.open(self.folder(phase), verify)


def run(phase: str, bench: Bench) -> Figures:
    """Runs one phase; its output is renamed into place at the end. Gives counts, seconds and peak memory for the record."""
    started, processor = time.monotonic(), _processor_s()
    bench.folder(phase).parent.mkdir(parents=True, exist_ok=True)
    figures = _PHASES[phase](bench)
    return {
        **figures,
        "wall_s": round(time.monotonic() - started, 3),
        "driver_cpu_s": round(_processor_s() - processor, 3),
        "peak_memory_bytes": peak_memory_bytes(),
    }


def peak_memory_bytes() -> int:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _processor_s() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _ingest(bench: Bench) -> Figures:
    from diptych.pairs.ingest import ingest_all

    workflow = bench.workflow
    dataset = ingest_all(
        workflow.source.build(),  # type: ignore[attr-defined]
        bench.folder("ingest"),
        config=workflow.ingest,
        seed=workflow.seed,
        map=bench.session.map,
        code=identity.code("ingest"),
        version=__version__,
        methods=(workflow.source.plain(),),
    )
    return ledger(dataset)


def _pairs(phase: str) -> Callable[[Bench], Figures]:
    def work(bench: Bench) -> Figures:
        workflow = bench.workflow
        (before,) = identity.INPUTS[phase]
        configs: Sequence[Config] = workflow.methods(phase)
        source = bench.dataset(before, verify=True)
        dataset = passes.run(
            source, configs, phase, bench.folder(phase), seed=workflow.seed, session=bench.session,
            scratch=bench.scratch, code=identity.code(phase), version=__version__, progress=bench.progress,
            feature_specs=_feature_specs(configs, bench, source),
        )  # fmt: skip
        return pair_figures(dataset)

    return work


def ledger(dataset: PairDataset) -> Figures:
    """Who came in, who left and why, as the manifest has it."""
    found = dataset.manifest.ledger
    left = [{"method": entry.method, "reason": entry.reason, "count": entry.count} for entry in found.left]
    return {
        "pairs_in": found.pairs_in,
        "kept": found.kept,
        "left": left,
        "digest": dataset.digest,
        "report": dataset.manifest.phase.report,
    }


def pair_figures(dataset: PairDataset) -> Figures:
    """The figures of a phase from pairs to pairs: its ledger, and how many captions a training pair has."""
    return {**ledger(dataset), "captions_per_pair": _captions_per_pair(dataset)}


def _captions_per_pair(dataset: PairDataset) -> float:
    value = dataset.scan().filter(pl.col("split") == "train").select(pl.col("captions").list.len().mean()).collect().item()
    return round(float(value or 0.0), 3)


def _feature_specs(configs: Sequence[Config], bench: Bench, dataset: PairDataset) -> dict[str, FeatureSpec]:
    """The features that the methods of a phase ask for, by the name they use."""
    pictures = digest.of_plain([[name, shard.sha256 or shard.uri, shard.size_bytes] for name, shard in sorted(dataset.shards.items())])
    specs = {}
    for config in configs:
        name = getattr(config, "features", None)
        if name is None:
            continue
        if name == SCOUT:
            folder = _scout(bench, dataset)
            specs[name] = FeatureSpec(
                name=str(folder), weights=identity.of_output(folder), pictures=pictures, cache=str(bench.cache / "features")
            )
            continue
        weights = (
            identity.of_output(Path(name.removeprefix("local-dir:")))
            if "/" in name and Path(name.removeprefix("local-dir:")).is_dir()
            else ""
        )
        specs[name] = FeatureSpec(
            name=name, weights=weights, seed=bench.workflow.seed, pictures=pictures, cache=str(bench.cache / "features")
        )
    return specs


def _scout(bench: Bench, dataset: PairDataset) -> Path:
    """The run's own features: the workflow's model after a short training on the pairs at hand, kept by what it was made from."""
    from diptych.train.config import UNJUDGED, TrainConfig

    workflow, section = bench.workflow, bench.workflow.train
    plain = {key: value for key, value in section.plain().items() if key in TrainConfig.model_fields}
    config = TrainConfig.parse({**plain, "epochs": None, "steps": SCOUT_STEPS, **UNJUDGED})
    identity_ = digest.of_plain(
        [dataset.digest, config.plain(), section.model, workflow.objective.plain(), workflow.optimizer.plain(), workflow.seed]
    )
    folder = (bench.cache / "scouts" / identity_.removeprefix("sha256:")).resolve()
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        job = training.Job(
            dataset.root, config, section.model, section.init, workflow.objective.plain(), workflow.optimizer.plain(), folder,
            (bench.scratch / f"scout-{digest.short(identity_)}").resolve(), workflow.seed, section.workers,
        )  # fmt: skip
        training.run(job, bench.session, bench.progress)
    return folder


def training_job(bench: Bench) -> training.Job:
    """The training that the workflow describes, on the pairs that its caption phase left."""
    from diptych.train.config import TrainConfig

    workflow, section = bench.workflow, bench.workflow.train
    dataset = bench.dataset("caption", verify=True)
    return training.Job(
        dataset=dataset.root,
        config=TrainConfig.parse({key: value for key, value in section.plain().items() if key in TrainConfig.model_fields}),
        model=section.model,
        init=section.init,
        objective=workflow.objective.plain(),
        optimizer=workflow.optimizer.plain(),
        batch_growth=None if workflow.batch_growth is None else workflow.batch_growth.plain(),
        out=bench.folder("train").resolve(),
        scratch=(bench.scratch / f"train-{digest.short(digest.of_plain([workflow.params('train'), dataset.digest]))}").resolve(),
        seed=workflow.seed,
        workers=section.workers,
        min_workers=section.min_workers,
    )


def _train(bench: Bench) -> Figures:
    job = training_job(bench)
    summary = training.run(job, bench.session, bench.progress)
    log = job.scratch / "steps.jsonl"
    kept_log = bench.folder("train").parent / ".records" / "steps.jsonl"
    kept_log.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(str(log), kept_log)
    shutil.rmtree(job.scratch, ignore_errors=True)
    return {
        **_training_figures(summary),
        "loss_curve": _loss_curve(kept_log),
        "rows": _train_rows(PairDataset.open(job.dataset)),
        "digest": identity.of_output(job.out),
    }


def _loss_curve(log: Path, points: int = 32) -> list[float]:
    """The loss at evenly spread steps, for a line in the terminal."""
    losses = [json.loads(line)["loss"] for line in log.read_text().splitlines()]
    return [round(losses[i * (len(losses) - 1) // max(1, min(points, len(losses)) - 1)], 4) for i in range(min(points, len(losses)))]


def _training_figures(summary: Mapping[str, Any]) -> Figures:
    """The summary, flat: the last losses by name, and the share of its time that each activity took."""
    activities = {"wait for data": "data_wait_s", "step": "step_s", "synchronise": "sync_s", "checkpoint": "checkpoint_s"}
    total = sum(summary[key] for key in activities.values()) or 1.0
    shares = {name: summary[key] / total for name, key in activities.items()}
    return {**{key: value for key, value in summary.items() if key != "losses"}, **summary["losses"], "shares": shares}


def _train_rows(dataset: PairDataset) -> int:
    return int(dataset.scan().filter(pl.col("split") == "train").select(pl.len()).collect().item())


def _compress(bench: Bench) -> Figures:
    from diptych.models import clip

    source, out = bench.folder("train"), bench.folder("compress")
    configs = bench.workflow.methods("compress")
    if not configs:
        hand_over(source, out)
        return {"digest": identity.of_output(out)}
    encoder = clip.load(source)
    reports = {}
    for config in configs:
        compressor = config.build()  # type: ignore[attr-defined]
        encoder = compressor.compress(encoder, Calibration.of(config, bench.dataset("caption"), encoder))
        reports[str(config.plain()["method"])] = compressor.report(encoder) if hasattr(compressor, "report") else {}
    lineage = {**json.loads((source / "lineage.json").read_text()), "compress": [config.plain() for config in configs]}
    clip.save(encoder, out, lineage)
    return {"report": reports, "digest": identity.of_output(out)}


@dataclass(frozen=True)
class Calibration:
    """Batches of training pairs, the first by key hash: what data-aware compressors look at. Pictures are decoded as they are gone through."""

    dataset: PairDataset
    encoder: Any
    pairs: int
    batch: int

    @classmethod
    def of(cls, config: Config, dataset: PairDataset, encoder: Any) -> Calibration:
        """As many pairs, and as many a batch, as a compressor's configuration asks for (`core.points.Compressor`)."""
        return cls(dataset, encoder, getattr(config, "calibration_pairs", 256), getattr(config, "calibration_batch", 128))

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        import torch

        from diptych.core.chance import key_hashes
        from diptych.engine.features import pictures

        frame = self.dataset.read().filter(pl.col("split") == "train")
        frame = frame[key_hashes(frame["key"]).argsort()[: self.pairs]]
        texts = iter([captions[0]["text"] for captions in frame["captions"]])
        for image_NCHW in pictures(frame, self.dataset.reader(), self.encoder.image_size, self.batch):
            text_NL = self.encoder.tokenizer.encode_cut(list(itertools.islice(texts, len(image_NCHW))))
            yield {"image_NCHW": torch.from_numpy(image_NCHW), "text_NL": torch.from_numpy(text_NL)}


def _evaluate(bench: Bench) -> Figures:
    workflow, out = bench.workflow, bench.folder("evaluate")
    encoder = evaluation.StoredEncoder(bench.folder("compress"), bench.dataset("ingest", verify=True), bench.cache / "encoded")
    encoder.training = bench.folder("caption")
    name = str(workflow.source.plain()["method"])
    measured = [measured_on(encoder, name, workflow.benchmarks, workflow.seed)]
    for one in workflow.sets:
        registered = sets.register(one, bench.cache, encoder.dataset)
        other = replace(encoder, dataset=registered.dataset, shared=encoder.checkpoint)
        measured.append(measured_on(other, one.name, one.benchmarks, workflow.seed, registered.flags))
    for set_name, flag in ((found.set, flag) for found in measured for flag in found.notes):
        bench.progress.note(f"{set_name}: {flag}")
    metrics = [metric for found in measured for metric in found.metrics]
    with files.replacing(out) as partial:
        pl.concat([found.rows for found in measured]).write_parquet(partial / "rows.parquet")
        evaluation.per_example(metrics).write_parquet(partial / "examples.parquet")
        if any(config.plain()["method"] == "retrieval" for config in workflow.benchmarks):
            _retrieval_examples(workflow, encoder).write_parquet(partial / "retrieved.parquet")
        sweep = _sweep(bench, partial)
    notes = {found.set: found.notes for found in measured if found.notes}
    return {"metrics": evaluation.figures(metrics), "sweep": sweep, **({"notes": notes} if notes else {})}


@dataclass(frozen=True)
class Measured:
    """One checkpoint on one set: its metrics, the same as rows with where they come from, and what to know of the set."""

    set: str
    metrics: list[Metric]
    rows: pl.DataFrame
    notes: list[str]


def measured_on(
    encoder: evaluation.StoredEncoder, name: str, benchmarks: Sequence[Config], seed: int, flags: Sequence[str] = ()
) -> Measured:
    """Measures a checkpoint on the set called `name`; `flags` were raised when the set was registered. Rows carry all notes as JSON."""
    metrics, said = evaluation.measure_noting(encoder, benchmarks, name, seed)
    notes = [*flags, *said]
    provenance = {
        "model": digest.short(encoder.identity),
        "dataset": digest.short(encoder.dataset.digest),
        "code": digest.short(identity.code("evaluate")),
        "notes": json.dumps(notes),
    }
    return Measured(name, metrics, evaluation.long_form(metrics, provenance), notes)


def _retrieval_examples(workflow: Workflow, encoder: evaluation.StoredEncoder) -> pl.DataFrame:
    from diptych.evaluate.retrieval import Config as RetrievalConfig
    from diptych.evaluate.retrieval import examples

    config = next(config for config in workflow.benchmarks if isinstance(config, RetrievalConfig))
    return examples(encoder, encoder.dataset.read(), workflow.seed, count=8, config=config)


def _sweep(bench: Bench, out: Path) -> Figures | None:
    if bench.workflow.sweep is None:
        return None
    from diptych.workflow import sweep

    return sweep.run(bench, out)


def hand_over(source: Path, out: Path) -> None:
    """An empty phase hands its input on: the same files under a second name, not copied where the file system allows."""
    with files.replacing(out) as partial:
        shutil.copytree(source, partial, copy_function=_link, dirs_exist_ok=True)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


_PHASES: Mapping[str, Callable[[Bench], Figures]] = {
    "ingest": _ingest,
    **{phase: _pairs(phase) for phase in PAIR_PHASES},
    "train": _train,
    "compress": _compress,
    "evaluate": _evaluate,
}
