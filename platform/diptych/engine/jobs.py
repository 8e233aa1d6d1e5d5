"""Sends a workflow to a cluster through Ray Jobs: packs what git lists, follows the log, leaves or stops on Ctrl-C."""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from diptych.core.errors import ConfigError, DiptychError, ResourceError
from diptych.engine import reach

MAX_PACK_BYTES = 64 * 2**20
"""Ray takes no more than 100 MiB."""
SHOWN = 10
POLL_S = 0.5
ANSWER_S = 5.0
RECONNECT_S = 60.0
STOP_S = 30.0
DEAD = ("FAILED", "STOPPED", "SUCCEEDED")
STOPPED = 130
FORWARDED = ("MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION")
LOOPBACK = ("localhost", "127.0.0.1", "::1")


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

    def name_of(self, path: Path) -> str:
        """A file's name in the pack. Raises ConfigError for one that stays behind."""
        name = path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else str(path)
        if name not in dict(self.files):
            raise ConfigError.at(
                "The file does not travel", path, "git does not list it", f"a file in git below {self.root}", f"git add {name}"
            )
        return name


@dataclass(frozen=True)
class Job:
    """What the cluster is asked to do.

    `name` is derived from the resolved parameters: the same submission is the same job, and finds its own checkpoints
    below `home`, the project's folder on the cluster (shared storage). `program` is what runs there.
    """

    name: str
    workflow: str
    overrides: tuple[str, ...]
    home: str
    tracking_uri: str | None
    program: tuple[str, ...] = ("python", "-m", "diptych.engine.remote")


def pack(root: Path) -> Pack:
    """Lists the project's files with git. Raises ConfigError outside a git work tree, or when the pack is too large."""
    listed = _git(root, "ls-files", "-z").split("\0")
    files = tuple((name, (root / name).stat().st_size) for name in sorted(filter(None, listed)) if (root / name).is_file())
    untracked = tuple(
        name for name in _git(root, "ls-files", "-z", "--others", "--exclude-standard").split("\0") if name.endswith((".py", ".yaml"))
    )
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
    """Ray's job client. Raises ResourceError within seconds when the cluster does not answer, or not as Ray does."""
    if urlsplit(address).scheme not in ("http", "https"):
        raise ConfigError.at(
            "Not the address of a dashboard", "--address", address, "http://HOST:8265", "ray:// and HOST:6379 are for `diptych run`"
        )
    if wrong := reach.listening(address) or _silent(address):
        raise _no_cluster(address, wrong)
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ["RAY_RUNTIME_ENV_IGNORE_GITIGNORE"] = "1"  # git has chosen the files already; some may be tracked and ignored
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except Exception as error:
        raise _no_cluster(address, str(error).split("\n", 1)[0]) from error


def _silent(address: str) -> str:
    """The empty string when somebody answers HTTP at the address in time; Ray's own client would wait for ever."""
    try:
        urllib.request.urlopen(f"{address.rstrip('/')}/api/version", timeout=ANSWER_S).close()  # noqa: S310 - http or https, checked
    except urllib.error.HTTPError:
        return ""  # an answer, if only that a token is missing: Ray's client words it better
    except OSError as error:
        return f"no answer within {ANSWER_S:.0f} s ({error})"
    return ""


def _no_cluster(address: str, wrong: str) -> DiptychError:
    closed = "401" in wrong or "auth" in wrong.lower()
    fix = (
        "export RAY_AUTH_MODE=token where the cluster asks for a token"
        if closed
        else "start the cluster with its dashboard, and forward the port"
    )
    return ResourceError.at("The cluster does not answer", address, wrong, "a Ray dashboard, e.g. http://head:8265", fix)


def describe_cluster(address: str) -> tuple[str, str]:
    """The cluster's Ray version, and how many of its jobs run, in words."""
    found = client(address)
    running = sum(entry.status not in DEAD for entry in found.list_jobs())
    version = str(getattr(found, "_server_ray_version", "") or "of unknown version")  # get_version gives the version of the protocol
    return version, f"Ray {version}, {running} jobs running"


def submit(job: Job, found: Pack, address: str, *, follow: bool) -> int:
    """Submits and follows the log to the end; gives the exit code of the run, 130 when it was stopped.

    A job of the same name that still runs is joined, not started twice.
    """
    jobs = client(address)
    running, past = _known(jobs, job)
    if running is None:
        name = f"{job.name}-{past + 1}"
        with _copied(found) as folder:
            try:
                jobs.submit_job(entrypoint=entrypoint(job), submission_id=name, metadata={"diptych": job.name},
                                runtime_env={"working_dir": str(folder), "env_vars": environment()})  # fmt: skip
            except RuntimeError as error:
                if "already exists" not in str(error):
                    raise _refused(address, error) from error
                running = name  # somebody else's submission of the same job was quicker
        if running is None:
            sys.stdout.write(f"submitted {name}; its outputs go to {job.home} on the cluster\n")
    if running:
        name = running
        sys.stdout.write(f"joined {name}: the same workflow with the same settings is running\n")
    if not follow:
        sys.stdout.write(f"follow it with the same command, or: ray job logs --address {address} --follow {name}\n")
        return 0
    return _follow(jobs, name, address)


def _known(jobs: Any, job: Job) -> tuple[str | None, int]:
    """The submission of this job that is running, if any, and how many there have been."""
    ours = [entry for entry in jobs.list_jobs() if entry.metadata and entry.metadata.get("diptych") == job.name]
    return next((entry.submission_id for entry in ours if entry.status not in DEAD), None), len(ours)


def _refused(address: str, error: Exception) -> DiptychError:
    return ResourceError.at(
        "The cluster did not take the job", address, str(error).split("\n", 1)[0], "a submission", "see the dashboard's log"
    )


def entrypoint(job: Job) -> str:
    """The command on the cluster. Outputs go to the project's folder there, never to the job's scratch folder."""
    words = [*job.program, "--home", job.home]
    if job.tracking_uri:
        words += ["--tracking-uri", job.tracking_uri]
    return shlex.join([*words, job.workflow, *job.overrides])


def environment() -> dict[str, str]:
    """Environment variables of the job: the packed code first on the path, Ray's uv hook off, where services are.

    Secrets do not travel, for the dashboard shows these variables: the cluster has its own. Nor does an address on this machine.
    """
    variables = {"PYTHONPATH": "platform", "PYTHONUNBUFFERED": "1", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    for name in FORWARDED:
        value = os.environ.get(name)
        if value and urlsplit(value).hostname not in LOOPBACK and not urlsplit(value).password:
            variables[name] = value
    return variables


def _follow(jobs: Any, name: str, address: str) -> int:
    """Prints the log as it comes, through lost connections, until the job is over; gives its exit code."""
    log = _Log(jobs, name)
    last_answer = time.monotonic()
    try:
        while True:
            try:
                asyncio.run(log.tail())
                info = jobs.get_job_info(name)
                last_answer = time.monotonic()
                if info.status in DEAD:
                    break
            except (RuntimeError, OSError) as error:  # aiohttp's, requests' and Ray's errors are all of these
                if time.monotonic() - last_answer > RECONNECT_S:
                    raise ResourceError.at("The cluster stopped answering", address, str(error).split("\n", 1)[0], "the job's log",
                                           f"{name} may still run; the same command joins it") from error  # fmt: skip
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        return _leave(jobs, name, log)
    return _verdict(info, name)


class _Log:
    """A job's log on its way to the terminal; a tail that starts anew repeats nothing."""

    def __init__(self, jobs: Any, name: str) -> None:
        self.jobs, self.name = jobs, name
        self.shown = 0

    async def tail(self) -> None:
        """Prints what comes until the job is over or the connection is lost."""
        position = 0
        async for text in self.jobs.tail_job_logs(self.name):
            fresh = text[max(0, self.shown - position) :]
            position += len(text)
            if fresh:
                sys.stdout.write(fresh)
                sys.stdout.flush()
                self.shown = position


def _verdict(info: Any, name: str) -> int:
    sys.stdout.write(f"\n{name}: {str(info.status.value).lower()}\n")
    if info.status == "SUCCEEDED":
        return 0
    if info.status == "STOPPED":
        return STOPPED
    if not info.driver_exit_code:
        sys.stdout.write(f"{info.message}\n")  # it never started, or was lost with its machine
    return int(info.driver_exit_code or 1)


def _leave(jobs: Any, name: str, log: _Log) -> int:
    """Ctrl-C: asks whether to stop the job or leave it running. Without a terminal to ask in, the job runs on."""
    answer = ""
    if sys.stdin.isatty():
        sys.stdout.write(f"\n{name} still runs. Stop it? [y/N] ")
        sys.stdout.flush()
        with suppress(KeyboardInterrupt):
            answer = sys.stdin.readline().strip().lower()
    if answer not in ("y", "yes"):
        sys.stdout.write(f"\nleft {name} running; the same command joins it again\n")
        return 0
    jobs.stop_job(name)
    deadline = time.monotonic() + STOP_S
    while jobs.get_job_info(name).status not in DEAD and time.monotonic() < deadline:
        time.sleep(POLL_S)
    with suppress(RuntimeError, OSError):
        asyncio.run(log.tail())
    return _verdict(jobs.get_job_info(name), name)
