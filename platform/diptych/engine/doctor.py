"""Looks at the machine and the services, and says what to mend."""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from diptych.core.errors import DiptychError

MIN_MEMORY_BYTES = 4 * 2**30
MIN_DISK_BYTES = 5 * 2**30
SERVICE_S = 15.0


@dataclass(frozen=True)
class Check:
    """One finding. `note` is worth knowing, `mend` stops a run; `fix` says what to do."""

    name: str
    state: Literal["ok", "note", "mend"]
    text: str
    fix: str = ""


def examine(folder: Path, tracking_uri: str | None, address: str | None) -> list[Check]:
    """All checks in turn; a check that fails in an unforeseen way is itself a finding."""
    checks: list[tuple[str, Callable[[], Check]]] = [
        ("python", _python),
        ("cores", _cores),
        ("memory", _memory),
        ("shared memory", _shared_memory),
        ("disk", lambda: _disk(folder)),
        ("gpu", _gpu),
        ("byte code", _byte_code),
        ("ray", _ray),
        ("dvc", lambda: _dvc(folder)),
        ("mlflow", lambda: _mlflow(folder, tracking_uri)),
    ]
    if address:
        checks.append(("cluster", lambda: _cluster(address)))
    found = []
    for name, check in checks:
        try:
            found.append(check())
        except Exception as error:
            found.append(Check(name, "mend", f"could not be checked: {type(error).__name__}: {error}".split("\n", 1)[0]))
    return found


def _python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    right = sys.version_info[:2] == (3, 11)
    return Check("python", "ok" if right else "mend", version, "" if right else "use Python 3.11: make install")


def _cores() -> Check:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    load = os.getloadavg()[0]
    busy = load > cores
    return Check(
        "cores",
        "note" if busy else "ok",
        f"{cores}, load {load:.1f}",
        "others use this machine: times will be longer than planned" if busy else "",
    )


def _memory() -> Check:
    import psutil

    memory = psutil.virtual_memory()
    enough = memory.available >= MIN_MEMORY_BYTES
    text = f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free"
    return Check(
        "memory",
        "ok" if enough else "mend",
        text,
        "" if enough else "close other programs, or lower train.batch_size and train.cache_bytes",
    )


def _shared_memory() -> Check:
    folder = Path("/dev/shm")  # noqa: S108 - where Ray keeps its object store
    if not folder.is_dir():
        return Check("shared memory", "note", "no /dev/shm", "Ray will use the disk for its object store, which is slow")
    free = shutil.disk_usage(folder).free
    enough = free >= 512 * 2**20
    fix = "" if enough else "in a container: --shm-size=2g"
    return Check("shared memory", "ok" if enough else "note", f"{free / 2**30:.1f} GiB", fix)


def _disk(folder: Path) -> Check:
    free = shutil.disk_usage(folder).free
    enough = free >= MIN_DISK_BYTES
    return Check(
        "disk",
        "ok" if enough else "mend",
        f"{free / 2**30:.1f} GiB free in {folder}",
        "" if enough else "free some space: runs/.cache can always go, `dvc gc -w` too",
    )


def _gpu() -> Check:
    import torch

    if not torch.cuda.is_available():
        return Check("gpu", "note", "none; training runs on the cores")
    names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    bf16 = "bf16 works" if torch.cuda.is_bf16_supported() else "no bf16: keep train.precision at fp32"
    return Check("gpu", "ok", f"{names}; {bf16}")


def _byte_code() -> Check:
    import ray

    cached = (Path(ray.__file__).parent / "__pycache__").is_dir()
    fix = "" if cached else "make install compiles it; without, every start takes twice as long"
    return Check("byte code", "ok" if cached else "note", "compiled" if cached else "missing", fix)


def _ray() -> Check:
    from diptych.engine.session import Session

    try:
        with Session(cores=1) as session:
            ray = session.ray()
            answer = ray.get(ray.remote(_answer).remote())
    except DiptychError as error:
        return Check(
            "ray", "mend", error.problems[0].got if error.problems else error.headline, "see the log below /tmp/ray/session_latest/logs"
        )
    return Check("ray", "ok" if answer == 42 else "mend", f"{ray.__version__}, a task ran")


def _answer() -> int:
    return 42


def _dvc(folder: Path) -> Check:
    import dvc
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo(str(folder)) as repo:
            stages = len(repo.index.stages)
            remote = repo.config["core"].get("remote")
            wrong = _in_time(lambda: _remote(repo, remote), SERVICE_S) if remote else ""
    except DvcException as error:
        return Check(
            "dvc", "mend", str(error), "work in a clone of the repository, or run `dvc init`, copy its dvc.yaml and link its platform/"
        )
    found = f"{dvc.__version__}, {stages} stages"
    if wrong:
        return Check("dvc", "mend", f"{found}; remote {remote!r}: {wrong}", "dvc remote list; see its credentials and network")
    return Check("dvc", "ok", found + (f", remote {remote!r} answers" if remote else ", no remote: data versions stay on this machine"))


def _remote(repo: Any, name: str) -> str:
    """The empty string when DVC's remote can be listed; else what is wrong."""
    storage = repo.cloud.get_remote_odb(name)
    try:
        next(iter(storage.fs.find(storage.path)), None) if storage.fs.exists(storage.path) else None
    except Exception as error:  # each kind of storage has its own
        return f"{type(error).__name__}: {error}"[:200]
    return ""


def _in_time(check: Callable[[], str], limit_s: float) -> str:
    """What a check says, or that it has not answered in time; its thread is left behind then."""
    answer: list[str] = []
    thread = threading.Thread(target=lambda: answer.append(check()), daemon=True)
    thread.start()
    thread.join(limit_s)
    return answer[0] if answer else f"no answer within {limit_s:.0f} s"


def _mlflow(folder: Path, uri: str | None) -> Check:
    import mlflow

    from diptych.engine.outbox import Outbox
    from diptych.engine.tracking import Target, Tracker

    target = Target.local(folder, "diptych", uri)
    if target.uri.startswith("sqlite") and not Path(target.uri.removeprefix("sqlite:///")).exists():
        return Check("mlflow", "ok", f"{mlflow.__version__}, {target.uri} will be made by the first run")
    outboxes = [Outbox(path) for path in sorted((folder / "runs").glob(".outbox*"))]
    try:
        Tracker(target, Outbox(folder / "runs" / ".outbox")).check()
    except DiptychError as error:
        return Check("mlflow", "mend", f"{target.shown}: {_got(error)}", error.problems[0].fix)
    waiting, refused = sum(outbox.behind for outbox in outboxes), sum(outbox.refused for outbox in outboxes)
    found = f"{mlflow.__version__}, {target.shown}"
    if refused:
        return Check(
            "mlflow",
            "note",
            f"{found}; {refused} events were refused",
            "the reasons are in runs/.outbox*/refused; delete the file when read",
        )
    if waiting:
        return Check("mlflow", "note", f"{found}; {waiting} events wait to be sent", "the next run sends them")
    return Check("mlflow", "ok", found)


def _cluster(address: str) -> Check:
    import ray

    from diptych.engine import jobs

    try:
        version, found = jobs.describe_cluster(address)
    except DiptychError as error:
        return Check("cluster", "mend", f"{address}: {_got(error)}", error.problems[0].fix)
    if version != ray.__version__:
        return Check("cluster", "note", found, f"this machine has Ray {ray.__version__}; run the image of infra/Dockerfile there")
    return Check("cluster", "ok", found)


def _got(error: DiptychError) -> str:
    """What was found wrong, without the quotes of its `repr`."""
    return error.problems[0].got.strip("'\"") if error.problems else error.headline


def text(found: list[Check]) -> str:
    """The findings as lines, what to mend beneath each."""
    signs = {"ok": "ok  ", "note": "note", "mend": "MEND"}
    lines = []
    for check in found:
        lines.append(f"  {signs[check.state]}  {check.name:<14} {check.text}")
        if check.fix:
            lines.append(f"        {'':<14} -> {check.fix}")
    bad = sum(check.state == "mend" for check in found)
    lines += ["", "  ready" if not bad else f"  {bad} thing{'s' if bad > 1 else ''} to mend"]
    return "\n".join(lines)
