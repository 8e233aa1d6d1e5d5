"""ShrinkMatch: unlabelled pictures that are uncertain learn in a smaller class space, in which their top class is certain.

Yang, Zhao, Qi, Qiao, Shi and Zhao, "Shrinking Class Space for Enhanced Certainty in Semi-Supervised Learning" (ICCV 2023), sections 3
and 4, on top of FixMatch (Sohn et al. 2020) with distribution alignment; `shrink: false` is that baseline. On a dual encoder the main head is
the logit scale times the text features of class prompts. A pair is labelled if its label is not null; the others are the unlabelled ones.

Shape legend: N pictures, C classes, D feature width, Q batch means in the queue.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax, normalize

from diptych.core.config import Config as BaseConfig
from diptych.core.points import Encoded, TrainContext
from diptych.objectives.gather import gather, world_size
from diptych.objectives.prompts import ClassPrompts, Templates


class Shrunk(NamedTuple):
    """The class space of each picture after shrinking.

    Attributes:
        kept_NC: bool, classes that are left; all of them where nothing was searched.
        top_N: int64, the likeliest class, always kept.
        stop_N: int64, the rank c at which the search ended: ranks 1 to c - 1 are gone.
        confidence_N: the probability of the top class among the kept ones.
        searched_N: bool, pictures that were uncertain and had classes to spare.
        settled_N: bool, those of them whose search found certainty.
    """

    kept_NC: Tensor
    top_N: Tensor
    stop_N: Tensor
    confidence_N: Tensor
    searched_N: Tensor
    settled_N: Tensor


def shrink(prob_NC: Tensor, threshold: float, uncertain_N: Tensor) -> Shrunk:
    """Removes the runner-up classes of uncertain pictures until the top class is certain, or only the last rank is left beside it.

    With q_0 >= q_1 >= … the sorted probabilities, the search goes over c = 2, …, C - 1 and ends at the first
    q_0 / (q_0 + q_c + … + q_{C-1}) >= threshold (section 3.2). Ties are in the order of the classes. With two classes there is nothing to remove.

    Args:
        prob_NC: probabilities; rows need not sum to one.
        uncertain_N: bool, what to search.
    """
    classes = prob_NC.shape[1]
    searched_N = uncertain_N & (classes > 2)
    sorted_NC, order_NC = prob_NC.sort(dim=1, descending=True, stable=True)
    tail_NC = sorted_NC.flip(1).cumsum(dim=1).flip(1)
    confidence_NC = sorted_NC[:, :1] / (sorted_NC[:, :1] + tail_NC)  # of rank 0 with the ranks from c on
    rank_C = torch.arange(classes, device=prob_NC.device)
    ends_NC = (rank_C >= 2) & ((confidence_NC >= threshold) | (rank_C == classes - 1))
    stop_N1 = ends_NC.int().argmax(dim=1, keepdim=True)
    confidence_N = confidence_NC.gather(1, stop_N1)[:, 0]
    kept_by_rank_NC = (rank_C == 0) | (rank_C >= stop_N1) | ~searched_N[:, None]
    kept_NC = torch.zeros_like(kept_by_rank_NC).scatter(1, order_NC, kept_by_rank_NC)
    return Shrunk(kept_NC, order_NC[:, 0], stop_N1[:, 0], confidence_N, searched_N, searched_N & (confidence_N >= threshold))


def shrink_losses(logits_NC: Tensor, shrunk: Shrunk, reliability_N: Tensor) -> Tensor:
    """Cross-entropy of the top class among the kept classes `[N]`, weighed by reliability; 0 where the search found no certainty.

    Args:
        logits_NC: the auxiliary head's, of the strong view.
        reliability_N: the probability of the top class in the full space, detached (principle 1, section 3.3).
    """
    left_NC = logits_NC.masked_fill(~shrunk.kept_NC, -torch.inf)
    return reliability_N * shrunk.settled_N * cross_entropy(left_NC, shrunk.top_N, reduction="none")


def consistency_losses(logits_NC: Tensor, prob_NC: Tensor, *, hard: bool) -> Tensor:
    """Cross-entropy `[N]` of the strong view against the weak view's probabilities, or their top class with `hard`."""
    if hard:
        return cross_entropy(logits_NC, prob_NC.argmax(dim=1), reduction="none")
    return -(prob_NC * log_softmax(logits_NC, dim=1)).sum(dim=1)


class Unlabelled(NamedTuple):
    """Losses of the unlabelled pictures of a batch; `mask` is the share of certain ones on all ranks, NaN of none."""

    certain: Tensor
    shrink: Tensor
    mask: Tensor
    shrunk: Shrunk


class ShrinkMatch(nn.Module):
    """The objective. State: the queue or the average of the alignment, the running share of certain pictures rho, the auxiliary head.

    Sums over pictures are divided by their number on all ranks, and rho is the same on every rank. (The released code divides on
    each worker by its own number, which is the same where workers hold equally many unlabelled pictures, and lets rho differ.)
    """

    encodes = ("image",)
    queue_QC: Tensor
    next_row: Tensor
    mean_C: Tensor
    rho: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.views = (config.view,)
        self.columns = ("label",) if config.truth is None else ("label", config.truth)
        self.prompts: ClassPrompts | None = None
        self.auxiliary: nn.Module | None = None

    def start(self, context: TrainContext) -> None:
        """Reads the classes and makes the auxiliary head for the model's feature width. Raises ConfigError without class names."""
        self.prompts = ClassPrompts(context, self.config.templates).to(context.device)
        self.allocate(len(self.prompts))
        if self.config.shrink:
            self.auxiliary = auxiliary_head(self.prompts.width(context.model), len(self.prompts))

    def allocate(self, classes: int) -> None:
        """Makes the state for a number of classes: an empty queue, no average, no rho."""
        self.register_buffer("queue_QC", torch.zeros(self.config.queue, classes))
        self.register_buffer("next_row", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean_C", torch.full((classes,), torch.nan))
        self.register_buffer("rho", torch.tensor(torch.nan))

    def forward(self, encoded: Encoded) -> dict[str, Tensor]:
        """`loss`; its parts `supervised`, `certain`, `shrink`; `mask`, the share of certain pictures among the unlabelled ones, and
        `rho`, its running mean; `used`, the share of unlabelled ones that teach anything; `settled`, the share of this rank's uncertain
        ones that a smaller class space made certain; with `truth`, `spared`, the share of those whose own class was not removed.

        `image_NCHW` is the weak view, `view0_NCHW` the strong one, `label_N` the labels (-1: none).
        """
        assert self.prompts is not None, "start() comes first"
        weight_CD, label_N = self.prompts.weights(encoded), self.prompts.classes(encoded.batch["label_N"])
        unlabelled_N = label_N < 0
        weak_NC = encoded.logit_scale * encoded.image_ND @ weight_CD.T
        strong_ND = encoded.encode_image(encoded.batch["view0_NCHW"], normalize=False)
        strong_NC = encoded.logit_scale * normalize(strong_ND, dim=-1) @ weight_CD.T
        auxiliary_NC = strong_NC.detach() if self.auxiliary is None else self.auxiliary(strong_ND)
        supervised = cross_entropy(weak_NC, label_N, ignore_index=-1, reduction="sum") / _rows_a_rank(~unlabelled_N)
        raw_NC = weak_NC.detach().softmax(dim=1)
        found = self.unlabelled(self.align(raw_NC, unlabelled_N), raw_NC, strong_NC, auxiliary_NC, unlabelled_N)
        return {**self.total(supervised, found), **self.reach(found, encoded.batch)}

    @torch.no_grad()
    def reach(self, found: Unlabelled, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """How far the unlabelled pictures of all ranks are reached: `used`, and `spared` where there are settled ones to judge it by.

        The truth is looked at here alone, by no loss.
        """
        settled_N = found.shrunk.settled_N & (self.rho > 0) & self.config.shrink
        unlabelled, settled = (_over_ranks(rows_N.sum()) for rows_N in (batch["label_N"] < 0, settled_N))
        used = {"used": found.mask.nan_to_num() + settled / unlabelled.clamp(min=1)}
        if self.config.truth is None or self.prompts is None or settled == 0:
            return used
        truth_N = self.prompts.classes(batch[f"{self.config.truth}_N"])
        kept_N = found.shrunk.kept_NC.gather(1, truth_N.clamp(min=0)[:, None])[:, 0] & (truth_N >= 0)
        return {**used, "spared": _over_ranks((settled_N & kept_N).sum()) / settled}

    def unlabelled(self, prob_NC: Tensor, raw_NC: Tensor, strong_NC: Tensor, auxiliary_NC: Tensor, rows_N: Tensor) -> Unlabelled:
        """The losses of the pictures in `rows_N` (bool).

        Args:
            prob_NC, raw_NC: probabilities of the weak view after and before alignment, detached.
            strong_NC, auxiliary_NC: logits of the strong view from the main and from the auxiliary head.
        """
        config, count = self.config, _rows_a_rank(rows_N)
        reliability_N = prob_NC.amax(dim=1)
        certain_N = rows_N & (reliability_N >= config.threshold)
        shrunk = shrink(prob_NC if config.search == "aligned" else raw_NC, config.threshold, rows_N & ~certain_N)
        certain = (certain_N * consistency_losses(strong_NC, prob_NC, hard=config.hard)).sum() / count
        mask = _over_ranks(certain_N.sum(dtype=prob_NC.dtype)) / _over_ranks(rows_N.sum())
        return Unlabelled(certain, shrink_losses(auxiliary_NC, shrunk, reliability_N).sum() / count, mask, shrunk)

    def total(self, supervised: Tensor, found: Unlabelled) -> dict[str, Tensor]:
        """The loss of a batch and its parts; moves rho, which weighs the shrink loss (principle 2, section 3.3)."""
        decay, mask = self.config.rho_decay, found.mask.to(self.rho.dtype)
        moved = torch.where(self.rho.isnan(), mask, decay * self.rho + (1 - decay) * mask)
        self.rho = torch.where(mask.isnan(), self.rho, moved)
        parts = {"supervised": supervised, "certain": found.certain, "mask": mask.nan_to_num()}
        loss = supervised + self.config.lambda_u * found.certain
        if self.config.shrink:
            rho = self.rho.nan_to_num()
            loss = loss + self.config.lambda_u * rho * found.shrink
            searched, settled = found.shrunk.searched_N.sum(), found.shrunk.settled_N.sum()
            parts |= {"shrink": found.shrink, "rho": rho, "settled": settled / searched.clamp(min=1)}
        return {"loss": loss, **{name: value.detach() for name, value in parts.items()}}

    def align(self, prob_NC: Tensor, rows_N: Tensor) -> Tensor:
        """Distribution alignment: probabilities over the mean of recent batches (this one included), rows summing to one again.

        The mean is over the pictures in `rows_N` (bool) of all ranks. The queue starts at zero and is divided by its full length; the
        factor cancels when the rows are normalised. As long as there was no such picture, `prob_NC` comes back.
        """
        config = self.config
        if config.alignment == "none":
            return prob_NC
        sum_C, count = _over_ranks(rows_N.to(prob_NC.dtype) @ prob_NC), _over_ranks(rows_N.sum())
        if count > 0:
            self._remember((sum_C / count).to(self.mean_C.dtype))
        recent_C = self.queue_QC.mean(dim=0) if config.alignment == "queue" else self.mean_C
        if not recent_C.sum() > 0:
            return prob_NC
        ratio_NC = prob_NC / recent_C.clamp(min=torch.finfo(recent_C.dtype).tiny)
        return ratio_NC / ratio_NC.sum(dim=1, keepdim=True)

    def _remember(self, mean_C: Tensor) -> None:
        """Puts a batch's mean into the queue and into the running average."""
        self.queue_QC[self.next_row] = mean_C
        self.next_row = (self.next_row + 1) % len(self.queue_QC)
        decay = self.config.average_decay
        self.mean_C = torch.where(self.mean_C.isnan(), mean_C, decay * self.mean_C + (1 - decay) * mean_C)

    def extra_repr(self) -> str:
        """The settings: they name a run's checkpoints."""
        return repr(self.config)


def auxiliary_head(width: int, classes: int) -> nn.Sequential:
    """The head of the shrink loss, used in training only, so that the main head is not disturbed (section 3.4)."""
    hidden = max(1, width // 4)
    return nn.Sequential(
        nn.Linear(width, hidden),
        nn.BatchNorm1d(hidden),
        nn.LeakyReLU(0.1),
        nn.Linear(hidden, hidden),
        nn.BatchNorm1d(hidden),
        nn.LeakyReLU(0.1),
        nn.Linear(hidden, classes),
    )


def _rows_a_rank(rows_N: Tensor) -> Tensor:
    """How many of the rows a rank has in the mean, at least one in all: sums over it, averaged over the ranks, are means over all rows."""
    return _over_ranks(rows_N.sum()).clamp(min=1) / world_size()


def _over_ranks(value: Tensor) -> Tensor:
    """The sum of a tensor over the ranks, detached."""
    return gather(value.detach()[None], with_grad=False).sum(dim=0)


class Config(BaseConfig):
    """ShrinkMatch's objective; the defaults are those of its CIFAR recipe."""

    method: Literal["shrinkmatch"] = "shrinkmatch"
    shrink: bool = Field(True, description="learn from uncertain pictures too; false: FixMatch with alignment, the baseline")
    threshold: float = Field(0.95, gt=0, le=1, description="probability from which a picture is certain")
    lambda_u: float = Field(1.0, ge=0, description="weight of both losses of unlabelled pictures")
    hard: bool = Field(False, description="the top class as the target of certain pictures, not all probabilities")
    alignment: Literal["queue", "average", "none"] = Field(
        "queue", description="what probabilities are divided by: the mean of recent batches"
    )
    queue: int = Field(32, ge=1, description="batch means in the queue")
    average_decay: float = Field(0.999, ge=0, lt=1, description="of the average of batch means")
    search: Literal["aligned", "raw"] = Field("aligned", description="which probabilities the search for a certain class space goes by")
    rho_decay: float = Field(0.999, ge=0, lt=1, description="of the running share of certain pictures, which weighs the shrink loss")
    truth: str | None = Field(
        None, description="a column with the true labels of unlabelled pairs, for the figure `spared`; nothing learns from it; null: none"
    )
    view: Literal["strong", "simclr"] = Field("strong", description="recipe of the second picture")
    templates: Templates = ("an image of a {}.",)

    def build(self) -> ShrinkMatch:
        """The objective."""
        return ShrinkMatch(self)
