"""XML of strangers: parsed without entities of its own, without anything from outside, and never by recursion.

A document type may be named, as every article of PubMed Central does; its file is not fetched. Characters by name (`&nbsp;`, `&alpha;`) are
known as HTML knows them.
"""

from __future__ import annotations

import html.entities
from collections.abc import Callable, Collection, Mapping
from xml.etree import ElementTree
from xml.parsers import expat
from xml.sax.saxutils import escape

from diptych.pairs.image import Fault

Element = ElementTree.Element
Mark = Callable[[Element], tuple[str, str]]

CHARACTERS = {name: value for name, value in html.entities.entitydefs.items() if name not in ("lt", "gt", "amp", "quot")}
LANG = "{http://www.w3.org/XML/1998/namespace}lang"
HREF = "{http://www.w3.org/1999/xlink}href"
_TEX = "tex-math"


class _PrologueOver(Exception):  # noqa: N818 - no error: the part that had to be looked at is over
    pass


def tree(data: bytes) -> Element:
    """The root of a document, its default namespace taken off the names. TeX sources of formulas are emptied: they are no text.

    Raises Fault: `malformed XML`, `XML declares entities`.
    """
    _refuse_entities(data)
    parser = ElementTree.XMLParser()  # noqa: S314 - a document that declares entities is refused above
    parser.entity.update(CHARACTERS)
    try:
        parser.feed(data)
        root: Element = parser.close()
    except (ElementTree.ParseError, ValueError, LookupError):
        raise Fault("malformed XML") from None
    space = root.tag.partition("}")[0] + "}" if root.tag.startswith("{") else ""
    if space:
        for element in root.iter():
            element.tag = element.tag.removeprefix(space)
    for formula in list(root.iter(_TEX)):
        formula.text = None
    return root


def _refuse_entities(data: bytes) -> None:
    """Reads up to the first element: whatever a document declares stands before it."""
    parser = expat.ParserCreate()
    parser.EntityDeclHandler = _declared
    parser.StartElementHandler = _over
    try:
        parser.Parse(data, True)
    except _PrologueOver:
        return
    except Fault:
        raise
    except (expat.ExpatError, ValueError, LookupError):
        raise Fault("malformed XML") from None


def _declared(*_: object) -> None:
    raise Fault("XML declares entities")


def _over(*_: object) -> None:
    raise _PrologueOver


def parents(root: Element) -> dict[Element, Element]:
    """The parent of every element but the root."""
    return {child: parent for parent in root.iter() for child in parent}


def ancestors(element: Element, parent_of: Mapping[Element, Element]) -> list[Element]:
    """The elements around one, the nearest first."""
    found: list[Element] = []
    around = parent_of.get(element)
    while around is not None:
        found.append(around)
        around = parent_of.get(around)
    return found


def content(element: Element | None) -> str:
    """All text within an element, as it stands; empty for none."""
    return "" if element is None else "".join(element.itertext())


def clean(text: str) -> str:
    """The text with every run of white space as one space."""
    return " ".join(text.split())


def prose(element: Element, without: Collection[str]) -> str:
    """The text within an element, leaving out what stands inside elements of the names `without`."""
    if all(inner.tag not in without for inner in element.iter() if inner is not element):
        return content(element)
    return _walked(element, without, None)


def marked(element: Element, without: Collection[str], mark: Mark) -> str:
    """As `prose`, escaped, with the tags that `mark` gives for an element before and after its text."""
    return _walked(element, without, mark)


def _walked(element: Element, without: Collection[str], mark: Mark | None) -> str:
    """Goes through the text with a stack of its own: a document may be nested deeper than Python calls."""
    out: list[str] = []
    stack: list[Element | str] = [element]
    while stack:
        node = stack.pop()
        if isinstance(node, str):
            out.append(node)
            continue
        if node is not element and node.tag in without:
            continue
        before, after = mark(node) if mark else ("", "")
        out.append(before + _escaped(node.text, mark))
        stack.append(after)
        for child in reversed(node):
            stack += (_escaped(child.tail, mark), child)
    return "".join(out)


def _escaped(text: str | None, mark: Mark | None) -> str:
    return "" if not text else escape(text) if mark else text
