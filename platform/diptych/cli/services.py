"""The verbs around a run: `submit`, `ui`, `doctor`, `completion`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def submit(options: argparse.Namespace) -> int:
    """`diptych submit W --address …`: the exit code of the run there."""
    from diptych.cli.experiments import load
    from diptych.engine import jobs
    from diptych.workflow.project import Project

    workflow = load(options)  # a mistake is refused here, not on the cluster
    project = Project.find(Path.cwd())
    pack = jobs.pack(project.root)
    path = pack.name_of(workflow.path)
    sys.stdout.write(jobs.describe(pack) + "\n")
    if options.dry_run:
        return 0
    name = f"{workflow.name}-{workflow.digest.removeprefix('sha256:')[:8]}"
    job = jobs.Job(name, path, workflow.overrides, options.root or str(project.root), options.tracking_uri)
    return jobs.submit(job, pack, options.address, follow=not options.detach)


def ui(options: argparse.Namespace) -> int:
    """`diptych ui`."""
    from diptych.engine import pages
    from diptych.engine.tracking import Target
    from diptych.workflow.project import Project

    target = Target.local(Project.find(Path.cwd()).root, "diptych", options.tracking_uri)
    pages.check(target, options.host, options.port)
    sys.stdout.write(f"MLflow on {target.shown}\n  {pages.address(options.host, options.port)}   (Ctrl-C ends it)\n")
    sys.stdout.flush()
    return pages.serve(target, options.host, options.port)


def doctor(options: argparse.Namespace) -> int:
    """`diptych doctor`: 0 when nothing has to be mended."""
    from diptych.engine import doctor as checks

    found = checks.examine(Path.cwd(), options.tracking_uri, options.address)
    sys.stdout.write(checks.text(found) + "\n")
    return 1 if any(check.state == "mend" for check in found) else 0


def completion(options: argparse.Namespace) -> int:
    """`diptych completion SHELL`."""
    from argcomplete.shell_integration import shellcode

    sys.stdout.write(shellcode(["diptych"], shell=options.shell))
    return 0
