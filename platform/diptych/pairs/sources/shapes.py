"""Renderings of coloured shapes with texts that name what is to be seen: a small world all of whose factors are known.

A picture shows one shape: `a small red circle on a black background`. Every split has a look of its own (which shapes, colours,
backgrounds and sizes, how much noise), so that one data set can hold a training domain and a shifted target (CapS-Adapter), words to
replace (CLIP4DM), edits (AugCLIP), shapes never seen, noise, and pictures whose texture speaks for another class than their silhouette
(holistic robustness). With `look-alike` classes it holds groups that differ by a neighbouring hue and size alone (ShrinkMatch); with
`scene` classes all that a text tells is the class, so that `train.avoid: label` keeps equal texts out of a batch.

    data:
      source: shapes
      classes: colour-shape
      more: {conflict: 200}
      looks:
        test: {backgrounds: [brown, gray], sizes: [small]}

Within a split the classes are dealt like cards, so that their counts differ by one at most, and within a class its looks are. A
picture's place, angle, noise and foil depend on `(seed, key)` alone. An edited picture has the place, angle and noise of its original.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field, field_validator, model_validator

from diptych.core import chance
from diptych.core.config import Config as BaseConfig
from diptych.core.points import RawPair, Source
from diptych.pairs.sources.shapes_draw import (
    BACKGROUNDS,
    COLOURS,
    RADIUS,
    SHAPES,
    TEXTURES,
    Rgb,
    Texture,
    of_hue,
    render,
    silhouette,
)
from diptych.pairs.sources.shapes_words import EDITS, PATTERNED, WORDINGS, Edit, Seen, caption, described, replaced

__all__ = ["Config", "Look", "Seen", "Shapes", "caption", "render", "silhouette"]

Classes = Literal["shape", "colour", "colour-shape", "size-colour-shape", "scene", "look-alike"]
Shape = Literal["circle", "square", "triangle", "diamond", "cross", "star", "ring", "crescent", "arrow"]
Colour = Literal["red", "green", "blue", "yellow", "purple", "orange", "crimson", "teal"]
Background = Literal["black", "white", "brown", "gray"]
Size = Literal["small", "large"]
Noise = Annotated[float, Field(ge=0, le=10)]
SplitName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]

SPLITS = ("train", "pool", "val", "test")
PART_ROWS = 2000
ORIGINALS, EDITED = "originals", "edits"
BARE_TEXT = "a picture"
SEPARATOR = ";"
CELLS = "meta.cells"

ALIKE_RADIUS = {"small": 0.29, "large": 0.35}
"""Neighbouring sizes of look-alike classes."""
ALIKE_SPREAD = 0.01
"""Half the range of a radius within a look-alike class."""


class Look(BaseConfig):
    """What the pictures of a split may look like. All combinations occur equally often."""

    shapes: tuple[Shape, ...] = Field(("circle", "square", "triangle", "diamond", "cross", "star"), min_length=1, description="shapes")
    colours: tuple[Colour, ...] = Field(("red", "green", "blue", "yellow", "purple"), min_length=1, description="colours")
    backgrounds: tuple[Background, ...] = Field(("black", "white", "brown", "gray"), min_length=1, description="backgrounds")
    sizes: tuple[Size, ...] = Field(("small", "large"), min_length=1, description="sizes")
    paint: Literal["plain", "own", "foreign"] = Field(
        "plain",
        description="`plain`: one colour; `own`: the texture of the shape, in place of a colour; `foreign`: that of another (cue conflict)",
    )
    jitter: float = Field(
        0.08, ge=0, le=0.5, description="how far the centre may lie from the picture's, sideways and up or down, share of the side"
    )
    turn_deg: float = Field(0.0, ge=0, le=180, description="by how much a shape may be turned, either way, degrees")
    noise: Noise | Annotated[tuple[Noise, ...], Field(min_length=1)] = Field(
        0.04, description="standard deviation of the pixels' noise, black to white is 1, with 10 nothing is left; or levels to draw it from"
    )

    @field_validator("shapes", "colours", "backgrounds", "sizes", "noise")
    @classmethod
    def _distinct(cls, values: Any) -> Any:
        if isinstance(values, tuple) and len(set(values)) < len(values):
            raise ValueError("each at most once")
        return values

    @model_validator(mode="after")
    def _another_texture(self) -> Self:
        if self.paint == "foreign" and len(self.shapes) < 2:
            raise ValueError("paint: a foreign texture is that of another of the shapes, and there is one only")
        return self


class Config(BaseConfig):
    """A world of rendered shapes: how many pictures a split has, what they look like, and what a class is."""

    method: Literal["shapes"] = "shapes"
    seed: int = Field(0, ge=0, lt=2**63, description="names all draws")
    size_px: int = Field(16, ge=8, le=256, description="side of the picture in pixels")
    classes: Classes = Field(
        "colour-shape",
        description="what `label` tells; `scene`: all that the text does; `look-alike`: groups of one shape each, of neighbouring hues and sizes",
    )
    train: int = Field(2000, ge=0, le=1_000_000, description="pictures of the split `train`")
    pool: int = Field(500, ge=0, le=1_000_000, description="pictures of the split `pool`: few shots, or unlabelled examples")
    val: int = Field(200, ge=0, le=1_000_000, description="pictures of the split `val`")
    test: int = Field(600, ge=0, le=1_000_000, description="pictures of the split `test`")
    more: dict[SplitName, Annotated[int, Field(ge=1, le=1_000_000)]] = Field({}, description="pictures of further splits by name")
    looks: dict[SplitName, Look] = Field({}, description="looks of splits by name; a split without one has the default look")
    edits: int = Field(
        0, ge=0, le=300_000, description="pictures of the split `originals`; `edits` holds an ideal edit, an over-edit and no edit of each"
    )
    wordings: int = Field(1, ge=1, le=len(WORDINGS), description="captions a picture has, all of which tell the same")
    labels_per_class: int | None = Field(
        None,
        ge=1,
        description="pictures a class of `train` that keep label and text; the others get null and a bare text; null: all keep them",
    )
    mismatched: float = Field(
        0.0, ge=0, lt=1, description="share of `train` whose text is another picture's; `meta.intact` is 0 there and 1 elsewhere"
    )
    synthetic: float | None = Field(
        None,
        ge=0,
        le=1,
        description="share of errors of a short caption, source `synthetic:shapes`, that `train` gets beside; null: no such",
    )
    foils: bool = Field(
        False, description="add `meta.foil`, the text with one word replaced by another word of `train`, and `meta.foil_word`"
    )
    cells: int | None = Field(
        None,
        ge=2,
        le=256,
        description="add `meta.cells`, a grid of so many cells a side, row by row: 1 + label where the shape covers half of a cell, else 0",
    )
    hues: int = Field(3, ge=1, le=5, description="look-alike: neighbouring hues a shape; with two sizes, five shapes make 30 classes")
    hue_step_deg: float = Field(14.0, gt=0, le=60, description="look-alike: distance of neighbouring hues, degrees of the colour circle")
    hue_spread_deg: float = Field(4.0, ge=0, le=60, description="look-alike: half the range of hues within a class, degrees")

    @model_validator(mode="after")
    def _splits_fit(self) -> Self:
        if taken := sorted(set(self.more) & {*SPLITS, ORIGINALS, EDITED}):
            raise ValueError(f"more: {', '.join(taken)} has a key of its own")
        if unknown := sorted(set(self.looks) - set(self.counts)):
            raise ValueError(f"looks: there is no split {', '.join(unknown)}; there are {', '.join(self.counts)}")
        if EDITED in self.looks:
            raise ValueError(f"looks: {EDITED} have the look of {ORIGINALS}")
        if not any(self.counts.values()):
            raise ValueError("no split has a picture")
        return self

    @model_validator(mode="after")
    def _cells_fit(self) -> Self:
        if self.cells is not None and self.size_px % self.cells:
            raise ValueError(f"cells: {self.size_px} pixels do not divide into {self.cells} cells")
        return self

    @model_validator(mode="after")
    def _classes_fit(self) -> Self:
        looks, coloured = [self.look(split) for split in self.counts], self.classes not in ("shape", "look-alike")
        if any(look.paint != "plain" for look in looks) and (coloured or self.classes == "look-alike"):
            raise ValueError("paint: a texture takes the colour's place, so classes must be 'shape'")
        if self.classes == "look-alike" and any(look.colours != Look().colours for look in looks):
            raise ValueError("colours: look-alike classes have hues of their own")
        return self

    @model_validator(mode="after")
    def _labels_and_foils_fit(self) -> Self:
        classes = len(_classes(self, self.look("train")))
        if self.labels_per_class is not None and self.labels_per_class * classes > self.train:
            raise ValueError(f"labels_per_class: {classes} classes need {self.labels_per_class * classes} pictures in train")
        if self.foils and self.classes == "look-alike":
            raise ValueError("foils: texts of look-alike classes have no words to replace")
        if self.synthetic is not None and self.classes == "look-alike":
            raise ValueError("synthetic: look-alike classes have hues that no captioner has words for")
        if self.edits and (self.classes == "look-alike" or min(map(len, _words(self.look(ORIGINALS)).values())) < 2):
            raise ValueError(f"edits: whatever is told of {ORIGINALS} must have two words or more")
        unpaired = [split for split in self.counts if self.foils and not self._replaceable(split)]
        if unpaired:
            raise ValueError(f"foils: train knows no other word for anything in the texts of {', '.join(unpaired)}")
        return self

    @property
    def counts(self) -> dict[str, int]:
        """Pictures a split."""
        edits = {ORIGINALS: self.edits, EDITED: len(EDITS) * self.edits} if self.edits else {}
        return {**{split: getattr(self, split) for split in SPLITS}, **self.more, **edits}

    def look(self, split: str) -> Look:
        """The look of a split."""
        return self.looks.get(ORIGINALS if split == EDITED else split, Look())

    def _replaceable(self, split: str) -> set[str]:
        """The attributes that texts of a split name and for which `train` has two words or more."""
        own = _words(self.look(split))
        return {name for name, words in _words(self.look("train")).items() if len(words) > 1 and own[name]}

    def build(self) -> Shapes:
        """The source; draws when it is read."""
        return Shapes(self)


class Shapes(Source):
    """Pairs with the extra columns `label`, `label_name`, `meta.shape`, `meta.colour`, `meta.background`, `meta.size`, `meta.turn_deg`.

    Labels number the classes of `train`'s look from 0, then those that only other splits have. Where there are textures, `meta.texture`
    names the shape that the picture's texture belongs to, and where a split has several levels of noise, `meta.noise` tells the picture's; with `labels_per_class`, `meta.class` holds the label that may be hidden. Edits
    have the columns of `shapes_words.Edit`.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def parts(self) -> Sequence[str]:
        """Runs of 2,000 pairs of the splits."""
        counts = self.config.counts
        return sorted(f"{split}-{index:05d}" for split, count in counts.items() for index in range(-(-count // PART_ROWS)))

    def read(self, part: str) -> Iterator[RawPair]:
        """The pairs of one part; keys tell the split and the row."""
        split, _, number = part.rpartition("-")
        first = int(number) * PART_ROWS
        for row in range(first, min(first + PART_ROWS, self.config.counts[split])):
            yield self._pair(split, row)

    @cached_property
    def labels(self) -> Mapping[str, int]:
        """The class names with their labels."""
        names = (name for split in self.config.counts for name in _classes(self.config, self.config.look(split)))
        return {name: label for label, name in enumerate(dict.fromkeys(names))}

    def _pair(self, split: str, row: int) -> RawPair:
        key, look = _key(split, row), self.config.look(split)
        seen, drawn_as, edit = self._edited(row) if split == EDITED else (self._dealt(split, row), key, {})
        image, drawn = self._drawn(drawn_as, look, seen)
        name = _class_name(self.config.classes, seen)
        texts, label = [caption(seen, wording) for wording in range(self.config.wordings)], self.labels[name]
        extra: dict[str, Any] = {
            "label": label,
            "label_name": name,
            **{f"meta.{word}": value for word, value in seen._asdict().items()},
            **drawn,
            **edit,
        }
        if self.config.cells is not None:
            extra[CELLS] = [(label + 1) * covered for covered in drawn[CELLS]]
        if self.config.foils:
            extra |= self._foil(key, seen)
        if split == "train" and self.config.mismatched:
            told = self._told(key, seen)
            texts, extra["meta.intact"] = [caption(told, wording) for wording in range(len(texts))], int(told == seen)
        if (kept := self.config.labels_per_class) is not None:
            extra["meta.class"] = label
            if split == "train" and row >= kept * len(self._classes[split]):
                texts, extra = [BARE_TEXT], {**extra, "label": None, "label_name": None}
        captions = [(text, "alt") for text in texts]
        if split == "train" and self.config.synthetic is not None:
            draw = chance.generator(self.config.seed, "shapes captioner", key)
            captions.append((described(seen, _words(look), draw, self.config.synthetic), "synthetic:shapes"))
        return RawPair(key, image, captions, extra, split)

    def _told(self, key: str, seen: Seen) -> Seen:
        """What the text of a training pair tells: what the picture shows, or what a picture drawn at random does."""
        draw = chance.generator(self.config.seed, "shapes mismatch", key)
        return self._dealt("train", int(draw.integers(self.config.train))) if draw.random() < self.config.mismatched else seen

    @cached_property
    def _classes(self) -> Mapping[str, Mapping[str, Sequence[Seen]]]:
        return {split: _classes(self.config, self.config.look(split)) for split in self.config.counts}

    def _edited(self, row: int) -> tuple[Seen, str, dict[str, Any]]:
        """What a row of the edits shows, the key of the original that it is drawn as, and the columns that describe the edit."""
        original, kind = divmod(row, len(EDITS))
        key = _key(ORIGINALS, original)
        draw = chance.generator(self.config.seed, "shapes edit", key)
        edit = Edit.drawn(self._dealt(ORIGINALS, original), _words(self.config.look(ORIGINALS)), draw)
        return edit.shown(EDITS[kind]), key, edit.columns(key, EDITS[kind], SEPARATOR)

    def _dealt(self, split: str, row: int) -> Seen:
        """What a row shows. A hand holds one picture a class; a class shows all it can before it repeats itself."""
        classes: Any = self._classes[split]
        hand, place = divmod(row, len(classes))
        name = list(classes)[chance.generator(self.config.seed, "shapes hand", split, hand).permutation(len(classes))[place]]
        round, turn = divmod(hand, len(classes[name]))
        order = chance.generator(self.config.seed, "shapes looks", split, name, round).permutation(len(classes[name]))
        dealt: Seen = classes[name][order[turn]]
        return dealt

    def _drawn(self, key: str, look: Look, seen: Seen) -> tuple[bytes, dict[str, Any]]:
        """The picture, and the columns that say how it was drawn. Noise is drawn last, so that it changes nothing else."""
        draw = chance.generator(self.config.seed, "shapes picture", key)
        across, down, turn, hue, radius = (2 * draw.random(5) - 1).tolist()
        other = float(draw.random())
        columns: dict[str, Any] = {"meta.turn_deg": turn * look.turn_deg}
        paint: str | Rgb | Texture = seen.colour
        size: str | float = seen.size
        if look.paint != "plain":
            others = [shape for shape in look.shapes if shape != seen.shape]
            columns["meta.texture"] = seen.shape if look.paint == "own" else others[int(other * len(others))]
            paint = TEXTURES[columns["meta.texture"]]
        if self.config.classes == "look-alike":
            paint = of_hue(float(seen.colour.removeprefix("hue ")) + hue * self.config.hue_spread_deg)
            size = ALIKE_RADIUS[seen.size] + radius * ALIKE_SPREAD
        jitter = (across * look.jitter, down * look.jitter)
        picture = render(seen.shape, paint, seen.background, size, jitter, self.config.size_px, columns["meta.turn_deg"])
        if self.config.cells is not None:
            side = self.config.size_px // self.config.cells
            covered_HW = silhouette(seen.shape, size, jitter, self.config.size_px, columns["meta.turn_deg"])
            share_GG = covered_HW.reshape(self.config.cells, side, self.config.cells, side).mean(axis=(1, 3))
            columns[CELLS] = (share_GG >= 0.5).ravel().tolist()
        noise = look.noise
        if isinstance(noise, tuple):
            noise = columns["meta.noise"] = noise[int(draw.integers(len(noise)))]
        return _png(picture + 255 * noise * draw.normal(0.0, 1.0, picture.shape)), columns

    def _foil(self, key: str, seen: Seen) -> dict[str, str]:
        """The text with one word replaced by another that `train` has in its place; each replaceable word is as likely."""
        draw = chance.generator(self.config.seed, "shapes foil", key)
        name, word = replaced(seen, _words(self.config.look("train")), draw)
        return {"meta.foil": caption(seen._replace(**{name: word})), "meta.foil_word": word}


def _key(split: str, row: int) -> str:
    return f"shapes-{split}-{row:06d}"


def _words(look: Look) -> dict[str, Sequence[str]]:
    """The words that texts of this look use for each attribute."""
    colours = look.colours if look.paint == "plain" else ()
    return {"size": look.sizes, "colour": colours, "shape": look.shapes, "background": look.backgrounds}


def _classes(config: Config, look: Look) -> dict[str, list[Seen]]:
    """The classes of a look by name, each with all it can show; the order is that of the tables, however the look lists its words."""
    shapes, backgrounds, sizes = (
        [word for word in table if word in chosen]
        for table, chosen in ((SHAPES, look.shapes), (BACKGROUNDS, look.backgrounds), (RADIUS, look.sizes))
    )
    found: dict[str, list[Seen]] = {}
    for shape in shapes:
        for colour, background, size in itertools.product(_colours(config, look, shape), backgrounds, sizes):
            seen = Seen(shape, colour, background, size)
            found.setdefault(_class_name(config.classes, seen), []).append(seen)
    return found


def _colours(config: Config, look: Look, shape: str) -> list[str]:
    """The colours of a shape: the look's, one word for all textures, or the hues of a look-alike group around one of the group's own."""
    if look.paint != "plain":
        return [PATTERNED]
    if config.classes != "look-alike":
        return [colour for colour in COLOURS if colour in look.colours]
    middle = 360 / len(SHAPES) * SHAPES.index(shape)
    steps = [(step - (config.hues - 1) / 2) * config.hue_step_deg for step in range(config.hues)]
    return [f"hue {(middle + step) % 360:g}" for step in steps]


def _class_name(classes: Classes, seen: Seen) -> str:
    match classes:
        case "shape":
            return seen.shape
        case "colour":
            return seen.colour
        case "colour-shape":
            return f"{seen.colour} {seen.shape}"
        case "size-colour-shape":
            return f"{seen.size} {seen.colour} {seen.shape}"
        case "scene":
            return caption(seen).removeprefix("a ")
        case "look-alike":
            return f"{seen.size} {seen.shape} of {seen.colour}"


def _png(picture_HWC: NDArray[np.float64]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.rint(picture_HWC.clip(0, 255)).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()
