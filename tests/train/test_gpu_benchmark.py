"""The GPU benchmark's script works from end to end on a processor, and prints lines that `run.py` can read."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCRIPT = BENCHMARKS / "gpu" / "bench_gpu.py"


def reader() -> Any:
    spec = importlib.util.spec_from_file_location("benchmarks_run", BENCHMARKS / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_tiny_run_measures_every_part() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--tiny"], capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr
    found = {figure.name for figure in reader().figures("gpu", done.stdout)}
    assert found == {
        "gpu step vit-micro-40 at 16", "gpu loss at 128", "gpu optimizer fused", "gpu optimizer adamw of ours", "gpu optimizer adamp of ours",
    }  # fmt: skip


def test_without_a_card_a_full_run_is_refused() -> None:
    import torch

    if torch.cuda.is_available():
        return
    done = subprocess.run([sys.executable, SCRIPT, "--only", "loss"], capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 2
    assert "there is no GPU here" in done.stderr
