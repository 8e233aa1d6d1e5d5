"""From XML to figures: captions, graphics, mentions, licences, panels; and what a hostile document may not do."""

from __future__ import annotations

import pytest

from diptych.pairs.articles import citations, licences, panels
from diptych.pairs.articles.article import parse
from diptych.pairs.image import Fault

from .packages import article, figure, graphic


def reason(data: bytes) -> str:
    with pytest.raises(Fault) as caught:
        parse(data)
    return caught.value.reason


def test_what_an_article_says_of_itself() -> None:
    found = parse(article(figure("F1", "A <italic>cell</italic> &amp; more.", "g1")))
    assert (found.pmid, found.accession, found.title, found.journal) == ("111", "PMC1001", "On cells", "J Test")
    assert (found.date, found.kind, found.licence, found.language) == ("2019-03-07", "research-article", "CC BY 4.0", "en")
    assert (found.subjects, found.keywords) == (("Cell Biology",), ("microscopy",))
    (only,) = found.figures
    assert (only.id, only.label, only.caption, only.graphics) == ("F1", "Figure", "A cell & more.", (("g1",),))


def test_a_figure_without_caption_has_none() -> None:
    found = parse(article(figure("F1", None, "g1") + figure("F2", "Second.", "g2") + figure("F3", None, "g3") + figure("F4", "", "g4")))
    assert [each.caption for each in found.figures] == ["", "Second.", "", ""]


def test_parts_of_a_caption_are_joined_by_one_space() -> None:
    caption = "<caption><title>Protein levels</title>\n<p>Western\n  blot. </p><p>Lane 1.</p></caption>"
    (only,) = parse(article(f'<fig id="F1">{caption}{graphic("g")}</fig>')).figures
    assert only.parts == ("Protein levels", "Western\n  blot.", "Lane 1.")
    assert only.caption == "Protein levels Western blot. Lane 1."


def test_graphics_of_a_figure() -> None:
    alternatives = f"<alternatives>{graphic('a.thumbnail.jpg')}{graphic('a.jpg')}</alternatives>"
    formula = f"<caption><p>C.<inline-formula>{graphic('e1')}</inline-formula></p></caption>"
    inner = f"<table-wrap><caption><p>T.</p></caption>{graphic('t1')}</table-wrap><table-wrap><table/></table-wrap>"
    body = f'<fig id="F1">{formula}{alternatives}<p>{graphic("b")}</p>{inner}</fig>'
    (alone,) = parse(article(body)).figures
    assert alone.graphics == (("a.jpg", "a.thumbnail.jpg"), ("b",), ("t1",))
    outer, table = parse(article(body), ("fig", "table-wrap")).figures
    assert (outer.graphics, table.graphics, table.caption) == ((("a.jpg", "a.thumbnail.jpg"), ("b",)), (("t1",),), "T.")


def test_figures_of_a_group_share_its_caption_where_they_have_none() -> None:
    body = f'<fig-group id="G"><caption><p>Both.</p></caption>{figure("a", None, "g1")}{figure("b", "Own.", "g2")}</fig-group>'
    body += '<p>As in <xref ref-type="fig" rid="G">Fig 1</xref>.</p>'
    found = parse(article(body)).figures
    assert [(each.caption, each.mentions) for each in found] == [("Both.", ("As in Fig 1.",)), ("Own.", ("As in Fig 1.",))]


def test_a_paragraph_counts_for_every_figure_it_cites_once() -> None:
    body = (
        figure("fig-1", 'One, cf. <xref ref-type="fig" rid="fig-1">this</xref> and <xref ref-type="fig" rid="fig-2">that</xref>.', "g1")
        + figure("fig-2", "Two.", "g2")
        + '<p>Both <italic>(<xref ref-type="fig" rid="fig-1">1</xref>)</italic> and <xref ref-type="fig" rid="fig.2">2</xref>, <xref ref-type="fig" rid="fig-1">1</xref>.'
        + figure("F9", "Not part of the sentence.", "g9")
        + '</p><p>Both <xref ref-type="fig" rid="fig-1 fig-2">1-2</xref>, <xref ref-type="bibr" rid="fig-1">r</xref>.</p>'
        + '<p>Unknown <xref ref-type="fig" rid="no">N</xref>.</p>'
    )
    one, two, nine = parse(article(body)).figures
    assert one.mentions == ("Both (1) and 2, 1.", "Both 1-2, r.")
    assert two.mentions == ("One, cf. this and that.", *one.mentions)
    assert nine.mentions == ()
    marked = parse(article(body), mentions="marked").figures[0].mentions[1]
    assert marked == 'Both <xref ref-type="fig" rid="g1 g2">1-2</xref>, r.'


def test_languages() -> None:
    translated = f'<sub-article article-type="translation" xml:lang="pt_BR"><body>{figure("F1", "Uma célula.", "g1")}</body></sub-article>'
    own = figure("F1", "Une cellule.", "g1")
    found = parse(article(own, attributes='xml:lang="fr"', after=translated))
    assert [each.language for each in found.figures] == ["fr", "pt"]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (article(figure("F1", "C", "g"))[:-40], "malformed XML"),
        (b"", "malformed XML"),
        (b"\x00\xff", "malformed XML"),
        (b'<?xml version="1.0" encoding="no-such"?><article/>', "malformed XML"),
        (b"<html/>", "not a JATS article"),
        (article(figure("F1", "&a;", "g"), head='<!DOCTYPE article [<!ENTITY a "aaaa">]>'), "XML declares entities"),
        (article(figure("F1", "&a;", "g"), head='<!DOCTYPE article [<!ENTITY a SYSTEM "file:///etc/hostname">]>'), "XML declares entities"),
        (article(figure("F1", "c", "g"), head='<!DOCTYPE article [<!ENTITY % p SYSTEM "x.dtd"> %p;]>'), "XML declares entities"),
        (article(figure("F1", "&nosuch;", "g")), "malformed XML"),
    ],
)
def test_documents_that_are_refused(data: bytes, expected: str) -> None:
    assert reason(data) == expected


def test_characters_by_name() -> None:
    assert parse(article(figure("F1", "5&nbsp;&micro;m, &alpha;", "g"))).figures[0].caption == "5 µm, α"


def test_deep_nesting_is_no_recursion() -> None:
    deep = "<b>" * 20_000 + "x" + "</b>" * 20_000
    (only,) = parse(article(figure("F1", deep, "g") + f'<p>{deep}<fig/><xref ref-type="fig" rid="F1">1</xref></p>')).figures[:1]
    assert (only.caption, only.mentions) == ("x", ("x1",))


def test_a_default_namespace_is_taken_off() -> None:
    data = article(figure("F1", "C", "g")).replace(b"<article ", b'<article xmlns="https://jats.nlm.nih.gov/ns/archiving/1.3/" ')
    assert parse(data).figures[0].caption == "C"


@pytest.mark.parametrize(
    ("text", "name", "kind"),
    [
        ("http://creativecommons.org/licenses/by-nc-sa/3.0/", "CC BY-NC-SA 3.0", "noncommercial"),
        ("https://creativecommons.org/publicdomain/zero/1.0/", "CC0 1.0", "commercial"),
        ("http://creativecommons.org/publicdomain/mark/1.0/", "Public Domain Mark 1.0", "commercial"),
        ("CC BY-ND", "CC BY-ND", "commercial"),
        ("CC0", "CC0", "commercial"),
        ("under the Creative Commons Attribution Non-Commercial License", "CC BY-NC", "noncommercial"),
        ("under the Creative Commons Attribution License", "CC BY", "commercial"),
        ("All rights reserved.", "", "other"),
    ],
)
def test_licences(text: str, name: str, kind: str) -> None:
    assert (licences.of_text(text), licences.class_of(licences.of_text(text))) == (name, kind)


@pytest.mark.parametrize(
    ("caption", "parts"),
    [
        ("A cell.", []),
        ("Cells (n = 5) after (a) long time.", []),
        ("Cells. (A) Red. (B) Green, as in (A).", ["Cells. (A) Red.", "Cells. (B) Green, as in (A)."]),
        ("(a, b) Both. (c-e) Three.", ["(a, b) Both."] * 2 + ["(c-e) Three."] * 3),
        ("Levels. A, Heat map. B, Box plot.", ["Levels. A, Heat map.", "Levels. B, Box plot."]),
        ("(B) comes (C) first.", []),
    ],
)
def test_panels_of_a_caption(caption: str, parts: list[str]) -> None:
    assert panels.split(caption) == parts
    assert panels.count(caption) == max(1, len(parts))


@pytest.mark.parametrize(
    ("citation", "date"),
    [
        ("PLoS Biol. 2003 Oct 18; 1(1):e5", (2003, 10, 18)),
        ("J. 2001 Autumn; 3:5", (2001, 9, 1)),
        ("J. 2001 Sept; 3:5", (2001, 9, 1)),
        ("J. 2001 Jan-Feb; 3:5", (2001, 1, 1)),
        ("No year at all", None),
    ],
)
def test_dates_of_citations(citation: str, date: tuple[int, int, int] | None) -> None:
    assert citations.date_of(citation) == date
