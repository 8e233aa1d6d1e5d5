"""Builds the lexicon rewriter's word table from a WordNet 3.1 `dict` folder (`data.*` and `index.sense`).

    python -m diptych.caption.rewriters.build_lexicon path/to/dict assets/lexicon.parquet

WordNet's synonyms are too many and too odd to put into captions as they come ("heart" -> "ticker"). A word is replaced only in its most
frequent sense, and only by words for which that sense is among their first two as well. Plurals and -ing forms are worked out
here, so that the rewriter itself is a look-up. `everyday.json` beside this file says it better for the commonest words of captions;
an empty list there keeps a word.
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from diptych.caption.rewriters.styles import word_set
from diptych.core.errors import DataError

POS_OF_NUMBER = {"1": "n", "2": "v", "3": "a", "4": "r", "5": "a"}
FILES = {"n": "data.noun", "v": "data.verb", "a": "data.adj"}
MAX_ALTERNATIVES = 6
MIN_LEAD = 0.6  # the share of a word's tagged uses that its part of speech must have for the word to be replaced
CONCRETE = frozenset({5, 6})  # the noun files animal and artifact; above plants, food and substances stand botany and chemistry
PEOPLE_FILE = 18  # nouns for persons are never replaced by each other: too many of them judge
UNWELCOME = frozenset({"ethnic slur", "obscenity", "vulgarism", "disparagement", "archaism", "slang", "trademark"})
TOO_BROAD = word_set(
    "artifact whole part piece thing object matter substance unit structure surface area covering device way "
    "container equipment machine applicator lever"
)
IRREGULAR_PLURALS = {
    "man": "men",
    "woman": "women",
    "child": "children",
    "foot": "feet",
    "tooth": "teeth",
    "goose": "geese",
    "mouse": "mice",
}
UNCOUNTED_ENDS = ("ics", "sheep", "deer", "fish", "ing", "ware", "wear", "ness")
WORD = re.compile(r"[a-z]+(?:-[a-z]+)?")
PHRASE = re.compile(r"[a-z]+(?:[ -][a-z]+)?")
EVERYDAY = Path(__file__).with_name("everyday.json")


@dataclass
class Synset:
    """One meaning: its words in WordNet's order, the nouns file it stands in, and the offsets of what it is a kind of."""

    lexfile: int
    words: list[str]
    hypernyms: list[int] = field(default_factory=list)
    domains: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Sense:
    """One meaning of one word: where it ranks among the word's meanings of that part of speech, and how often it was tagged."""

    pos: str
    offset: int
    rank: int
    count: int


def synsets(dictionary: Path, pos: str) -> dict[int, Synset]:
    """The synsets of one part of speech by offset. Raises DataError for a folder without WordNet's files."""
    path = dictionary / FILES[pos]
    if not path.is_file():
        raise DataError.at("This is not a WordNet dict folder", path, "no such file", "data.noun, data.verb, data.adj and index.sense")
    lines = path.read_text(encoding="latin-1").splitlines()
    return {int(line[:8]): _synset(line.partition(" | ")[0].split(" ")) for line in lines if not line.startswith(" ")}


def _synset(fields: list[str]) -> Synset:
    """Parses `offset lexfile type n_words (word id)* n_pointers (symbol offset pos source/target)*`."""
    count = int(fields[3], 16)
    words = [fields[4 + 2 * index].partition("(")[0].replace("_", " ") for index in range(count)]
    pointers = fields[5 + 2 * count :]
    synset = Synset(int(fields[1]), words)
    for symbol, offset in zip(pointers[0::4], pointers[1::4], strict=False):
        if symbol == "@":
            synset.hypernyms.append(int(offset))
        elif symbol == ";u":
            synset.domains.append(int(offset))
    return synset


def senses(dictionary: Path) -> dict[str, list[Sense]]:
    """All senses of every word, by the word in lower case. Each line is `word%type:… offset rank count`."""
    found: dict[str, list[Sense]] = defaultdict(list)
    for line in (dictionary / "index.sense").read_text(encoding="latin-1").splitlines():
        name, offset, rank, count = line.split()
        word, _, kind = name.partition("%")
        found[word.replace("_", " ")].append(Sense(POS_OF_NUMBER[kind[0]], int(offset), int(rank), int(count)))
    return found


def lead(word_senses: Iterable[Sense]) -> Sense | None:
    """The sense a word has when nothing else is known: first sense of its clearly most tagged part of speech, or None."""
    uses: dict[str, int] = defaultdict(int)
    first: dict[str, Sense] = {}
    for sense in word_senses:
        uses[sense.pos] += sense.count + 1
        if sense.rank == 1:
            first[sense.pos] = sense
    pos = max(uses, key=lambda name: (uses[name], name))
    return first.get(pos) if uses[pos] >= MIN_LEAD * sum(uses.values()) else None


class Thesaurus:
    """WordNet read into memory, with the rules that choose which words may stand for which."""

    def __init__(self, dictionary: Path) -> None:
        self.synsets = {pos: synsets(dictionary, pos) for pos in FILES}
        self.senses = senses(dictionary)
        self.leads = {word: found for word, all_senses in self.senses.items() if (found := lead(all_senses))}

    def rows(self) -> Iterator[tuple[str, list[str]]]:
        """`(word, alternatives)` for every single word that has any, inflected forms included."""
        for word, sense in sorted(self.leads.items()):
            if sense.pos in FILES and WORD.fullmatch(word) and len(word) > 2:
                yield from self._forms(word, sense.pos, self.synonyms(word, sense) or self.kinds(word, sense))

    def _forms(self, word: str, pos: str, found: list[str]) -> Iterator[tuple[str, list[str]]]:
        """The word itself, and its plural or -ing form where WordNet has no word of that spelling. Verbs only as -ing forms."""
        if pos != "v":
            yield word, fitting(word, found)
        inflect = {"n": plural, "v": gerund}.get(pos)
        form = inflect(word) if inflect else None
        if inflect and form and form not in self.senses:
            yield form, fitting(form, [other for alternative in found if (other := inflect(alternative))])

    def synonyms(self, word: str, sense: Sense) -> list[str]:
        """Words of the same synset for which it is the first or second sense and was seen in tagged text."""
        synset = self.synsets[sense.pos][sense.offset]
        if synset.lexfile == PEOPLE_FILE or self._unwelcome(synset):
            return []
        return [other for other in synset.words if other != word and self._mainly(other, sense)]

    def kinds(self, word: str, sense: Sense) -> list[str]:
        """The kinds that a concrete thing belongs to: `cat` -> `feline`."""
        synset = self.synsets[sense.pos][sense.offset]
        if sense.pos != "n" or synset.lexfile not in CONCRETE or self._unwelcome(synset):
            return []
        above = [(offset, self.synsets["n"].get(offset)) for offset in synset.hypernyms]
        return [
            name
            for offset, kind in above
            if kind and kind.lexfile in CONCRETE and not self._unwelcome(kind)
            for name in kind.words[:1]
            if name not in TOO_BROAD and " " not in name and self._mainly(name, Sense("n", offset, 1, 0))
        ]

    def _mainly(self, word: str, sense: Sense) -> bool:
        """Whether a word mostly means this: seen in tagged text, and WordNet lists the sense among its first two."""
        if not PHRASE.fullmatch(word):
            return False
        own = next((own for own in self.senses.get(word, ()) if (own.pos, own.offset) == (sense.pos, sense.offset)), None)
        main = self.leads.get(word)
        return own is not None and own.rank <= 2 and own.count > 0 and (main is None or main.pos == sense.pos)

    def _unwelcome(self, synset: Synset) -> bool:
        names = (name for offset in synset.domains if (domain := self.synsets["n"].get(offset)) for name in domain.words)
        return any(name in UNWELCOME for name in names)


def fitting(word: str, others: Iterable[str]) -> list[str]:
    """The first few that may stand in the word's place: neither contains the other, and both or neither end in -ing."""
    fits = [other for other in others if word not in other and other not in word and word.endswith("ing") == other.endswith("ing")]
    return fits[:MAX_ALTERNATIVES]


def plural(noun: str) -> str | None:
    """The plural of a noun by the common rules; None for those that are not counted."""
    if noun in IRREGULAR_PLURALS:
        return IRREGULAR_PLURALS[noun]
    if noun.endswith(UNCOUNTED_ENDS) or (noun.endswith("s") and not noun.endswith(("ss", "us"))):
        return None
    if noun.endswith(("s", "x", "z", "ch", "sh")):
        return noun + "es"
    if noun.endswith("man"):
        return noun[:-2] + "en"
    return noun[:-1] + "ies" if re.search(r"[^aeiou]y$", noun) else noun + "s"


def gerund(verb: str) -> str | None:
    """The -ing form of a one-word verb; None where the common rules do not say whether a consonant doubles."""
    if " " in verb or "-" in verb:
        return None
    if verb.endswith("ie"):
        return verb[:-2] + "ying"
    if re.search(r"[^eoy]e$", verb):
        return verb[:-1] + "ing"
    if re.fullmatch(r"[^aeiou]*[aeiou][^aeiouwxy]", verb):
        return verb + verb[-1] + "ing"
    vowels = len(re.findall(r"[aeiouy]+", verb))
    return None if vowels > 1 and re.search(r"[^aeiou][aeiou][lrtpnm]$", verb) else verb + "ing"


def table(dictionary: Path) -> pl.DataFrame:
    """The word table: `word` (str, lower case, unique, sorted), `alternatives` (list of str, the nearest first)."""
    rows = dict(Thesaurus(dictionary).rows()) | json.loads(EVERYDAY.read_text())
    rows = {word: others for word, others in rows.items() if others}
    return pl.DataFrame({"word": list(rows), "alternatives": list(rows.values())}, schema=SCHEMA).sort("word")


SCHEMA: dict[str, pl.DataType | type[pl.DataType]] = {"word": pl.String, "alternatives": pl.List(pl.String)}


def main(arguments: list[str]) -> None:
    """Reads the dict folder named first, writes the Parquet file named second."""
    frame = table(Path(arguments[0]))
    frame.write_parquet(arguments[1], compression="zstd", compression_level=19, statistics=False)
    print(f"{frame.height} words, {Path(arguments[1]).stat().st_size} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
