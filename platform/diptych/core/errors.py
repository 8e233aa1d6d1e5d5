"""What a user is told when something is wrong: a headline, then where, what came, what was expected, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing to mend. `where` is a key path (`train.optimizer.lr`), a file, or a pair's key."""

    where: str
    got: str
    expected: str
    fix: str = ""

    def __str__(self) -> str:
        lines = [f"  {self.where}", f"    got:      {self.got}", f"    expected: {self.expected}"]
        if self.fix:
            lines.append(f"    do:       {self.fix}")
        return "\n".join(lines)


class DiptychError(Exception):
    """A mistake that its reader can mend. Printed whole by the command line, without a traceback.

    Attributes:
        headline: one sentence.
        problems: every problem found, not only the first.
    """

    exit_code = 1

    def __init__(self, headline: str, problems: Iterable[Problem] = ()) -> None:
        self.headline = headline
        self.problems = tuple(problems)
        super().__init__(headline, self.problems)

    def __str__(self) -> str:
        return "\n".join([self.headline, *map(str, self.problems)])

    @classmethod
    def at(cls, headline: str, where: object, got: object, expected: str, fix: str = "") -> DiptychError:
        """An error with a single problem. Values are shown with `repr`, cut at 200 characters."""
        return cls(headline, [Problem(str(where), shorten(got), expected, fix)])


class ConfigError(DiptychError):
    """The workflow, a parameter or the command line is wrong. Raised before anything starts."""

    exit_code = 2


class DataError(DiptychError):
    """Data on disk or from a server is not what it claims to be."""

    exit_code = 3


class ResourceError(DiptychError):
    """The machine or a service lacks what the run needs: cores, memory, disk, a reachable server."""

    exit_code = 4


def shorten(value: object, limit: int = 200) -> str:
    """`repr` of a value, cut so that a megabyte caption does not fill the terminal."""
    text = value if isinstance(value, str) and value.startswith("<") else repr(value)
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text)} characters)"


def nearest(name: str, known: Iterable[str]) -> str:
    """`"did you mean 'x'?"` for the nearest known name, or the empty string."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"did you mean {matches[0]!r}?" if matches else ""
