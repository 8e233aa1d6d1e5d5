"""The base of every configuration: frozen, strict, and wrong in one go rather than one key at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from diptych.core.errors import ConfigError, Problem, nearest, shorten


class Config(BaseModel):
    """Base of all configuration models; a subclass owns its component and builds it with `build()`.

    Values are immutable and never coerced: `"3"` is not 3. Unknown keys are refused with the nearest known one.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False, ser_json_inf_nan="constants")

    unit: ClassVar[Mapping[str, str]] = {}
    directories: ClassVar[tuple[str, ...]] = ()
    """Fields that name directories of models or other data: what lies in them counts for a phase's identity, as its parameters do."""

    @classmethod
    def parse(cls, data: object, where: str = "") -> Self:
        """Validates plain data (from YAML or JSON), or raises a ConfigError that names every problem under `where`."""
        try:
            # JSON mode: lists may become tuples, which strict Python mode would refuse.
            return cls.model_validate_json(json.dumps(data))
        except ValidationError as error:
            raise ConfigError(headline(error.error_count()), problems(cls, error, where)) from None
        except ConfigError as error:  # of a configuration within this one
            raise ConfigError(
                error.headline, [replace(p, where=f"{where}.{p.where}" if where else p.where) for p in error.problems]
            ) from None
        except TypeError as error:
            raise ConfigError.at("The configuration is not plain data", where or "(root)", data, f"YAML values only ({error})") from None

    def tried_on(self, share: float) -> Self:
        """The configuration to try on such a share of the pairs, in (0, 1], so that they take about that share of the work."""
        del share
        return self

    def plain(self) -> dict[str, Any]:
        """The configuration as JSON-able data with every default filled in: what digests, locks and MLflow see."""
        data: dict[str, Any] = self.model_dump(mode="json")
        return data


_NUMBER = re.compile(r"[-+]?[0-9.]+([eE][-+]?[0-9]+)?")
PLAIN = {
    "int_type": "a whole number", "float_type": "a number", "bool_type": "true or false", "string_type": "text",
    "list_type": "a list, as in `[…]`", "tuple_type": "a list, as in `[…]`", "dict_type": "a mapping, as in `{key: value}`",
    "model_type": "a mapping, as in `{key: value}`",
}  # fmt: skip
"""What YAML calls the types that pydantic names in Python's or JSON's words."""


def headline(count: int) -> str:
    """The first line of a report over `count` configuration problems."""
    return f"{count} problem{'s' if count != 1 else ''} in the configuration; nothing was started"


def problems(model: type[BaseModel], error: ValidationError, where: str = "") -> list[Problem]:
    """Translates pydantic's report into ours, one problem a line, each with its key path."""
    return [_problem(model, detail, where) for detail in error.errors(include_url=False)]


def _problem(model: type[BaseModel], detail: ErrorDetails, where: str) -> Problem:
    location = [str(part) for part in detail["loc"]]
    path = ".".join(filter(None, [where, *location])) or "(root)"
    match detail["type"]:
        case "extra_forbidden":
            known = _fields_at(model, detail["loc"][:-1])
            return Problem(path, shorten(detail["input"]), f"one of the keys {', '.join(known)}", nearest(location[-1], known))
        case "missing":
            shown = _example_of(model, detail["loc"])
            return Problem(path, "nothing", "a value: the key is required", f"add {shown or repr(location[-1])}")
        case "literal_error":
            allowed = str(detail.get("ctx", {}).get("expected", ""))
            hint = nearest(str(detail["input"]), [word.strip(" '") for word in allowed.replace(" or ", ",").split(",")])
            return Problem(path, shorten(detail["input"]), allowed, hint)
    expected = PLAIN.get(detail["type"]) or detail["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    quoted = detail["type"] in ("int_type", "float_type") and isinstance(detail["input"], str) and _NUMBER.fullmatch(detail["input"])
    return Problem(path, shorten(detail["input"]), expected, "take the quotes away: what stands in quotes is text" if quoted else "")


def _example_of(model: type[BaseModel], location: tuple[int | str, ...]) -> str | None:
    """A key with a value that could stand there, for keys of the model that have an example."""
    field = model.model_fields.get(str(location[0])) if len(location) == 1 else None
    return f"`{location[0]}: {field.examples[0]}`" if field is not None and field.examples else None


def _fields_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """The field names of the model that a key path leads to, as far as annotations tell."""
    current: Any = model
    for part in location:
        field = getattr(current, "model_fields", {}).get(part)
        if field is None:
            continue
        current = next((kind for kind in models_in(field.annotation)), current)
    return list(getattr(current, "model_fields", {}))


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The models that a field of this type may hold: itself, or those among the members of a union, a list or a mapping."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in models_in(part)]
