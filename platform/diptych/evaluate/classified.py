"""What benchmarks share that look at a zero-shot classifier from other sides than its accuracy.

Shape legend: N images, C classes, D feature width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, Field

from diptych.core.config import Config as BaseConfig
from diptych.core.errors import ConfigError
from diptych.core.points import Encoder
from diptych.evaluate import zero_shot
from diptych.evaluate.ranks import chunks
from diptych.evaluate.templates import OF_THE_SET, TemplateSet, resolve


def _renders(templates: TemplateSet | tuple[str, ...]) -> TemplateSet | tuple[str, ...]:
    try:
        if templates != OF_THE_SET:
            resolve(templates)
    except ConfigError as error:
        raise ValueError(error.problems[0].expected) from None
    return templates


class Classified(BaseConfig):
    """Base of a benchmark's configuration: which pairs are classified, and by which prompts (averaged in embedding space)."""

    split: str = Field("test", min_length=1, description="the split to classify")
    templates: Annotated[TemplateSet | tuple[str, ...], AfterValidator(_renders)] = Field(
        "plain", description="a set of prompt templates by name (`set`: the evaluation set's own), or the templates, each with {}"
    )
    classnames: str = Field("label_name", description="the column of class names; `label` numbers them")

    def classifier(self, encoder: Encoder, names: Sequence[str]) -> NDArray[np.float32]:
        """The zero-shot weights `[D, C]`."""
        weight_DC: NDArray[np.float32] = self._zero_shot().weights(encoder, names)[0]
        return weight_DC

    def settings(self, encoder: Encoder, names: Sequence[str]) -> dict[str, Any]:
        """What must be equal for two rows to be comparable."""
        return self._zero_shot().settings(encoder, names)

    def _zero_shot(self) -> zero_shot.ZeroShot:
        return zero_shot.Config(split=self.split, templates=self.templates, classnames=self.classnames).build()


def cosines(image_ND: NDArray[np.float32], weight_DC: NDArray[np.float32]) -> NDArray[np.float32]:
    """The cosine of every picture and class, float32 `[N, C]`."""
    return np.concatenate([image_ND[part] @ weight_DC for part in chunks(len(image_ND), weight_DC.shape[1])])
