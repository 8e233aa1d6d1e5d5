from __future__ import annotations

import pytest

from diptych.core.errors import ConfigError
from diptych.evaluate.templates import TEMPLATES, fill, resolve


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_every_shipped_template_renders_once(name):
    templates = resolve(name)
    assert len({fill(template, "red apple") for template in templates}) == len(templates) > 0
    assert all(template.count("{}") == 1 for template in templates)


def test_braces_in_class_names_mean_nothing():
    assert fill("a {}.", "{0} {x}") == "a {0} {x}."


@pytest.mark.parametrize("templates", [(), ("a photo",), ("{}", "{}")])
def test_templates_that_cannot_be_used_are_refused(templates):
    with pytest.raises(ConfigError):
        resolve(templates)
