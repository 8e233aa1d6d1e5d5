"""Puts this folder and that of `_ranks` (real gloo processes) on the path, here and in the processes that it starts."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent

for folder in (HERE, HERE.parent / "golden"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
