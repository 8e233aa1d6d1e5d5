"""CLIP4DM: which words of a caption do not fit its picture, from the sign of attention times gradient in the text tower.

The cosine of picture and caption is differentiated with respect to the attention of the text tower's last layers. Attention times gradient,
averaged over heads and layers, says at the end token's row how much each token speaks for the picture; a word below zero speaks against it.

Source: Nam et al., Extract Free Dense Misalignment from CLIP (AAAI 2025).

Shape legend: N pairs, L tokens, W words of a caption, M misaligned words, D feature width.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from itertools import chain, groupby
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray
from pydantic import Field, field_validator

from diptych.core.config import Config as BaseConfig
from diptych.core.errors import DataError
from diptych.core.points import Encoder, Metric
from diptych.evaluate.clip_score import TEMPLATE, WEIGHT, candidates, clip_score, cosines
from diptych.evaluate.precision import average_precision, average_precision_interval
from diptych.evaluate.rows import Rows, preprocessing
from diptych.models.tokenizer import Tokenizer, repair

if TYPE_CHECKING:
    import torch

    from diptych.evaluate.text_attention import AttentionGradients
    from diptych.models.clip import DualEncoder

Floats = NDArray[np.float64]
Readout = Literal["threshold", "most_negative"]
Locator = Literal["attribution", "single-word"]

TASK = "clip4dm"
START_LAYER = -3
EPSILON = -5e-5
BATCH = 32
PUNCTUATION = frozenset('.,!"?;:')
PIECES = re.compile(r"[.,]|[^.,]+")
FUNCTION = (
    "a an the this that these those some any its his her their my your our it he she they we you i is are was were be been being has have had "
    "do does did and or but nor so if than as of on in at by to from with without into onto over under up down near for about there here"
)
FUNCTION_WORDS = frozenset(FUNCTION.split())
"""Words that name nothing in a picture: no foil replaces them, and the single-word baseline does not ask for them."""


class Config(BaseConfig):
    """Names the wrong word of foiled captions, and scores captions by how much of them is wrong.

    A foil is the pair's caption with something replaced so that it no longer fits the picture. The two columns are strings.
    """

    method: Literal["clip4dm"] = "clip4dm"
    split: str = Field("test", min_length=1, description="the split to score")
    source: str | None = Field(
        None, min_length=1, description="a pair's first caption of this source; `rewrite:` takes all that begin so; null: of any"
    )
    foil: str | None = Field("meta.foil", description="the column of the foiled captions; null: only score the captions")
    foil_word: str = Field("meta.foil_word", description="the column of what the foil put in: a word, or words as they stand in the foil")
    readout: Readout = Field(
        "most_negative", description="what is called wrong: every word below `epsilon`, or always the one word with the lowest attribution"
    )
    epsilon: float = Field(
        EPSILON, description="`threshold`: largest attribution of a wrong word; tuned for published weights of 12 to 24 layers"
    )
    start_layer: int = Field(START_LAYER, description="first layer whose attention counts, from the end if negative; 0: all layers")
    locate: Locator = Field(
        "attribution", description="`single-word` names the content word with the lowest cosine of its own instead: the baseline"
    )
    positive: Literal["originals", "foils"] = Field("originals", description="which captions the average precisions are to find")
    template: str = Field(TEMPLATE, pattern=r"^$|\s$", description="put before every caption; empty, or ends in a space")
    batch_size: int = Field(BATCH, ge=1, description="captions a forward and backward pass")
    task: str = Field(
        TASK, pattern=r"^[a-z0-9][a-z0-9-]*$", description="the figures' name between set and metric, where one set is scored twice"
    )

    @field_validator("epsilon")
    @classmethod
    def _speaks_against(cls, epsilon: float) -> float:
        if epsilon > 0:
            raise ValueError("at most 0: a positive attribution speaks for the picture")
        return epsilon

    def build(self) -> Clip4DM:
        """The benchmark."""
        return Clip4DM(self)


# ---------------------------------------------------------------- tokens


def relevance(found: AttentionGradients) -> torch.Tensor:
    """R `[N, L, L]`: attention times gradient, mean over heads, mean over layers; signs are kept and layers are not chained."""
    import torch

    layers = [(map_NHLL * slope_NHLL).mean(dim=1) for map_NHLL, slope_NHLL in zip(found.attention, found.gradient, strict=True)]
    return torch.stack(layers).mean(dim=0)


def token_attributions(
    model: DualEncoder, image_ND: torch.Tensor, text_NL: torch.Tensor, start_layer: int = START_LAYER
) -> tuple[list[Floats], Floats]:
    """r of every caption, float64 `[tokens between start and end]` each, and the cosines, float64 `[N]`. Raises as `attention_gradients` does."""
    import torch

    from diptych.evaluate.text_attention import attention_gradients

    found = attention_gradients(model, image_ND, text_NL, start_layer)
    end_N = text_NL.argmax(dim=1)
    row_NL = relevance(found)[torch.arange(len(end_N)), end_N].double().cpu().numpy()
    return [row_L[1:end] for row_L, end in zip(row_NL, end_N.tolist(), strict=True)], found.cosine_N.double().cpu().numpy()


# ---------------------------------------------------------------- words


class Attribution(NamedTuple):
    """A caption's words as the model reads them, punctuation included, how much each speaks for the picture, and the cosine of the whole."""

    words: tuple[str, ...]
    score_W: Floats
    cosine: float

    def without_punctuation(self) -> Attribution:
        """The words that are not made of punctuation alone, numbered anew."""
        keep = [place for place, word in enumerate(self.words) if not set(word) <= PUNCTUATION]
        return Attribution(tuple(self.words[place] for place in keep), self.score_W[keep], self.cosine)


def attribute(
    model: DualEncoder,
    image_features: NDArray[Any],
    captions: Sequence[str],
    *,
    start_layer: int = START_LAYER,
    template: str = TEMPLATE,
    batch_size: int = BATCH,
) -> list[Attribution]:
    """How much every word of every caption speaks for its picture.

    A word's attribution is the mean over its tokens; words that the context cut off are left out, and so are those of the template.

    Args:
        model: as in `text_attention.attention_gradients`, with CLIP's own tokenizer.
        image_features: `[N, D]`, a row a caption.
        captions: N texts.
        start_layer: first layer whose attention counts, from the end if negative; 0: all.
        template: put before every caption; empty, or ends in a space.
        batch_size: captions a forward and backward pass, which takes about `24 H L^2` bytes a caption and layer.

    Raises DataError for a text tower or a tokenizer of another kind.
    """
    import torch

    tokenizer = model.tokenizer
    if not isinstance(tokenizer, Tokenizer):
        raise DataError.at("The tokenizer cannot be matched to words", "model", type(tokenizer.tokenizer).__name__, "CLIP's own tokenizer")
    if not captions:
        return []
    prompts = [template + caption for caption in captions]
    text_NL = tokenizer.encode_cut(prompts)
    end_N = text_NL.argmax(axis=1)
    by_length = np.argsort(end_N, kind="stable")
    token_score: list[Floats] = [np.empty(0)] * len(prompts)
    cosine_N = np.empty(len(prompts))
    for at in range(0, len(prompts), batch_size):
        rows = by_length[at : at + batch_size]
        # Behind the end token nothing reaches it: a batch is cut to its longest caption.
        batch_NL = torch.from_numpy(text_NL[rows, : end_N[rows[-1]] + 1]).to(model.logit_scale.device)
        scores, cosine_N[rows] = token_attributions(model, torch.from_numpy(image_features[rows]), batch_NL, start_layer)
        for row, score_L in zip(rows.tolist(), scores, strict=True):
            token_score[row] = score_L
    skip = len(word_lengths(tokenizer, [template])[0])
    by_word = [_by_word(words, score_L, skip) for words, score_L in zip(word_lengths(tokenizer, prompts), token_score, strict=True)]
    return [Attribution(*of_caption, float(cosine)) for of_caption, cosine in zip(by_word, cosine_N, strict=True)]


def word_lengths(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[tuple[str, int]]]:
    """The words of every text, each with its number of tokens.

    Words lie between spaces; "." and "," are words of their own, other punctuation stays with its word. Where the tokens of the parts are
    not those of the whole ("...", a token of its own), all that lies between two spaces is one word.
    """
    chunked = [html.unescape(html.unescape(repair(text))).split() for text in texts]
    pieces = {chunk: PIECES.findall(chunk) for chunk in dict.fromkeys(chain.from_iterable(chunked))}
    ids = _ids(tokenizer, chain(pieces, chain.from_iterable(pieces.values())))
    words_of = {
        chunk: parts if list(chain.from_iterable(map(ids.__getitem__, parts))) == ids[chunk] else [chunk] for chunk, parts in pieces.items()
    }
    return [[(word, len(ids[word])) for chunk in chunks_ for word in words_of[chunk]] for chunks_ in chunked]


def _ids(tokenizer: Tokenizer, texts: Iterable[str]) -> dict[str, list[int]]:
    """Token ids of distinct texts, without start and end."""
    distinct = list(dict.fromkeys(texts))
    if not distinct:
        return {}
    text_NL = tokenizer.encode_cut(distinct)
    return {text: row[1:end].tolist() for text, row, end in zip(distinct, text_NL, text_NL.argmax(axis=1), strict=True)}


def _by_word(words: Sequence[tuple[str, int]], score_L: Floats, skip: int) -> tuple[tuple[str, ...], Floats]:
    """The words of which a token is left, and the means of their tokens' scores; the first `skip` words are dropped."""
    start_W = np.cumsum([0, *(length for _, length in words)])
    kept = [(word, score_L[start : start + length]) for (word, length), start in zip(words, start_W, strict=False)][skip:]
    kept = [(word, score) for word, score in kept if len(score)]
    return tuple(word for word, _ in kept), np.array([score.mean() for _, score in kept], dtype=np.float64)


# ---------------------------------------------------------------- what is misaligned


class Misaligned(NamedTuple):
    """The words that do not fit, worst first: their places in the caption (for `threshold` punctuation is not
    counted), and their attributions."""

    place_M: NDArray[np.int64]
    words: tuple[str, ...]
    score_M: Floats

    @property
    def total(self) -> float:
        """S: the sum of the attributions, 0 without any."""
        return float(self.score_M.sum())


def misaligned(attribution: Attribution, readout: Readout = "threshold", epsilon: float = EPSILON) -> Misaligned:
    """The words that do not fit the picture.

    `threshold`: the attribution is below `epsilon`; punctuation is left out. `most_negative`: the word with the smallest attribution
    (the first of equals), even if that is positive and even if it is punctuation.
    """
    held = attribution.without_punctuation() if readout == "threshold" else attribution
    order = np.argsort(held.score_W, kind="stable")
    place_M = order[held.score_W[order] < epsilon] if readout == "threshold" else order[:1]
    return Misaligned(place_M, tuple(held.words[place] for place in place_M), held.score_W[place_M])


def merged(found: Misaligned) -> list[tuple[str, float]]:
    """Runs of neighbouring misaligned words as phrases with their mean attribution, in the order of the caption."""
    order = np.argsort(found.place_M)
    runs = groupby(enumerate(order), key=lambda item: found.place_M[item[1]] - item[0])
    members = [[place for _, place in run] for _, run in runs]
    return [(" ".join(found.words[place] for place in run), float(found.score_M[run].mean())) for run in members]


def prediction(found: Misaligned) -> str:
    """The phrase of `merged` with the smallest mean attribution; empty if nothing is misaligned."""
    return min(merged(found), key=lambda phrase: phrase[1], default=("", 0.0))[0]


def is_located(predicted: str, annotated: str) -> bool:
    """Whether the predicted words stand, one after another, among the annotated ones; case and punctuation do not count.

    The published evaluation looks for a substring, to which an "a" is right in every "cat".
    """
    return bool(_plain(predicted)) and f" {_plain(predicted)} " in f" {_plain(annotated)} "


def _plain(text: str) -> str:
    return " ".join(filter(None, (word.strip("".join(PUNCTUATION)) for word in text.lower().split())))


def f_clip_score(total: ArrayLike, score: ArrayLike) -> Floats:
    """F-CLIPScore `S (1 - CLIPScore / 2.5)`, of any shape; the larger, the better the caption fits. At most 0 for `threshold`."""
    return np.asarray(np.asarray(total, np.float64) * (1 - np.asarray(score, np.float64) / WEIGHT))


# ---------------------------------------------------------------- figures of a data set


def location_accuracy(correct_N: ArrayLike, is_foil_N: ArrayLike) -> float:
    """LA: the share of foils whose wrong word was named."""
    return float(np.asarray(correct_N, dtype=np.float64)[np.asarray(is_foil_N, dtype=bool)].mean())


# ---------------------------------------------------------------- the benchmark


class Foils(NamedTuple):
    """The foiled captions of the split, and what each of them put in."""

    texts: list[str]
    words: list[str]


def foils(pairs: pl.DataFrame, column: str, word_column: str) -> Foils:
    """Raises DataError if a column is missing or not text, or if what was put in does not stand in the foil."""
    for name in (column, word_column):
        if name not in pairs.columns or pairs[name].dtype != pl.String or pairs[name].null_count():
            got = "no such column" if name not in pairs.columns else f"{pairs[name].dtype}, {pairs[name].null_count()} nulls"
            fix = "name the columns in `foil` and `foil_word`; `foil: null` only scores the captions"
            raise DataError.at("The pairs have no foils", name, got, "a column of texts, one a pair", fix)
    texts, words = pairs[column].to_list(), pairs[word_column].to_list()
    if odd := [key for key, text, word in zip(pairs["key"], texts, words, strict=True) if not is_located(word, text)]:
        raise DataError.at(f"{len(odd)} foils do not hold what they are said to have put in", word_column, odd[:5], f"words of {column}")
    return Foils(texts, words)


class Clip4DM:
    """The benchmark.

    Metrics: `clip_score` and `f_clip_score`, the means over the captions; with foils also `location_accuracy`, the share of foils whose wrong
    word was named, and `ap_clip_score` and `ap_f_clip_score`, how well either score tells originals from foils (no `per_example`).
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def run(self, encoder: Encoder, pairs: pl.DataFrame, name: str, seed: int) -> list[Metric]:
        """The rows for the set `name`. Raises DataError as `candidates`, `foils` and `attribute` do, or if the encoder has no model."""
        config = self.config
        found = candidates(pairs, config.split, config.source)
        foiled = foils(found.pairs, config.foil, config.foil_word) if config.foil is not None else None
        image_ND = encoder.images(found.pairs)
        settings = {**config.model_dump(exclude={"method", "task", "batch_size"}), **preprocessing(encoder)}
        rows = Rows(name, config.task, found.pairs["key"].to_list(), seed, settings)
        original = self._attribute(encoder, image_ND, found.texts)
        score_N, fine_N = self._scores(original)
        metrics = [rows.mean("clip_score", score_N), rows.mean("f_clip_score", fine_N)]
        if foiled is None:
            return metrics
        changed = self._attribute(encoder, image_ND, foiled.texts)
        named = self._named(encoder, image_ND, changed)
        hit_N = np.asarray([is_located(word, put_in) for word, put_in in zip(named, foiled.words, strict=True)], dtype=np.float64)
        foil_score_N, foil_fine_N = self._scores(changed)
        return [
            *metrics,
            rows.mean("location_accuracy", hit_N),
            self._precision(rows, "ap_clip_score", score_N, foil_score_N),
            self._precision(rows, "ap_f_clip_score", fine_N, foil_fine_N),
        ]

    def _attribute(self, encoder: Encoder, image_ND: NDArray[np.float32], captions: Sequence[str]) -> list[Attribution]:
        config = self.config
        model = model_of(encoder)
        return attribute(model, image_ND, captions, start_layer=config.start_layer, template=config.template, batch_size=config.batch_size)

    def _scores(self, attributions: Sequence[Attribution]) -> tuple[Floats, Floats]:
        """CLIPScore and F-CLIPScore of every caption."""
        score_N = clip_score([attribution.cosine for attribution in attributions])
        totals = [misaligned(attribution, self.config.readout, self.config.epsilon).total for attribution in attributions]
        return score_N, f_clip_score(totals, score_N)

    def _named(self, encoder: Encoder, image_ND: NDArray[np.float32], attributions: Sequence[Attribution]) -> list[str]:
        """What is called wrong in every caption."""
        config = self.config
        if config.locate == "attribution":
            return [prediction(misaligned(attribution, config.readout, config.epsilon)) for attribution in attributions]
        return lowest_single_words(encoder, image_ND, [attribution.words for attribution in attributions], config.template)

    def _precision(self, rows: Rows, metric: str, original_N: Floats, foil_N: Floats) -> Metric:
        sign = 1 if self.config.positive == "originals" else -1
        score_2N = sign * np.stack([original_N, foil_N])
        positive_2N = np.repeat([[sign > 0], [sign < 0]], len(original_N), axis=1)
        value = float(average_precision(score_2N.ravel(), positive_2N.ravel()))
        low, high = average_precision_interval(score_2N, positive_2N, rows.seed)
        return Metric(rows.set, rows.task, metric, value, score_2N.size, low, high, rows.settings)


def lowest_single_words(
    encoder: Encoder, image_ND: NDArray[np.float32], words: Sequence[Sequence[str]], template: str = TEMPLATE
) -> list[str]:
    """The baseline: of every caption the content word whose own cosine with the picture is the lowest; empty if it has none."""
    content = [[word for word in dict.fromkeys(map(_plain, held)) if word and word not in FUNCTION_WORDS] for held in words]
    row_N = np.repeat(np.arange(len(words)), [len(held) for held in content])
    flat = list(chain.from_iterable(content))
    if not flat:
        return [""] * len(words)
    cosine = iter(cosines(image_ND[row_N], encoder.texts([template + word for word in flat])).tolist())
    return [min(((next(cosine), word) for word in held), default=(0.0, ""))[1] for held in content]


def model_of(encoder: Encoder) -> DualEncoder:
    """The encoder's dual encoder. Raises DataError if it has features only."""
    model: DualEncoder | None = getattr(encoder, "model", None)
    if model is None:
        raise DataError.at(
            "The benchmark looks into the text tower", "encoder", type(encoder).__name__, "an encoder with its `model`, not features alone"
        )
    return model
