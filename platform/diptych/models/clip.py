"""The dual encoder: an open_clip model that takes raw pixels and short captions, and the directories it is kept in.

A directory of ours is one that `open_clip.create_model_and_transforms("local-dir:DIR")` opens, with a lineage file beside.

Shape legend: N pairs in a batch, C H W an image, L tokens, D feature width.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import nn

from diptych.core.errors import ConfigError, DataError, nearest
from diptych.models import architectures, preprocess, readout, resize

if TYPE_CHECKING:
    from diptych.models.tokenizer import ForeignTokenizer, Tokenizer

HUB, LOCAL_DIR = "open_clip:", "local-dir:"


class DualEncoder(nn.Module):
    """An open_clip model between raw inputs and features.

    Args:
        clip: the open_clip model: `CLIP`, `CustomTextCLIP` or `CoCa`.
        config: what it was built from (open_clip's `model_cfg`); a model without can be used but not saved.
        captioner: what the text decoder of a CoCa looks at, where it is not the usual (`captioner.py`).

    Attributes:
        image_size: side in pixels of the square images it takes.
        context_length: tokens of the longest caption it takes.
        structure: heads and neurons left, by block, where they are fewer than `config` says, and which modules are fused
            (`models/structure.py`, `models/reparameterize.py`); mostly empty.
        preprocess_cfg: open_clip's evaluation preprocessing: size, mean, std, interpolation, resize_mode, fill_color, mode.
        mean, std: `[3]`, of pixels in [0, 1]; buffers that are not saved.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, clip: nn.Module, config: Mapping[str, Any] | None = None, captioner: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        from open_clip.model import get_model_preprocess_cfg
        from open_clip.transform import PreprocessCfg, merge_preprocess_dict

        self.clip: Any = clip
        self.config: dict[str, Any] = deepcopy(dict(config or {}))
        self.structure: dict[str, dict[str, int]] = {}
        self.captioner: dict[str, Any] = dict(captioner or {})
        self.preprocess_cfg: dict[str, Any] = merge_preprocess_dict(PreprocessCfg(), get_model_preprocess_cfg(clip))
        self.image_size = self.preprocess_cfg["size"] = _square(self.preprocess_cfg["size"])
        self.context_length = _context_length(clip, self.config.get("text_cfg", {}))
        self.register_buffer("mean", torch.tensor(self.preprocess_cfg["mean"]), persistent=False)
        self.register_buffer("std", torch.tensor(self.preprocess_cfg["std"]), persistent=False)
        self._tokenizer: Tokenizer | ForeignTokenizer | None = None

    @property
    def tokenizer(self) -> Tokenizer | ForeignTokenizer:
        """What turns captions into this model's token ids; built on first use."""
        if self._tokenizer is None:
            from diptych.models.tokenizer import for_model

            self._tokenizer = for_model(self.config.get("text_cfg", {}), self.context_length)
        return self._tokenizer

    @property
    def logit_scale(self) -> nn.Parameter:
        """The learnt scale of the logits, in log space."""
        return cast(nn.Parameter, self.clip.logit_scale)

    @property
    def logit_bias(self) -> nn.Parameter | None:
        """The learnt bias of the logits, where the architecture has one (SigLIP)."""
        return cast("nn.Parameter | None", self.clip.logit_bias)

    def forward(self, image_NCHW: torch.Tensor, text_NL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Unit-norm image and text features `[N, D]` and the scale of the logits, already exponentiated."""
        return self.encode_image(image_NCHW), self.encode_text(text_NL), self.logit_scale.exp()

    def encode_image(self, image_NCHW: torch.Tensor, normalize: bool = True) -> torch.Tensor:
        """Features `[N, D]` of images, of unit norm with `normalize`.

        uint8 pixels are scaled and normalised here, on their device; floats are taken as normalised already. Pictures of another side
        than `image_size` are encoded with interpolated position embeddings, where the tower has a grid of them.
        """
        if image_NCHW.dtype == torch.uint8:
            image_NCHW = preprocess.normalize(image_NCHW, self.mean, self.std)
        if image_NCHW.shape[-1] != self.image_size and resize.grid_of(self.clip.visual) is not None:
            feature_ND = resize.features(self.clip.visual, image_NCHW)
        elif readout.reads_class_token(self.clip.visual):
            feature_ND = readout.class_token(self.clip.visual, self.clip.visual._embeds(image_NCHW))
        else:
            feature_ND = self.clip.encode_image(image_NCHW, normalize=False)
        return nn.functional.normalize(feature_ND, dim=-1) if normalize else feature_ND

    def check_image_size(self, size: int) -> None:
        """Raises ConfigError if the image tower cannot take pictures of this side in pixels."""
        grid = resize.grid_of(self.clip.visual)
        if grid is None:
            got = type(self.clip.visual).__name__
            raise ConfigError.at("The image tower takes one size only", "image_sizes", got, "a tower with learnt position embeddings")
        if size % grid.stride or size < grid.stride:
            raise ConfigError.at("The picture does not divide into patches", "image_sizes", size, f"a multiple of {grid.stride} pixels")

    def encode_text(self, text_NL: torch.Tensor, normalize: bool = True) -> torch.Tensor:
        """Features `[N, D]` of captions of any length L <= `context_length`, of unit norm with `normalize`.

        Each row holds its end token. Under a causal mask nothing behind that token can reach it, so a batch cut to its longest
        caption has the features, and the gradients, of the full context. A tower of Hugging Face masks what is padding, to the same
        effect. Towers with neither property see it padded back.
        Raises DataError if L is too large.
        """
        length = text_NL.shape[1]
        if length > self.context_length:
            raise DataError.at("The captions are longer than the context", "text_NL", length, f"at most {self.context_length} tokens")
        tower = getattr(self.clip, "text", self.clip)
        if ignores_padding(tower):
            feature_ND = _encode_cut(tower, text_NL)
        else:
            missing = 0 if _masks_padding(tower) else self.context_length - length
            full_NL = nn.functional.pad(text_NL, (0, missing), value=pad_id(tower))
            feature_ND = self.clip.encode_text(full_NL, normalize=False)
        return nn.functional.normalize(feature_ND, dim=-1) if normalize else feature_ND


def names() -> list[str]:
    """All architecture names, ours first. Without torch: `architectures.names`."""
    return architectures.names()


def create(name: str, seed: int, overrides: Mapping[str, Any] | None = None) -> DualEncoder:
    """The model that a name stands for.

    Args:
        name: an architecture of ours or of open_clip (random weights), `open_clip:ARCHITECTURE/TAG` (published weights, fetched
            by open_clip), or a directory, with or without `local-dir:` before it.
        seed: of random weights; equal seeds give equal weights, whatever was drawn before, and no global state changes.
        overrides: values merged into the architecture's configuration, e.g. `{"vision_cfg": {"layers": 6}}`.

    Raises ConfigError for an unknown name, tag or override, DataError if the weights cannot be had.
    """
    stored = name.removeprefix(LOCAL_DIR) if name.startswith(LOCAL_DIR) else name
    if name.startswith((HUB, LOCAL_DIR)) or (name not in architectures.files() and Path(name).is_dir()):
        if overrides:
            raise ConfigError.at(
                "A stored model has its architecture", "model", dict(overrides), "no overrides", "train from a name instead"
            )
        return _published(name.removeprefix(HUB)) if name.startswith(HUB) else load(Path(stored))
    config = architectures.find(name, overrides)
    init_std, captioner = config.pop(architectures.INIT_STD, {}), config.pop(architectures.CAPTIONER, None)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return _drawn_anew(build(config, captioner=captioner), init_std)


def build(
    config: Mapping[str, Any], preprocess_cfg: Mapping[str, Any] | None = None, captioner: Mapping[str, Any] | None = None
) -> DualEncoder:
    """A dual encoder of an open_clip configuration with random weights. Raises ConfigError if it describes no model."""
    from open_clip.model import set_model_preprocess_cfg
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict
    from open_clip.transformer import VisionTransformer

    try:
        model = _instantiate(config)
    except (TypeError, KeyError, ValueError, AssertionError, RuntimeError) as error:
        raise ConfigError.at("The configuration describes no model", "model", str(error), "open_clip's model_cfg") from error
    if not isinstance(model.visual, VisionTransformer):
        model.visual.to(memory_format=torch.channels_last)  # convolutions are half as fast again so, and follow their weights
    cfg = merge_preprocess_dict(PreprocessCfg(size=model.visual.image_size), dict(preprocess_cfg or {}))
    set_model_preprocess_cfg(model, cfg)
    return DualEncoder(model, config, captioner)


def save(model: DualEncoder, directory: Path, lineage: Mapping[str, Any]) -> None:
    """Writes a model and its lineage to a directory, all or nothing; one that is there is replaced. See `models/store.py`."""
    from diptych.models import store

    store.save(model, directory, lineage)


def load(directory: Path) -> DualEncoder:
    """The model in a directory of ours or of open_clip. Raises DataError if a file is missing, damaged or does not fit."""
    from diptych.models import store

    return store.load(directory)


def parameters_by_part(model: DualEncoder) -> dict[str, int]:
    """How many parameters the image tower, the token table, the rest of the text tower and the remainder have."""
    counts = {"image": 0, "token_table": 0, "text": 0, "logit": 0}
    for name, parameter in model.clip.named_parameters():
        part = part_of(name)
        counts["token_table" if name.endswith("token_embedding.weight") else part] += parameter.numel()
    return counts


def part_of(name: str) -> Literal["image", "text", "logit"]:
    """The part of open_clip's model that a parameter or a child belongs to, by its dotted name."""
    return "image" if name.partition(".")[0] == "visual" else "logit" if name.startswith("logit_") else "text"


def freeze(model: DualEncoder, tower: Literal["image", "text"]) -> None:
    """Takes a tower out of training: its parameters require no gradients, and its layers behave as in evaluation, for good."""
    for name, parameter in model.clip.named_parameters():
        if part_of(name) == tower:
            parameter.requires_grad_(False)
    for name, child in model.clip.named_children():
        if part_of(name) == tower:
            child.eval()


def _instantiate(config: Mapping[str, Any]) -> Any:
    """The open_clip model of a configuration, by the rules of open_clip's factory; no weights are fetched."""
    from open_clip import CLIP, CoCa, CustomTextCLIP

    own = deepcopy(dict(config))
    is_hf, is_timm = "hf_model_name" in own["text_cfg"], "timm_model_name" in own["vision_cfg"]
    if is_hf:
        own["text_cfg"]["hf_model_pretrained"] = False
    if is_timm:
        from diptych.models import swin  # noqa: F401  # registers its tower with timm

        own["vision_cfg"]["timm_model_pretrained"] = False
    if not (own.pop("custom_text", False) or is_hf):
        return CLIP(**own)
    if "multimodal_cfg" not in own:
        return CustomTextCLIP(**own)
    coca = CoCa(**own)
    head = coca.text_decoder.text_projection  # open_clip leaves it as the memory it was given
    nn.init.normal_(head, std=head.shape[0] ** -0.5)
    return coca


def _drawn_anew(model: DualEncoder, init_std: Mapping[str, float]) -> DualEncoder:
    """The model with the parameters that are named here drawn from a normal distribution of that standard deviation."""
    parameters = dict(model.clip.named_parameters())
    for name, std in init_std.items():
        if name not in parameters:
            fix = nearest(name, parameters)
            raise ConfigError.at("There is no such parameter", architectures.INIT_STD, name, "a parameter of the open_clip model", fix)
        nn.init.normal_(parameters[name], std=std)
    return model


def _published(name: str) -> DualEncoder:
    """A model of open_clip's list with its published weights, e.g. `ViT-B-32/laion2b_s34b_b79k`."""
    import open_clip

    architecture, _, tag = name.rpartition("/")
    config = open_clip.get_model_config(architecture)
    if config is None:
        fix = nearest(architecture or tag, open_clip.list_models())
        raise ConfigError.at("Unknown architecture", "model", HUB + name, f"{HUB}ARCHITECTURE/TAG of open_clip", fix)
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if tag not in tags:
        raise ConfigError.at("Unknown weights", "model", HUB + name, f"one of {', '.join(tags)}", nearest(tag, tags))
    quick_gelu = bool(config.get("quick_gelu") or open_clip.get_pretrained_cfg(architecture, tag).get("quick_gelu"))
    try:
        model = open_clip.create_model(architecture, tag, force_quick_gelu=quick_gelu, require_pretrained=True)
    except (RuntimeError, OSError) as error:
        raise DataError.at(
            "The published weights could not be fetched", HUB + name, str(error), "a reachable hub or its local cache"
        ) from error
    return DualEncoder(model, {**config, "quick_gelu": quick_gelu})


def ignores_padding(tower: Any) -> bool:
    """Whether the feature of a caption cannot depend on what follows its end token."""
    mask, pool = getattr(tower, "attn_mask", None), getattr(tower, "text_pool_type", getattr(tower, "pool_type", None))
    whole = getattr(tower, "cls_emb", None) is not None or getattr(tower, "output_tokens", False)
    return mask is not None and pool in ("argmax", "eos") and not whole


def _encode_cut(tower: Any, text_NL: torch.Tensor) -> torch.Tensor:
    """A causal text tower on a cut batch: the first L positions, the L x L corner of the mask, read at the end token alone.

    The end token is taken before the last LayerNorm, which works on each token alone.
    """
    length, dtype = text_NL.shape[1], tower.transformer.get_cast_dtype()
    x_NLD = tower.token_embedding(text_NL).to(dtype) + tower.positional_embedding[:length].to(dtype)
    return projected(tower, readout.at_token(tower.transformer, x_NLD, end_of(tower, text_NL), tower.attn_mask[:length, :length]))


def projected(tower: Any, x_ND: torch.Tensor) -> torch.Tensor:
    """The feature `[N, D]` of a text tower's last token, not normalised: behind the last norm, in the shared space."""
    x_ND = tower.ln_final(x_ND)
    projection = tower.text_projection
    if projection is None:
        return x_ND
    return cast(torch.Tensor, projection(x_ND)) if isinstance(projection, nn.Module) else x_ND @ projection


def end_of(tower: Any, text_NL: torch.Tensor) -> torch.Tensor:
    """Where each caption ends, `[N]` int64: the token at which a tower that `ignores_padding` takes its feature."""
    if (getattr(tower, "text_pool_type", None) or tower.pool_type) == "argmax":
        return text_NL.argmax(dim=-1)
    eos_id = getattr(tower, "text_eos_id", None) or tower.eos_id
    end_N: torch.Tensor = (text_NL == eos_id).int().argmax(dim=-1)
    return end_N


def _masks_padding(tower: Any) -> bool:
    """Whether the tower attends to no token of its pad id, as those that open_clip takes from Hugging Face."""
    return getattr(getattr(tower, "config", None), "pad_token_id", None) is not None


def _context_length(clip: Any, text_cfg: Mapping[str, Any]) -> int:
    """Tokens of the longest caption; a tower of Hugging Face tells its positions, of which the configuration may use fewer."""
    positions = int(clip.context_length)
    return min(positions, int(text_cfg.get("context_length", positions))) if "hf_model_name" in text_cfg else positions


def pad_id(tower: Any) -> int:
    """What fills a caption: the tower's own id, the Hugging Face configuration's, or CLIP's 0."""
    hugging_face = getattr(getattr(tower, "config", None), "pad_token_id", None)
    return int(hugging_face if hugging_face is not None else getattr(tower, "pad_id", 0))


def _square(size: int | tuple[int, int] | list[int]) -> int:
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        raise ConfigError.at("Images that are not square are not supported", "vision_cfg.image_size", size, "one side in pixels")
    return int(height)
