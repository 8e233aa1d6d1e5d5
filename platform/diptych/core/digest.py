"""Digests: the names by which data, code and results refer to each other. All are SHA-256, written `sha256:<hex>`."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

BLOCK_BYTES = 1 << 20


def of_bytes(data: bytes) -> str:
    """The digest of a byte string."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def of_plain(value: Any) -> str:
    """The digest of JSON-able data; keys are sorted, so that the order of a mapping does not matter."""
    return of_bytes(json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode())


def of_file(path: Path) -> str:
    """The digest of a file, read in blocks of one MiB."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            sha.update(block)
    return f"sha256:{sha.hexdigest()}"


def of_tree(root: Path, pattern: str = "**/*") -> str:
    """The digest of the files below a folder: relative names and contents, in sorted order."""
    files = sorted(path for path in root.glob(pattern) if path.is_file() and "__pycache__" not in path.parts)
    return of_plain([[path.relative_to(root).as_posix(), of_file(path)] for path in files])


def short(digest: str) -> str:
    """Ten hexadecimal digits: enough for a person to tell two digests apart."""
    return digest.removeprefix("sha256:")[:10]
