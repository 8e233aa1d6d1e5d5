"""How a replay is held against its golden vectors; see README.md beside this file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]
Tolerance = Mapping[str, tuple[float, float]]

EXACT = (0.0, 0.0)
KINDS = {"f": "float", "c": "complex", "i": "integer", "u": "integer", "b": "bool", "U": "string", "S": "bytes"}


class Inputs(Mapping[str, Array]):
    """The inputs of a golden file, and nothing else: reading an output is an AssertionError, not a KeyError."""

    def __init__(self, vectors: Mapping[str, Array], patterns: Iterable[str]) -> None:
        self._inputs = {key: vectors[key] for key in vectors if matches(key, patterns)}
        self._outputs = frozenset(vectors) - frozenset(self._inputs)

    def __getitem__(self, key: str) -> Array:
        assert key not in self._outputs, f"the replay read {key!r}, which is an output: a replay computes outputs, it never sees them"
        return self._inputs[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._inputs)

    def __len__(self) -> int:
        return len(self._inputs)


def matches(key: str, patterns: Iterable[str]) -> bool:
    """Whether any glob pattern matches the whole key; `*` also crosses slashes."""
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def mismatches(vectors: Mapping[str, Array], inputs: Inputs, replayed: Mapping[str, object], tolerance: Tolerance) -> list[str]:
    """Everything that is wrong with a replay, a line a key; empty if it is right."""
    given = set(inputs)
    outputs = [key for key in vectors if key not in given]
    wrong = [f"{key}: is an input (INPUTS), yet the replay returned it" for key in replayed if key in given]
    wrong += [f"{key}: the replay returned it, the file does not hold it" for key in replayed if key not in vectors]
    wrong += [f"{key}: an output that the replay did not return (or an input missing in INPUTS)" for key in outputs if key not in replayed]
    if not outputs:
        wrong.append("no outputs: INPUTS matches every key of the file")
    for key in outputs:
        if key in replayed and (fault := difference(np.asarray(replayed[key]), vectors[key], *tolerance_of(key, tolerance))):
            wrong.append(f"{key}: {fault}")
    return wrong


def tolerance_of(key: str, tolerance: Tolerance) -> tuple[float, float]:
    """The (rtol, atol) of the first pattern that matches; exact if none does."""
    return next((bounds for pattern, bounds in tolerance.items() if fnmatchcase(key, pattern)), EXACT)


def difference(got: Array, expected: Array, rtol: float, atol: float) -> str:
    """What tells two arrays apart beyond the tolerance; empty if nothing does. NaN equals NaN; strings and bools are exact."""
    kinds = KINDS.get(got.dtype.kind, str(got.dtype)), KINDS.get(expected.dtype.kind, str(expected.dtype))
    if kinds[0] != kinds[1]:
        return f"got {kinds[0]}, expected {kinds[1]}"
    if got.shape != expected.shape:
        return f"got shape {got.shape}, expected {expected.shape}"
    if kinds[0] not in ("float", "complex", "integer") or (rtol, atol) == EXACT:
        floats = kinds[0] in ("float", "complex")
        if np.array_equal(got, expected, equal_nan=floats):
            return ""
        unequal = (got != expected) & ~((got != got) & (expected != expected)) if floats else got != expected
        at = tuple(int(index) for index in np.argwhere(unequal)[0])
        return f"{int(unequal.sum())} of {got.size} elements differ, first at {at}: got {got[at]!r}, expected {expected[at]!r}"
    try:
        np.testing.assert_allclose(got, expected, rtol=rtol, atol=atol, equal_nan=True, verbose=False)
    except AssertionError as error:
        return " ".join(str(error).split())
    return ""
