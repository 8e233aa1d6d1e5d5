"""Runs the training loop in this process or on Ray Train's workers; the loop itself is `train/`."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from diptych.core import catalogue
from diptych.core.errors import DataError, DiptychError, ResourceError
from diptych.engine import notice
from diptych.engine.progress import Progress
from diptych.engine.session import Session, usable_cores

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diptych.train.config import TrainConfig

Result = TypeVar("Result")

MAX_FAILURES = 3


@dataclass(frozen=True)
class Job:
    """One training, as plain data that travels to workers.

    `objective`, `optimizer` and `batch_growth` are resolved parameters with their `method`; `out` is where the model directory is
    renamed to; `scratch` keeps checkpoints and the step log, and must be reachable from every worker. With `min_workers` a cluster that
    has fewer than `workers` trains with what it has, from that many on, and takes more in when they come.
    """

    dataset: Path
    config: TrainConfig
    model: str
    init: str
    objective: Mapping[str, Any]
    optimizer: Mapping[str, Any]
    out: Path
    scratch: Path
    seed: int
    workers: int
    batch_growth: Mapping[str, Any] | None = None
    min_workers: int | None = None


def run(job: Job, session: Session, progress: Progress | None = None) -> dict[str, Any]:
    """Trains and gives the summary: samples seen, where time went, final losses. Continues from the newest checkpoint.

    Raises DataError for a loss that is not finite, embeddings that collapsed or a picture that broke, ResourceError when workers cannot be
    had, and KeyboardInterrupt after SIGTERM in process, when a checkpoint is written.
    """
    job.scratch.mkdir(parents=True, exist_ok=True)
    if progress and (step := _saved_step(job.scratch)):
        progress.note(f"training continues from the checkpoint of step {step:,}")
    with _watch(job.scratch / "steps.jsonl", progress):
        summary = _here(job, session.cores or usable_cores()) if session.in_process else _on_ray(job, session)
    shutil.rmtree(job.scratch / "checkpoints", ignore_errors=True)
    return summary


def _here(job: Job, cores: int) -> dict[str, Any]:
    """Trains in this process, which a SIGTERM ends after a checkpoint."""
    with notice.termination() as asked:
        summary = work(job, 0, 1, should_stop=asked, cores=cores)
    if not summary["finished"]:
        raise KeyboardInterrupt
    return summary


def _saved_step(scratch: Path) -> int:
    """The step of the newest checkpoint that an earlier run has left, or 0."""
    return max((int(path.parent.name.removeprefix("step-")) for path in scratch.glob("checkpoints/step-*/state.json")), default=0)


def work(
    job: Job,
    rank: int,
    world: int,
    on_log: Callable[[dict[str, Any]], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    should_save: Callable[[], bool] | None = None,
    cores: int = 1,
) -> dict[str, Any]:
    """What one worker does: builds the objective and the optimizer by name and enters the loop."""
    from diptych.train.run import train

    objective, optimizer = _method(job.objective, "objective"), _method(job.optimizer, "optimizer")
    growth = None if job.batch_growth is None else _method(job.batch_growth, "batch-size").build
    summary = train(
        job.dataset, "train", job.config, job.model, objective.build, optimizer.build, job.out, job.scratch, job.seed,
        build_batch_size=growth, init=job.init, rank=rank, world=world, device=_device(), on_log=on_log, should_stop=should_stop,
        should_save=should_save, cores=cores,
    )  # fmt: skip
    return asdict(summary)


def _method(parameters: Mapping[str, Any], phase: str) -> Any:
    """The configuration of a method by its resolved parameters."""
    return catalogue.config_class(catalogue.find(str(parameters["method"]), phase)).parse(dict(parameters))


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _on_ray(job: Job, session: Session) -> dict[str, Any]:
    ray = session.ray()
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    cores = int(ray.cluster_resources().get("CPU", 1))
    least = job.min_workers or job.workers
    if least > cores and not session.address:
        raise ResourceError.at("More workers than cores", "train.workers", least, f"at most {cores}", f"set train.workers={cores}")
    gpus = int(ray.cluster_resources().get("GPU", 0)) >= least
    workers = job.workers if least == job.workers else (least, job.workers)
    trainer = TorchTrainer(
        _ray_worker,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpus, resources_per_worker={"CPU": 1} | ({"GPU": 1} if gpus else {})),
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        run_config=RunConfig(
            name=f"train-{job.seed}",
            storage_path=str((job.scratch / "ray").resolve()),
            failure_config=FailureConfig(max_failures=MAX_FAILURES),
        ),
    )
    result_path = job.scratch / "summary.json"
    for left_over in (result_path, job.scratch / "failure.json"):
        left_over.unlink(missing_ok=True)
    with _calm():
        try:
            result = _interruptible(trainer.fit)
        except Exception as error:
            raise _cause(error, job) from error
    shutil.rmtree(job.scratch / "ray", ignore_errors=True)
    if result.error is not None:
        raise _cause(result.error, job)
    summary: dict[str, Any] = json.loads(result_path.read_text())
    return summary


def _interruptible(work: Callable[[], Result]) -> Result:
    """Does `work` in a side thread, so that Ctrl-C ends the wait for it at once.

    In the main thread Ray Train takes SIGINT for itself, for good, and ends the driver with code 0.
    """
    outcome: Future[Result] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True, name="diptych-training").start()
    return outcome.result()


def _ray_worker(settings: Mapping[str, Any]) -> None:
    """Runs on each of Ray Train's workers; rank 0 leaves the summary in the shared scratch folder."""
    from ray.train import get_context

    context = get_context()
    job: Job = settings["job"]
    failure = job.scratch / "failure.json"
    try:
        cores = usable_cores() // context.get_local_world_size()
        summary = work(job, context.get_world_rank(), context.get_world_size(), should_save=notice.preemption(), cores=cores)
    except DiptychError as error:
        # A mistake of the user or the data will not go away by retrying: leave word for the driver.
        failure.write_text(json.dumps({"headline": error.headline, "problems": [asdict(problem) for problem in error.problems]}))
        raise
    if context.get_world_rank() == 0:
        (job.scratch / "summary.json").write_text(json.dumps(summary))


def _cause(error: BaseException, job: Job) -> DiptychError:
    """The user's mistake behind a failed training if a worker left word of one, else the failure itself in one sentence."""
    from diptych.core.errors import Problem

    failure = job.scratch / "failure.json"
    if failure.exists():
        data = json.loads(failure.read_text())
        failure.unlink()
        return DataError(data["headline"], [Problem(**problem) for problem in data["problems"]])
    return ResourceError.at("The training workers failed", str(job.scratch), str(error), "workers that run to the end",
                            "run again to continue from the last checkpoint; --in-process shows the error where it happens")  # fmt: skip


@contextmanager
def _calm() -> Iterator[None]:
    """Ray Train prints its own tables; ours are enough."""
    import logging

    for name in ("ray.train", "ray.tune", "ray.air"):
        logging.getLogger(name).setLevel(logging.ERROR)
    yield


@contextmanager
def _watch(log: Path, progress: Progress | None) -> Iterator[None]:
    """Follows the loop's step log from a thread and shows where training stands."""
    if progress is None:
        yield
        return
    stop = threading.Event()
    thread = threading.Thread(target=_follow, args=(log, progress.update, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=5)


def _follow(log: Path, update: Callable[[float, float, str], None], stop: threading.Event) -> None:
    while not stop.wait(0.5):
        record = last_record(log)
        if record:
            text = f"step {record['step']:,}, epoch {record['epoch']:.1f}, loss {record['loss']:.3f}, {record['samples_per_s']:,.0f} pictures/s"
            update(record["step"], record["steps"], text)


def last_record(log: Path) -> dict[str, Any] | None:
    """The last whole line of a JSONL file, or None."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 8192))
            lines = file.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return None
    return json.loads(lines[-1]) if lines and lines[-1].startswith(b"{") else None
