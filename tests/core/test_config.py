"""Configuration errors: all at once, each with its path, what came, what is allowed and the nearest name."""

from __future__ import annotations

from typing import Literal

import pytest
from pydantic import Field

from diptych.core.config import Config
from diptych.core.errors import ConfigError


class Inner(Config):
    method: Literal["adamw", "adamp"] = "adamw"
    lr: float = Field(1e-3, gt=0)


class Outer(Config):
    inner: Inner = Inner()
    sizes: tuple[int, ...] = (1, 2)


def test_every_problem_is_reported_at_once_with_its_path() -> None:
    with pytest.raises(ConfigError) as caught:
        Outer.parse({"inner": {"method": "adampp", "lrr": 1, "lr": -1}, "sizes": ["3"], "iner": {}}, "train")
    found = {problem.where: problem for problem in caught.value.problems}
    assert set(found) == {"train.inner.method", "train.inner.lr", "train.inner.lrr", "train.sizes.0", "train.iner"}
    assert found["train.inner.method"].fix == "did you mean 'adamp'?"
    assert found["train.inner.lrr"].fix == "did you mean 'lr'?"
    assert found["train.iner"].fix == "did you mean 'inner'?"
    assert found["train.inner.lr"].got == "-1"


def test_types_are_named_in_words_of_yaml() -> None:
    with pytest.raises(ConfigError) as caught:
        Outer.parse({"inner": {"lr": "1e-3"}, "sizes": {"a": 1}})
    found = {problem.where: (problem.expected, problem.fix) for problem in caught.value.problems}
    assert found["inner.lr"] == ("a number", "take the quotes away: what stands in quotes is text")
    assert found["sizes"] == ("a list, as in `[…]`", "")
    with pytest.raises(ConfigError) as caught:
        Outer.parse({"inner": [], "sizes": ["two"]})
    found = {problem.where: (problem.expected, problem.fix) for problem in caught.value.problems}
    assert found == {"inner": ("a mapping, as in `{key: value}`", ""), "sizes.0": ("a whole number", "")}


def test_values_are_never_coerced_but_lists_become_tuples() -> None:
    assert Outer.parse({"sizes": [3, 4]}).sizes == (3, 4)
    assert Inner.parse({"lr": 1}).lr == 1.0
    with pytest.raises(ConfigError):
        Outer.parse({"sizes": [3.5]})


def test_a_configuration_is_frozen_and_plain_gives_all_defaults() -> None:
    config = Outer()
    with pytest.raises(Exception, match="frozen"):
        config.sizes = (9,)  # type: ignore[misc]
    assert config.plain() == {"inner": {"method": "adamw", "lr": 0.001}, "sizes": [1, 2]}


def test_a_huge_value_is_cut_in_the_message() -> None:
    with pytest.raises(ConfigError) as caught:
        Outer.parse({"inner": "x" * 1_000_000})
    assert len(str(caught.value)) < 1000
