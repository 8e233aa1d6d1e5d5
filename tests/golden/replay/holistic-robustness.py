"""Replays calibration, out-of-distribution detection, retrieval, factors, cues, effective robustness and correspondence."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from diptych.evaluate import calibration as cal
from diptych.evaluate import effective_robustness as er
from diptych.evaluate import holistic_robustness as holistic
from diptych.evaluate import ood, retrieval, visual_factors
from diptych.evaluate.zero_shot import log_loss

Array = NDArray[np.generic]

INPUTS = (
    "text", "val_x", "val_y", "id_x", "id_y", "shift_x", "shift_y", "ood_x", "logit_scale", "edge_prob", "edge_y", "ood_ties_id", "ood_ties_out",
    "ret_image", "ret_text", "ret_owner", "factor_mask", "factor_correct", "cue_shape", "cue_texture", "cue_pred", "er_base_id", "er_base_ood",
    "er_query_id", "er_query_ood", "corr_feat_a", "corr_feat_b", "corr_xyz_a", "corr_xyz_b", "corr_thresholds",
)  # fmt: skip

# torchmetrics bins in float32 and ties go the other way on an edge: its values of `edge_*` are replayed with bins [lo, hi).
TOLERANCE = {
    "temperature": (1e-5, 0),
    "cal_*": (0, 2e-6),
    "edge_ece15": (0, 2e-6),
    "edge_ece5": (0, 2e-6),
    "*": (1e-9, 1e-9),
}


def replay(vectors: Mapping[str, Array]) -> dict[str, Array]:
    given = {key: np.asarray(vectors[key]) for key in vectors}
    return {
        **calibration(given),
        **edges(given),
        **detection(given),
        **retrieved(given),
        **factors(given),
        **effective(given),
        **correspondence(given),
    }


def calibration(given: dict[str, Array]) -> dict[str, Array]:
    def logits(split: str) -> Array:
        return float(given["logit_scale"]) * given[f"{split}_x"] @ given["text"].T

    temperature = cal.fit_temperature(logits("val"), given["val_y"])
    outputs = {"temperature": np.asarray(temperature)}
    for split in ("val", "id", "shift"):
        outputs[f"cal_{split}"] = figures(logits(split), given[f"{split}_y"])
        outputs[f"cal_{split}_after"] = figures(logits(split) / temperature, given[f"{split}_y"])
    return outputs


def figures(logit_NC: Array, label_N: Array) -> Array:
    prob_NC = cal.softmax(logit_NC)
    confidence_N, correct_N = prob_NC.max(axis=1), prob_NC.argmax(axis=1) == label_N
    ece = [cal.expected_error(confidence_N, correct_N, cal.equal_width(confidence_N, bins)) for bins in (10, 15)]
    mce = cal.maximum_error(confidence_N, correct_N, cal.equal_width(confidence_N, 15))
    return np.array([correct_N.mean(), *ece, mce, log_loss(logit_NC, label_N).mean(), cal.brier(prob_NC, label_N).mean()])


def edges(given: dict[str, Array]) -> dict[str, Array]:
    confidence_N = given["edge_prob"].max(axis=1)
    correct_N = given["edge_prob"].argmax(axis=1) == given["edge_y"]
    outputs = {}
    for bins in (5, 15):
        bin_N = cal.equal_width(confidence_N, bins)
        outputs[f"edge_ece{bins}_lo_open"] = np.asarray(cal.expected_error(confidence_N, correct_N, bin_N))
        lo_closed_N = np.searchsorted(np.linspace(0, 1, bins + 1, dtype=np.float32), confidence_N.astype(np.float32), side="right") - 1
        outputs[f"edge_ece{bins}"] = np.asarray(cal.expected_error(confidence_N, correct_N, lo_closed_N))
    return outputs


def detection(given: dict[str, Array]) -> dict[str, Array]:
    outputs = {"ood_ties": np.array(ood.separation(given["ood_ties_id"], given["ood_ties_out"]))}
    scale = float(given["logit_scale"])
    for key, name in {
        name.replace("_", "") if name == "max_logit" else name.replace("negative", "neg"): name for name in holistic.SCORES
    }.items():
        inside, outside = (ood.score(name, given[x] @ given["text"].T, scale) for x in ("id_x", "ood_x"))
        outputs |= {f"ood_{key}_id": inside, f"ood_{key}_out": outside, f"ood_{key}": np.array(ood.separation(inside, outside))}
    return outputs


def retrieved(given: dict[str, Array]) -> dict[str, Array]:
    found = {
        "i2t": retrieval.image_to_text_ranks(given["ret_image"], given["ret_text"], given["ret_owner"]),
        "t2i": retrieval.text_to_image_ranks(given["ret_text"], given["ret_image"], given["ret_owner"]),
    }
    return {f"ret_{way}_R{k}": np.asarray((rank < k).mean()) for way, rank in found.items() for k in (1, 5, 10)}


def factors(given: dict[str, Array]) -> dict[str, Array]:
    """The file writes -1 for an empty factor."""
    found = visual_factors.by_factor(given["factor_mask"], given["factor_correct"])
    followed = visual_factors.cues(given["cue_pred"], given["cue_shape"], given["cue_texture"])
    return {
        "factor_acc": np.nan_to_num(found.accuracy, nan=-1),
        "factor_error_ratio": np.nan_to_num(found.error_ratio, nan=-1),
        "shape_bias": np.asarray(followed.shape_bias),
        "cue_accuracy": np.asarray(followed.accuracy),
    }


def effective(given: dict[str, Array]) -> dict[str, Array]:
    outputs = {"er_pearson_spearman_kendall": np.array(er.correlations(given["er_base_id"], given["er_base_ood"]))}
    for space in ("logit", "probit"):
        line = er.fit_line(given["er_base_id"], given["er_base_ood"], space)
        outputs[f"er_{space}_fit"] = np.array(line)
        outputs[f"er_{space}"] = er.effective_robustness(line, given["er_query_id"], given["er_query_ood"], space)
    return outputs


def correspondence(given: dict[str, Array]) -> dict[str, Array]:
    match_P = holistic.correspond(given["corr_feat_a"], given["corr_feat_b"])
    error_P = holistic.correspondence_error(given["corr_xyz_a"], given["corr_xyz_b"], match_P)
    recall = holistic.correspondence_recall(error_P, given["corr_thresholds"])
    return {"corr_nn": match_P, "corr_err": error_P, "corr_recall": recall}
