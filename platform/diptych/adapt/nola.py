"""NoLA without its prompts: the zero-shot classifier's surest guesses train a small head on features of a self-supervised encoder.

CLIP knows the classes' names, the other encoder (DINO in the paper) knows which pictures look alike; the head joins the two and no
label is read. Its predictions are also the teacher's labels of the paper's third stage, `adapt/prompt_tuning.py`.

Source: Fazli Imam et al., CLIP meets DINO for Tuning Zero-Shot Classifier using Unlabeled Image Collections (2024): the stages
of the description-based classifier (`adapt/descriptions.py` makes it) and of the DINO-based labelling network.

The released selection walks over the classes that occur in the ground truth; `classes: present` does that. By default all classes
are walked over, which needs no label.

Shape legend: N pictures, C classes, S selected pictures, B pictures of a batch, D width of CLIP's features, E of the other encoder's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import nn

from diptych.core import chance
from diptych.core.config import Config as BaseConfig
from diptych.core.errors import DataError, DiptychError
from diptych.core.points import Examples, Support

Labels = NDArray[np.int64]


class Config(BaseConfig):
    """The labelling head. The defaults are the released ones, but for `classes`."""

    method: Literal["nola"] = "nola"
    share: float = Field(0.2, gt=0, le=1, description="pictures selected a class, as a share of its even part of all, N / C")
    least: int = Field(16, ge=1, description="pictures selected a class at least, as far as there are candidates")
    choices: int = Field(3, ge=1, description="how far down the pictures' rankings a class that is nobody's first choice is looked for")
    classes: Literal["all", "present"] = Field(
        "all", description="classes to select for: `all` reads no label; `present`, as released, reads which occur in the unlabelled set"
    )
    hidden: int = Field(256, ge=1, description="hidden units of the head")
    epochs: int = Field(50, ge=1, description="passes of the head over the selected pictures")
    batch_size: int = Field(32, ge=1, description="selected pictures a step")
    lr: float = Field(1e-3, gt=0, description="learning rate of Adam")

    def build(self) -> Nola:
        """The adapter."""
        return Nola(self)


# ---------------------------------------------------------------- pseudo-labels


class Selection(NamedTuple):
    """Pictures with pseudo-labels, class by class, the surest first.

    Attributes:
        row_S: rows of the probabilities, int64, each once.
        label_S: the class a picture was selected for, int64.
        confidence_S: probability of the picture's FIRST choice, whichever choice it was selected by; the probabilities' dtype.
    """

    row_S: Labels
    label_S: Labels
    confidence_S: NDArray[Any]


def zero_shot_probabilities(feature_ND: NDArray[Any], text_CD: NDArray[Any], logit_scale: float) -> NDArray[np.float64]:
    """`softmax(logit_scale * feature @ text.T)`, `[N, C]`; features are L2-normalised, the scale is already exponentiated.

    float64, because CLIP's scale saturates a float32 softmax: the surest pictures would tie at 1.
    """
    logit_NC = logit_scale * (feature_ND.astype(np.float64) @ text_CD.astype(np.float64).T)
    odds_NC = np.exp(logit_NC - logit_NC.max(axis=1, keepdims=True))
    return np.asarray(odds_NC / odds_NC.sum(axis=1, keepdims=True))


def pictures_per_class(pictures: int, classes: int, share: float = 0.2, least: int = 16) -> int:
    """k: the share of a class's even part of the pictures, rounded down, and at least `least`."""
    return max(int(pictures / classes * share), least)


def select_pseudo_labels(
    probability_NC: NDArray[Any], k: int, classes: Sequence[int] | Labels | None = None, choices: int = 3
) -> Selection:
    """The k surest pictures of every class.

    A class takes pictures whose first choice it is, by falling probability; if there are none, those whose second choice it is,
    and so on down to `choices`. Classes choose in ascending order and a picture stays with the first that chose it: a later class
    may end with fewer than k pictures, or none. Ties go to the lower class and to the earlier row.

    Args:
        probability_NC: float, finite.
        k: most pictures a class, >= 1.
        classes: class numbers to select for; None: all.
        choices: >= 1; more than C count as C.

    Raises DataError for probabilities that are not finite, and for a class that is among no picture's first `choices`.
    """
    if probability_NC.ndim != 2 or not probability_NC.size or not np.isfinite(probability_NC).all():
        raise DataError.at("No probabilities to select by", "probability_NC", probability_NC.shape, "[N, C], not empty, all finite")
    choice_NR = _first_choices(probability_NC, choices)
    labels = range(probability_NC.shape[1]) if classes is None else np.unique(classes).tolist()
    rows = [_candidates(probability_NC, choice_NR, label)[:k] for label in labels]
    row_S, label_S = np.concatenate(rows), np.repeat(np.asarray(labels, dtype=np.int64), [len(row) for row in rows])
    first_S = np.sort(np.unique(row_S, return_index=True)[1])
    row_S = row_S[first_S]
    return Selection(row_S, label_S[first_S], probability_NC[row_S, choice_NR[row_S, 0]])


def _first_choices(probability_NC: NDArray[Any], choices: int) -> Labels:
    """The `choices` likeliest classes of every picture, int64 `[N, R]`; among equals the lower number stands first."""
    left_NC, choice_R = probability_NC.copy(), []
    for _ in range(min(choices, probability_NC.shape[1])):
        choice_R.append(left_NC.argmax(axis=1))
        np.put_along_axis(left_NC, choice_R[-1][:, None], -np.inf, axis=1)
    return np.stack(choice_R, axis=1)


def _candidates(probability_NC: NDArray[Any], choice_NR: Labels, label: int) -> Labels:
    """Rows whose first choice the class is, or else second, …; by falling probability of the class."""
    for choice_N in choice_NR.T:
        row_n = np.flatnonzero(choice_N == label)
        if len(row_n):
            return np.asarray(row_n[np.argsort(-probability_NC[row_n, label], kind="stable")])
    raise DataError.at(
        "No picture is a candidate for a class", f"class {label}", f"{len(choice_NR)} pictures, none with it among {choice_NR.shape[1]} choices",
        "a picture that has the class among its likeliest", "raise `choices`, add unlabelled pictures, or leave the class out",
    )  # fmt: skip


# ---------------------------------------------------------------- the labelling head


def labelling_head(width: int, classes: int, hidden: int = 256, seed: int = 0) -> nn.Sequential:
    """`Linear(E, hidden) - ReLU - Linear(hidden, C)`, torch's initialisation, float32. Equal seeds give equal weights."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, classes))


def train_head(head: nn.Module, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], lr: float = 1e-3) -> list[float]:
    """A step of Adam on the cross-entropy a batch of features `[B, E]` and labels `[B]`; gives the losses before each step."""
    optimizer = torch.optim.Adam(head.parameters(), lr=lr)
    losses = []
    for feature_BE, label_B in batches:
        loss = nn.functional.cross_entropy(head(feature_BE), label_B)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    return losses


class Nola:
    """The adapter: `fit` selects pseudo-labels and trains the head on them, `predict` asks the head.

    Attributes:
        selection: after `fit`, what the head learned from; rows count in `support.unlabelled`.
        losses: after `fit`, cross-entropy in nats, one a step.
    """

    needs = frozenset({"unlabelled", "auxiliary"})
    selection: Selection
    losses: list[float]

    def __init__(self, config: Config) -> None:
        self.config = config
        self.head: nn.Sequential | None = None

    def fit(self, support: Support) -> Nola:
        """Selects from the unlabelled pictures and trains the head; of several views of a picture, the first row is used.

        Raises DataError if there are no unlabelled pictures, if they lack the other encoder's features, or if one class
        is nobody's choice.
        """
        unlabelled, auxiliary_NE = _needed(support)
        config, classes = self.config, len(support.text_CD)
        row_N = _first_views(unlabelled)
        probability_NC = zero_shot_probabilities(unlabelled.feature_ND[row_N], support.text_CD, support.logit_scale)
        k = pictures_per_class(len(row_N), classes, config.share, config.least)
        selection = select_pseudo_labels(probability_NC, k, self._classes(unlabelled, classes), config.choices)
        self.selection = selection._replace(row_S=row_N[selection.row_S])
        self.head = labelling_head(auxiliary_NE.shape[1], classes, config.hidden, int(chance.mix(support.seed, chance.key_hash("head"))))
        self.losses = train_head(self.head, self._batches(auxiliary_NE[self.selection.row_S], support.seed), config.lr)
        return self

    def predict(self, test: Examples) -> NDArray[np.float32]:
        """The head's logits `[N, C]`, from `test.auxiliary_NE` alone. Raises DataError if it is missing or of another width."""
        assert self.head is not None, "fit comes before predict"
        feature_NE, width = test.auxiliary_NE, self.head[0].in_features
        if feature_NE is None or feature_NE.shape[1] != width:
            got = "nothing" if feature_NE is None else feature_NE.shape
            raise DataError.at("The head cannot see these pictures", "auxiliary_NE", got, f"features [N, {width}] of the second encoder")
        with torch.no_grad():
            return np.asarray(self.head(torch.tensor(feature_NE, dtype=torch.float32)).numpy())

    def pseudo_labels(self, examples: Examples) -> Labels:
        """The teacher's labels int64 `[N]` of any pictures, for `prompt_tuning`: every picture has one, however unsure."""
        return np.asarray(self.predict(examples).argmax(axis=1), dtype=np.int64)

    def _classes(self, unlabelled: Examples, classes: int) -> Labels | None:
        if self.config.classes == "all":
            return None
        label_N = unlabelled.label_N
        if label_N is None or not len(label_N) or label_N.min() < 0 or label_N.max() >= classes:
            got = "no labels" if label_N is None else label_N
            raise DataError.at(
                "`classes: present` reads labels of the unlabelled pictures", "unlabelled.label_N", got, f"[N] in [0, {classes})", "use `classes: all`"
            )  # fmt: skip
        return label_N

    def _batches(self, feature_SE: NDArray[np.float32], seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """All epochs' batches; the order of an epoch is the seed's."""
        features, labels = torch.tensor(feature_SE, dtype=torch.float32), torch.tensor(self.selection.label_S)
        for epoch in range(self.config.epochs):
            order_S = torch.from_numpy(chance.generator(seed, "nola", epoch).permutation(len(labels)))
            for row_B in torch.split(order_S, self.config.batch_size):
                yield features[row_B], labels[row_B]


def _needed(support: Support) -> tuple[Examples, NDArray[np.float32]]:
    """The unlabelled pictures and their features of the second encoder."""
    unlabelled = support.unlabelled
    if unlabelled is None or not len(unlabelled.feature_ND):
        raise _missing("support.unlabelled", "nothing", "pictures of the target, without labels")
    auxiliary_NE = unlabelled.auxiliary_NE
    if auxiliary_NE is None or len(auxiliary_NE) != len(unlabelled.feature_ND):
        got = "nothing" if auxiliary_NE is None else auxiliary_NE.shape
        raise _missing(
            "support.unlabelled.auxiliary_NE", got, f"{len(unlabelled.feature_ND)} rows of features of a self-supervised encoder"
        )
    if not np.isfinite(auxiliary_NE).all():
        raise _missing("support.unlabelled.auxiliary_NE", "infinities or NaN", "finite features")
    return unlabelled, auxiliary_NE


def _missing(where: str, got: object, expected: str) -> DiptychError:
    return DataError.at("NoLA learns from unlabelled pictures seen by two encoders", where, got, expected)


def _first_views(examples: Examples) -> Labels:
    """The first row of every picture, in the order of the rows, int64."""
    if examples.picture_N is None:
        return np.arange(len(examples.feature_ND))
    return np.sort(np.unique(examples.picture_N, return_index=True)[1])
