"""Puts the folder of `_ranks` (real gloo processes) on the path, here and in the processes that it starts."""

from __future__ import annotations

import sys
from pathlib import Path

RANKS = Path(__file__).parents[1] / "golden"

if str(RANKS) not in sys.path:
    sys.path.insert(0, str(RANKS))
