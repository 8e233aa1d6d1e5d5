"""Where work runs: one lazily started Ray session, or this very process under a debugger. The same calls serve both."""

from __future__ import annotations

import os
import pickle
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from diptych.core.errors import ResourceError

Item = TypeVar("Item")
Result = TypeVar("Result")

QUIET = {
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "1",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_DATA_LOGGING_CONFIG": str(Path(__file__).with_name("ray_data_logging.yaml")),
}
"""Ray's settings for a calm log, set before Ray is imported; what the user has set stays."""

LOCAL = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
"""What a session on this machine does without: nobody takes it away with notice, and the watcher is one process more a training."""

START_TRIES = 2


@dataclass
class Session:
    """A place to run tasks.

    Attributes:
        address: a Ray cluster's address; None starts a local one on first use.
        in_process: run everything here, in turn: for debuggers and tests.
        cores: cores of the local session, or of what runs in process; None takes all that this process may use.
    """

    address: str | None = None
    in_process: bool = False
    cores: int | None = None
    _started: bool = field(default=False, init=False)

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            # Polars hooks SIGINT with SA_RESTART: a main thread that waits for a lock would then sleep on through Ctrl-C.
            signal.siginterrupt(signal.SIGINT, True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def started(self) -> bool:
        """Whether Ray runs already."""
        return self._started

    @property
    def parallelism(self) -> int:
        """How many tasks of one core can run at once."""
        if self.in_process:
            return 1
        return max(1, int(self.ray().cluster_resources().get("CPU", 1)))

    def ray(self) -> Any:
        """The `ray` module with the session started. Raises ResourceError when it cannot start."""
        assert not self.in_process, "an in-process session has no Ray"
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        import ray

        if not self._started:
            self._start(ray)
            self._started = True
        return ray

    def _start(self, ray: Any) -> None:
        if ray.is_initialized():
            return
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
        if self.address:
            options["address"] = self.address
        elif os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"):
            options["address"] = os.environ.get("RAY_ADDRESS", "auto")
        else:
            for name, value in LOCAL.items():
                os.environ.setdefault(name, value)
            options |= {"num_cpus": self.cores or usable_cores(), "include_dashboard": False, "object_store_memory": 400 * 2**20}
        for attempt in range(START_TRIES):
            try:
                with _signals_kept():
                    ray.init(**options)
                break
            except Exception as error:
                ray.shutdown()
                if attempt == START_TRIES - 1:
                    raise ResourceError.at("Ray did not start", options.get("address", "this machine"), str(error), "a Ray session",
                                           "see `diptych doctor`, or run with --in-process") from error  # fmt: skip
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.execution_options.verbose_progress = False

    def map(self, task: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """`task` of every item, as results come, through Ray Data: `(index, result)` order is that of `items`.

        Work is cut by item, one block each, so that a lost worker repeats that item alone. Results are held back
        only until their predecessors have come.
        """
        if self.in_process or len(items) == 0:
            yield from map(task, items)
            return
        ray = self.ray()
        rows = [{"index": index, "item": pickle.dumps(item)} for index, item in enumerate(items)]
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _RowTask(task), batch_size=None, batch_format="pyarrow", num_cpus=1
        )
        waiting: dict[int, Any] = {}
        following = 0
        for row in dataset.iter_rows():
            waiting[row["index"]] = row["result"]
            while following in waiting:
                yield _unwrap(waiting.pop(following))
                following += 1
        assert following == len(items), f"{len(items) - following} results of {len(items)} did not come back"

    def close(self) -> None:
        """Stops the session if this object started it."""
        if self._started:
            import ray

            ray.shutdown()
            self._started = False


class _RowTask:
    """Runs a task on the rows of a block; an error travels back as a value, so that its type survives."""

    def __init__(self, task: Callable[[Any], Any]) -> None:
        self.task = task

    def __call__(self, block: Any) -> dict[str, Any]:
        import numpy as np

        results = np.empty(block.num_rows, dtype=object)
        for position, item in enumerate(block.column("item").to_pylist()):
            try:
                results[position] = pickle.dumps(("ok", self.task(pickle.loads(item))))  # noqa: S301 - our own bytes, never from disk
            except Exception as error:
                results[position] = pickle.dumps(("error", error))
        return {"index": np.asarray(block.column("index")), "result": results}


def _unwrap(data: bytes) -> Any:
    kind, value = pickle.loads(data)  # noqa: S301 - made by _RowTask
    if kind == "error":
        raise value
    return value


def usable_cores() -> int:
    """The cores that this process may run on: a container's or `taskset`'s share, not the whole machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray makes SIGTERM end the driver with code 15 and a traceback; what was set before stays."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def scratch_folder(prefix: str) -> Path:
    """A fresh folder below the system's temporary folder."""
    return Path(tempfile.mkdtemp(prefix=f"diptych-{prefix}-"))
