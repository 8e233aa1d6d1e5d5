"""CapS-Adapter's support set: every class is painted from prompts "class + caption", the captions being those of a few target pictures.

Captions are named by string keys, and all draws by `(seed, key)`: a caption's place does not depend on the order of the others.
Source: Wang et al., CapS-Adapter (ACM MM 2024). The authors caption pictures of the class itself, whose labels they thus read;
`for_every_class` is the variant without that leak.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from diptych.core import chance
from diptych.core.errors import ConfigError, DataError

Image = NDArray[np.uint8]

TEMPLATE = "A photo of {}. "
SEEDS = 10_000
BLACK = 5.0
"""A picture darker than this in the mean (0 to 255) is what a generator gives when its safety filter struck."""


class Prompt(NamedTuple):
    """What to paint: `key` is unique within a support set, `turn` counts how often the caption was taken before for this class."""

    key: str
    class_name: str
    caption_key: str
    turn: int
    text: str


def class_prompts(class_name: str, captions: Mapping[str, str], seed: int, template: str = TEMPLATE) -> Iterator[Prompt]:
    """The prompts of a class without end: its captions (key -> text) in an order shuffled by `(seed, class, key)`, again and again.

    Raises ConfigError for a template without `{}`, DataError for a class without captions.
    """
    if "{}" not in template:
        raise ConfigError.at("A template has no place for the class name", "template", template, "a text with {}")
    if not captions:
        raise DataError.at("A class has no caption to paint from", f"captions.{class_name}", captions, "at least one caption")
    draw_n = chance.uniform(seed, chance.key_hash(class_name), chance.key_hashes(captions))
    order = [key for _, key in sorted(zip(draw_n.tolist(), captions, strict=True))]
    return (
        Prompt(json.dumps([class_name, key, turn], ensure_ascii=False), class_name, key, turn, template.replace("{}", class_name) + captions[key])
        for turn in itertools.count()
        for key in order
    )  # fmt: skip


def support_prompts(
    classes: Sequence[str], captions: Mapping[str, Mapping[str, str]], per_class: int, seed: int, template: str = TEMPLATE
) -> list[Prompt]:
    """The first `per_class` prompts of every class, from its captions (class -> key -> text). Errors as for `class_prompts`."""
    return [
        prompt for name in classes for prompt in itertools.islice(class_prompts(name, captions.get(name, {}), seed, template), per_class)
    ]


def for_every_class(classes: Sequence[str], captions: Mapping[str, str]) -> dict[str, Mapping[str, str]]:
    """Captions of pictures without labels, given to every class: each class shuffles them in its own way."""
    return dict.fromkeys(classes, captions)


def paint(
    prompts: Iterator[Prompt], painter: Callable[[str, int], Image | None], count: int, seed: int, tries: int = 5
) -> list[tuple[Prompt, Image]]:
    """Paints `count` pictures of a class; a caption that fails `tries` times is skipped, and the next one takes its place.

    Args:
        prompts: `class_prompts` of the class.
        painter: (text, seed in [0, 10,000)) -> image_HWC, uint8, or None for a picture that came out broken.
        count: pictures wanted.
        seed: with the prompt's key and the try, names the painter's seed.
        tries: attempts a prompt.

    Raises:
        DataError: every caption in turn failed since the last success.
    """
    painted: list[tuple[Prompt, Image]] = []
    failed: set[str] = set()
    while len(painted) < count:
        prompt = next(prompts)
        if prompt.caption_key in failed:
            raise DataError.at(
                "No caption of a class gives a usable picture", prompt.class_name, sorted(failed), f"a picture in {tries} tries"
            )
        image = _attempt(prompt, painter, seed, tries)
        if image is None:
            failed.add(prompt.caption_key)
        else:
            painted.append((prompt, image))
            failed.clear()
    return painted


def _attempt(prompt: Prompt, painter: Callable[[str, int], Image | None], seed: int, tries: int) -> Image | None:
    for attempt in range(tries):
        image = painter(prompt.text, int(chance.generator(seed, prompt.key, attempt).integers(SEEDS)))
        if image is not None and image.mean() >= BLACK:
            return image
    return None
