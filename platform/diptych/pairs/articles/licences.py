"""What an article's licence is called, and whom it allows what: by the licence's address, else by its words.

Source of the classes: BIOMEDICA, after the lists of PubMed Central's open-access subset.
"""

from __future__ import annotations

import re
from typing import Literal

from diptych.pairs.articles.xml import HREF, Element, clean, content

LicenceClass = Literal["commercial", "noncommercial", "other"]

_ADDRESS = re.compile(
    r"creativecommons\.org/(licen[cs]es/(?P<kind>by(?:-[a-z]+)*)|publicdomain/(?P<public>zero|mark))/?(?P<version>\d\.\d)?", re.I
)
_SHORT = re.compile(r"\b(?P<zero>CC[ -]?0|CC[ -]?ZERO)\b|\bCC[ -]?(?P<kind>BY(?:-[A-Z]{2})*)\b(?: (?P<version>\d\.\d))?", re.I)
_WORDS = re.compile(r"creative commons attribution|attribution licen[cs]e", re.I)
_CLAUSES = (
    ("NC", re.compile(r"non-?\s?commercial", re.I)),
    ("ND", re.compile(r"no-?\s?deriv", re.I)),
    ("SA", re.compile(r"share-?\s?alike", re.I)),
)
_PUBLIC = {"zero": "CC0", "mark": "Public Domain Mark"}


def of_element(licence: Element) -> str:
    """The name of a `license` element's licence, e.g. `CC BY-NC 4.0`; empty if it is none that is known."""
    addresses = [
        address for inner in licence.iter() for address in (inner.get(HREF), inner.text if inner.tag.endswith("license_ref") else None)
    ]
    named = (of_text(address) for address in addresses if address)
    return next((name for name in named if name), "") or of_text(clean(content(licence)))


def of_text(text: str) -> str:
    """The name of a licence by an address, a short name such as `CC BY-NC`, or the words that articles use; empty if there is none."""
    if found := _ADDRESS.search(text):
        name = _PUBLIC[found["public"].lower()] if found["public"] else f"CC {found['kind'].upper()}"
        return f"{name} {found['version']}" if found["version"] else name
    if found := _SHORT.search(text):
        name = "CC0" if found["zero"] else f"CC {found['kind'].upper()}"
        return f"{name} {found['version']}" if found["version"] else name
    if _WORDS.search(text):
        return "-".join(["CC BY", *(clause for clause, words in _CLAUSES if words.search(text))])
    return "Public Domain" if re.search(r"\bpublic domain\b", text, re.I) else ""


def class_of(name: str) -> LicenceClass:
    """`commercial` for CC0, CC BY, BY-SA, BY-ND and the public domain, `noncommercial` for what has an NC clause, else `other`."""
    if not name.upper().startswith(("CC", "PUBLIC DOMAIN")):
        return "other"
    return "noncommercial" if re.search(r"\bNC\b", name.upper()) else "commercial"
