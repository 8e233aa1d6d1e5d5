"""The catalogue of methods: one literal table, and the only thing the command line must import to know them all."""

from __future__ import annotations

import importlib
from functools import cache
from importlib.metadata import entry_points
from typing import Any, NamedTuple

from diptych.core.config import Config
from diptych.core.errors import ConfigError, nearest


class Row(NamedTuple):
    """A method: its name, the phase it serves, where its `Config` is, the plug-in point, the paper, and one line."""

    name: str
    phase: str
    config: str
    point: str
    paper: str
    line: str


# fmt: off
TABLE: tuple[Row, ...] = (
    # ingest
    Row("emoji", "ingest", "diptych.pairs.sources.emoji:Config", "Source", "Noto, Fluent, Twemoji, OpenMoji", "the shipped emoji: four makers' drawings of 1,911 things"),
    Row("webdataset", "ingest", "diptych.pairs.sources.webdataset:Config", "Source", "WebDataset", "tar shards, indexed in place"),
    Row("clip-benchmark", "ingest", "diptych.pairs.sources.clip_benchmark:Config", "Source", "CLIP_benchmark", "evaluation sets in CLIP_benchmark's WebDataset layout, read in place with their class names and templates"),
    Row("parquet", "ingest", "diptych.pairs.sources.parquet:Config", "Source", "Apache Parquet", "Parquet files that hold the image bytes"),
    Row("folder", "ingest", "diptych.pairs.sources.folder:Config", "Source", "", "a folder of images with a CSV, TSV or JSONL table"),
    Row("hf", "ingest", "diptych.pairs.sources.hf:Config", "Source", "🤗 Datasets", "a data set saved to disk by 🤗 Datasets"),
    Row("digits", "ingest", "diptych.pairs.sources.digits:Config", "Source", "UCI optical digits", "real 8x8 handwritten digits with captions, the claims' pool"),
    Row("shapes", "ingest", "diptych.pairs.sources.shapes:Config", "Source", "", "rendered shapes with texts, all factors known: targets, foils, look-alikes, cue conflicts"),
    # curate
    Row("metaclip", "curate", "diptych.curate.metaclip:Config", "PairMethod", "Demystifying CLIP Data (ICLR 2024)", "keep texts that match a concept list, cap the head concepts"),
    # prune
    Row("semantic-dedup", "prune", "diptych.prune.semantic_dedup:Config", "PairMethod", "SemDeDup (2023)", "drop near copies inside feature clusters"),
    Row("concept-pruning", "prune", "diptych.prune.concept_pruning:Config", "PairMethod", "Effective pruning of web-scale datasets (ICLR 2024)", "budget clusters by complexity, keep the least prototypical"),
    Row("random-subset", "prune", "diptych.prune.random_subset:Config", "PairMethod", "", "keep a share or a number of pairs, drawn by key: the baseline of pruning"),
    # caption
    Row("laclip", "caption", "diptych.caption.laclip:Config", "PairMethod", "Improving CLIP Training with Language Rewrites (NeurIPS 2023)", "rewrite captions, train on one drawn at random"),
    Row("cfg-captioning", "caption", "diptych.caption.cfg_captioning:Config", "PairMethod", "Guiding Image Captioning Models Toward More Specific Captions (ICCV 2023)", "caption pictures, the more specifically the larger the guidance"),
    # train
    Row("clip", "objective", "diptych.objectives.clip:Config", "Objective", "Learning Transferable Visual Models From Natural Language Supervision (2021)", "symmetric contrastive loss"),
    Row("shrinkmatch", "objective", "diptych.objectives.shrinkmatch:Config", "Objective", "Shrinking Class Space for Enhanced Certainty in Semi-Supervised Learning (ICCV 2023)", "consistency on uncertain pictures, in a class space without the runners-up"),
    Row("adawac", "objective", "diptych.objectives.adawac:Config", "Objective", "AdaWAC (ICML 2023)", "each pair weighs its supervised loss against consistency of two views"),
    Row("coca", "objective", "diptych.objectives.coca:Config", "Objective", "CoCa (TMLR 2022)", "caption and contrast: trains a captioner, with pictures hidden for guidance"),
    Row("cgt-gan", "objective", "diptych.objectives.cgt_gan:Config", "Objective", "CgT-GAN: CLIP-guided Text GAN for Image Captioning (ACM MM 2023)", "a captioner from unpaired pictures and sentences, rewarded by CLIP and a discriminator"),
    Row("adamw", "optimizer", "diptych.optimizers.adamw:Config", "Optimizer", "Decoupled Weight Decay Regularization (ICLR 2019)", "torch's fused AdamW"),
    Row("adamp", "optimizer", "diptych.optimizers.adamp:Config", "Optimizer", "AdamP (ICLR 2021)", "Adam without the radial part of the step"),
    # compress
    Row("magnitude", "compress", "diptych.compress.magnitude:Config", "Compressor", "Learning both Weights and Connections (NeurIPS 2015)", "zero the smallest weights: the baseline of pruning"),
    Row("rws", "compress", "diptych.adapt.rws:Config", "Compressor", "Robust Weight Signatures (ICML 2023)", "patch shallow layers with what training on a corruption changed"),
    Row("wise-ft", "compress", "diptych.adapt.interpolation:WiseFTConfig", "Compressor", "Robust fine-tuning of zero-shot models (CVPR 2022)", "the straight line back to the zero-shot model"),
    Row("soup", "compress", "diptych.adapt.interpolation:SoupConfig", "Compressor", "Model soups (ICML 2022)", "average models fine-tuned from one start"),
    # evaluate
    Row("zero-shot", "evaluate", "diptych.evaluate.zero_shot:Config", "Benchmark", "CLIP (2021)", "classify by class names in prompt templates"),
    Row("few-shot", "evaluate", "diptych.evaluate.few_shot:Config", "Benchmark", "", "adapters on stored features, by shots and draws"),
    Row("clip-score", "evaluate", "diptych.evaluate.clip_score:Config", "Benchmark", "CLIPScore (EMNLP 2021)", "how well captions fit their pictures, with and without references"),
    Row("captioning", "evaluate", "diptych.evaluate.captioning:Config", "Benchmark", "Guiding Image Captioning Models Toward More Specific Captions (ICCV 2023)", "captions a split, with guidance: CLIPScore and recall beside CIDEr, BLEU, ROUGE-L"),
    Row("clip4dm", "evaluate", "diptych.evaluate.clip4dm:Config", "Benchmark", "Extract Free Dense Misalignment from CLIP (AAAI 2025)", "which words of a caption do not fit the picture, and F-CLIPScore"),
    Row("augclip", "evaluate", "diptych.evaluate.augclip:Config", "Benchmark", "AugCLIP (CVPR 2025)", "score edits by the cosine to an estimated ideal edit"),
    Row("holistic-robustness", "evaluate", "diptych.evaluate.holistic_robustness:Config", "Benchmark", "Toward a Holistic Evaluation of Robustness in CLIP Models (TPAMI 2025)", "factors, calibration, out-of-distribution and cue conflict in one suite"),
    Row("corruption-robustness", "evaluate", "diptych.evaluate.corruption_robustness:Config", "Benchmark", "Common corruptions (ICLR 2019)", "zero-shot accuracy under 15 corruptions at 5 severities"),
    Row("straggler-sharpness", "evaluate", "diptych.adapt.straggler_sharpness:Config", "Benchmark", "In Search of the Successful Interpolation (2024)", "accuracy, sharpness and unstable layers on the way from zero-shot"),
    Row("retrieval", "evaluate", "diptych.evaluate.retrieval:Config", "Benchmark", "CLIP (2021)", "find the image by its text and the text by its image"),
    # adapters of few-shot
    Row("gda", "adapter", "diptych.adapt.gda:Config", "Adapter", "A Hard-to-Beat Baseline for Training-free CLIP-based Adaptation (ICLR 2024)", "class means and one shared covariance beside the zero-shot head"),
    Row("adanpc", "adapter", "diptych.adapt.adanpc:Config", "Adapter", "AdaNPC (ICML 2023)", "a vote of nearest memories that learns from the stream"),
    Row("knn", "adapter", "diptych.adapt.knn:Config", "Adapter", "", "a weighted vote of the nearest labelled features"),
    Row("tip-adapter", "adapter", "diptych.adapt.tip_adapter:Config", "Adapter", "Tip-Adapter (ECCV 2022)", "few-shot features as a cache beside the text weights, nothing trained"),
    Row("tip-adapter-f", "adapter", "diptych.adapt.tip_adapter:TunedConfig", "Adapter", "Tip-Adapter (ECCV 2022)", "Tip-Adapter with its keys trained"),
    Row("sus-x", "adapter", "diptych.adapt.sus_x:Config", "Adapter", "SuS-X (ICCV 2023)", "a cache of painted or retrieved pictures, and a KL term between the modalities"),
    Row("caps-adapter", "adapter", "diptych.adapt.caps_adapter:Config", "Adapter", "CapS-Adapter (2024)", "pictures and their captions as keys of a training-free cache"),
    Row("nola", "adapter", "diptych.adapt.nola:Config", "Adapter", "CLIP meets DINO (2024)", "the zero-shot classifier's surest guesses train a head on a self-supervised encoder"),
    Row("linear-probe", "adapter", "diptych.adapt.linear_probe:Config", "Adapter", "CLIP (2021)", "logistic regression on frozen features"),
)
# fmt: on


@cache
def rows() -> dict[str, Row]:
    """All methods by name: the table above, then what other packages add through the entry-point group `diptych.methods`.

    An entry point names a function or value that gives `Row`s. A name that is taken is refused.
    """
    found = {row.name: row for row in TABLE}
    for point in entry_points(group="diptych.methods"):
        value = point.load()
        for row in value() if callable(value) else value:
            if row.name in found:
                raise ConfigError.at("Two methods have one name", f"entry point {point.name}", row.name, "a name that is not taken")
            found[row.name] = row
    return found


def find(name: str, phase: str | None = None, where: str = "method") -> Row:
    """The row of a method; `phase` restricts it. Raises ConfigError with the nearest name."""
    known = {key: row for key, row in rows().items() if phase in (None, row.phase)}
    if name in known:
        return known[name]
    other = rows().get(name)
    fix = f"{name!r} belongs to the phase {other.phase!r}" if other else nearest(name, known)
    raise ConfigError.at("Unknown method", where, name, f"one of {', '.join(sorted(known))}", fix)


def config_class(row: Row) -> type[Config]:
    """Imports the method's file and gives its `Config`."""
    module, _, attribute = row.config.partition(":")
    loaded: Any = getattr(importlib.import_module(module), attribute)
    assert isinstance(loaded, type), f"{row.config} is not a class"
    assert issubclass(loaded, Config), f"{row.config} is not a Config"
    return loaded
