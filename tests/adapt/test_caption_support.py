from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from diptych.adapt.caption_support import class_prompts, for_every_class, paint, support_prompts
from diptych.core.errors import ConfigError, DataError

CAPTIONS = {"1_23": "A red one on grass.", "12_3": "A small one.", "x": "One with {} braces."}
GREY = np.full((4, 4, 3), 90, dtype=np.uint8)


def test_a_prompt_is_class_and_caption() -> None:
    prompts = list(itertools.islice(class_prompts("tench", CAPTIONS, 0), 7))
    for prompt in prompts:
        assert prompt.text == "A photo of tench. " + CAPTIONS[prompt.caption_key]
    assert next(class_prompts("Chad", {"a": "Sand."}, 0, "In {}. ")).text == "In Chad. Sand."


def test_captions_are_cycled_in_one_shuffled_order_and_keys_are_unique() -> None:
    prompts = list(itertools.islice(class_prompts("tench", CAPTIONS, 0), 9))
    order = [prompt.caption_key for prompt in prompts]
    assert order == order[:3] * 3
    assert sorted(order[:3]) == sorted(CAPTIONS)
    assert [prompt.turn for prompt in prompts] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert len({prompt.key for prompt in prompts}) == 9


def test_the_order_depends_on_seed_class_and_key_alone() -> None:
    many = {f"k{i}": f"caption {i}" for i in range(20)}
    first = [prompt.caption_key for prompt in support_prompts(["a"], {"a": many}, 20, 0)]
    backwards = dict(reversed(many.items()))
    assert [prompt.caption_key for prompt in support_prompts(["a"], {"a": backwards}, 20, 0)] == first
    assert [prompt.caption_key for prompt in support_prompts(["a"], {"a": many}, 20, 1)] != first
    assert [prompt.caption_key for prompt in support_prompts(["b"], {"b": many}, 20, 0)] != first
    fewer = {key: text for key, text in many.items() if key != first[4]}
    assert [prompt.caption_key for prompt in support_prompts(["a"], {"a": fewer}, 19, 0)] == first[:4] + first[5:]


def test_captions_without_labels_go_to_every_class() -> None:
    prompts = support_prompts(["a", "b"], for_every_class(["a", "b"], CAPTIONS), 4, 0)
    assert Counter(prompt.class_name for prompt in prompts) == {"a": 4, "b": 4}
    assert {prompt.caption_key for prompt in prompts if prompt.class_name == "b"} == set(CAPTIONS)


def test_what_cannot_be_painted_is_said() -> None:
    with pytest.raises(DataError, match="no caption"):
        support_prompts(["a", "b"], {"a": CAPTIONS}, 1, 0)
    with pytest.raises(ConfigError, match="template"):
        class_prompts("a", CAPTIONS, 0, "A photo. ")


def test_broken_and_black_pictures_are_painted_again_with_another_seed() -> None:
    seen: list[tuple[str, int]] = []

    def painter(text: str, seed: int) -> np.ndarray | None:
        seen.append((text, seed))
        return [None, np.zeros_like(GREY), GREY][(len(seen) - 1) % 3]

    painted = paint(class_prompts("a", CAPTIONS, 0), painter, 2, seed=5)
    assert len(painted) == 2
    assert len(seen) == 6
    assert len({seed for _, seed in seen}) == 6
    assert all(0 <= seed < 10_000 for _, seed in seen)
    again = [painter_seed for _, painter_seed in seen]
    seen.clear()
    paint(class_prompts("a", CAPTIONS, 0), painter, 2, seed=5)
    assert [painter_seed for _, painter_seed in seen] == again


def test_a_caption_that_fails_is_skipped_and_a_class_that_fails_is_an_error() -> None:
    tries: Counter[str] = Counter()

    def painter(text: str, seed: int) -> np.ndarray | None:
        tries[text] += 1
        return None if "small" in text else GREY

    painted = paint(class_prompts("a", CAPTIONS, 0), painter, 4, seed=0)
    assert {prompt.caption_key for prompt, _ in painted} == {"1_23", "x"}
    assert tries["A photo of a. A small one."] % 5 == 0
    with pytest.raises(DataError, match="No caption"):
        paint(class_prompts("a", CAPTIONS, 0), lambda text, seed: None, 1, seed=0)
