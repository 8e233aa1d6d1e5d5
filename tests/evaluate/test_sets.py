"""Every fault of an evaluation set is refused or flagged, with a sentence that says what to do."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from diptych.core.errors import DataError
from diptych.evaluate import zero_shot
from diptych.evaluate.sets import check_classes, check_rejected, check_templates, near_copies_flag
from diptych.pairs.schema import REJECTS

NAMES = ["cat", "dog", "owl"]


def pairs(labels: list[int | None], names: list[str] = NAMES) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "key": [f"k{row}" for row in range(len(labels))],
            "split": ["test"] * len(labels),
            "label": labels,
            "label_name": [None if label is None or not 0 <= label < len(names) else names[label] for label in labels],
        }
    )


def test_a_good_set_has_nothing_to_flag() -> None:
    assert check_classes(pairs([0, 0, 1, 1, 2, 2]), "test", NAMES) == []
    assert check_classes(pairs([0, 0, 1, 1, 2, 2]), "test") == []


@pytest.mark.parametrize("label", [3, -1, None])
def test_a_label_out_of_range_is_refused(label: int | None) -> None:
    with pytest.raises(DataError, match="out of range") as caught:
        check_classes(pairs([0, 1, 2, label]), "test", NAMES)
    assert "k3" in caught.value.problems[0].got
    assert "0 to 2" in caught.value.problems[0].expected


def test_two_classes_of_one_name_are_refused_unless_allowed() -> None:
    with pytest.raises(DataError, match="share a name") as caught:
        check_classes(pairs([0, 0, 1, 1, 2, 2]), "test", ["cat", "dog", "cat"])
    assert caught.value.problems[0].where == "classes 0 and 2"
    assert "duplicate_names" in caught.value.problems[0].fix
    assert check_classes(pairs([0, 0, 1, 1, 2, 2]), "test", ["cat", "dog", "cat"], duplicates=True) == []
    with pytest.raises(DataError, match="share a class name"):
        check_classes(pairs([0, 1], ["cat", "cat"]), "test")


def test_a_blank_name_is_refused() -> None:
    with pytest.raises(DataError, match="has no name"):
        check_classes(pairs([0, 1]), "test", ["cat", " "])


def test_an_empty_class_is_flagged() -> None:
    (flag,) = check_classes(pairs([0, 0, 2, 2]), "test", NAMES)
    assert flag.startswith("1 of 3 classes have no example in the split test (dog)")
    assert "bring examples" in flag


def test_a_class_with_one_example_is_flagged() -> None:
    (flag,) = check_classes(pairs([0, 0, 1, 2, 2]), "test", NAMES)
    assert flag.startswith("1 of 3 classes have a single example in the split test (dog)")


def test_many_classes_are_not_listed_whole() -> None:
    names = [f"thing {number}" for number in range(50)]
    flag, _ = check_classes(pairs([0], names), "test", names)
    assert flag.startswith("49 of 50 classes")
    assert "thing 5, …" in flag


@pytest.mark.parametrize("template", ["a photo", "", "a photo of {c}"])
def test_a_template_without_a_place_for_the_name_is_refused(template: str) -> None:
    with pytest.raises(DataError, match="template 2") as caught:
        check_templates(["a {}", template])
    assert "{}" in caught.value.problems[0].fix


def test_a_template_that_stands_twice_is_refused() -> None:
    with pytest.raises(DataError, match="template 3"):
        check_templates(["a {}", "{}", "a {}"])
    check_templates(["a {}", "{}"])


def test_examples_that_left_are_refused_or_flagged_by_reason() -> None:
    rows = [{"key": f"k{number}", "reason": reason} for number, reason in enumerate(["truncated", "truncated", "label out of range"])]
    rejected = pl.DataFrame(rows, schema=REJECTS)
    flags = check_rejected(rejected, 7)
    assert flags[0].startswith("2 of 10 examples could not be used (truncated), e.g. k0")
    with pytest.raises(DataError, match="do not fit") as caught:
        check_rejected(rejected, 7, ["label out of range"])
    assert caught.value.problems[0].where == "k2"


def test_near_copies_are_counted() -> None:
    assert near_copies_flag(np.zeros(4, bool)) == []
    (flag,) = near_copies_flag(np.array([True, False, False, False]))
    assert flag.startswith("1 of 4 pictures (25.0%) have a near copy")


def test_names_in_another_order_are_found_after_measuring() -> None:
    """The shuffled-label check: predictions that fit a re-ordering of the classes far better than the classes as given."""
    label_N = np.arange(300) % 3
    order = zero_shot.class_order((label_N + 1) % 3, label_N, [f"k{row}" for row in range(300)])
    assert order.suspect
    assert not zero_shot.class_order(label_N, label_N, [f"k{row}" for row in range(300)]).suspect


def test_a_listed_class_without_example_competes() -> None:
    known, rows = zero_shot.classes(pairs([0, 2, 2]), "test", names=NAMES)
    assert known.names == NAMES
    assert known.label_N.tolist() == [0, 2, 2]
    assert rows.height == 3
    closed_up, _ = zero_shot.classes(pairs([0, 2, 2]), "test")
    assert closed_up.names == ["cat", "owl"]
