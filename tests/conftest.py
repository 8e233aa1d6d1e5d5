"""Shared by all tests: calm environments, nothing from the user's own."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("DVC_NO_ANALYTICS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.pop("MLFLOW_TRACKING_URI", None)
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # started in the background of a script; tests of Ctrl-C need it
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _first_import_path() -> list[str]:
    return list(sys.path)


@pytest.fixture(autouse=True)
def _import_path(_first_import_path: list[str]) -> Iterator[None]:
    """Puts `sys.path` back: MLflow adds the code of every model that it loads, and processes started later would import that.

    The path is that of the session's start, not of the test's: a fixture of a whole module may have loaded a model before.
    """
    yield
    sys.path[:] = _first_import_path
