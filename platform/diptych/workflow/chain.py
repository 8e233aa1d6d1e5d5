"""The datasets that a dataset came from, as far as they lie beside it."""

from __future__ import annotations

import itertools
from pathlib import Path

from diptych.core.errors import DiptychError
from diptych.pairs.dataset import PairDataset
from diptych.pairs.manifest import NAME


def of(dataset: PairDataset) -> list[PairDataset]:
    """From the first dataset to this one: each the first parent of the next, looked for by digest among the folders beside it.

    A phase that several runs share lies where it was made, so the folders beside the dataset's own are looked into first, then those one
    level up and the phases of the runs there.
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
    beside, above = root.parent, root.parent.parent
    places = itertools.chain.from_iterable(
        sorted(base.glob(pattern)) for base, pattern in ((beside, f"*/{NAME}"), (above, f"*/{NAME}"), (above, f"*/*/{NAME}"))
    )
    seen = {root}
    for folder in (path.parent for path in places):
        if folder in seen:
            continue
        seen.add(folder)
        try:
            found = PairDataset.open(folder)
        except DiptychError:  # another program's folder, or one that is being written
            continue
        if found.digest == wanted:
            return found
    return None
