"""Which packages there are: those below a folder, or those that a file list names, with what it says of them.

Lists are those of PubMed Central (tab-separated after a line with the date: path, citation, PMC id, PubMed id, licence), or a CSV, TSV or
JSON Lines table with the column `File` and any of `Article Citation`, `Title`, `Journal`, `Year`, `DOI`, `PMCID`, `PMID`, `License`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

from diptych.core.errors import DataError
from diptych.pairs.articles import citations, licences
from diptych.pairs.articles.package import is_archive
from diptych.pairs.sources.folder import read_table

_NAMES = {
    "file": "file", "path": "file", "article file": "file", "citation": "citation", "article citation": "citation", "title": "title",
    "journal": "journal", "year": "year", "doi": "doi", "pmcid": "pmc", "accession id": "pmc", "pmc": "pmc", "pmid": "pmid",
    "license": "licence", "licence": "licence",
}  # fmt: skip
_PMC_COLUMNS = ("file", "citation", "pmc", "pmid", "licence")


@dataclass(frozen=True)
class Entry:
    """What a list says of a package; what it does not say is empty."""

    title: str = ""
    journal: str = ""
    date: str = ""
    doi: str = ""
    pmc: str = ""
    pmid: str = ""
    licence: str = ""


def packages(root: Path) -> list[str]:
    """The packages below a folder, by their paths in it, sorted: archives, articles that lie beside their files, and folders without either,
    which are no packages but are not passed over in silence.

    Raises DataError if there is no such folder, or no package in it.
    """
    if not root.is_dir():
        raise DataError.at("There is no folder of article packages here", "path", str(root), "a folder")
    paths = list(root.rglob("*"))
    names = sorted(path.relative_to(root).as_posix() for path in paths if path.is_file())
    beside = {name.rpartition("/")[0] for name in names if name.lower().endswith(".nxml")}
    found = [
        name
        for name in names
        if is_archive(name) or name.lower().endswith(".nxml") or (name.lower().endswith(".xml") and name.rpartition("/")[0] not in beside)
    ]
    if not found:
        raise DataError.at(
            "There are no article packages here", "path", str(root), "archives (.tar.gz, .tgz, .tar) or .nxml files below it"
        )
    return sorted(found + _without({path.relative_to(root).as_posix() for path in paths if path.is_dir()}, found))


def _without(folders: set[str], found: Sequence[str]) -> list[str]:
    """The folders with no package in them that belong to no article further up either; of those inside one another the outermost."""
    holders = {str(parent) for name in found for parent in PurePosixPath(name).parents}
    articles = {str(PurePosixPath(name).parent) for name in found if not is_archive(name)}
    bare = {name for name in folders - holders if articles.isdisjoint(map(str, PurePosixPath(name).parents)) and "/." not in f"/{name}"}
    return [name for name in bare if str(PurePosixPath(name).parent) not in bare]


def read(path: Path) -> Mapping[str, Entry]:
    """The entries of a list by package, in the order of the list; kept by the process until the file changes.

    Raises DataError if the list is missing or names no package.
    """
    try:
        return _read(path, path.stat().st_mtime_ns)
    except OSError as error:
        raise DataError.at("The file list cannot be read", "table", str(path), "a readable table", str(error)) from None


@lru_cache(maxsize=4)
def _read(path: Path, changed_ns: int) -> Mapping[str, Entry]:
    del changed_ns
    rows = _pmc_rows(path) if path.suffix == ".txt" else [_named(row) for row in read_table(path)]
    entries = {str(row["file"]).strip(): _entry(row) for row in rows if row.get("file")}
    if not entries:
        raise DataError.at("The file list names no package", str(path), "<no column `File`>", "PubMed Central's list, or a column `File`")
    return entries


def _pmc_rows(path: Path) -> list[dict[str, object]]:
    lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    return [dict(zip(_PMC_COLUMNS, line.split("\t"), strict=False)) for line in lines if "\t" in line]


def _named(row: Mapping[str, object]) -> dict[str, object]:
    return {_NAMES[name.strip().lower()]: value for name, value in row.items() if isinstance(name, str) and name.strip().lower() in _NAMES}


def _entry(row: Mapping[str, object]) -> Entry:
    citation = str(row.get("citation") or "")
    day = citations.date_of(citation) if citation else None
    year = str(row.get("year") or "")
    return Entry(
        title=citations.title_of(row.get("title")) or "",
        journal=str(row.get("journal") or "") or citations.journal_of(citation),
        date="{:04d}-{:02d}-{:02d}".format(*day) if day else f"{year}-01-01" if len(year) == 4 and year.isdigit() else "",
        doi=str(row.get("doi") or ""),
        pmc=str(row.get("pmc") or ""),
        pmid=str(row.get("pmid") or "").upper().removeprefix("PMID:"),
        licence=licences.of_text(str(row.get("licence") or "")),
    )
