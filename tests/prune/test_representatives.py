from __future__ import annotations

import numpy as np
import pytest

from diptych.prune.representatives import nearest_to_centres, representatives


def test_a_picture_is_taken_once_unless_asked_for_as_published() -> None:
    logits = np.array([[0.0], [1.0], [9.0]])
    centres = np.array([[0.1], [0.2]])
    assert nearest_to_centres(logits, centres).tolist() == [0, 1]
    assert nearest_to_centres(logits, centres, distinct=False).tolist() == [0, 0]
    assert nearest_to_centres(logits, centres, 2, distinct=False).tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("count", [1, 3, 10, 20, 25])
def test_any_number_of_different_pictures(count: int) -> None:
    logits = np.random.default_rng(0).normal(size=(25, 4))
    picked = representatives(logits, count, seed=0)
    assert len(set(picked.tolist())) == count
    assert picked.tolist() == representatives(logits, count, seed=0).tolist()


def test_every_heap_has_its_representative() -> None:
    heaps = np.repeat(np.eye(3) * 100, 30, axis=0) + np.random.default_rng(0).normal(size=(90, 3))
    assert sorted(row // 30 for row in representatives(heaps, 3, seed=5)) == [0, 1, 2]
