"""What a model still knows after each of several sessions: the forgetting protocol of continual learning.

Ding et al., "Don't Stop Learning: Towards Continual Learning for the CLIP Model" (2022), section 4; accuracy and backward transfer are those of
Lopez-Paz & Ranzato, Gradient Episodic Memory (NeurIPS 2017), with the released code's divisor.

Shape legend: K phases (sessions), C classes, N pictures.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field

from diptych.core.errors import ConfigError, DataError
from diptych.core.points import Encoder, Metric
from diptych.evaluate import zero_shot
from diptych.evaluate.classified import Classified, cosines
from diptych.evaluate.encode import ModelEncoder
from diptych.evaluate.rows import Rows
from diptych.models import clip

Floats = NDArray[np.float64]

TASK = "forgetting"


def phase_matrix(class_accuracy_KC: Floats, phases: int) -> Floats:
    """M `[K, phases]`: the mean accuracy of each phase's classes after each session. The classes are dealt evenly, in order.

    Raises ConfigError if they do not divide by the phases.
    """
    sessions, classes = class_accuracy_KC.shape
    if classes % phases:
        raise ConfigError.at("The classes do not divide by the phases", "phases", phases, f"a divisor of {classes}")
    matrix: Floats = class_accuracy_KC.reshape(sessions, phases, -1).mean(axis=2)
    return matrix


def accuracy(matrix_KK: Floats) -> Floats:
    """The mean accuracy of the phases so far after each session, `[K]`."""
    return np.array([row[: phase + 1].mean() for phase, row in enumerate(matrix_KK)])


def backward_transfer(matrix_KK: Floats) -> Floats:
    """What each session gave to the phases before it, `[K]`; below zero: they were forgotten.

    The sum over earlier phases of M[p, i] - M[i, i] is divided by the number of phases so far, the present one included.
    """
    own_K = np.diag(matrix_KK)
    return np.array([(row[:phase] - own_K[:phase]).sum() / (phase + 1) for phase, row in enumerate(matrix_KK)])


class Config(Classified):
    """Accuracy and backward transfer after the last of several sessions, each of equally many classes, in the order of the labels."""

    directories: ClassVar[tuple[str, ...]] = ("earlier",)

    method: Literal["forgetting"] = "forgetting"
    earlier: tuple[str, ...] = Field(min_length=1, description="directories of the models after the earlier sessions, in order")

    untrained: bool = Field(False, description="the set's classes are of no session: how they changed since the first model is measured")

    def build(self) -> Forgetting:
        """The benchmark."""
        return Forgetting(self)


class Forgetting:
    """The benchmark; the measured model is that of the last session. Every model classifies all pictures among all classes."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def run(self, encoder: Encoder, pairs: pl.DataFrame, name: str, seed: int) -> list[Metric]:
        """The rows `acc`: mean accuracy of all classes, `phase0`, …: that of each session's classes, and `bwt`: backward transfer.

        Of untrained classes `acc` and `change`: that less the accuracy of the first model.

        Raises DataError for pairs without classes, for a class without pictures, and for an encoder that cannot read pictures for another
        model; ConfigError if the classes do not divide by the sessions.
        """
        known, rows = zero_shot.classes(pairs, self.config.split, name=self.config.classnames)
        sessions, classes = len(self.config.earlier) + 1, len(known.names)
        if missing := sorted(set(range(classes)) - set(known.label_N.tolist())):
            raise DataError.at("A class has no pictures to test", "label_name", known.names[missing[0]], f"some in {self.config.split}")
        earlier = self.config.earlier[:1] if self.config.untrained else self.config.earlier
        encoders = [*(self._beside(encoder, directory) for directory in earlier), encoder]
        hit_KN = np.stack([self._hits(each, rows, known) for each in encoders])
        count_C = np.bincount(known.label_N, minlength=classes)
        class_KC = np.stack([np.bincount(known.label_N, weights=hit_N, minlength=classes) / count_C for hit_N in hit_KN])
        settings = {**self.config.settings(encoder, known.names), "sessions": sessions}
        make, weight_N = Rows(name, TASK, rows["key"].to_list(), seed, settings), zero_shot.class_weights(known.label_N)
        now = make.mean("acc", hit_KN[-1], weight_N)
        if self.config.untrained:
            return [now, make.mean("change", hit_KN[-1] - hit_KN[0], weight_N)]
        matrix_KK = phase_matrix(class_KC, sessions)
        phase_N = known.label_N // (classes // sessions)
        phases = [self._phase(phase, hit_KN[-1], phase_N, weight_N, rows, make) for phase in range(sessions)]
        # Transfer as a mean over pictures: what each picture of an earlier session gained since, as a share of all sessions.
        gain_N = np.where(phase_N < sessions - 1, hit_KN[-1] - hit_KN[phase_N, np.arange(len(phase_N))], 0.0)
        transfer = make.mean("bwt", gain_N, weight_N)
        assert abs(transfer.value - backward_transfer(matrix_KK)[-1]) < 1e-6
        return [now, *phases, transfer]

    def _hits(self, encoder: Encoder, rows: pl.DataFrame, known: zero_shot.Classes) -> Floats:
        cosine_NC = cosines(encoder.images(rows), self.config.classifier(encoder, known.names))
        return np.asarray(cosine_NC.argmax(axis=1) == known.label_N, dtype=np.float64)

    def _phase(self, phase: int, hit_N: Floats, phase_N: NDArray[Any], weight_N: Floats, rows: pl.DataFrame, make: Rows) -> Metric:
        own_N = phase_N == phase
        keys = rows.filter(pl.Series(own_N))["key"].to_list()
        return replace(make, keys=keys).mean(f"phase{phase}", hit_N[own_N], weight_N[own_N] / weight_N[own_N].mean())

    def _beside(self, encoder: Encoder, directory: str) -> Encoder:
        """Another model on the same pictures."""
        load_pixels = getattr(encoder, "load_pixels", None)
        if load_pixels is None:
            raise DataError.at("Pictures cannot be read for another model", "evaluate", type(encoder).__name__, "an encoder of a data set")
        return ModelEncoder(clip.load(Path(directory)), load_pixels)
