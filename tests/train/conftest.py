"""A small pair dataset on disk, made of drawings, for the tests of the training room."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
for folder in (HERE, HERE.parent / "golden"):  # `tiny` is also imported by processes that the tests start; `_ranks` starts them
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


@pytest.fixture(scope="session")
def dataset_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny import write_dataset

    root = tmp_path_factory.mktemp("pairs") / "data"
    write_dataset(root, rows=40)
    return root
