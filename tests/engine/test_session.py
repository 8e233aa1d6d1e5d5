"""Where work runs: what a session changes in its process."""

from __future__ import annotations

import subprocess
import sys


def test_ctrl_c_wakes_a_main_thread_that_waits_for_a_lock() -> None:
    """Polars hooks SIGINT so that system calls restart; a wait for a lock would not notice it."""
    code = """
import os, signal, threading
import polars
from diptych.engine.session import Session

with Session(in_process=True):
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        print("woken")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "woken\n", done.stderr
