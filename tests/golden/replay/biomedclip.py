"""BiomedCLIP: figures of articles, poolers and projection of the text tower, the loss on one process and on two, learning rates."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from _ranks import run_ranks
from numpy.typing import NDArray
from torch import nn

from diptych.models import clip
from diptych.objectives.clip import clip_loss
from diptych.pairs.articles.article import parse
from diptych.pairs.image import Fault
from diptych.train.schedule import cosine

Array = NDArray[np.generic]

INPUTS = (
    "pmc_xml",
    "txt_hidden",
    "txt_mask",
    "txt_pooler_output",
    "txt_w1",
    "txt_w2",
    "loss_image",
    "loss_text",
    "loss_log_scale",
    "lr_args",
    "lr_steps",
)

TOLERANCE = {"lr_values": (1e-12, 1e-18), "txt_*": (1e-9, 1e-12), "loss_*": (1e-9, 1e-12)}

POOLERS = {"txt_pool_cls_last_hidden_state": "cls_last_hidden_state_pooler", "txt_pool_cls": "cls_pooler", "txt_pool_mean": "mean_pooler"}


def replay(vectors: Mapping[str, Array]) -> dict[str, Array]:
    outputs: dict[str, Array] = {"pmc_jsonl": np.array([line(str(xml), index) for index, xml in enumerate(vectors["pmc_xml"])])}
    outputs |= {name: features(vectors, pooler, None) for name, pooler in POOLERS.items()}
    outputs["txt_embed"] = features(vectors, "cls_last_hidden_state_pooler", (np.asarray(vectors["txt_w1"]), np.asarray(vectors["txt_w2"])))
    arrays = [np.asarray(vectors[name], np.float64) for name in ("loss_image", "loss_text", "loss_log_scale")]
    outputs |= {f"loss_ws1{name}": value for name, value in joined([on_rank(0, 1, *arrays, True, False)]).items()}
    for tag, local_loss, gather_with_grad in (("local", True, True), ("global", False, True), ("nograd", False, False)):
        ranks = run_ranks(2, on_rank, *arrays, local_loss, gather_with_grad)
        outputs |= {f"loss_ws2_{tag}{name}": value for name, value in joined(ranks).items()}
    base, warmup, total = np.asarray(vectors["lr_args"]).tolist()
    outputs["lr_values"] = np.array([cosine(step, base, int(warmup), int(total)) for step in np.asarray(vectors["lr_steps"]).tolist()])
    return outputs


# ---------------------------------------------------------------- extraction


def line(xml: str, index: int) -> str:
    """The official pipeline's line of an article, from our figures of it; the official one puts `.jpg` behind every reference."""
    try:
        article = parse(xml.encode())
    except Fault:
        return ""
    if not article.figures:
        return ""
    location = f"ROOT/PMC{index}"
    figures = [
        {
            "fig_caption": " ".join(figure.parts),
            "fig_id": figure.id,
            "fig_label": figure.label,
            "graphic_ref": f"{location}/{figure.graphics[0][0]}.jpg",
            "pair_id": f"{article.pmid}_{figure.id}",
        }
        for figure in article.figures
    ]
    return json.dumps({"pmid": article.pmid, "pmc": article.pmc, "location": location, "figures": figures})


# ---------------------------------------------------------------- the text tower


def features(vectors: Mapping[str, Array], pooler: str, projection: tuple[Array, Array] | None) -> Array:
    """What the dual encoder makes of given hidden states: its own pooler and projection behind a transformer that returns them."""
    hidden_NLW, pooled_NW = (torch.tensor(np.asarray(vectors[name]), dtype=torch.float64) for name in ("txt_hidden", "txt_pooler_output"))
    width = hidden_NLW.shape[2]
    model = encoder(width, width if projection is None else len(projection[1]), pooler, projection is not None).double()
    model.clip.text.transformer = Given(hidden_NLW, pooled_NW)
    if projection is not None:
        for layer, weight in zip((model.clip.text.proj[0], model.clip.text.proj[2]), projection, strict=True):
            layer.weight = nn.Parameter(torch.tensor(np.asarray(weight), dtype=torch.float64))
    with torch.no_grad():
        return np.asarray(model.encode_text(torch.tensor(np.asarray(vectors["txt_mask"], np.int64)), normalize=False).numpy())


def encoder(width: int, features: int, pooler: str, projected: bool) -> clip.DualEncoder:
    """A dual encoder with a small BERT whose pad id is 0, so that a mask can stand for the tokens."""
    with tempfile.TemporaryDirectory() as folder:
        bert = {"model_type": "bert", "vocab_size": 4, "hidden_size": width, "num_hidden_layers": 1, "num_attention_heads": 1,
                "intermediate_size": 4, "max_position_embeddings": 512, "pad_token_id": 0}  # fmt: skip
        Path(folder, "config.json").write_text(json.dumps(bert))
        text = {"hf_model_name": folder, "hf_pooler_type": pooler, "hf_proj_type": "mlp" if projected else None}
        vision = {"image_size": 8, "layers": 1, "width": 8, "head_width": 8, "patch_size": 8}
        return clip.build({"embed_dim": features, "vision_cfg": vision, "text_cfg": text})


class Given(nn.Module):
    """A transformer whose output is known."""

    def __init__(self, hidden_NLW: torch.Tensor, pooled_NW: torch.Tensor) -> None:
        super().__init__()
        self.hidden_NLW, self.pooled_NW = hidden_NLW, pooled_NW

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        assert torch.equal(input_ids, attention_mask)
        return BaseModelOutputWithPooling(last_hidden_state=self.hidden_NLW, pooler_output=self.pooled_NW)


# ---------------------------------------------------------------- the loss


def on_rank(
    rank: int, world: int, image: Array, text: Array, log_scale: Array, local_loss: bool, gather_with_grad: bool
) -> dict[str, Array]:
    """Loss and gradients of this rank's contiguous share, with regard to raw features."""
    own = [np.array_split(each, world)[rank] for each in (image, text)]
    leaves = [torch.tensor(np.asarray(value), dtype=torch.float64).requires_grad_() for value in (*own, log_scale)]
    unit = partial(nn.functional.normalize, dim=-1)
    loss = clip_loss(unit(leaves[0]), unit(leaves[1]), leaves[2].exp(), local_loss=local_loss, gather_with_grad=gather_with_grad)
    loss.backward()
    grads = SimpleNamespace(gi=leaves[0].grad, gt=leaves[1].grad, gs=leaves[2].grad)
    return {"": loss.detach().numpy(), **{f"_{name}": grad.numpy() for name, grad in vars(grads).items()}}


def joined(ranks: list[dict[str, Array]]) -> dict[str, Array]:
    """Scalars by rank, rows one rank after another."""
    return {name: np.concatenate([np.atleast_1d(result[name]) for result in ranks]) for name in ranks[0]}
