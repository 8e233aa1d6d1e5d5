"""The directory of a model: open_clip's files, the masks of a compressed model, and where it came from.

- `open_clip_config.json`, `open_clip_model.safetensors`: what `open_clip.create_model("local-dir:DIR")` opens; under the key `captioner`, which
  open_clip passes over, what the decoder of a captioner looks at, where that is not the usual;
- `structure.json`: only if blocks have fewer heads or neurons, or towers less width, than the configuration can say (`models/structure.py`), or
  modules are fused (`models/reparameterize.py`); open_clip then refuses the weights, since their shapes are not the configuration's;
- `masks.safetensors`: only if the model has masks (buffers named `<parameter>_mask`), which open_clip knows nothing of;
- `lineage.json`: what the writer says about its origin.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych.core.errors import ConfigError, DataError, DiptychError
from diptych.models.architectures import CAPTIONER

if TYPE_CHECKING:
    import torch

    from diptych.models.clip import DualEncoder

CONFIG, WEIGHTS, MASKS, LINEAGE = "open_clip_config.json", "open_clip_model.safetensors", "masks.safetensors", "lineage.json"
STRUCTURE = "structure.json"
FOREIGN_WEIGHTS = ("open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin", "open_clip_pytorch_model.pth")
"""Names under which open_clip itself publishes weights; read (safely), never written."""
MASK = "_mask"


def save(model: DualEncoder, directory: Path, lineage: Mapping[str, Any]) -> None:
    """Writes a model to a directory: first beside it, then one rename; an older one is there whole until then."""
    from safetensors.torch import save_file

    assert model.config, "a model that is saved knows its configuration"
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.clip.state_dict().items()}
    masks = {name: state.pop(name) for name in list(state) if name.endswith(MASK) and name.removesuffix(MASK) in state}
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", suffix=".partial", dir=directory.parent))
    try:
        partial.chmod(0o755)  # a temporary folder is private, a model is not
        save_file(state, partial / WEIGHTS)
        if masks:
            save_file(masks, partial / MASKS)
        if model.structure:
            _write(partial / STRUCTURE, model.structure)
        more = {CAPTIONER: model.captioner} if model.captioner else {}
        _write(partial / CONFIG, {"model_cfg": model.config, "preprocess_cfg": model.preprocess_cfg, **more})
        _write(partial / LINEAGE, lineage)
        _replace(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load(directory: Path) -> DualEncoder:
    """The model in a directory. Raises DataError if a file is missing, damaged or does not fit the configuration."""
    from diptych.models import clip

    config = read_config(directory)
    encoder = clip.build(config["model_cfg"], config.get("preprocess_cfg"), config.get(CAPTIONER))
    if (directory / STRUCTURE).is_file():
        _shape(encoder, directory / STRUCTURE)
    weights = next((directory / name for name in (WEIGHTS, *FOREIGN_WEIGHTS) if (directory / name).is_file()), None)
    if weights is None:
        raise _missing(directory / WEIGHTS)
    _load_weights(encoder.clip, weights)
    if (directory / MASKS).is_file():
        for name, mask in _read(directory / MASKS).items():
            owner, _, buffer = name.rpartition(".")
            encoder.clip.get_submodule(owner).register_buffer(buffer, mask)
    return encoder


def read_config(directory: Path) -> dict[str, Any]:
    """`open_clip_config.json` of a directory. Raises DataError if it is missing or no such file."""
    path = directory / CONFIG
    if not path.is_file():
        raise _missing(path)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError.at("A model's configuration is not JSON", path, str(error), "open_clip's configuration") from error
    if not isinstance(config, dict) or "model_cfg" not in config:
        raise DataError.at("A model's configuration has no architecture", path, config, "a mapping with the key model_cfg")
    return config


def read_lineage(directory: Path) -> dict[str, Any]:
    """What the writer of a model said about its origin; empty if the directory is not one of ours."""
    path = directory / LINEAGE
    lineage: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return lineage


def _shape(encoder: DualEncoder, path: Path) -> None:
    from diptych.models import structure

    try:
        structure.shape(encoder, json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, KeyError, AttributeError, ConfigError) as error:
        raise DataError.at("A model's structure cannot be read", path, str(error), f"heads and neurons of blocks of {CONFIG}") from error


def _load_weights(model: Any, path: Path) -> None:
    """Loads weights: as they are if the names are the model's, else through open_clip's conversions of older layouts."""
    from open_clip.factory import load_checkpoint

    state = _read(path)
    try:
        if state.keys() == model.state_dict().keys():
            model.load_state_dict(state)
        else:
            load_checkpoint(model, str(path), weights_only=True)
    except (RuntimeError, KeyError, AttributeError) as error:
        raise DataError.at(
            "The weights do not fit the model's configuration", path, str(error), f"the shapes of {CONFIG} beside it"
        ) from error


def _read(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, read without executing anything in it."""
    import pickle

    from open_clip.factory import load_state_dict
    from safetensors import SafetensorError

    try:
        state: dict[str, torch.Tensor] = load_state_dict(str(path), weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, StopIteration) as error:
        raise DataError.at("The weights cannot be read", path, str(error), "a whole safetensors file") from error
    return state


def _replace(partial: Path, directory: Path) -> None:
    """Renames `partial` to `directory`; what was there is moved out of the way first, and deleted last."""
    if not directory.exists():
        partial.rename(directory)
        return
    aside = partial.with_suffix(".replaced")
    directory.rename(aside)
    partial.rename(directory)
    shutil.rmtree(aside)


def _write(path: Path, value: Mapping[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, sort_keys=True, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())


def _missing(path: Path) -> DiptychError:
    return DataError.at("A model's file is missing", path, "nothing", "the directory of a saved model", "check the path")
