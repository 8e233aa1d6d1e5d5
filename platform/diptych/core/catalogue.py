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
    Row("digit-scenes", "ingest", "diptych.pairs.sources.digit_scenes:Config", "Source", "UCI optical digits", "scenes of four digits with poor or good texts and dense labels"),
    Row("shapes", "ingest", "diptych.pairs.sources.shapes:Config", "Source", "", "rendered shapes with texts, all factors known: targets, foils, look-alikes, cue conflicts"),
    Row("biomedclip", "ingest", "diptych.pairs.sources.biomedclip:Config", "Source", "BiomedCLIP (2023)", "article packages (JATS XML and figures) as PMC-15M: figures with their whole captions"),
    Row("biomedica", "ingest", "diptych.pairs.sources.biomedica:Config", "Source", "BIOMEDICA (CVPR 2025)", "article packages with all metadata: citing paragraphs, licence, panels, subjects, pixel hash"),
    Row("digit-archive", "ingest", "diptych.pairs.sources.digit_archive:Config", "Source", "UCI optical digits", "digits among plots, or under captions longer than CLIP's context: pools of two claims"),
    # curate
    Row("metaclip", "curate", "diptych.curate.metaclip:Config", "PairMethod", "Demystifying CLIP Data (ICLR 2024)", "keep texts that match a concept list, cap the head concepts"),
    Row("biomedica-concepts", "curate", "diptych.curate.biomedica:Config", "PairMethod", "BIOMEDICA (CVPR 2025)", "label clusters of pictures by a few looks; keep, drop or balance the labels"),
    Row("figure-filter", "curate", "diptych.curate.figure_filter:Config", "PairMethod", "BIOMEDICA (CVPR 2025)", "keep figures by size, licence, language, panels, kind of article, caption length"),
    Row("sources", "ingest", "diptych.pairs.sources.several:Config", "Source", "", "several sources as one pool, each pair with the name of its source and each source with a card"),
    # curate
    Row("metaclip", "curate", "diptych.curate.metaclip:Config", "PairMethod", "Demystifying CLIP Data (ICLR 2024)", "keep texts that match a concept list, cap the head concepts"),
    Row("mixture", "curate", "diptych.curate.mixture:Config", "PairMethod", "Quality Not Quantity (NeurIPS 2022)", "mix sources by shares to a fixed total, drawn by key"),
    Row("basic-filter", "curate", "diptych.curate.basic_filter:Config", "PairMethod", "DataComp (NeurIPS 2023)", "captions of some length, pictures of some size and no extreme shape"),
    Row("language-filter", "curate", "diptych.curate.language_filter:Config", "PairMethod", "langid.py (ACL 2012)", "keep captions in some languages"),
    # prune
    Row("exact-duplicates", "prune", "diptych.prune.exact_duplicates:Config", "PairMethod", "", "of pairs with the very same picture one stays"),
    Row("perceptual-duplicates", "prune", "diptych.prune.perceptual_duplicates:Config", "PairMethod", "pHash (2010)", "of pairs whose pictures' 64-bit hashes differ in a few bits one stays"),
    Row("clip-score-filter", "prune", "diptych.prune.clip_score_filter:Config", "PairMethod", "LAION-400M (2021), DataComp (NeurIPS 2023)", "keep pairs whose picture and caption a model finds alike"),
    Row("safety-filter", "prune", "diptych.prune.safety_filter:Config", "PairMethod", "", "drop pairs that a column, a linear head or another package's scorer calls unsafe"),
    Row("stratified-subset", "prune", "diptych.prune.stratified_subset:Config", "PairMethod", "", "so many pairs of every class, source, label or language, drawn by key"),
    Row("semantic-dedup", "prune", "diptych.prune.semantic_dedup:Config", "PairMethod", "SemDeDup (2023)", "drop near copies inside feature clusters"),
    Row("concept-pruning", "prune", "diptych.prune.concept_pruning:Config", "PairMethod", "Effective pruning of web-scale datasets (ICLR 2024)", "budget clusters by complexity, keep the least prototypical"),
    Row("smooth-distillation", "prune", "diptych.prune.smooth_distillation:Config", "PairMethod", "Efficient Dataset Distillation through Alignment with Smooth and High-Quality Expert Trajectories (2023)", "learn a few pictures a class that train like the whole set"),
    Row("random-subset", "prune", "diptych.prune.random_subset:Config", "PairMethod", "", "keep a share or a number of pairs, drawn by key: the baseline of pruning"),
    # caption
    Row("laclip", "caption", "diptych.caption.laclip:Config", "PairMethod", "Improving CLIP Training with Language Rewrites (NeurIPS 2023)", "rewrite captions, train on one drawn at random"),
    Row("veclip", "caption", "diptych.caption.veclip:Config", "PairMethod", "VeCLIP: Improving CLIP Training via Visual-enriched Captions (ECCV 2024)", "describe pictures, fuse that with the alt text, train on a mixture of both"),
    Row("cfg-captioning", "caption", "diptych.caption.cfg_captioning:Config", "PairMethod", "Guiding Image Captioning Models Toward More Specific Captions (ICCV 2023)", "caption pictures, the more specifically the larger the guidance"),
    Row("reinforce", "caption", "diptych.caption.reinforce:Config", "PairMethod", "MobileCLIP (CVPR 2024)", "store augmentations, and what several teachers see in them and in the captions"),
    # train
    Row("clip", "objective", "diptych.objectives.clip:Config", "Objective", "Learning Transferable Visual Models From Natural Language Supervision (2021)", "symmetric contrastive loss"),
    Row("shrinkmatch", "objective", "diptych.objectives.shrinkmatch:Config", "Objective", "Shrinking Class Space for Enhanced Certainty in Semi-Supervised Learning (ICCV 2023)", "consistency on uncertain pictures, in a class space without the runners-up"),
    Row("adawac", "objective", "diptych.objectives.adawac:Config", "Objective", "AdaWAC (ICML 2023)", "each pair weighs its supervised loss against consistency of two views"),
    Row("cloob", "objective", "diptych.objectives.cloob:Config", "Objective", "CLOOB: Modern Hopfield Networks with InfoLOOB Outperform CLIP (NeurIPS 2022)", "compare what a Hopfield network retrieves, a pair left out of its own denominator"),
    Row("alip", "objective", "diptych.objectives.alip:Config", "Objective", "ALIP: Adaptive Language-Image Pre-training with Synthetic Caption (ICCV 2023)", "raw and synthetic captions, weighed down where picture and captions disagree"),
    Row("a-clip", "objective", "diptych.objectives.a_clip:Config", "Objective", "Attentive Mask CLIP (ICCV 2023)", "the image tower sees the half of the tokens that its running average attends to, of two views"),
    Row("lightclip", "objective", "diptych.objectives.lightclip:Config", "Objective", "LightCLIP: Learning Multi-Level Interaction for Lightweight Vision-Language Models (2023)", "softened labels, patches matched with words, masked words told with the picture: for small towers"),
    Row("clip-rocket", "objective", "diptych.objectives.clip_rocket:Config", "Objective", "Improved baselines for vision-language pre-training (TMLR 2023)", "augmented pictures and captions beside plain ones, and non-contrastive losses to compare with"),
    Row("siglip", "objective", "diptych.objectives.siglip:Config", "Objective", "Sigmoid Loss for Language Image Pre-Training (ICCV 2023)", "a yes-or-no question for every combination of picture and text"),
    Row("distillation", "objective", "diptych.objectives.distillation:Config", "Objective", "CLIP-KD (CVPR 2024)", "learn the similarities, or the features, of a frozen teacher"),
    Row("m2-mix", "objective", "diptych.objectives.m2_mix:Config", "Objective", "Geodesic Multi-Modal Mixup for Robust Fine-Tuning (NeurIPS 2023)", "hard negatives on the great circle between a picture and its caption"),
    Row("vr-lwf", "objective", "diptych.objectives.vr_lwf:Config", "Objective", "Don't Stop Learning: Towards Continual Learning for the CLIP Model (2022)", "new classes, while similarities to random sentences stay as they were"),
    Row("coca", "objective", "diptych.objectives.coca:Config", "Objective", "CoCa (TMLR 2022)", "caption and contrast: trains a captioner, with pictures hidden for guidance"),
    Row("cgt-gan", "objective", "diptych.objectives.cgt_gan:Config", "Objective", "CgT-GAN: CLIP-guided Text GAN for Image Captioning (ACM MM 2023)", "a captioner from unpaired pictures and sentences, rewarded by CLIP and a discriminator"),
    Row("dc-clip", "objective", "diptych.objectives.dc_clip:Config", "Objective", "DC-CLIP: Multilingual CLIP Compression (Pattern Recognition 2025)", "each tower learns a teacher's feature maps by itself, before both are aligned"),
    Row("tinyclip", "objective", "diptych.objectives.tinyclip:Config", "Objective", "TinyCLIP: CLIP Distillation via Affinity Mimicking and Weight Inheritance (ICCV 2023)", "reproduce a teacher's affinities, and begin with a slice of its weights"),
    Row("mobileclip", "objective", "diptych.objectives.mobileclip:Config", "Objective", "MobileCLIP (CVPR 2024)", "learn the similarities that several teachers, asked once before training, see in the batch"),
    Row("adamw", "optimizer", "diptych.optimizers.adamw:Config", "Optimizer", "Decoupled Weight Decay Regularization (ICLR 2019)", "torch's fused AdamW"),
    Row("adamp", "optimizer", "diptych.optimizers.adamp:Config", "Optimizer", "AdamP (ICLR 2021)", "Adam without the radial part of the step"),
    Row("sgdp", "optimizer", "diptych.optimizers.sgdp:Config", "Optimizer", "AdamP (ICLR 2021)", "SGD with momentum, without the radial part of the step"),
    Row("diffgrad", "optimizer", "diptych.optimizers.diffgrad:Config", "Optimizer", "diffGrad (TNNLS 2020)", "Adam that slows down where the gradient has stopped changing"),
    Row("sophiag", "optimizer", "diptych.optimizers.sophia:SophiaGConfig", "Optimizer", "Sophia (ICLR 2024)", "clipped momentum over curvature from labels sampled from the model"),
    Row("sophiah", "optimizer", "diptych.optimizers.sophia:SophiaHConfig", "Optimizer", "Sophia (ICLR 2024)", "clipped momentum over curvature from Hessian-vector products"),
    Row("adahessian", "optimizer", "diptych.optimizers.adahessian:Config", "Optimizer", "ADAHESSIAN (AAAI 2021)", "Adam on the averaged diagonal of the Hessian"),
    Row("adagrad", "optimizer", "diptych.optimizers.adadagrad:AdaGradConfig", "Optimizer", "Adaptive Subgradient Methods (JMLR 2011)", "torch's AdaGrad, for batches that grow"),
    Row("adagrad-norm", "optimizer", "diptych.optimizers.adadagrad:AdaGradNormConfig", "Optimizer", "AdAdaGrad (2024)", "AdaGrad with one step size for the model, or one a row"),
    Row("gradnormlorp", "optimizer", "diptych.optimizers.gradnormlorp:Config", "Optimizer", "Gradient Weight-normalized Low-rank Projection (AAAI 2025)", "Adam on projected gradients of weight-normalised matrices or adapters"),
    Row("adalora", "optimizer", "diptych.optimizers.adalora:Config", "Optimizer", "AdaLoRA (ICLR 2023)", "low-rank adapters that share one budget of ranks"),
    Row("adadagrad", "batch-size", "diptych.optimizers.adadagrad:Config", "BatchSize", "AdAdaGrad (2024)", "a batch that grows while its gradient is too noisy"),
    # problems with a known answer, for claims about optimizers alone
    Row("quadratic", "problem", "diptych.train.problems.quadratic:Config", "Problem", "", "a noisy bowl whose curvatures span six decades"),
    Row("one-dimensional", "problem", "diptych.train.problems.one_dimensional:Config", "Problem", "diffGrad (TNNLS 2020)", "three functions of one variable, with valleys to run past"),
    Row("prototypes", "problem", "diptych.train.problems.prototypes:Config", "Problem", "AdamP (ICLR 2021)", "a small classifier whose weights may be scale-invariant"),
    Row("logistic", "problem", "diptych.train.problems.logistic:Config", "Problem", "AdAdaGrad (2024)", "logistic regression with exact gradients of single samples"),
    Row("planted-ranks", "problem", "diptych.train.problems.planted_ranks:Config", "Problem", "AdaLoRA (ICLR 2023)", "maps that have to change by matrices of known ranks"),
    # compress
    Row("magnitude", "compress", "diptych.compress.magnitude:Config", "Compressor", "Learning both Weights and Connections (NeurIPS 2015)", "zero the smallest weights: the baseline of pruning"),
    Row("gblm", "compress", "diptych.compress.gblm:Config", "Compressor", "Beyond Size: How Gradients Shape Pruning Decisions (2023)", "zero the weights of least size times input and gradient norm"),
    Row("wanda", "compress", "diptych.compress.gblm:WandaConfig", "Compressor", "A Simple and Effective Pruning Approach for Large Language Models (ICLR 2024)", "zero the weights of least size times input norm"),
    Row("sparsegpt", "compress", "diptych.compress.sparsegpt:Config", "Compressor", "SparseGPT (ICML 2023)", "zero weights, and let the others make up for them"),
    Row("flap", "compress", "diptych.compress.flap:Config", "Compressor", "Fluctuation-based Adaptive Structured Pruning (AAAI 2024)", "remove heads and neurons that fluctuate least: a smaller, faster model"),
    Row("perp", "compress", "diptych.compress.perp:Config", "Compressor", "PERP: Rethinking the Prune-Retrain Paradigm (2023)", "retrain biases, norms and low-rank updates of a pruned model, zeros kept"),
    Row("rescale", "compress", "diptych.compress.rescale:Config", "Compressor", "", "other weights for the same function: what pruning by magnitude minds"),
    Row("tinyclip-masks", "compress", "diptych.compress.tinyclip_masks:Config", "Compressor", "TinyCLIP: CLIP Distillation via Affinity Mimicking and Weight Inheritance (ICCV 2023)", "learn which width, heads and neurons stay, and cut the rest out"),
    Row("rd-prune", "compress", "diptych.compress.rd_prune:Config", "Compressor", "Efficient Joint Optimization of Layer-Adaptive Weight Pruning (ICCV 2023)", "each layer's sparsity by what it does to the output, one exact budget"),
    Row("dimap", "compress", "diptych.compress.dimap:Config", "Compressor", "Data-independent Module-Aware Pruning for Hierarchical Vision Transformers (ICLR 2024)", "scores within layers, one threshold a kind of layer, no data"),
    Row("ap", "compress", "diptych.compress.ap:Config", "Compressor", "AP: Selective Activation for De-sparsifying Pruned Neural Networks (TMLR 2023)", "iterative pruning that spends a part on negative weights that hardly move"),
    Row("reparameterize", "compress", "diptych.compress.reparameterize:Config", "Compressor", "MobileCLIP (CVPR 2024)", "parallel convolutions and their norms as one: the same function, faster"),
    Row("rws", "compress", "diptych.adapt.rws:Config", "Compressor", "Robust Weight Signatures (ICML 2023)", "patch shallow layers with what training on a corruption changed"),
    Row("wise-ft", "compress", "diptych.adapt.interpolation:WiseFTConfig", "Compressor", "Robust fine-tuning of zero-shot models (CVPR 2022)", "the straight line back to the zero-shot model"),
    Row("soup", "compress", "diptych.adapt.interpolation:SoupConfig", "Compressor", "Model soups (ICML 2022)", "average models fine-tuned from one start"),
    # evaluate
    Row("zero-shot", "evaluate", "diptych.evaluate.zero_shot:Config", "Benchmark", "CLIP (2021)", "classify by class names in prompt templates"),
    Row("few-shot", "evaluate", "diptych.evaluate.few_shot:Config", "Benchmark", "", "adapters on stored features, by shots and draws"),
    Row("clip-score", "evaluate", "diptych.evaluate.clip_score:Config", "Benchmark", "CLIPScore (EMNLP 2021)", "how well captions fit their pictures, with and without references"),
    Row("captioning", "evaluate", "diptych.evaluate.captioning:Config", "Benchmark", "Guiding Image Captioning Models Toward More Specific Captions (ICCV 2023)", "captions a split, with guidance: CLIPScore and recall beside CIDEr, BLEU, ROUGE-L, METEOR"),
    Row("clip4dm", "evaluate", "diptych.evaluate.clip4dm:Config", "Benchmark", "Extract Free Dense Misalignment from CLIP (AAAI 2025)", "which words of a caption do not fit the picture, and F-CLIPScore"),
    Row("augclip", "evaluate", "diptych.evaluate.augclip:Config", "Benchmark", "AugCLIP (CVPR 2025)", "score edits by the cosine to an estimated ideal edit"),
    Row("holistic-robustness", "evaluate", "diptych.evaluate.holistic_robustness:Config", "Benchmark", "Toward a Holistic Evaluation of Robustness in CLIP Models (TPAMI 2025)", "factors, calibration, out-of-distribution and cue conflict in one suite"),
    Row("quality-not-quantity", "evaluate", "diptych.evaluate.quality_not_quantity:Config", "Benchmark", "Quality Not Quantity (NeurIPS 2022)", "the lines of data sources: accuracy under shift over accuracy without, and ensembles beside mixtures"),
    Row("corruption-robustness", "evaluate", "diptych.evaluate.corruption_robustness:Config", "Benchmark", "Common corruptions (ICLR 2019)", "zero-shot accuracy under 15 corruptions at 5 severities"),
    Row("straggler-sharpness", "evaluate", "diptych.adapt.straggler_sharpness:Config", "Benchmark", "In Search of the Successful Interpolation (2024)", "accuracy, sharpness and unstable layers on the way from zero-shot"),
    Row("quality-captions", "evaluate", "diptych.evaluate.quality_captions:Config", "Benchmark", "CLIP with Quality Captions: A Strong Pretraining for Vision Tasks (2024)", "a linear probe on the frozen feature map: what captions do to dense prediction"),
    Row("fresh-networks", "evaluate", "diptych.evaluate.fresh_networks:Config", "Benchmark", "Dataset Distillation by Matching Training Trajectories (CVPR 2022)", "accuracy of small classifiers trained anew on the training pairs alone"),
    Row("retrieval", "evaluate", "diptych.evaluate.retrieval:Config", "Benchmark", "CLIP (2021)", "find the image by its text and the text by its image"),
    Row("contrastive-loss", "evaluate", "diptych.evaluate.contrastive_loss:Config", "Benchmark", "CLIP (2021)", "the loss on pairs that were not trained on"),
    Row("alignment", "evaluate", "diptych.evaluate.alignment:Config", "Benchmark", "Alignment and Uniformity on the Hypersphere (ICML 2020)", "how close pairs lie, how evenly all spread, how far the modalities are apart"),
    Row("forgetting", "evaluate", "diptych.evaluate.forgetting:Config", "Benchmark", "Don't Stop Learning: Towards Continual Learning for the CLIP Model (2022)", "accuracy and backward transfer after several sessions of training"),
    Row("class-retrieval", "evaluate", "diptych.evaluate.class_retrieval:Config", "Benchmark", "", "find a text of the picture's class, and a picture of the text's"),
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
