"""Replays the golden vectors of the methods with the project's implementations; the contract is in README.md."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from _compare import Inputs, difference, mismatches, tolerance_of

REPLAYS = Path(__file__).parent / "replay"


def test_replay(golden_file: Path) -> None:
    path = REPLAYS / f"{golden_file.stem}.py"
    if not path.exists():
        pytest.skip(f"{golden_file.name} has no replay: the method is not in the catalogue yet")
    if not golden_file.exists():
        pytest.fail(f"replay/{path.name} has no vectors: {golden_file.name} is missing", pytrace=False)
    module = load(path)
    for name in ("INPUTS", "TOLERANCE", "replay"):
        if not hasattr(module, name):
            pytest.fail(f"replay/{path.name} lacks {name}", pytrace=False)
    with np.load(golden_file, allow_pickle=False) as archive:
        vectors = dict(archive)
    inputs = Inputs(vectors, module.INPUTS)
    wrong = mismatches(vectors, inputs, module.replay(inputs), module.TOLERANCE)
    if wrong:
        pytest.fail("\n".join([f"{golden_file.name}: {len(wrong)} mismatches", *wrong]), pytrace=False)


def load(path: Path) -> ModuleType:
    """Loads a replay by path, for the names of methods hold hyphens."""
    name = f"golden_replay_{path.stem.replace('-', '_')}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


# ---------------------------------------------------------------- the harness itself

VECTORS = {"a/in/x": np.arange(3.0), "a/out/double": np.arange(3.0) * 2, "a/out/count": np.asarray(3)}


def judge(replayed: dict[str, object], tolerance: dict[str, tuple[float, float]] | None = None) -> list[str]:
    return mismatches(VECTORS, Inputs(VECTORS, ("*/in/*",)), replayed, tolerance or {})


def test_a_right_replay_passes() -> None:
    assert judge({"a/out/double": [0.0, 2.0, 4.0], "a/out/count": 3}) == []


@pytest.mark.parametrize(
    ("replayed", "word"),
    [
        ({"a/out/double": [0.0, 2.0, 4.0]}, "did not return"),
        ({"a/out/double": [0.0, 2.0, 4.0], "a/out/count": 3, "a/out/more": 1}, "does not hold"),
        ({"a/out/double": [0.0, 2.0, 4.0], "a/out/count": 3, "a/in/x": [0.0, 1.0, 2.0]}, "is an input"),
        ({"a/out/double": [0.0, 2.0, 4.1], "a/out/count": 3}, "first at (2,)"),
        ({"a/out/double": [[0.0, 2.0, 4.0]], "a/out/count": 3}, "shape"),
        ({"a/out/double": [0.0, 2.0, 4.0], "a/out/count": 3.0}, "got float, expected integer"),
    ],
)
def test_a_wrong_replay_is_reported(replayed: dict[str, object], word: str) -> None:
    assert word in "\n".join(judge(replayed))


def test_a_replay_cannot_read_outputs() -> None:
    inputs = Inputs(VECTORS, ("*/in/*",))
    assert list(inputs) == ["a/in/x"]
    with pytest.raises(AssertionError, match="is an output"):
        inputs["a/out/double"]
    with pytest.raises(AssertionError, match="is an output"):
        "a/out/double" in inputs  # noqa: B015
    with pytest.raises(KeyError):
        inputs["a/in/unknown"]


def test_inputs_that_swallow_every_key_are_refused() -> None:
    assert "no outputs" in mismatches(VECTORS, Inputs(VECTORS, ("*",)), {}, {})[0]


def test_the_first_tolerance_that_matches_wins() -> None:
    assert tolerance_of("a/out/double", {"*/count": (1, 1), "*/double": (0, 0.2), "*": (9, 9)}) == (0, 0.2)
    assert judge({"a/out/double": [0.0, 2.0, 4.1], "a/out/count": 3}, {"*/double": (0, 0.2)}) == []


@pytest.mark.parametrize(
    ("got", "expected", "same"),
    [
        ([1.0, np.nan], [1.0, np.nan], True),
        ([1.0, np.nan], [1.0, 2.0], False),
        ([1.0, np.inf], [1.0, np.inf], True),
        (["a", "b"], ["a", "c"], False),
        ([True], [False], False),
        (np.uint8([3]), np.int64([3]), True),
    ],
)
def test_difference(got: list[object], expected: list[object], same: bool) -> None:
    for bounds in [(0.0, 0.0), (1e-9, 1e-9)]:
        assert (difference(np.asarray(got), np.asarray(expected), *bounds) == "") is same
