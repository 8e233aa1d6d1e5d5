"""A raw pair whose picture already lies in a tar: it is pointed at, not copied."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from diptych.core.points import RawPair
from diptych.pairs.manifest import ShardEntry

HEAD_BYTES = 1 << 16


def _nothing(size: int) -> bytes:
    raise AssertionError(f"a placed pair without a loader was asked for {size} bytes")


@dataclass(frozen=True)
class PlacedPair(RawPair):
    """A pair whose picture is `size` bytes from `offset` of the tar `shard`.

    Attributes:
        entry: the tar itself, for the manifest.
        load: the first `n` bytes of the picture; used once, in the process that made the pair.
    """

    shard: str = ""
    offset: int = 0
    size: int = 0
    entry: ShardEntry = field(default_factory=lambda: ShardEntry(uri="", size_bytes=0))
    load: Callable[[int], bytes] = _nothing
