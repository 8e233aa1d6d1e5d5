"""Samples the driver's machine while a run lasts: processor, memory, disk, graphics cards."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress

EVERY_S = 10.0
GPU_QUERY = "--query-gpu=index,utilization.gpu,memory.used,memory.total"


class Sampler(threading.Thread):
    """Reports use under the names of MLflow's system-metrics page, every `every_s` seconds until `stop`."""

    def __init__(self, report: Callable[[Mapping[str, float], int], object], every_s: float = EVERY_S) -> None:
        super().__init__(daemon=True, name="diptych-system")
        self._report = report
        self._every_s = every_s
        self._stopped = threading.Event()

    def run(self) -> None:
        """The thread's work."""
        import psutil

        psutil.cpu_percent()  # the first call only sets the mark from which the next one measures
        step = 0
        while not self._stopped.wait(self._every_s):
            with suppress(OSError):  # a full disk must not end the run through its record of the disk
                self._report(sample(), step)
            step += 1

    def stop(self) -> None:
        """Ends the thread."""
        self._stopped.set()
        self.join(timeout=self._every_s)


def sample() -> dict[str, float]:
    """One sample: shares in percent, sizes in megabytes (10^6 bytes)."""
    import psutil

    memory, disk = psutil.virtual_memory(), psutil.disk_usage("/")
    return {
        "system/cpu_utilization_percentage": psutil.cpu_percent(),
        "system/system_memory_usage_percentage": memory.percent,
        "system/system_memory_usage_megabytes": memory.used / 1e6,
        "system/disk_usage_percentage": disk.percent,
        **_gpus(),
    }


def _gpus() -> dict[str, float]:
    """Use of the NVIDIA cards, as far as their own tool reports it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    try:
        command = [tool, GPU_QUERY, "--format=csv,noheader,nounits"]
        text = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout  # noqa: S603 - a fixed program
    except (subprocess.SubprocessError, OSError):
        return {}
    return parse_gpus(text)


def parse_gpus(text: str) -> dict[str, float]:
    """The tool's lines `index, percent, MiB used, MiB in all` as metrics; a figure that a card does not report is left out."""
    values: dict[str, float] = {}
    for line in text.splitlines():
        index, *figures = (field.strip() for field in line.split(","))
        numbers = [float(figure) if figure.replace(".", "", 1).isdigit() else None for figure in figures]
        if len(numbers) != 3:
            continue
        busy, used, total = numbers
        if busy is not None:
            values[f"system/gpu_{index}_utilization_percentage"] = busy
        if used is not None:
            values[f"system/gpu_{index}_memory_usage_megabytes"] = used * 2**20 / 1e6
        if used is not None and total:
            values[f"system/gpu_{index}_memory_usage_percentage"] = 100 * used / total
    return values
