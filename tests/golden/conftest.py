"""`pytest tests/golden --golden-dir DIR` replays the vectors in DIR; without the option, the ones in `vectors/`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
VECTORS = HERE / "vectors"
REPLAYS = HERE / "replay"

if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))  # replays import `_ranks`, and so do the processes that it starts


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden-dir", default=str(VECTORS), metavar="DIR", help="folder with the golden vectors (*.npz) to replay")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test a method: every vector file, and in the default folder every replay as well, so that neither can be forgotten."""
    if "golden_file" not in metafunc.fixturenames:
        return
    # The default covers runs that start above this folder, where pytest reads this file too late for the option.
    folder = Path(metafunc.config.getoption("--golden-dir", default=str(VECTORS))).resolve()
    files = {path.stem: path for path in folder.glob("*.npz")}
    if not files:
        raise pytest.UsageError(f"--golden-dir: no *.npz in {folder}")
    if folder == VECTORS.resolve():
        files |= {path.stem: folder / f"{path.stem}.npz" for path in REPLAYS.glob("*.py")}
    metafunc.parametrize("golden_file", [pytest.param(files[stem], id=stem) for stem in sorted(files)])
