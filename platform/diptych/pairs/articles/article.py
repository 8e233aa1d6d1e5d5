"""From the JATS XML of an article to its figures, captions, the paragraphs that cite them, and what the article is.

Where the two papers' own pipelines go wrong, this does not: a figure without caption has none (not the one before it), graphics
inside `alternatives` belong to their figure, a paragraph that cites several figures counts for each, nested references count.

Sources: PMC-15M (BiomedCLIP, 2023), section on the data set; BIOMEDICA (CVPR 2025), extraction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from diptych.pairs.articles import citations, licences
from diptych.pairs.articles.xml import HREF, LANG, Element, ancestors, clean, content, marked, parents, prose, tree
from diptych.pairs.image import Fault

Mentions = Literal["plain", "marked", "none"]

FIGURES = ("fig",)
NO_GRAPHICS = frozenset({"caption", "disp-formula", "disp-formula-group", "inline-formula", "chem-struct", "alt-text"})
"""Where a graphic within a figure is not the figure's picture."""

FLOATS = frozenset({"fig", "fig-group", "table-wrap", "table-wrap-group", "boxed-text", "supplementary-material", "media"})
"""What may stand inside a paragraph without being part of its sentence."""

LANGUAGE = "en"
"""What JATS says of an article that names no language."""

_DATES = ("epub", "ppub", "pub", "collection", "epub-ppub")


@dataclass(frozen=True)
class Figure:
    """A figure of an article.

    Attributes:
        id, label: as the article has them; empty if it has none.
        parts: the text of every part of the caption (title, paragraphs), stripped; none for a figure without caption.
        content: all text of the caption as it stands.
        graphics: a tuple a picture: the references to its files, alternatives of one another, the best first.
        mentions: the paragraphs that cite the figure, each once, in order.
        language: of the caption, as JATS has it (`en`).
    """

    id: str
    label: str
    parts: tuple[str, ...]
    content: str
    graphics: tuple[tuple[str, ...], ...]
    mentions: tuple[str, ...]
    language: str

    @property
    def caption(self) -> str:
        """The whole caption on one line, its parts joined by a space."""
        return clean(" ".join(self.parts))


@dataclass(frozen=True)
class Article:
    """What an article says of itself; a text that it does not say is empty. `date` is ISO, what is missing of it is 01."""

    pmid: str
    pmc: str
    doi: str
    title: str
    journal: str
    date: str
    kind: str
    licence: str
    language: str
    subjects: tuple[str, ...]
    keywords: tuple[str, ...]
    abstract: str
    figures: tuple[Figure, ...]

    @property
    def accession(self) -> str:
        """`PMC<number>`; empty for an article without."""
        return f"PMC{self.pmc.upper().removeprefix('PMC')}" if self.pmc else ""


def parse(data: bytes, elements: Sequence[str] = FIGURES, mentions: Mentions = "plain") -> Article:
    """The article in a file.

    Args:
        data: JATS XML.
        elements: what counts as a figure: `fig`, and what else may carry a graphic and a caption, such as `table-wrap`; such an element
            without a graphic is none.
        mentions: citing paragraphs as text; `marked`: escaped, with the references to figures as `<xref ref-type="fig" rid="picture">`;
            `none`: not looked for, which saves about half of the time.

    Raises Fault: `malformed XML`, `XML declares entities`, `not a JATS article`.
    """
    root = tree(data)
    article = root if root.tag == "article" else next(root.iter("article"), None)
    if article is None:
        raise Fault("not a JATS article")
    meta = next(article.iter("article-meta"), None)
    meta = Element("article-meta") if meta is None else meta
    front = article.find("front")
    date = _date(meta)
    return Article(
        pmid=_id(meta, "pmid"),
        pmc=_id(meta, "pmc", "pmcid"),
        doi=_id(meta, "doi"),
        title=clean(content(meta.find("title-group/article-title"))),
        journal=clean(content(next((front if front is not None else article).iter("journal-title"), None))),
        date=date,
        kind=article.get("article-type", ""),
        licence=next((name for licence in meta.iter("license") if (name := licences.of_element(licence))), ""),
        language=_language(article.get(LANG)),
        subjects=_texts(meta, "article-categories", "subject"),
        keywords=_texts(meta, "kwd-group", "kwd"),
        abstract=clean(content(meta.find("abstract"))),
        figures=tuple(figures(article, elements, mentions)),
    )


def figures(article: Element, elements: Sequence[str] = FIGURES, mentions: Mentions = "plain") -> list[Figure]:
    """The figures of an article, in the order of the document; arguments as for `parse`."""
    parent_of = parents(article)
    graphics = {element: _graphics(element, elements, parent_of) for element in article.iter() if element.tag in elements}
    found = [element for element, own in graphics.items() if own or element.tag in FIGURES]  # a table in letters is no figure
    cited = {} if mentions == "none" else _mentions(article, graphics, parent_of, marks=mentions == "marked")
    return [_figure(element, graphics[element], cited.get(element, ()), parent_of) for element in found]


def normal(id: str) -> str:
    """An id as references to it are compared."""
    return id.strip().replace("-", ".")


def image_name(graphics: Sequence[Sequence[str]]) -> str:
    """The name of a figure's first picture, without folders; empty if it has none."""
    return PurePosixPath(graphics[0][0]).name if graphics else ""


def _mentions(
    article: Element, graphics: Mapping[Element, Sequence[Sequence[str]]], parent_of: Mapping[Element, Element], *, marks: bool
) -> dict[Element, tuple[str, ...]]:
    """The paragraphs that cite each figure, each text once. A paragraph of a figure's own caption is no mention of it."""
    figure_of = {normal(element.get("id", "")): element for element in graphics if element.get("id")}
    names = {id: image_name(graphics[element]) for id, element in figure_of.items()}
    groups = {normal(group.get("id", "")): list(group.iter("fig")) for group in article.iter("fig-group") if group.get("id")}
    cited: dict[Element, dict[str, None]] = {}
    texts: dict[Element, str] = {}
    for reference in article.iter("xref"):
        if reference.get("ref-type") != "fig":
            continue
        around = ancestors(reference, parent_of)
        paragraph = next((element for element in around if element.tag == "p"), None)
        if paragraph is None:
            continue
        captioned = next((parent_of[element] for element in around if element.tag == "caption"), None)
        for id in map(normal, reference.get("rid", "").split()):
            for figure in [figure_of[id]] if id in figure_of else groups.get(id, ()):
                if figure is captioned:
                    continue
                if paragraph not in texts:
                    texts[paragraph] = _marked(paragraph, names) if marks else clean(prose(paragraph, FLOATS))
                cited.setdefault(figure, {}).setdefault(texts[paragraph])
    return {figure: tuple(texts) for figure, texts in cited.items()}


def _marked(paragraph: Element, names: Mapping[str, str]) -> str:
    def mark(element: Element) -> tuple[str, str]:
        if element.tag != "xref" or element.get("ref-type") != "fig":
            return "", ""
        rids = " ".join(names.get(normal(id)) or id for id in element.get("rid", "").split())
        return f'<xref ref-type="fig" rid="{rids}">', "</xref>"

    return marked(paragraph, FLOATS, mark)


def _figure(element: Element, graphics: tuple[tuple[str, ...], ...], cited: Sequence[str], parent_of: Mapping[Element, Element]) -> Figure:
    around = ancestors(element, parent_of)
    caption = element.find("caption")
    if caption is None:  # the parts of a compound figure may share the caption of their group
        caption = next((group.find("caption") for group in around if group.tag == "fig-group"), None)
    spoken = [inner.get(LANG) for inner in ([] if caption is None else [caption]) + [element, *around]]
    return Figure(
        id=element.get("id", "").strip(),
        label=clean(content(element.find("label"))),
        parts=_parts(caption),
        content=content(caption),
        graphics=graphics,
        mentions=tuple(cited),
        language=_language(next((language for language in spoken if language), None)),
    )


def _parts(caption: Element | None) -> tuple[str, ...]:
    """The text of every child of a caption; a caption that holds bare text is one part."""
    if caption is None:
        return ()
    return tuple(content(child).strip() for child in caption) or tuple(filter(None, [content(caption).strip()]))


def _graphics(element: Element, elements: Sequence[str], parent_of: Mapping[Element, Element]) -> tuple[tuple[str, ...], ...]:
    """The pictures of a figure, but not those of a figure within it, nor of formulas. Thumbnails come last among alternatives."""
    pictures: dict[Element, list[str]] = {}
    for graphic in element.iter("graphic"):
        href, own = (graphic.get(HREF) or "").strip(), graphic
        if not href:
            continue
        for around in ancestors(graphic, parent_of):
            if around is element:
                pictures.setdefault(own, []).append(href)
                break
            if around.tag in NO_GRAPHICS or around.tag in elements:
                break
            if around.tag == "alternatives":
                own = around
    return tuple(tuple(sorted(dict.fromkeys(hrefs), key=_is_thumbnail)) for hrefs in pictures.values())


def _is_thumbnail(href: str) -> bool:
    return "thumb" in href.lower()


def _id(meta: Element, *kinds: str) -> str:
    found = (id for kind in kinds for id in meta.findall("article-id") if id.get("pub-id-type") == kind)
    return next((text for id in found if (text := clean(content(id)))), "")


def _texts(meta: Element, group: str, name: str) -> tuple[str, ...]:
    found = (clean(content(element)) for each in meta.iter(group) for element in each.iter(name))
    return tuple(dict.fromkeys(text for text in found if text))


def _language(name: str | None) -> str:
    return (name or "").strip().lower().replace("_", "-").partition("-")[0] or LANGUAGE


def _date(meta: Element) -> str:
    """The day on which the article first appeared, by the kinds of date in their order."""
    dates = meta.findall("pub-date")
    dates.sort(
        key=lambda date: next((i for i, kind in enumerate(_DATES) if kind in (date.get("pub-type"), date.get("date-type"))), len(_DATES))
    )
    for date in dates:
        year = clean(content(date.find("year")))
        if len(year) == 4 and year.isdigit():
            day = clean(content(date.find("day")))
            month = content(date.find("month")) or content(date.find("season"))
            return f"{year}-{citations.month_of(month):02d}-{int(day) if day.isdigit() and 1 <= int(day) <= 31 else 1:02d}"
    return ""
