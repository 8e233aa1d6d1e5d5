"""Weights as numbers on a grid of a few levels, and their bit-packed file: how a weight signature is kept small.

Source: Cai et al., Robust Weight Signatures (ICML 2023), section on compactness, with its published quantisers: `linear`, `tanh` and `log`.
A tensor costs ceil(log2 levels) bits a weight and two float64, the ends of its grid.

Codes: with `linear` and `tanh` the index on the grid. With `log`, half = levels // 2: the index for positive weights, half + index for
negative ones, 2 * half for exact zeros.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diptych.adapt.states import State
from diptych.core.errors import ConfigError, DataError

Kind = Literal["linear", "tanh", "log"]
Range = tuple[float, float]

FORMAT = "diptych-weight-codes-1"
RANGES = "ranges"
TANH_LIMIT = 15.0
"""Beyond it tanh is so near to 1 that float64 cannot lead back."""


@dataclass(frozen=True)
class Coded:
    """One quantised state.

    Attributes:
        codes: int32 tensors of the weights' shapes; what a code means stands at the top of this file.
        ranges: the ends (low, high) of each tensor's grid, in units of the weight, of its tanh, or of log2 of its magnitude.
        levels, kind: the quantiser.
    """

    codes: Mapping[str, Tensor]
    ranges: Mapping[str, Range]
    levels: int
    kind: Kind

    def decode(self) -> dict[str, Tensor]:
        """The quantised weights, float64."""
        return {name: _decode(code, self.ranges[name], self.levels, self.kind) for name, code in self.codes.items()}

    @property
    def size_bytes(self) -> int:
        """Bytes of packed codes and ranges, without the names and shapes in the file's header."""
        return sum((code.numel() * _bits(code) + 7) // 8 + 16 for code in self.codes.values())


def quantise(signatures: Sequence[State], levels: int, kind: Kind = "linear") -> list[Coded]:
    """Quantises signatures tensor by tensor, on one grid a tensor for all signatures together; rounds half to even.

    Args:
        signatures: one or more, with the same names; finite.
        levels: points of the grid (not bits), >= 2. `log` spends half of them on each sign. A grid of two points must be symmetric.
        kind: `linear` spaces the points evenly, `tanh` evenly after tanh (finer around 0), `log` evenly in log2 of the magnitude.

    Exact zeros stay zero under `log`; a constant tensor stays as it is. Raises ConfigError for levels that leave fewer than two points,
    DataError for weights that are not finite or too large for `tanh`.
    """
    points = grid_points(levels, kind)
    codes: list[dict[str, Tensor]] = [{} for _ in signatures]
    ranges: dict[str, Range] = {}
    for name in signatures[0]:
        stacked = torch.stack([signature[name].detach().double() for signature in signatures])
        values = _onto_axis(_checked(stacked, kind, name), kind)
        low, high = ranges[name] = _range(values)
        if points == 2 and low not in (high, -high):
            raise ConfigError.at("Two levels need a symmetric range", "levels", levels, "at least 3 (6 for log), or min = -max")
        index = torch.zeros_like(values) if low == high else torch.round((values - low) / (high - low) * (points - 1))
        code = _signed(index, stacked, points) if kind == "log" else index
        for number, row in enumerate(code.to(torch.int32)):
            codes[number][name] = row
    return [Coded(code, ranges, levels, kind) for code in codes]


def grid_points(levels: int, kind: Kind) -> int:
    """Points of the grid: `levels`, or half of them for each sign under `log`. Raises ConfigError for fewer than two."""
    points = levels // 2 if kind == "log" else levels
    if points < 2:
        raise ConfigError.at("Too few levels", "levels", levels, "at least 4 for log, 2 for linear and tanh")
    return points


def _checked(values: Tensor, kind: Kind, name: str) -> Tensor:
    largest = float(values.abs().max()) if values.numel() else 0.0
    if not np.isfinite(largest) or (kind == "tanh" and largest > TANH_LIMIT):
        expected = "finite weights" + (f" of at most {TANH_LIMIT}" if kind == "tanh" else "")
        raise DataError.at("A signature cannot be quantised", name, largest, expected)
    return values


def _onto_axis(values: Tensor, kind: Kind) -> Tensor:
    """Where the grid is even. Zeros have no logarithm; theirs is set below by the smallest that there is."""
    if kind == "linear":
        return values
    if kind == "tanh":
        return values.tanh()
    zero = values == 0
    exponent = values.abs().log2()
    least = float(exponent[~zero].min()) if bool((~zero).any()) else 0.0
    return exponent.masked_fill(zero, least)


def _range(values: Tensor) -> Range:
    return (float(values.min()), float(values.max())) if values.numel() else (0.0, 0.0)


def _signed(index: Tensor, values: Tensor, half: int) -> Tensor:
    return torch.where(values == 0, 2.0 * half, torch.where(values < 0, index + half, index))


def _decode(code: Tensor, ends: Range, levels: int, kind: Kind) -> Tensor:
    points = grid_points(levels, kind)
    low, high = ends
    index = code.double() if kind != "log" else (code % points).double()
    value = index / (points - 1) * (high - low) + low
    if kind == "linear":
        return value
    if kind == "tanh":
        return value.atanh()
    sign = torch.where(code == 2 * points, 0.0, torch.where(code >= points, -1.0, 1.0))
    return sign * torch.exp2(value)


# ---------------------------------------------------------------- the file


def save(coded: Coded, path: Path) -> int:
    """Writes a quantised state as safetensors with packed codes; gives the file's bytes, header included."""
    from safetensors.torch import save_file

    shapes = {name: list(code.shape) for name, code in coded.codes.items()}
    bits = {name: _bits(code) for name, code in coded.codes.items()}
    header = {"format": FORMAT, "levels": coded.levels, "kind": coded.kind, "shapes": shapes, "bits": bits}
    tensors = {f"codes/{name}": torch.from_numpy(_pack(code, bits[name])) for name, code in coded.codes.items()}
    tensors[RANGES] = torch.tensor([coded.ranges[name] for name in shapes], dtype=torch.float64).view(-1, 2)
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, metadata={"codes": json.dumps(header)})
    partial.replace(path)
    return path.stat().st_size


def load(path: Path) -> Coded:
    """A quantised state from its file. Raises DataError if it is missing, damaged or something else."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["codes"])
            if header["format"] != FORMAT:
                raise ValueError(f"format {header['format']!r}")
            ranges = {name: (float(low), float(high)) for name, (low, high) in zip(header["shapes"], file.get_tensor(RANGES), strict=True)}
            codes = {
                name: _unpack(file.get_tensor(f"codes/{name}").numpy(), header["bits"][name], shape)
                for name, shape in header["shapes"].items()
            }
        grid_points(header["levels"], header["kind"])
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise DataError.at("This is no file of quantised weights", path, str(error), f"a file in the format {FORMAT}") from error
    return Coded(codes, ranges, header["levels"], header["kind"])


def _bits(code: Tensor) -> int:
    """Bits a code needs: of those that occur, so that the code of zero costs nothing where there is none."""
    return max(1, int(code.max()).bit_length()) if code.numel() else 1


def _pack(code: Tensor, bits: int) -> NDArray[np.uint8]:
    flat = code.cpu().numpy().reshape(-1, 1).astype(np.uint32)
    return np.packbits(((flat >> np.arange(bits, dtype=np.uint32)) & 1).astype(np.uint8))


def _unpack(packed: NDArray[np.uint8], bits: int, shape: Sequence[int]) -> Tensor:
    count = int(np.prod(shape, dtype=np.int64))
    if not 1 <= bits <= 31 or len(packed) != (count * bits + 7) // 8:
        raise ValueError(f"{len(packed)} bytes for {count} codes of {bits} bits")
    digit = np.unpackbits(packed, count=count * bits).reshape(count, bits).astype(np.int32)
    return torch.from_numpy((digit << np.arange(bits, dtype=np.int32)).sum(axis=1, dtype=np.int32).reshape(shape))
