"""Replays AugCLIP: the planes of three solvers, both readings of the ideal edit, and the rival scores."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from diptych.evaluate import augclip

Array = NDArray[np.generic]

INPUTS = ("*_source_attr", "*_target_attr", "*_img_src", "*_img_edit", "*_text_src", "*_text_trg")

# What follows from a plane is exact; the planes are as near as two solvers come.
TOLERANCE = {"*_svm*": (1e-6, 1e-8), "*_logreg*": (1e-6, 1e-8), "*": (1e-10, 1e-12)}

SOLVERS: dict[str, tuple[augclip.Solver, float]] = {"svm": ("svm", 1.0), "svm_C100": ("svm", 100.0), "logreg": ("logreg", 1.0)}


def replay(vectors: Mapping[str, Array]) -> dict[str, Array]:
    outputs: dict[str, Array] = {}
    for case in sorted({key.partition("_")[0] for key in vectors}):
        given = {key.partition("_")[2]: np.asarray(vectors[key]) for key in vectors if key.startswith(f"{case}_")}
        found = rivals(given)
        for name, (solver, c) in SOLVERS.items():
            found |= {f"{name}_{key}": value for key, value in of_solver(given, solver, c).items()}
        outputs |= {f"{case}_{key}": np.asarray(value) for key, value in found.items()}
    return outputs


def of_solver(given: Mapping[str, Array], solver: augclip.Solver, c: float) -> dict[str, Array]:
    plane = augclip.separate(given["source_attr"], given["target_attr"], solver, c)
    source_D = given["img_src"]
    ideal_D = augclip.ideal_edit(plane, source_D, "project")
    return {
        "w": plane.weight_D,
        "b": np.array(plane.bias),
        "src_margin": np.array(plane.margin(source_D)),
        "v": augclip.modification(plane, source_D),
        "ideal": ideal_D,
        "score": augclip.aug_clip(given["img_edit"], ideal_D),
        "score_reflect": augclip.aug_clip(given["img_edit"], augclip.ideal_edit(plane, source_D, "reflect")),
        "train_acc": np.array(plane.accuracy),
    }


def rivals(given: Mapping[str, Array]) -> dict[str, Array]:
    return {
        "clipscore": augclip.clip_similarity(given["img_edit"], given["text_trg"]),
        "directional": augclip.directional(given["img_edit"], given["img_src"], given["text_src"], given["text_trg"]),
        "image_sim": augclip.image_similarity(given["img_edit"], given["img_src"]),
    }
