"""Class names as a linear head: the text features of prompts, for objectives that learn from labels.

Shape legend: N pictures, C classes, T templates, L tokens, D feature width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Field, StringConstraints
from torch import Tensor, nn
from torch.nn.functional import normalize

from diptych.core.errors import ConfigError
from diptych.core.points import Encoded, TrainContext

Templates = Annotated[
    tuple[Annotated[str, StringConstraints(pattern=r"\{\}")], ...],
    Field(min_length=1, description="prompts of a class; each {} is replaced by its name"),
]


class ClassPrompts(nn.Module):
    """The classes of a training set as text features (Radford et al. 2021, section 3.1.4).

    Args:
        context: gives the class names and the tokenizer.
        templates: texts with `{}` in them.

    Raises ConfigError if the training pairs have no class names.
    """

    token_PL: Tensor
    label_C: Tensor

    def __init__(self, context: TrainContext, templates: Sequence[str]) -> None:
        super().__init__()
        if not context.class_names:
            fix = "choose an objective without labels, or pairs with them"
            raise ConfigError.at("There are no classes to name", "label_name", "no named label", "columns label and label_name", fix)
        texts = [template.replace("{}", name) for name in context.class_names.values() for template in templates]
        self.templates = len(templates)
        self._constant: Tensor | None = None
        self.register_buffer("token_PL", torch.from_numpy(context.tokenizer.encode_cut(texts)), persistent=False)
        self.register_buffer("label_C", torch.tensor(list(context.class_names)), persistent=False)

    def __len__(self) -> int:
        return len(self.label_C)

    @torch.no_grad()
    def width(self, model: nn.Module) -> int:
        """The feature width D of the model."""
        encoder: Any = model
        return int(encoder.encode_text(self.token_PL[:1]).shape[1])

    def weights(self, encoded: Encoded) -> Tensor:
        """The classes' features `[C, D]` of unit norm: the mean over the templates. A text tower that is frozen is asked once."""
        if self._constant is not None:
            return self._constant
        weight_CD = self.weights_of(encoded.encode_text(self.token_PL))
        if torch.is_grad_enabled() and not weight_CD.requires_grad:
            self._constant = weight_CD
        return weight_CD

    def weights_of(self, feature_PD: Tensor) -> Tensor:
        """The classes' features `[C, D]` from those of the prompts, unit norm: the mean over the templates."""
        return normalize(feature_PD.view(len(self), self.templates, -1).mean(dim=1), dim=-1)

    def classes(self, label_N: Tensor) -> Tensor:
        """Labels as rows of `weights`, int64 `[N]`; -1 stays -1."""
        return torch.where(label_N < 0, -1, torch.searchsorted(self.label_C, label_N.clamp(min=0)))
