"""Real handwritten digits as image-text pairs: small pools in which the claims of three papers can show, or fail to.

The pictures are the 1,797 digits of 8 x 8 pixels that scikit-learn ships (UCI optical recognition of handwritten digits). The seed draws
597 of them as the split `test`, each with a text that names the digit, and of the others a training share. A pool is made of that share:

- `plain`: every picture once, with a text that names its digit;
- `zipf-junk`: pictures drawn so that the digits' frequencies fall as 1 / rank^2 (which digit has which rank is the seed's), and more than
  a third of the texts replaced by camera file names that name nothing: what a crawl looks like (MetaCLIP);
- `dense-classes`: three digits twelve times over with a little noise, the others once: concepts of unequal density (Density-Based Pruning);
- `sales`: texts of which 45 % name the digit among a sales phrase and the others name nothing; `meta.visual` says what the strokes look
  like, in every split (VeCLIP);
- `stock-ids`: texts of one fixed form with a number of the picture's own, which a model can learn by heart (LaCLIP);
- `vague`: texts that mostly say "a handwritten digit" and in a fifth of the cases which; five such texts a test picture (guided captioning);
- `unpaired`: pictures that `plain` with as many never trains on, each with a text that names any digit at all (CgT-GAN);
- `target`: clean pictures to train on, and all other digits shifted: a domain to adapt to (GDA, NoLA, AdaNPC, model patching). Which digit
  is in which split is the seed's and the same for every shift, so a model of one dataset never saw the test pictures of another. The
  training pictures and texts are those of `plain` with as many of them.

  | split | pictures | what for |
  |---|---|---|
  | `train` | 600 or `train`, clean (shifted with `shift_train`) | training; the memory of a test-time method |
  | `pool` | `pool_rows`, shifted | few shots, or unlabelled examples |
  | `val` | `val_rows`, shifted | choosing hyper-parameters |
  | `test` | all others, shifted; keys in the order of the stream | measuring |

  With the shift `drift`, all that is not `train` is one stream in `test`, clean at first and more corrupted from block to block.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field, field_validator, model_validator

from diptych.core import chance
from diptych.core.config import Config as BaseConfig
from diptych.core.points import RawPair, Source
from diptych.pairs.sources import digits_texts
from diptych.pairs.sources.digits_shift import SIGMA, Corruption, Shift, block_of, strength_of
from diptych.pairs.sources.source_card import SourceCard
from diptych.pairs.strokes import describe

Pool = Literal["plain", "zipf-junk", "dense-classes", "stock-ids", "sales", "vague", "unpaired", "target"]

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SYNONYMS = ("nought", "solo", "duet", "trio", "quartet", "quintet", "sextet", "septet", "octet", "nonet")
"""Another word for each digit, which no text of any pool holds: what a model can only know from rewritten texts."""

TEXTS = ("the number {}", "a handwritten {}", "digit {} in white on black", "somebody wrote {} here", "scan of the figure {}")
TEST_TEXT = "the number {}"
JUNK = ("IMG_{:04d}.JPG", "DSC{:05d}.jpg", "scan-{:05d}.png", "untitled ({})", "P10{:05d}")

SALES = ("buy {} now, best price", "{} in stock, free delivery", "{} only today, half price", "order {} here and save")
NO_NAME = ("free delivery, order today", "best price, new in stock", "sale ends soon, click here", "top seller {:04d}", "item {:05d}")
NAMED = 0.45

PICTURES, TEST = 1797, 597
TARGET_TRAIN = 600
SIDE_PX, LEVELS = 8, 16
CONTRAST, BRIGHTNESS = 0.5, 0.2
PART_ROWS = 2000

_Int = NDArray[np.int64]


class Config(BaseConfig):
    """A pool of handwritten digits; the seed draws the training share and the pool."""

    method: Literal["digits"] = "digits"
    pool: Pool = Field("plain", description="which pool to make of the training share")
    seed: int = Field(
        0, ge=0, lt=2**63, description="names the draws: which pictures are for training, the pool's classes, texts and noise"
    )
    train: int | None = Field(
        None,
        ge=10,
        le=PICTURES - TEST,
        description="pictures of the training share; never one of the test split; null: 1,200, of the target and unpaired 600",
    )
    size_px: int = Field(16, ge=SIDE_PX, le=256, description="side of the picture in pixels, a multiple of 8: every pixel becomes a square")
    rows: int = Field(12_000, ge=10, le=1_000_000, description="zipf-junk: pairs of the pool")
    exponent: float = Field(2.0, ge=0, le=10, description="zipf-junk: frequency of a class is 1 / rank^exponent")
    junk: float = Field(0.35, ge=0, lt=1, description="zipf-junk: share of texts replaced by file names")
    dense: tuple[int, ...] = Field((0, 4, 6), description="dense-classes: the digits that are repeated")
    copies: int = Field(12, ge=1, le=1000, description="dense-classes: times that a repeated picture occurs")
    noise: float = Field(0.5, ge=0, le=LEVELS, description="dense-classes: standard deviation of the noise, in grey levels of 16")
    classes: tuple[int, ...] = Field(
        tuple(range(10)), min_length=1, description="the digits that are read, of every split; the splits are drawn before, from all"
    )
    shift: Shift = Field(
        "none",
        description="target: `pixel`: one pixel sideways; `blur`: 3 x 3; `contrast`; `noise`: nothing but it; `drift`: a stream of 12 blocks",
    )
    sigma: float | None = Field(
        None,
        ge=0,
        le=10,
        description="target: standard deviation of the noise, black to white is 1; null: the shift's own: "
        + ", ".join(f"{shift} {sigma:g}" for shift, sigma in SIGMA.items()),
    )
    contrast: float = Field(CONTRAST, ge=0, le=1, description="target, shift `contrast`: factor of the grey levels")
    brightness: float = Field(BRIGHTNESS, ge=-1, le=1, description="target, shift `contrast`: what is added to them, black to white is 1")
    pool_rows: int = Field(500, ge=0, description="target: pictures of the split `pool`; none in a drift")
    val_rows: int = Field(150, ge=0, description="target: pictures of the split `val`; none in a drift")
    shift_train: bool = Field(False, description="target: shift the training pictures too (not by a drift)")
    shift_share: float = Field(1.0, gt=0, le=1, description="target, with shift_train: share of the training pictures that are shifted")
    part: tuple[int, int] = Field(
        (0, 1), description="[k, n]: of the training share only the k-th of n parts, from 0: pools of other parts share no picture with it"
    )

    @field_validator("size_px")
    @classmethod
    def _whole_squares(cls, size_px: int) -> int:
        if size_px % SIDE_PX:
            raise ValueError(f"a multiple of {SIDE_PX}")
        return size_px

    @field_validator("dense", "classes")
    @classmethod
    def _are_digits(cls, digits: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(digits)) < len(digits) or not set(digits) <= set(range(10)):
            raise ValueError("digits from 0 to 9, each at most once")
        return digits

    @model_validator(mode="after")
    def _fits_the_pool(self) -> Self:
        if self.pool != "target" and (self.shift != "none" or self.sigma is not None or self.shift_train):
            raise ValueError("shift, sigma and shift_train belong to the pool 'target'")
        if self.shift == "drift" and self.shift_train:
            raise ValueError("shift_train: a drift has no one shift that training pictures could have")
        if not 0 <= self.part[0] < self.part[1]:
            raise ValueError("part: [k, n] with k from 0 to n - 1")
        if self.shift_share < 1 and not self.shift_train:
            raise ValueError("shift_share belongs to shift_train")
        if self.pool == "unpaired" and 2 * self.training > PICTURES - TEST:
            raise ValueError(
                f"train: two disjoint shares of the {PICTURES - TEST} pictures outside the test have at most half of them each"
            )
        if self.pool == "target" and self.shift != "drift" and self.training + self.pool_rows + self.val_rows >= PICTURES:
            raise ValueError(f"train, pool_rows and val_rows leave none of the {PICTURES} pictures for the test")
        return self

    @property
    def training(self) -> int:
        """Pictures of the training share."""
        return self.train or (TARGET_TRAIN if self.pool in ("target", "unpaired") else PICTURES - TEST)

    @property
    def corruption(self) -> Corruption:
        """What befalls the pictures of the target."""
        return Corruption(self.shift, SIGMA[self.shift] if self.sigma is None else self.sigma, self.contrast, self.brightness)

    def build(self) -> Digits:
        """The source. Needs nothing but scikit-learn's own data file."""
        return Digits(self)


@dataclass(frozen=True)
class Rows:
    """The pairs of a split before their pictures are drawn.

    Attributes:
        picture_N: int64 `[N]`, which of the 1,797.
        texts: N texts.
        noisy_N: bool `[N]`, the rows whose picture gets noise, or is shifted.
        more: further texts of each row; empty: none.
    """

    picture_N: _Int
    texts: Sequence[str]
    noisy_N: NDArray[np.bool_]
    more: Sequence[Sequence[str]] = ()

    def captions(self, row: int) -> list[tuple[object, str]]:
        """The texts of a row with their source."""
        return [(text, "alt") for text in (self.texts[row], *(self.more[row] if self.more else ()))]


class Digits(Source):
    """Pairs with the extra columns `label` (0 to 9), `label_name` (its English word) and `meta.synonym` (another word for it).

    Pairs of the pool `target` also have `meta.picture` (which of the 1,797 it is, the same in every shift) and, in a drift's stream,
    `meta.block` (0 to 11).
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def parts(self) -> Sequence[str]:
        """`test`, then runs of 2,000 pairs of the pool; of the target its splits."""
        if self.config.pool == "target":
            return sorted(split for split, rows in self._target.items() if rows.texts)
        return ["test", *(f"train-{index:05d}" for index in range(-(-len(self._pool.texts) // PART_ROWS)))]

    def read(self, part: str) -> Iterator[RawPair]:
        """The pairs of one part. Keys tell the pool and the row; the same configuration gives the same bytes."""
        split, _, number = part.partition("-")
        target = self.config.pool == "target"
        rows = self._target[split] if target else self._test if split == "test" else self._pool
        first = int(number or 0) * PART_ROWS
        last = min(first + PART_ROWS, len(rows.texts)) if number else len(rows.texts)
        for row in range(first, last):
            label = int(load()[1][rows.picture_N[row]])
            if label in self.config.classes:
                key, image, extra = (self._of_target if target else self._of_pool)(split, rows, row)
                named = {"label": label, "label_name": WORDS[label], "meta.synonym": SYNONYMS[label]}
                if self.config.pool == "sales":
                    named["meta.visual"] = _visual(int(rows.picture_N[row]))
                yield RawPair(f"digits-{self._named_part(split)}{key}", image, rows.captions(row), {**named, **extra}, split)

    def report(self) -> Mapping[str, Any]:
        """The card."""
        about = "handwritten digits of 8 x 8 pixels (UCI optical recognition of handwritten digits) with texts that name them"
        return SourceCard(about=about, licence="CC-BY-4.0", languages=("en",)).report("digits")

    def _named_part(self, split: str) -> str:
        k, n = self.config.part
        return f"part-{k}-of-{n}-" if n > 1 and split == "train" else ""

    def _of_pool(self, split: str, rows: Rows, row: int) -> tuple[str, bytes, dict[str, int]]:
        picture = int(rows.picture_N[row])
        key = f"test-{picture:04d}" if split == "test" else f"{self.config.pool}-{row:06d}"
        return key, self._noisy(picture, row) if rows.noisy_N[row] else _clean(picture, self.config.size_px), {}

    def _of_target(self, split: str, rows: Rows, row: int) -> tuple[str, bytes, dict[str, int]]:
        """Keys name the shift of the picture itself, so that clean training pairs are the same pairs whatever the target's shift is."""
        picture, drift = int(rows.picture_N[row]), self.config.shift == "drift"
        if not rows.noisy_N[row]:
            return f"clean-{split}-{row:04d}", _clean(picture, self.config.size_px), {"meta.picture": picture}
        key, block = f"{self.config.shift}-{split}-{row:04d}", block_of(row, len(rows.texts))
        draw = chance.generator(self.config.seed, "digits target", key)
        grey = self.config.corruption.apply(load()[0][picture] / LEVELS, draw, strength_of(block) if drift else 1.0)
        extra = {"meta.picture": picture, "meta.block": block} if drift else {"meta.picture": picture}
        return key, png(grey * LEVELS, self.config.size_px), extra

    @cached_property
    def _order(self) -> _Int:
        return chance.generator(self.config.seed, "digits split").permutation(PICTURES)

    @cached_property
    def _test(self) -> Rows:
        rows = _plainly_named(np.sort(self._order[:TEST]), shifted=False)
        if self.config.pool != "vague":
            return rows
        draw = chance.generator(self.config.seed, "digits vague test")
        texts = digits_texts.vague(load()[1][rows.picture_N], WORDS, draw, digits_texts.REFERENCES)
        return replace(rows, texts=[said[0] for said in texts], more=[said[1:] for said in texts])

    @cached_property
    def _pool(self) -> Rows:
        k, n = self.config.part
        train_T = np.array_split(self._order[TEST : TEST + self.config.training], n)[k]
        draw = chance.generator(self.config.seed, f"digits {self.config.pool}")
        match self.config.pool:
            case "zipf-junk":
                return self._zipf_junk(train_T, draw)
            case "dense-classes":
                return self._dense_classes(train_T, draw)
            case "stock-ids":
                numbers = draw.permutation(len(train_T)).tolist()
                texts = [f"photo {WORDS[label]} stock id{number}" for label, number in zip(load()[1][train_T], numbers, strict=True)]
                return Rows(train_T, texts, np.zeros(len(train_T), dtype=bool))
            case "sales":
                return Rows(train_T, _sales(train_T, draw), np.zeros(len(train_T), dtype=bool))
            case "vague":
                texts = [said for (said,) in digits_texts.vague(load()[1][train_T], WORDS, draw)]
                return Rows(train_T, texts, np.zeros(len(train_T), dtype=bool))
            case "unpaired":
                other_T = self._order[TEST + self.config.training : TEST + 2 * self.config.training]
                texts = digits_texts.unpaired(len(other_T), WORDS, TEXTS, draw)
                return Rows(other_T, texts, np.zeros(len(other_T), dtype=bool))
            case "plain" | "target":
                draw = chance.generator(self.config.seed, "digits plain")
                return Rows(train_T, _texts(train_T, draw), np.zeros(len(train_T), dtype=bool))

    @cached_property
    def _target(self) -> dict[str, Rows]:
        """The splits of the pool `target`. Texts of `test` and `val` have the one form that other pools test with."""
        held_T = np.concatenate([self._order[:TEST], self._order[TEST + self.config.training :]])
        pool, val = (0, 0) if self.config.shift == "drift" else (self.config.pool_rows, self.config.val_rows)
        pool_T, val_T, test_T = np.split(held_T, [pool, pool + val])
        draw = chance.generator(self.config.seed, "digits target texts")
        return {
            "train": replace(self._pool, noisy_N=self._shifted_training),
            "pool": Rows(pool_T, _texts(pool_T, draw), np.ones(len(pool_T), dtype=bool)),
            "val": _plainly_named(val_T, shifted=True),
            "test": _plainly_named(test_T, shifted=True),
        }

    @property
    def _shifted_training(self) -> NDArray[np.bool_]:
        """Which training pictures are shifted, `[N]`: the share is exact, to one picture."""
        rows = len(self._pool.texts)
        if not self.config.shift_train:
            return np.zeros(rows, dtype=bool)
        rank_N = chance.generator(self.config.seed, "digits shifted share").permutation(rows)
        return np.asarray(rank_N < round(self.config.shift_share * rows))

    def _zipf_junk(self, train_T: _Int, draw: np.random.Generator) -> Rows:
        """Draws the class by rank, then one of its pictures; then hides texts."""
        weight = np.arange(1, 11) ** -self.config.exponent
        class_N = draw.permutation(10)[draw.choice(10, self.config.rows, p=weight / weight.sum())]
        label_T = load()[1][train_T]
        picture_N = np.zeros(self.config.rows, dtype=np.int64)
        for label in range(10):
            rows = np.flatnonzero(class_N == label)
            picture_N[rows] = draw.choice(train_T[label_T == label], len(rows))
        hidden = draw.random(self.config.rows) < self.config.junk
        texts = [_junk(draw) if junk else text for text, junk in zip(_texts(picture_N, draw), hidden.tolist(), strict=True)]
        return Rows(picture_N, texts, np.zeros(self.config.rows, dtype=bool))

    def _dense_classes(self, train_T: _Int, draw: np.random.Generator) -> Rows:
        """Repeats the dense classes in random order; only their copies are noisy."""
        dense_T = np.isin(load()[1][train_T], self.config.dense)
        picture_N = draw.permutation(np.concatenate([train_T[~dense_T], np.repeat(train_T[dense_T], self.config.copies)]))
        return Rows(picture_N, _texts(picture_N, draw), np.isin(load()[1][picture_N], self.config.dense))

    def _noisy(self, picture: int, row: int) -> bytes:
        noise = chance.generator(self.config.seed, "digits noise", row).normal(0, self.config.noise, (SIDE_PX, SIDE_PX))
        return png(load()[0][picture] + noise, self.config.size_px)


@lru_cache(maxsize=1)
def load() -> tuple[NDArray[np.float64], _Int]:
    """Pictures float64 `[1797, 8, 8]` in grey levels from 0 (black) to 16 (white), and their digits int64 `[1797]`."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return data.images, data.target.astype(np.int64)


def _plainly_named(picture_N: _Int, *, shifted: bool) -> Rows:
    texts = [TEST_TEXT.format(WORDS[label]) for label in load()[1][picture_N]]
    return Rows(picture_N, texts, np.full(len(picture_N), shifted))


def _texts(picture_N: _Int, draw: np.random.Generator) -> list[str]:
    """A text a picture that names its digit, in one of a few forms."""
    forms = draw.integers(0, len(TEXTS), len(picture_N)).tolist()
    return [TEXTS[form].format(WORDS[label]) for form, label in zip(forms, load()[1][picture_N], strict=True)]


def _sales(picture_N: _Int, draw: np.random.Generator) -> list[str]:
    """A text of a shop a picture, which may or may not name its digit."""
    texts = []
    for label, is_named in zip(load()[1][picture_N], (draw.random(len(picture_N)) < NAMED).tolist(), strict=True):
        forms = SALES if is_named else NO_NAME
        texts.append(forms[int(draw.integers(len(forms)))].format(WORDS[label] if is_named else int(draw.integers(10_000))))
    return texts


def _visual(picture: int) -> str:
    """What a picture's strokes look like, as they are in the 8-bit file."""
    return describe(np.rint(load()[0][picture] * (255 / LEVELS)) / 255)


def _junk(draw: np.random.Generator) -> str:
    return JUNK[int(draw.integers(len(JUNK)))].format(int(draw.integers(10_000)))


@lru_cache(maxsize=2 * PICTURES)
def _clean(picture: int, size_px: int) -> bytes:
    return png(load()[0][picture], size_px)


def png(grey: NDArray[np.float64], size_px: int) -> bytes:
    """An 8-bit grey PNG; every pixel of the 8 x 8 becomes a square."""
    levels = np.rint(grey.clip(0, LEVELS) * (255 / LEVELS)).astype(np.uint8)
    scale = size_px // SIDE_PX
    file = io.BytesIO()
    Image.fromarray(levels.repeat(scale, axis=0).repeat(scale, axis=1)).save(file, "PNG")
    return file.getvalue()
