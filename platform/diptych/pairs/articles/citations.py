"""What the file lists of article archives say in one line: journal and date of a citation, titles that are more than text.

Source: BIOMEDICA's article fields (CVPR 2025).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

MONTHS = {
    name: number
    for number, name in enumerate(["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"], start=1)
}
SEASONS = {"winter": 12, "spring": 3, "summer": 6, "autumn": 9, "fall": 9}
_DATE = re.compile(r"(?<!\d)(?P<year>(?:1[5-9]|20)\d\d)(?:\s+(?P<month>[A-Za-z]+|\d{1,2})[^\s;,]*)?(?:\s+(?P<day>\d{1,2})(?!\d))?")


def journal_of(citation: str) -> str:
    """The journal of `PLoS Biol. 2003 Oct 18; 1(1):e5`: what stands before the first full stop or semicolon."""
    return re.split(r"[.;]", citation, maxsplit=1)[0].strip()


def date_of(citation: str) -> tuple[int, int, int] | None:
    """Year, month and day of a citation; what is missing is 1, a season is its month; None without a year."""
    _, _, rest = citation.partition(".")
    found = _DATE.search(rest or citation)
    if not found:
        return None
    return int(found["year"]), month_of(found["month"]), min(int(found["day"] or 1), 31) or 1


def month_of(text: str | None) -> int:
    """The month of a name, its beginning, a number or a season; 1 for what is none."""
    word = (text or "").strip().lower()
    if word.isdigit():
        return int(word) if 1 <= int(word) <= 12 else 1
    return SEASONS.get(word) or MONTHS.get(word[:3], 1)


def title_of(value: object) -> str | None:
    """A title as metadata services give it: text, or a mapping of marked-up parts, whose values are joined with spaces."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, Mapping):
        return str(value)
    parts = (part for entry in value.values() for part in (entry if isinstance(entry, list) else [entry]))
    return " ".join(str(title_of(part)) for part in parts if part is not None)
