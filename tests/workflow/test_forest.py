from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest

from diptych.workflow.forest import Group, Line, forest, ticks


def line(value, low, high, verdict="no difference shown", label="acc1", run=""):
    return Line(label, run, value, low, high, verdict, (f"{value:+.3f}", "p = 1"))


def rectangles(svg):
    return [(float(node.get("x")), node.get("fill"), node.get("stroke")) for node in ET.fromstring(svg).iter("rect")]


def test_differences_stand_in_order_on_one_axis_and_colour_says_the_verdict():
    lines = [line(-0.2, -0.3, -0.1, "worse"), line(0.0, -0.05, 0.05), line(0.1, 0.02, 0.2, "better")]
    svg = forest([Group("s / one", lines[:1]), Group("s / two", lines[1:])], 1)
    (worse, none, better) = rectangles(svg)
    assert worse[0] < none[0] < better[0]
    assert (better[0] - none[0]) == pytest.approx((none[0] - worse[0]) / 2, abs=0.2)
    assert none[1] == "#fff"
    assert len({worse[1], none[2], better[1]}) == 3
    assert worse[1] == worse[2]


@pytest.mark.parametrize(("direction", "left"), [(1, "← worse"), (-1, "← better"), (0, "← lower")])
def test_the_axis_says_which_side_is_better(direction, left):
    texts = re.findall(r">([^<]*[←→][^<]*)<", forest([Group("s", [line(0.1, 0, 0.2)])], direction))
    assert texts[0] == left


def test_zero_is_always_on_the_axis_and_names_are_escaped():
    svg = forest([Group("a<b", [line(5.0, 4.9, 5.1, label="x&y", run="r" * 50)])], 1)
    texts = ["".join(node.itertext()) for node in ET.fromstring(svg).iter("text")]
    assert {"a<b", "x&y", "0"} <= set(texts)
    assert "r" * 29 + "…" in texts


def test_a_difference_of_nothing_has_an_axis():
    assert len(rectangles(forest([Group("s", [line(0.0, 0.0, 0.0)])], 1))) == 1


@pytest.mark.parametrize(("low", "high"), [(-0.013, 0.041), (-3.0, 250.0), (-1e-6, 2e-6), (0.2, 0.9)])
def test_ticks_are_round_few_and_inside(low, high):
    found = ticks(low, high)
    assert 2 <= len(found) <= 8
    assert low <= found[0] < found[-1] <= high
    step = found[1] - found[0]
    assert float(f"{step:.0e}") == pytest.approx(step)
    assert (0 in [round(tick / step) for tick in found]) == (low <= 0 <= high)
