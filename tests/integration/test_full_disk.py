"""A disk that fills up in the middle: one sentence, nothing half done, and once there is room the same command finishes."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from tests.integration import commands
from tests.integration.commands import Results
from tests.integration.conftest import Diptych

pytestmark = pytest.mark.timeout(900)


def mount(folder: Path, options: str) -> None:
    """Mounts (or changes) a file system in memory."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True, capture_output=True)


@pytest.fixture
def sized(fresh: Path) -> Iterator[Callable[[int], None]]:
    """Sets the room, in KiB, that the project's runs have."""
    runs = fresh / "runs"
    runs.mkdir()
    try:
        mount(runs, "size=64k")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"mounting a file system is not permitted here: {error}")
    yield lambda kibibytes: mount(runs, f"remount,size={kibibytes}k")
    with suppress(OSError):
        subprocess.run(["umount", "--lazy", str(runs)], check=True)


def test_a_disk_that_fills_up_in_one_phase_after_another(
    fresh: Path, sized: Callable[[int], None], diptych: Diptych, expected: Results
) -> None:
    project, phases = fresh, []

    def fills_up() -> None:
        command = diptych(project, "run", "pool", "--in-process").done(4)
        assert "The disk is full" in command.text, command.text
        assert "bytes free" in command.text
        assert not commands.unfinished(project)
        phases.extend([line.split()[0] for line in command.text.splitlines() if line.endswith("starting")][-1:])

    for kibibytes in (64, 12_500, 36_000):
        sized(kibibytes)
        fills_up()
    sized(200_000)
    diptych(project, "run", "pool", "--in-process", "--until", "caption").done()
    sized(shutil.disk_usage(project / "runs").used // 1024 + 512)
    fills_up()
    assert phases == ["ingest", "curate", "prune", "train"]
    sized(200_000)
    diptych(project, "run", "pool", "--in-process").done()
    assert Results.of(project / "runs/pool") == expected
