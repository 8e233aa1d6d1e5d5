"""Sends a workflow to a cluster through Ray Jobs: packs what git lists, follows the log, leaves or stops on Ctrl-C."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diptych.core.errors import ConfigError, ResourceError

MAX_PACK_BYTES = 20 * 2**20
SHOWN = 10
POLL_S = 1.0
DEAD = ("FAILED", "STOPPED", "SUCCEEDED")


@dataclass(frozen=True)
class Pack:
    """The files that travel: what git lists in the project, as they are in the working tree."""

    root: Path
    files: tuple[tuple[str, int], ...]
    untracked: tuple[str, ...]

    @property
    def size_bytes(self) -> int:
        """Their size together."""
        return sum(size for _, size in self.files)


@dataclass(frozen=True)
class Job:
    """What the cluster is asked to do.

    `name` is derived from the resolved parameters: the same submission is the same job, and finds its own checkpoints
    below `home`, the project's folder on the cluster (shared storage).
    """

    name: str
    workflow: str
    overrides: tuple[str, ...]
    home: str
    tracking_uri: str | None


def pack(root: Path) -> Pack:
    """Lists the project's files with git. Raises ConfigError outside a git work tree, or when the pack is too large."""
    listed = _git(root, "ls-files", "-z").split("\0")
    files = tuple((name, (root / name).stat().st_size) for name in sorted(filter(None, listed)) if (root / name).is_file())
    untracked = tuple(name for name in _git(root, "ls-files", "-z", "--others", "--exclude-standard").split("\0") if name.endswith((".py", ".yaml")))
    found = Pack(root, files, untracked)
    if found.size_bytes > MAX_PACK_BYTES:
        largest = "; ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in largest_files(found))
        raise ConfigError.at("The project is too large to travel", root, f"{found.size_bytes / 2**20:.1f} MiB: {largest}",
                             f"at most {MAX_PACK_BYTES / 2**20:.0f} MiB in git", "keep data out of git; name it by path or s3:// in the workflow")  # fmt: skip
    return found


def _git(root: Path, *arguments: str) -> str:
    try:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True).stdout  # noqa: S603, S607
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        raise ConfigError.at("git cannot list the project's files", root, getattr(error, "stderr", str(error)), "a git work tree") from None


def largest_files(found: Pack) -> list[tuple[str, int]]:
    """The ten largest files of a pack."""
    return sorted(found.files, key=lambda file: -file[1])[:SHOWN]


def describe(found: Pack) -> str:
    """The pack as lines: how many files, how large, the largest, and what git does not know."""
    lines = [f"{len(found.files):,} files, {found.size_bytes / 2**20:.1f} MiB, as git lists them; the largest:"]
    lines += [f"  {size / 2**10:>9,.0f} KiB  {name}" for name, size in largest_files(found)]
    if found.untracked:
        lines.append(f"  left behind, since git does not know them: {', '.join(found.untracked[:5])}")
    return "\n".join(lines)


@contextmanager
def _copied(found: Pack) -> Iterator[Path]:
    """The pack's files in a folder of their own, since Ray packs whole folders."""
    folder = Path(tempfile.mkdtemp(prefix="diptych-pack-"))
    try:
        for name, _ in found.files:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(found.root / name, target)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def client(address: str) -> Any:
    """Ray's job client. Raises ResourceError when the cluster does not answer."""
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except Exception as error:
        hint = "export RAY_AUTH_MODE=token where the cluster asks for a token" if "401" in str(error) or "auth" in str(error).lower() else "is the dashboard on, and the port open?"
        raise ResourceError.at("The cluster does not answer", address, str(error).split("\n", 1)[0][:200], "a Ray dashboard, e.g. http://head:8265", hint) from error


def describe_cluster(address: str) -> str:
    """The cluster's version and jobs in a line."""
    found = client(address)
    return f"Ray {found.get_version()}, {len(found.list_jobs())} jobs"


def submit(job: Job, found: Pack, address: str, *, follow: bool) -> int:
    """Submits and follows the log to the end; gives the job's exit code: 0, 1 when it failed, 130 when it was stopped.

    A job of the same name that still runs is joined, not started twice.
    """
    jobs = client(address)
    running = next((entry.submission_id for entry in jobs.list_jobs() if _ours(entry, job) and entry.status not in DEAD), None)
    if running:
        sys.stdout.write(f"joined {running}: the same workflow with the same settings is running\n")
        name = str(running)
    else:
        with _copied(found) as folder:
            name = jobs.submit_job(
                entrypoint=entrypoint(job), submission_id=f"{job.name}-{int(time.time())}", runtime_env={"working_dir": str(folder), "env_vars": environment()},
                metadata={"diptych": job.name},
            )  # fmt: skip
        sys.stdout.write(f"submitted {name}\n")
    if not follow:
        sys.stdout.write(f"follow it with: diptych submit … again, or ray job logs --address {address} --follow {name}\n")
        return 0
    return _follow(jobs, name)


def _ours(entry: Any, job: Job) -> bool:
    return bool(entry.metadata and entry.metadata.get("diptych") == job.name)


def entrypoint(job: Job) -> str:
    """The command on the cluster. Outputs go to the project's folder there, never to the job's scratch folder."""
    words = ["python", "-m", "diptych.engine.remote", "--home", job.home, job.workflow, *job.overrides]
    if job.tracking_uri:
        words += ["--tracking-uri", job.tracking_uri]
    return shlex.join(words)


def environment() -> dict[str, str]:
    """Environment variables of the job: the packed code first on the path, Ray's uv hook off."""
    variables = {"PYTHONPATH": "platform", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_TOKEN", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION"):
        if name in os.environ:
            variables[name] = os.environ[name]
    return variables


def _follow(jobs: Any, name: str) -> int:
    seen = 0
    try:
        while True:
            status = str(jobs.get_job_status(name).value)
            log = jobs.get_job_logs(name)
            sys.stdout.write(log[seen:])
            sys.stdout.flush()
            seen = len(log)
            if status in DEAD:
                sys.stdout.write(f"\n{name}: {status.lower()}\n")
                return {"SUCCEEDED": 0, "STOPPED": 130}.get(status, 1)
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        return _leave(jobs, name)


def _leave(jobs: Any, name: str) -> int:
    """Ctrl-C: asks whether to stop the job or leave it running. Without a terminal to ask in, the job runs on."""
    answer = ""
    if sys.stdin.isatty():
        sys.stdout.write(f"\n{name} still runs. Stop it? [y/N] ")
        sys.stdout.flush()
        try:
            answer = sys.stdin.readline().strip().lower()
        except KeyboardInterrupt:
            answer = ""
    if answer in ("y", "yes"):
        jobs.stop_job(name)
        sys.stdout.write("stopped\n")
        return 130
    sys.stdout.write("detached; the same submit joins it again\n")
    return 0
