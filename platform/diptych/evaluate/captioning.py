"""Measures a captioner: captions every picture of a split, and asks how well the captions fit the pictures and what people wrote of them.

The two pull apart: guidance makes captions name what is particular, which raises CLIPScore and recall and lowers CIDEr (Kornblith et al., "Guiding
Image Captioning Models Toward More Specific Captions", ICCV 2023). `guidance` is a setting of the rows, so a sweep over it with `pareto` on
`clip_score` and `cider` draws that frontier.

Shape legend: N captions, G orders of n-grams, R bootstrap replicates, D feature width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field, model_validator

from diptych.core.chance import key_hashes, uniform
from diptych.core.config import Config as BaseConfig
from diptych.core.config import headline
from diptych.core.errors import ConfigError, DataError
from diptych.core.points import Encoder, Metric
from diptych.evaluate import coco_agreement
from diptych.evaluate.caption_metrics import Agreement, bleu, bleu_counts, bleu_of_sums, cider, rouge_l, words_of
from diptych.evaluate.clip_score import TEMPLATE, best_reference, clip_score, cosines, ref_clip_score
from diptych.evaluate.encode import encode_texts
from diptych.evaluate.meteor import Thesaurus, meteor, missing_files, read_wordnet
from diptych.evaluate.ranks import target_rank
from diptych.evaluate.resampling import bias_corrected, sums
from diptych.evaluate.rows import Rows, of_split, preprocessing

if TYPE_CHECKING:
    from diptych.models.captioner import Captioner

Floats = NDArray[np.float64]


class Config(BaseConfig):
    """Captions of a split, by the checkpoint itself, and their figures."""

    directories: ClassVar[tuple[str, ...]] = ("scorer", "wordnet")

    method: Literal["captioning"] = "captioning"
    split: str = Field("test", min_length=1, description="the split to caption")
    guidance: float = Field(1.0, ge=0, le=100, description="scale of classifier-free guidance; 1: none, 0: captions of no picture")
    beams: int = Field(1, ge=1, le=64, description="beams of the search; 1: the best token each time")
    temperature: float = Field(0.0, ge=0, le=10, description="of sampling; 0: the best token each time")
    top_k: int | None = Field(None, ge=1, description="sample among so many best tokens; null: among all")
    max_length: int | None = Field(None, ge=1, description="tokens of a caption; null: what the context holds")
    scorer: str | None = Field(None, description="model directory that judges the captions; null: the checkpoint itself, which is partial")
    template: str = Field(TEMPLATE, description="put before every caption for the scorer")
    recall_at: tuple[int, ...] = Field((1, 5), min_length=1, description="a caption should find its picture among the split's first k")
    references: str | None = Field(None, min_length=1, description="the source of the captions to compare with; null: all of a pair")
    agreement: Literal["builtin", "coco"] = Field(
        "builtin",
        description="who scores captions beside the references; builtin: our formulas and NLTK's METEOR; coco: the field's own scorer, "
        "for figures to be held beside published ones (pip install pycocoevalcap, and a Java)",
    )
    wordnet: str | None = Field(
        None, min_length=1, description="directory of WordNet's database files, for METEOR with synonyms; null: `meteor_stem`, without them"
    )
    names: str | None = Field(
        None, min_length=1, description="column with the name of what is shown, for the figures of naming; null: none"
    )
    forms: tuple[str, ...] = Field((), description="with names: sentences with {} for a name; the figure `in_form` is the share of them")
    phrases: dict[str, str] = Field(default={}, description="name -> a whole caption; the figure `says.<name>` is how often it is said")
    batch_size: int = Field(256, ge=1, description="pictures captioned at a time")
    task: str = Field(
        "captioning",
        pattern=r"^[a-z0-9][a-z0-9.-]*$",
        description="the figures' name between set and metric, where one set is measured twice",
    )

    @model_validator(mode="after")
    def _one_way_to_decode(self) -> Self:
        if self.beams > 1 and self.temperature > 0:
            raise ValueError("beams and temperature exclude each other: a beam search draws nothing")
        if self.forms and self.names is None:
            raise ValueError("forms need names")
        return self

    @model_validator(mode="after")
    def _scorer_at_hand(self) -> Self:
        if self.agreement == "coco":
            if self.wordnet is not None:
                raise ValueError("wordnet is builtin's: METEOR 1.5 of agreement: coco brings synonyms of its own")
            coco_agreement.require()
        if self.wordnet is not None and (missing := missing_files(Path(self.wordnet))):
            expected = "a directory with WordNet's database files: of Debian's package wordnet-base, or nltk_data's corpora/wordnet"
            got = f"<{self.wordnet} without {', '.join(missing)}>"
            raise ConfigError.at(headline(1), "wordnet", got, expected, "install one of these and name its directory, or leave wordnet out")
        return self

    def build(self) -> Captioning:
        """The benchmark."""
        return Captioning(self)


class Captioning:
    """The benchmark.

    Metrics: `clip_score`; `recall@k`, the share of captions that find their own picture; `words`, a caption's length; `distinct`, different
    captions as a share of all; over pairs with references `ref_clip_score`, `reference_match`, the share of a pair's references that are the very caption, and `cider`, `bleu_4`,
    `rouge_l` and METEOR by `agreement`, which their settings name. METEOR is `meteor_stem` by equal words and stems; with `wordnet`, `meteor` of 2007;
    by coco, `meteor` 1.5. With `names`: `named`, the share that holds some name; `named_right`, the share whose only
    name is the right one; `right_of_named`, that share among those that name (no row if none does).
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def run(self, encoder: Encoder, pairs: pl.DataFrame, name: str, seed: int) -> list[Metric]:
        """The rows for the set `name`. Raises DataError for an encoder without model or pixels, ConfigError for one that cannot caption."""
        config = self.config
        pairs = of_split(pairs, config.split)
        thesaurus = read_wordnet(Path(config.wordnet)) if config.wordnet is not None else None  # a broken one is told before the work
        texts = self.captions(encoder, pairs, seed)
        apart = {"method", "task", "batch_size", "agreement", "wordnet"}
        settings = {**config.model_dump(mode="json", exclude=apart), **preprocessing(encoder)}
        rows = Rows(name, config.task, pairs["key"].to_list(), seed, settings)
        references = [_references(captions, config.references) for captions in pairs["captions"].to_list()]
        named = self._naming(rows, pairs, texts) if config.names is not None else []
        agreement = self._agreement(rows, texts, references, thesaurus)
        return [*self._fit(rows, encoder, pairs, texts, references), *agreement, *named, *self._said(rows, texts)]

    def captions(self, encoder: Encoder, pairs: pl.DataFrame, seed: int) -> list[str]:
        """A caption of every pair; sampling draws by `(seed, key, position)`."""
        import torch

        from diptych.models.captioner import Captioner

        model, load_pixels = getattr(encoder, "model", None), getattr(encoder, "load_pixels", None)
        if model is None or load_pixels is None:
            raise DataError.at("The benchmark captions pictures", "encoder", type(encoder).__name__, "an encoder with its model and pixels")
        captioner, texts = Captioner(model), []
        device = next(model.parameters()).device
        for start in range(0, pairs.height, self.config.batch_size):
            part = pairs.slice(start, self.config.batch_size)
            texts += self._caption(captioner, torch.from_numpy(load_pixels(part)).to(device), part["key"].to_list(), seed)
        return texts

    def _caption(self, captioner: Captioner, image_NCHW: Any, keys: Sequence[str], seed: int) -> list[str]:
        import torch

        config, hash_N = self.config, key_hashes(keys)
        options: dict[str, Any] = {"beams": config.beams, "max_length": config.max_length}
        if config.temperature > 0:
            options |= {"temperature": config.temperature, "top_k": config.top_k}
            options["draw"] = lambda position: torch.from_numpy(uniform(seed, hash_N, position))
        return captioner.caption(image_NCHW, config.guidance, **options)

    def _fit(
        self, rows: Rows, encoder: Encoder, pairs: pl.DataFrame, texts: Sequence[str], references: Sequence[Sequence[str]]
    ) -> list[Metric]:
        """How captions fit their pictures, by the scorer."""
        flat = [text for others in references for text in others]
        image_ND, text_MD = self._features(encoder, pairs, [self.config.template + text for text in [*texts, *flat]])
        text_ND, count = text_MD[: len(texts)], len(texts)
        cosine_N, found_N = cosines(image_ND, text_ND), target_rank(text_ND @ image_ND.T, np.arange(count))
        metrics = [rows.mean("clip_score", clip_score(cosine_N))]
        metrics += [rows.mean(f"recall@{k}", (found_N < k).astype(np.float64)) for k in self.config.recall_at]
        if flat:
            row_of_M = np.repeat(np.arange(count), [len(others) for others in references])
            best_N = best_reference(text_ND, text_MD[count:], row_of_M)
            has_N = np.isfinite(best_N)
            metrics.append(_of(rows, has_N).mean("ref_clip_score", ref_clip_score(cosine_N[has_N], best_N[has_N])))
        return metrics

    def _features(self, encoder: Encoder, pairs: pl.DataFrame, texts: Sequence[str]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """L2-normalised features of the pictures and of texts, by the scorer."""
        if self.config.scorer is None:
            return encoder.images(pairs), encoder.texts(texts)
        from diptych.models import clip

        stored: Any = encoder
        return stored.auxiliary(pairs, self.config.scorer), encode_texts(clip.load(Path(self.config.scorer)).eval(), texts)

    def _agreement(
        self, rows: Rows, texts: Sequence[str], references: Sequence[Sequence[str]], thesaurus: Thesaurus | None
    ) -> list[Metric]:
        """How captions agree with the references of the pairs that have some."""
        has_N = np.asarray([bool(others) for others in references])
        if not has_N.any():
            return []
        rows, others = _of(rows, has_N), [held for held in references if held]
        said = [text for text, has in zip(texts, has_N, strict=True) if has]
        coco = self.config.agreement == "coco"
        found = coco_agreement.agreement(said, others) if coco else _builtin(said, others, thesaurus)
        by = replace(rows, settings={**rows.settings, "agreement": self.config.agreement})
        of_meteor = replace(by, settings={**by.settings, "wordnet": self.config.wordnet})
        match = [[words_of(text) for text in held].count(words_of(caption)) / len(held) for caption, held in zip(said, others, strict=True)]
        return [
            by.mean("cider", found.cider_N),
            _bleu_row(by, found),
            by.mean("rouge_l", found.rouge_l_N),
            of_meteor.mean("meteor" if coco or thesaurus is not None else "meteor_stem", found.meteor_N),
            rows.mean("reference_match", np.asarray(match)),
        ]

    def _naming(self, rows: Rows, pairs: pl.DataFrame, texts: Sequence[str]) -> list[Metric]:
        """Whether captions say what is shown."""
        column = str(self.config.names)
        if column not in pairs.columns or pairs[column].null_count():
            raise DataError.at("The set does not say what is shown", "names", column, "a column without nulls", "leave names out")
        own = [str(value).lower() for value in pairs[column].to_list()]
        known = set(own)
        held = [known & set(words_of(text)) for text in texts]
        named_N = np.asarray([bool(found) for found in held])
        right_N = np.asarray([found == {name} for found, name in zip(held, own, strict=True)])
        metrics = [rows.mean("named", named_N.astype(np.float64)), rows.mean("named_right", right_N.astype(np.float64))]
        if named_N.any():
            metrics.append(_of(rows, named_N).mean("right_of_named", right_N[named_N].astype(np.float64)))
        if self.config.forms:
            sentences = {tuple(words_of(form.replace("{}", name))) for form in self.config.forms for name in known}
            metrics.append(rows.mean("in_form", np.asarray([tuple(words_of(text)) in sentences for text in texts], dtype=np.float64)))
        return metrics

    def _said(self, rows: Rows, texts: Sequence[str]) -> list[Metric]:
        """What captions are like, whatever is shown."""
        words = [words_of(text) for text in texts]
        metrics = [rows.mean("words", np.asarray([len(said) for said in words], dtype=np.float64))]
        share = len({tuple(said) for said in words}) / len(words)
        metrics.append(Metric(rows.set, rows.task, "distinct", share, len(words), share, share, rows.settings))
        for name, phrase in self.config.phrases.items():
            metrics.append(rows.mean(f"says.{name}", np.asarray([said == words_of(phrase) for said in words], dtype=np.float64)))
        return metrics


def _references(captions: Sequence[dict[str, Any]] | None, source: str | None) -> list[str]:
    return [caption["text"] for caption in captions or () if source is None or caption["source"] == source]


def _of(rows: Rows, kept_N: NDArray[np.bool_]) -> Rows:
    """The rows of some of the examples."""
    return Rows(rows.set, rows.task, [key for key, kept in zip(rows.keys, kept_N, strict=True) if kept], rows.seed, rows.settings)


def _builtin(captions: Sequence[str], references: Sequence[Sequence[str]], thesaurus: Thesaurus | None) -> Agreement:
    said = [words_of(text) for text in captions]
    others = [[words_of(text) for text in held] for held in references]
    counts = bleu_counts(said, others)
    rouge_l_N = np.asarray([rouge_l(*pair) for pair in zip(said, others, strict=True)])
    return Agreement(cider(said, others), rouge_l_N, meteor(said, others, thesaurus), float(bleu(counts)[-1]), counts)


def _bleu_row(rows: Rows, found: Agreement) -> Metric:
    """BLEU-4 of the set, which is no mean over captions: its interval comes from resampled counts."""
    low, high = bias_corrected(found.bleu_4, bleu_of_sums(sums(np.column_stack(found.counts), rows.seed, "bleu"))[:, -1])
    return Metric(rows.set, rows.task, "bleu_4", found.bleu_4, len(rows.keys), low, high, rows.settings)
