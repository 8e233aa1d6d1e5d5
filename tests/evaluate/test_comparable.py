from __future__ import annotations

import numpy as np
import pytest

from diptych.core.errors import ConfigError, DataError
from diptych.core.points import Metric
from diptych.evaluate.comparable import compare, differing

HALF = np.arange(40) % 2


def row(values, *, task="zero-shot", settings=None, keys=None, metric="acc1"):
    values = np.asarray(values, np.float32)
    keys = keys or [str(i) for i in range(len(values))]
    return Metric("s", task, metric, float(values.mean()), len(values), 0, 1, settings or {}, keys, values)


def median(value):
    return Metric("s", "retrieval", "median_rank", value, 40, 1, 5)


def test_all_rows_are_corrected_together_and_a_median_is_shown_without_a_test():
    found = compare([row(HALF), row(HALF, task="x"), median(3)], {"b": [row(np.ones(40)), row(HALF, task="x"), median(2)]}, seed=0)["b"]
    assert [entry.key for entry in found.compared] == ["s/zero-shot/acc1", "s/x/acc1"]
    assert found.compared[0].p_holm == pytest.approx(2 * found.compared[0].test.p_value)
    assert (found.compared[0].base, found.compared[0].value, found.compared[1].p_holm) == (0.5, 1.0, 1.0)
    assert [tuple(entry) for entry in found.untested] == [("s/retrieval/median_rank", 3, 2)]
    assert found.left_out == []


def test_the_correction_spans_all_checkpoints():
    better, base = np.ones(40), [row(HALF)]
    alone = compare(base, {"b": [row(better)]}, seed=0)["b"].compared[0]
    beside = compare(base, {"b": [row(better)], "c": [row(HALF)], "d": [row(HALF)]}, seed=0)["b"].compared[0]
    assert beside.test == alone.test
    assert beside.p_holm == pytest.approx(3 * alone.p_holm)


def test_a_comparison_turned_round_has_the_other_sign():
    rng = np.random.default_rng(0)
    a, b = rng.random(60), rng.random(60)
    there = compare([row(a, metric="log_loss")], {"b": [row(b, metric="log_loss")]}, seed=3)["b"].compared[0].test
    back = compare([row(b, metric="log_loss")], {"a": [row(a, metric="log_loss")]}, seed=3)["a"].compared[0].test
    assert (there.difference, there.effect, there.higher) == pytest.approx((-back.difference, -back.effect, back.lower))
    assert there.test == "bootstrap"


def unequal():
    """The baseline's rows, another's, and the words that the reason must hold, by key."""
    base = [
        row(HALF),
        row(HALF, task="templates", settings={"templates": "sha256:" + "ab" * 32, "n": 1}),
        row(HALF, task="names", settings={"classnames": "x"}),
        row(HALF, task="resize", settings={"preprocessing": {"resize": "bicubic", "crop": 1}}),
        row(HALF, task="only"),
        row(HALF, task="keys"),
        row([1, 0], task="twice"),
        row([1, 0], task="nan"),
        row([1, 0], task="no-values"),
    ]
    other = [
        row(HALF),
        row(HALF, task="templates", settings={"templates": "sha256:" + "cd" * 32, "n": 1}),
        row(HALF, task="names"),
        row(HALF, task="resize", settings={"preprocessing": {"resize": "nearest", "crop": 1}}),
        row(HALF, task="keys", keys=[str(i) for i in range(1, 41)]),
        row([1, 0], task="twice"),
        row([0, 1], task="twice"),
        row([1, np.nan], task="nan"),
        Metric("s", "no-values", "acc1", 0.5, 2, 0, 1),
    ]
    words = {
        "s/templates/acc1": "templates differs: ababababab and cdcdcdcdcd",
        "s/names/acc1": "classnames differs: x and None",
        "s/resize/acc1": "preprocessing.resize differs: bicubic and nearest",
        "s/only/acc1": "only the baseline has it",
        "s/keys/acc1": "other examples: 2 keys are on one side only (0, 40)",
        "s/twice/acc1": "several rows of one name",
        "s/nan/acc1": "not a finite number",
        "s/no-values/acc1": "one side has no values by example",
    }
    return base, other, words


def test_rows_that_cannot_be_compared_are_refused_all_at_once():
    base, other, words = unequal()
    with pytest.raises(DataError, match="not measured the same way") as caught:
        compare(base, {"b": other}, seed=0)
    for key, reason in words.items():
        assert key in str(caught.value)
        assert reason in str(caught.value)
    assert "s/zero-shot/acc1" not in str(caught.value)
    assert "'n'" not in str(caught.value)
    assert "--common" in str(caught.value)


def test_what_is_common_is_compared_and_every_other_row_is_listed():
    base, other, words = unequal()
    found = compare(base, {"b": other}, seed=0, common=True)["b"]
    assert [entry.key for entry in found.compared] == ["s/zero-shot/acc1"]
    assert found.compared[0].p_holm == found.compared[0].test.p_value, "what is left out takes no part in the correction"
    assert {entry.key for entry in found.left_out} == words.keys()
    for entry in found.left_out:
        assert words[entry.key] in entry.why


def test_one_reason_is_told_once_with_its_figures():
    metrics = [f"m{i}" for i in range(6)]
    base, other = ([row(HALF, metric=m, settings={"templates": t}) for m in metrics] for t in "xy")
    with pytest.raises(DataError) as caught:
        compare(base, {"b": other}, seed=0)
    assert len(caught.value.problems) == 1
    assert "and 2 more" in caught.value.problems[0].where


@pytest.mark.parametrize("rows", [[median(3)], [row(HALF, task="elsewhere")], []])
def test_nothing_to_test_is_an_error_even_for_what_is_common(rows):
    with pytest.raises(DataError, match="nothing to compare"):
        compare([row(HALF), median(2)] if rows != [median(3)] else [median(2)], {"b": rows}, seed=0, common=True)


def test_too_few_resamples_are_refused():
    with pytest.raises(ConfigError):
        compare([row(HALF)], {"b": [row(HALF)]}, seed=0, resamples=10)


def test_differing_names_nested_entries_by_path():
    assert differing({"a": {"x": 1, "y": [1]}, "b": 2}, {"a": {"x": 1, "y": [2]}, "c": None}) == {"a.y": ([1], [2]), "b": (2, None)}
