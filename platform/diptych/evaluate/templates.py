"""Prompt templates by name. Every `{}` in a template is replaced by the class name, braces in which mean nothing.

The name `set` stands for the templates that come with an evaluation set; the engine puts them in its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

from diptych.core.errors import ConfigError

TemplateSet = Literal["plain", "name-only", "photo", "icon", "set"]

OF_THE_SET = "set"

TEMPLATES: dict[TemplateSet, tuple[str, ...]] = {
    # Neutral about medium, number and style, so that one set serves photographs, drawings and renderings.
    "plain": (
        "{}",
        "{}.",
        "an image of {}.",
        "an image of a {}.",
        "an image showing the {}.",
        "a picture of {}.",
        "a picture of one {}.",
        "a picture with a {} in it.",
        "a photo of a {}.",
        "a photo of {}.",
        "a drawing of a {}.",
        "an illustration of {}.",
        "a graphic that shows {}.",
        "a close view of a {}.",
        "a {} seen from afar.",
        "a small {}.",
        "a large {}.",
        "this is {}.",
        "this shows a {}.",
        "the subject here is {}.",
    ),
    "name-only": ("{}",),
    "photo": ("a photo of a {}.",),
    "icon": (
        "{}",
        "an icon of {}.",
        "an icon of a {}.",
        "an emoji of {}.",
        "the {} emoji.",
        "a small symbol for {}.",
        "a pictogram that means {}.",
        "a flat drawing of a {}.",
        "a glossy icon showing {}.",
    ),
}


def resolve(templates: TemplateSet | Sequence[str], where: str = "templates") -> tuple[str, ...]:
    """The templates behind a name, or the given ones after a check.

    Raises ConfigError for none, doubles, or one without `{}`, and for `set` where nobody has put an evaluation set's own in its place.
    """
    if templates == OF_THE_SET:
        fix = "bring a file of templates with the set, or name others, e.g. templates: plain"
        raise ConfigError.at("This set brings no prompt templates", where, templates, "an evaluation set with templates", fix)
    if isinstance(templates, str):
        return TEMPLATES[cast("TemplateSet", templates)]
    for index, template in enumerate(templates):
        if "{}" not in template:
            raise ConfigError.at("A template has no place for the class name", f"{where}.{index}", template, "a text with {}")
    if not templates or len(set(templates)) != len(templates):
        raise ConfigError.at("These templates cannot be averaged", where, list(templates), "at least one, each once")
    return tuple(templates)


def fill(template: str, name: str) -> str:
    """The prompt for a class. Plain replacement: a class called `{0}` stays `{0}`."""
    return template.replace("{}", name)
