"""The card of an evaluation set: what it says about itself beside its pairs. It travels in the manifest of the dataset."""

from __future__ import annotations

from pydantic import Field

from diptych.core.config import Config
from diptych.pairs.dataset import PairDataset

KEY = "card"


class Card(Config):
    """Class names and prompt templates that come with a set; a set that brings neither has an empty card.

    The names are all classes of the task, whether or not the set at hand has examples of each: a class without examples still competes.
    """

    classes: tuple[str, ...] = Field(default=(), description="class names; a label is a place in this list")
    templates: tuple[str, ...] = Field(default=(), description="prompt templates, each with {} for the class name")
    duplicate_names: bool = Field(default=False, description="whether two classes may share a name")

    @classmethod
    def of(cls, dataset: PairDataset) -> Card:
        """The card in a dataset's manifest. Raises ConfigError for one that is not of this form."""
        return cls.parse(dataset.manifest.phase.report.get(KEY, {}), f"{dataset.root}: {KEY}")
