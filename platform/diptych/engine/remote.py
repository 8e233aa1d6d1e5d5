"""The entry of a submitted job: runs the packed workflow with its outputs in the project's folder on the cluster.

    python -m diptych.engine.remote --home /shared/project workflows/quickstart.yaml train.epochs=5
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path


def prepare(pack: Path, home: Path) -> None:
    """Lays the packed project's files into `home`. A folder with `.git` is somebody's clone, and is left as it is."""
    if (home / ".git").exists():
        return
    home.mkdir(parents=True, exist_ok=True)
    for name in ("dvc.yaml", "workflows", ".dvc", ".dvcignore", "platform"):
        source, target = pack / name, home / name
        if not source.exists():
            continue
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)
        else:
            shutil.copy2(source, target)


def main() -> int:
    """Runs the job."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--home", type=Path, required=True, help="absolute folder for outputs")
    parser.add_argument("--tracking-uri")
    parser.add_argument("workflow")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    prepare(Path.cwd(), options.home)
    arguments = ["run", str(options.home / options.workflow), *options.overrides, "--address", "auto"]
    if options.tracking_uri:
        arguments += ["--tracking-uri", options.tracking_uri]
    from importlib import import_module

    # The command line is a floor above; the job enters it as a user would.
    code: int = import_module("diptych.cli.main").main(arguments)
    return code


if __name__ == "__main__":
    sys.exit(main())
