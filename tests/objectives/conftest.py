"""Puts this folder, that of `_ranks` (real gloo processes) and that of `tiny` on the path, here and in the processes that are started."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent

for folder in (HERE, HERE.parent / "golden", HERE.parent / "train"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
