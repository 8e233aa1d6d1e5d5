"""A zero-shot classifier from descriptions: a class is the mean direction of many sentences about it.

Beside the usual templates ("a photo of a {}.") stand sentences that tell what the class looks like, written by a language model or a person.
This is NoLA's description-based classifier, its starting point; the templates alone give CLIP's.

Source: Fazli Imam et al., CLIP meets DINO for Tuning Zero-Shot Classifier using Unlabeled Image Collections (2024); Radford et al.,
Learning Transferable Visual Models From Natural Language Supervision (2021), section 3.1.4, for averaging in embedding space.
Shape legend: C classes, P prompts of a class, K classifiers, D feature width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diptych.core.errors import ConfigError, DataError, DiptychError, nearest
from diptych.core.points import Encoder

Prompts = Sequence[Sequence[str]]


def class_prompts(
    classnames: Sequence[str], descriptions: Mapping[str, Sequence[str]], templates: Sequence[str] = ()
) -> list[tuple[str, ...]]:
    """The prompts of every class: the filled templates, then its descriptions as they are.

    Args:
        classnames: in the order of the class numbers.
        descriptions: class name -> sentences; every class must stand in it, though its list may be empty if there are templates.
        templates: each with `{}` for the class name.

    Raises ConfigError for a template without `{}`, DataError for a class that is missing or has no prompt.

    >>> class_prompts(["cat"], {"cat": ["A small animal with whiskers."]}, ["a photo of a {}."])
    [('a photo of a cat.', 'A small animal with whiskers.')]
    """
    for template in templates:
        if "{}" not in template:
            raise ConfigError.at("The template has no place for the class name", "templates", template, "a text with {}")
    return [_prompts(name, descriptions, templates) for name in classnames]


def description_classifier(encoder: Encoder, prompts: Prompts) -> NDArray[np.float32]:
    """Zero-shot weights float32 `[C, D]`, L2-normalised: of every class, the mean of its normalised prompts, normalised.

    A text that several classes share is encoded once. Raises DataError for a class without prompts, or whose prompts cancel out.
    """
    text_row = {text: row for row, text in enumerate(dict.fromkeys(text for texts in prompts for text in texts))}
    for number, texts in enumerate(prompts):
        if not texts:
            raise _no_prompt(f"class {number}")
    text_TD = encoder.texts(list(text_row))
    return np.stack(
        [mean_direction(text_TD[[text_row[text] for text in texts]], f"class {number}") for number, texts in enumerate(prompts)]
    )


def mean_direction(text_PD: NDArray[Any], where: str = "text_PD") -> NDArray[np.float32]:
    """The normalised mean `[D]`, float32, of the normalised rows; summed in float64. Raises DataError if a norm is zero or not finite."""
    unit_PD = _unit(text_PD.astype(np.float64), where)
    return _unit(unit_PD.mean(axis=0), where).astype(np.float32)


def ensemble(classifiers: Sequence[NDArray[Any]], weights: Sequence[float] | None = None) -> NDArray[np.float32]:
    """Several zero-shot weights in one, float32 `[C, D]`: the normalised weighted mean of their normalised rows.

    A classifier counts by its weight and not by its number of prompts: five descriptions are not drowned by eighty templates.

    Args:
        classifiers: K arrays `[C, D]`.
        weights: K numbers >= 0, not all 0; None: equal ones.

    Raises ConfigError for weights that do not fit, DataError for shapes that differ or rows that cancel out.
    """
    if not classifiers or len({array.shape for array in classifiers}) > 1:
        raise DataError.at("The classifiers do not fit together", "classifiers", [a.shape for a in classifiers], "one shape [C, D]")
    weight_K = np.ones(len(classifiers)) if weights is None else np.asarray(weights, dtype=np.float64)
    if weight_K.shape != (len(classifiers),) or not np.isfinite(weight_K).all() or weight_K.min() < 0 or not weight_K.any():
        raise ConfigError.at("The weights do not fit the classifiers", "weights", weights, f"{len(classifiers)} numbers >= 0, not all 0")
    unit_KCD = _unit(np.stack(classifiers).astype(np.float64), "classifiers")
    return _unit(np.tensordot(weight_K, unit_KCD, axes=1), "ensemble").astype(np.float32)


def _prompts(name: str, descriptions: Mapping[str, Sequence[str]], templates: Sequence[str]) -> tuple[str, ...]:
    if name not in descriptions:
        raise DataError.at("A class has no descriptions", name, "nothing", "a list of sentences", nearest(name, descriptions))
    sentences = descriptions[name]
    if isinstance(sentences, str) or not all(isinstance(sentence, str) and sentence.strip() for sentence in sentences):
        raise DataError.at("The descriptions of a class are not texts", name, sentences, "a list of sentences, none of them empty")
    prompts = (*(template.replace("{}", name) for template in templates), *sentences)
    if not prompts:
        raise _no_prompt(name)
    return prompts


def _no_prompt(where: str) -> DiptychError:
    return DataError.at("A class has no prompt", where, "no description and no template", "at least one of either")


def _unit(value_xD: NDArray[np.float64], where: str) -> NDArray[np.float64]:
    norm_x = np.linalg.norm(value_xD, axis=-1, keepdims=True)
    if not np.isfinite(norm_x).all() or (norm_x < 1e-12).any():
        raise DataError.at("Text features have no direction", where, "a norm of zero, or not finite", "features that do not cancel out")
    return np.asarray(value_xD / norm_x)
