"""Reads workflow files: YAML 1.2's core schema (`3e-4` is a number, `no` is a word), duplicate keys refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from diptych.core.errors import ConfigError, nearest


class _Loader(yaml.SafeLoader):
    """A safe loader whose plain scalars follow YAML 1.2, as DVC reads the same files."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("int", r"^[-+]?(?:0|[1-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+)$", "-+0123456789"),
    ("float", r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$", "-+.0123456789"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first))


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


def _float(loader: _Loader, node: yaml.ScalarNode) -> float:
    return float(loader.construct_scalar(node))


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
_Loader.add_constructor("tag:yaml.org,2002:float", _float)


def parse(text: str, where: str) -> Any:
    """The data in a YAML text. Raises ConfigError with the line of a mistake."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"{where}:{mark.line + 1}" if mark else where
        raise ConfigError.at("The file is not valid YAML", line, getattr(error, "problem", str(error)), "YAML 1.2") from None


def read(path: Path) -> dict[str, Any]:
    """The mapping in a workflow file. Raises ConfigError when it is missing or not a mapping."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        beside = sorted(file.name for file in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        expected = f"a YAML file; beside it: {', '.join(beside) or 'none'}"
        raise ConfigError.at("There is no such workflow file", path, "nothing", expected, nearest(path.name, beside)) from None
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise ConfigError.at("The workflow file cannot be read", path, str(error), "a UTF-8 text file") from None
    data = parse(text, str(path))
    if not isinstance(data, dict):
        raise ConfigError.at("The workflow file is not a mapping", path, data, "keys name, seed, data, curate, …")
    return data


def dump(data: Any) -> str:
    """YAML text of plain data, keys in their given order."""
    text: str = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, default_flow_style=None, width=140)
    return text
