"""The entry of a submitted job: lays the packed project into its folder on the cluster and runs the workflow there.

python -m diptych.engine.remote --home /shared/project workflows/quickstart.yaml train.epochs=5
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from diptych.core.errors import DiptychError, ResourceError

PARTS = ("platform", "workflows", "dvc.yaml", ".dvc/config", ".dvcignore")
WITHOUT_GIT = "[core]\n    no_scm = true\n"


def prepare(pack: Path, home: Path) -> None:
    """Lays the packed project's files into `home`, in place of those of the submission before; what was computed there stays.

    A folder with `.git` is somebody's clone, and is left as it is.
    """
    if (home / ".git").exists():
        return
    for name in PARTS:
        _replace(pack / name, home / name)
    (home / ".dvc").mkdir(exist_ok=True)
    (home / ".dvc" / "config.local").write_text(WITHOUT_GIT)


def _replace(source: Path, target: Path) -> None:
    """A copy of a file or a folder, without what the target held beside: a module deleted since would count as code."""
    if not source.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy2(source, target)


def lock(home: Path) -> int:
    """The lock of a project's folder, as a file descriptor; waits, and says so, while another job works there."""
    (home / "runs").mkdir(parents=True, exist_ok=True)
    descriptor = os.open(home / "runs" / ".job-lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.stdout.write(f"another job works in {home}; waiting for it to end\n")
        sys.stdout.flush()
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


def command(options: argparse.Namespace) -> list[str]:
    """The command line that the job becomes."""
    words = [sys.executable, "-m", "diptych.cli.main", "run", str(options.home / options.workflow), *options.overrides, "--address", "auto"]
    return words + (["--tracking-uri", options.tracking_uri] if options.tracking_uri else [])


def build_parser() -> argparse.ArgumentParser:
    """The parser of the job's own arguments."""
    parser = argparse.ArgumentParser(description="Runs a packed workflow with its outputs in a folder of the cluster.")
    parser.add_argument("--home", type=Path, required=True, help="absolute folder for outputs, shared by all machines")
    parser.add_argument("--pack", type=Path, default=Path.cwd(), help="the project's files; default: the job's own folder")
    parser.add_argument("--tracking-uri")
    parser.add_argument("workflow")
    parser.add_argument("overrides", nargs="*")
    return parser


def _unwritable(home: Path, error: OSError) -> DiptychError:
    return ResourceError.at("The project's folder on the cluster cannot be written", home, error.strerror or str(error),
                            "a shared folder that the job's user may write", "diptych submit … --root /shared/project")  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepares the folder, then becomes the run: its exit code and its signals are the job's. The lock goes with the process."""
    options = build_parser().parse_args(arguments)
    try:
        os.set_inheritable(lock(options.home), True)
        prepare(options.pack, options.home)
    except OSError as error:
        sys.stderr.write(f"{_unwritable(options.home, error)}\n")
        return ResourceError.exit_code
    os.execv(sys.executable, command(options))  # noqa: S606 - our own program, no shell


if __name__ == "__main__":
    sys.exit(main())
