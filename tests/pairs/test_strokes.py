from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from diptych.pairs.sources.digits import WORDS, load
from diptych.pairs.strokes import describe


def drawing() -> np.ndarray:
    """A ring of ink, 12 x 12."""
    grey = np.zeros((12, 12))
    grey[2:10, 3:9] = 1.0
    grey[4:8, 5:7] = 0.0
    return grey


def test_a_ring_has_a_loop_and_what_is_cut_open_has_none() -> None:
    assert describe(drawing()) == "faint narrow drawing with one loop"
    opened = drawing()
    opened[4:8, 5:9] = 0.0
    assert describe(opened).endswith("without a loop")
    double = drawing()
    double[5:6, 5:7] = 1.0
    assert describe(double).endswith("with two loops")


def test_width_and_tone_are_told() -> None:
    assert describe(np.repeat(drawing(), 1, axis=1)[:, 2:10]).split()[1] == "medium"
    assert describe(drawing()[:, 3:9]).split()[:2] == ["bold", "wide"]
    assert describe(np.zeros((4, 4))) == "empty drawing"


def test_the_size_of_the_picture_does_not_matter_and_no_number_is_named() -> None:
    said = Counter()
    for picture in load()[0][:200]:
        grey = picture / 16
        text = describe(grey)
        assert describe(grey.repeat(3, axis=0).repeat(3, axis=1)) == text
        assert not {"zero", *WORDS[3:]} & set(text.split())
        said[text] += 1
    assert len(said) > 12
    assert max(said.values()) < 60


@pytest.mark.parametrize("level", [0.29, 0.31])
def test_ink_begins_at_a_level(level: float) -> None:
    assert (describe(np.full((4, 4), level)) == "empty drawing") == (level < 0.3)
