"""The datasets that a dataset came from, as far as they lie beside it."""

from __future__ import annotations

from pathlib import Path

from diptych.core.errors import DiptychError
from diptych.pairs.dataset import PairDataset
from diptych.pairs.manifest import NAME


def of(dataset: PairDataset) -> list[PairDataset]:
    """From the first dataset to this one: each the first parent of the next, looked for by digest among the folders beside it.

    A phase that several runs share lies where it was made, so folders beside the dataset's own, and one level up, are looked into.
    """
    chain, seen = [dataset], {dataset.digest}
    while chain[0].manifest.parents:
        wanted = chain[0].manifest.parents[0]
        parent = _find(chain[0].root, wanted)
        if parent is None or parent.digest in seen:
            break
        seen.add(parent.digest)
        chain.insert(0, parent)
    return chain


def _find(root: Path, wanted: str) -> PairDataset | None:
    for folder in dict.fromkeys(path.parent for base in (root.parent, root.parent.parent) for path in sorted(base.glob(f"*/{NAME}"))):
        if folder == root:
            continue
        try:
            found = PairDataset.open(folder)
        except DiptychError:  # another program's folder, or one that is being written
            continue
        if found.digest == wanted:
            return found
    return None
