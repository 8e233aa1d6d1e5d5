"""From what stands in a file to the configuration of a method or a source, with the key path in every complaint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from diptych.core import catalogue, digest
from diptych.core.config import Config, headline
from diptych.core.errors import ConfigError, Problem, nearest, shorten
from diptych.pairs.ingest import IngestConfig
from diptych.pairs.sources.paths import local_files

T = TypeVar("T")
ONE_OF = "one of the keys "


def method(value: Any, phase: str, where: str, name_key: str = "method") -> Config:
    """The checked configuration of one method. Raises ConfigError naming keys under `where`."""
    if not isinstance(value, Mapping):
        raise ConfigError(headline(1), [Problem(where, shorten(value), "a mapping with the key `method`", "{method: NAME, …}")])
    name = value.get("method")
    if not isinstance(name, str):
        raise ConfigError(headline(1), [Problem(f"{where}.{name_key}", shorten(name), "the name of a method", "see `diptych methods`")])
    row = catalogue.find(name, phase, f"{where}.{name_key}")
    return catalogue.config_class(row).parse(dict(value), where)


def source(data: Mapping[str, Any], where: str) -> Config:
    """The checked configuration of the source under a `data` key; ingest's own keys stand beside it and are left out."""
    if "source" not in data:
        raise ConfigError(
            headline(1), [Problem(f"{where}.source", "nothing", "the name of a source", "see `diptych methods --phase ingest`")]
        )
    parameters = {key: value for key, value in data.items() if key not in IngestConfig.model_fields and key != "source"}
    try:
        return method({"method": data["source"], **parameters}, "ingest", where, name_key="source")
    except ConfigError as error:
        raise ConfigError(error.headline, [_beside_ingest(problem, where) for problem in error.problems]) from None


def _beside_ingest(problem: Problem, where: str) -> Problem:
    """An unknown key of a source may be meant for ingest, whose keys stand beside the source's own."""
    head, _, name = problem.where.rpartition(".")
    if head != where or not problem.expected.startswith(ONE_OF):
        return problem
    keys = ["source", *(key for key in problem.expected.removeprefix(ONE_OF).split(", ") if key != "method"), *IngestConfig.model_fields]
    return replace(problem, expected=ONE_OF + ", ".join(keys), fix=nearest(name, keys))


def ingest(data: Mapping[str, Any], where: str) -> IngestConfig:
    """Ingest's own keys of a `data` key."""
    return IngestConfig.parse({key: data[key] for key in data if key in IngestConfig.model_fields}, where)


def source_files(config: Config) -> str:
    """A digest of the local files that a source names (names, sizes, times of change); empty for a source that names none.

    DVC cannot know these files, so a changed one is found here.
    """
    found: list[list[Any]] = []
    for name in ("path", "table"):
        value = getattr(config, name, None)
        for entry in (value,) if isinstance(value, str) else value or ():
            for path in local_files(str(entry)):
                status = path.stat()
                found.append([str(path), status.st_size, status.st_mtime_ns])
    found += [[name, files] for name, member in getattr(config, "members", {}).items() if (files := source_files(member))]
    return digest.of_plain(found) if found else ""


class Checks:
    """Gathers every problem of a file, so that all are told at once."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []

    def attempt(self, build: Callable[[], T]) -> T | None:
        """What `build` gives, or None with its complaint noted."""
        try:
            return build()
        except ConfigError as error:
            self.problems.extend(error.problems or [Problem("(file)", error.headline, "a valid file")])
            return None

    def methods(self, values: Any, phase: str, where: str) -> tuple[Config, ...]:
        """The configurations of a list of methods; a value that is no list is the skeleton's to refuse."""
        if not isinstance(values, list | tuple):
            return ()
        built = [self.attempt(partial(method, value, phase, f"{where}.{i}")) for i, value in enumerate(values)]
        return tuple(config for config in built if config is not None)

    def refuse(self) -> None:
        """Raises ConfigError with all problems, each once, if there are any."""
        if self.problems:
            raise ConfigError(headline(len(self.problems)), list(dict.fromkeys(self.problems)))
