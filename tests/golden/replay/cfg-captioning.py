"""Guided captioning: guidance a step, whole decodes, guidance by a language model, CLIPScore with recall, and the caption metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diptych.evaluate.caption_metrics import bleu, bleu_counts, cider, rouge_l
from diptych.evaluate.clip_score import best_reference, clip_score, cosines, ref_clip_score
from diptych.evaluate.ranks import target_rank
from diptych.models.decoding import Vocabulary, decode, guide, guide_by_language_model, guided

INPUTS = (
    "step_cond_logits",
    "step_uncond_logits",
    "gamma",
    "dec_*_table",
    "dec_bos",
    "dec_eos",
    "dec_max_length",
    "lm_table",
    "lm_newline",
    "lm_alpha_beta",
    "cs_image",
    "cs_caption",
    "cs_refs",
    "cs_ref_count",
    "cs_recall_at",
    "cap_*",
)
TOLERANCE = {
    "step_guided_*": (1e-10, 1e-12),
    "lm_first_scores": (1e-10, 1e-12),
    "cs_recall": (0.0, 1e-12),
    "cs_*": (1e-9, 1e-12),
    "cider*": (1e-6, 1e-9),
    "bleu": (1e-6, 0.0),
    "rouge*": (1e-6, 0.0),
}
Vectors = Mapping[str, np.ndarray]


def replay(vectors: Vectors) -> dict[str, np.ndarray]:
    return _steps(vectors) | _decodes(vectors) | _language_model(vectors) | _clip_scores(vectors) | _captions(vectors)


def _steps(vectors: Vectors) -> dict[str, np.ndarray]:
    c, u = (torch.tensor(vectors[f"step_{side}_logits"]) for side in ("cond", "uncond"))
    logits = torch.stack([guide(c, u, gamma) for gamma in vectors["gamma"].tolist()])
    logprobs = torch.stack([guide(c.log_softmax(dim=-1), u.log_softmax(dim=-1), gamma) for gamma in vectors["gamma"].tolist()])
    return {
        "step_guided_logits": logits.numpy(),
        "step_guided_logprobs_form": logprobs.numpy(),
        "step_argmax": logits.argmax(dim=-1).numpy(),
    }


def _decodes(vectors: Vectors) -> dict[str, np.ndarray]:
    conditional, unconditional = _first_order(vectors["dec_cond_table"]), _first_order(vectors["dec_uncond_table"])
    tokens = [_decoded(vectors, guided(conditional, unconditional, gamma)) for gamma in vectors["gamma"].tolist()]
    return {"dec_tokens": np.stack(tokens)}


def _language_model(vectors: Vectors) -> dict[str, np.ndarray]:
    c, u, q = (_first_order(vectors[name]) for name in ("dec_cond_table", "dec_uncond_table", "lm_table"))
    eos, newline = int(vectors["dec_eos"]), int(vectors["lm_newline"])
    first_NL = torch.full((len(vectors["dec_cond_table"]), 1), int(vectors["dec_bos"]))
    scores, tokens = [], []
    for alpha, beta in vectors["lm_alpha_beta"].tolist():

        def following(token_NL: Tensor, alpha: float = alpha, beta: float = beta) -> Tensor:
            return guide_by_language_model(q(token_NL), c(token_NL), u(token_NL), alpha, beta, eos, newline)

        scores.append(following(first_NL).numpy())
        tokens.append(_decoded(vectors, following))
    return {"lm_first_scores": np.stack(scores), "lm_tokens": np.stack(tokens)}


def _first_order(table: NDArray[np.float64]) -> Callable[[Tensor], Tensor]:
    """A captioner that looks at the previous token alone; a table `[V, V]` for all captions or `[N, V, V]`."""
    logits = torch.tensor(table)

    def following(token_NL: Tensor) -> Tensor:
        return logits[token_NL[:, -1]] if logits.ndim == 2 else logits[torch.arange(len(token_NL)), token_NL[:, -1]]

    return following


def _decoded(vectors: Vectors, following: Callable[[Tensor], Tensor]) -> NDArray[np.int64]:
    length = int(vectors["dec_max_length"])
    vocabulary = Vocabulary(int(vectors["dec_bos"]), int(vectors["dec_eos"]))
    token_NL = decode(following, len(vectors["dec_cond_table"]), vocabulary, length).token_NL.numpy()
    return np.pad(token_NL, ((0, 0), (0, length + 1 - token_NL.shape[1])), constant_values=-1)


def _clip_scores(vectors: Vectors) -> dict[str, np.ndarray]:
    image_ND, caption_ND, reference_RD = (_unit(vectors[f"cs_{name}"]) for name in ("image", "caption", "refs"))
    rows = np.arange(len(image_ND))
    cosine_N = cosines(image_ND, caption_ND)
    best_N = best_reference(caption_ND, reference_RD, np.repeat(rows, vectors["cs_ref_count"]))
    rank_N = target_rank(caption_ND @ image_ND.T, rows)
    return {
        "cs_clipscore": clip_score(cosine_N),
        "cs_refonly": best_N,
        "cs_refclipscore": ref_clip_score(cosine_N, best_N),
        "cs_recall": np.asarray([(rank_N < k).mean() for k in vectors["cs_recall_at"]]),
    }


def _unit(feature_ND: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(feature_ND / np.linalg.norm(feature_ND, axis=1, keepdims=True))


def _captions(vectors: Vectors) -> dict[str, np.ndarray]:
    captions = [text.split() for text in vectors["cap_hyp"].tolist()]
    references = [[text.split() for text in row if text] for row in vectors["cap_refs"].tolist()]
    cider_N = cider(captions, references)
    rouge_N = np.asarray([rouge_l(words, others) for words, others in zip(captions, references, strict=True)])
    return {
        "cider": cider_N.mean(),
        "cider_each": cider_N,
        "bleu": bleu(bleu_counts(captions, references)),
        "rouge_l": rouge_N.mean(),
        "rouge_each": rouge_N,
    }
