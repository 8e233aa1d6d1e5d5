"""MetaCLIP: spacing, matching, inverted index, counts, balancing with given draws, and the conversions of the threshold."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from diptych.curate import metaclip

INPUTS = ("metadata", "texts", "t", "uniform_*", "zipf_count", "t_to_p_t", "p_to_t_p")

TOLERANCE = {"entry_prob_*": (1e-12, 1e-12), "keep_prob_*": (1e-12, 1e-12), "t_to_p": (1e-12, 1e-12), "zipf_prob_t50": (1e-12, 1e-12)}


def replay(vectors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All outputs of the file; the number of thresholds is that of `t`."""
    texts, metadata = vectors["texts"].tolist(), vectors["metadata"].tolist()
    matches = metaclip.Matcher(metadata).match(texts)
    count = metaclip.count(matches, len(metadata))
    outputs = {
        "spaced": np.array([metaclip.space(text) + "|" for text in texts]),
        "match_indptr": matches.indptr,
        "match_ids": matches.ids,
        "inverted_index": metaclip.inverted_index(matches),
        "entry_count": count,
        "kept_text_ids_inf": kept_ids(matches, metaclip.entry_prob(count, float("inf")), np.zeros(len(matches.ids))),
        "zipf_prob_t50": metaclip.entry_prob(vectors["zipf_count"], 50),
        "t_to_p": np.array([metaclip.threshold_to_tail_share(vectors["zipf_count"], t) for t in vectors["t_to_p_t"].tolist()]),
        "p_to_t": np.array([metaclip.tail_share_to_threshold(vectors["zipf_count"], p) for p in vectors["p_to_t_p"].tolist()]),
    }
    for index, threshold in enumerate(vectors["t"].tolist()):
        prob = metaclip.entry_prob(count, threshold)
        outputs[f"entry_prob_{index}"] = prob
        outputs[f"keep_prob_{index}"] = metaclip.keep_prob(prob, matches)
        outputs[f"kept_text_ids_{index}"] = kept_ids(matches, prob, vectors[f"uniform_{index}"])
    return outputs


def kept_ids(matches: metaclip.Matches, prob: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Ids of the texts that balancing keeps, ascending."""
    return np.flatnonzero(metaclip.balance(prob, matches, uniform))
