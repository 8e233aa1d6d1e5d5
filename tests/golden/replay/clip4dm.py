"""Replays CLIP4DM on an open_clip model that holds the given text tower, in float64, with the real tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from diptych.evaluate import clip4dm
from diptych.evaluate.clip_score import clip_score
from diptych.evaluate.precision import average_precision
from diptych.evaluate.text_attention import attention_gradients
from diptych.models.clip import DualEncoder, build
from diptych.models.tokenizer import EOT, SOT, VOCABULARY_SIZE

Array = NDArray[np.generic]

INPUTS = (
    "cfg", "real_bpe_ids", "sot_eot", "w_*", "lnf", "l[0-9]*_*", "threshold", "texts", "template", "last_layers", "pairs", "img*_embed",
    "ds_is_foil", "ds_is_correct", "ds_clipscore", "ds_sum_neg",
)  # fmt: skip

TOLERANCE = {
    "*_ids": (0, 0),
    "*_words": (0, 0),
    "*_word": (0, 0),
    "*": (1e-6, 1e-10),
}

# Where a block of the file lies in open_clip's.
PLACES = {
    "qkv_w": "attn.in_proj_weight", "qkv_b": "attn.in_proj_bias", "out_w": "attn.out_proj.weight", "out_b": "attn.out_proj.bias",
    "fc1_w": "mlp.c_fc.weight", "fc1_b": "mlp.c_fc.bias", "fc2_w": "mlp.c_proj.weight", "fc2_b": "mlp.c_proj.bias",
}  # fmt: skip


def replay(vectors: Mapping[str, Array]) -> dict[str, Array]:
    model = tower(vectors)
    outputs: dict[str, Array] = {}
    captions, template = [str(text) for text in vectors["texts"]], str(vectors["template"])
    text_NL = torch.from_numpy(model.tokenizer.encode([template + caption for caption in captions]))
    for text, row_L in enumerate(text_NL):
        outputs[f"text{text}_ids"] = renumbered(row_L.numpy(), vectors)
        with torch.no_grad():
            outputs[f"text{text}_embed"] = model.encode_text(row_L[None]).numpy()
    pairs = vectors["pairs"].tolist()
    image_ND = np.concatenate([vectors[f"img{image}_embed"] for image, _ in pairs])
    explain = partial(clip4dm.attribute, model, image_ND, [captions[text] for _, text in pairs], template=template, batch_size=3)
    epsilon, kept = float(vectors["threshold"]), int(vectors["last_layers"])
    for number, (last, whole) in enumerate(zip(explain(start_layer=-kept), explain(start_layer=0), strict=True)):
        found = of_pair(last, epsilon) | {"word_scores_all_layers": whole.without_punctuation().score_W}
        outputs |= {f"p{number}_{key}": value for key, value in found.items()}
    any_image_ND = np.repeat(vectors["img0_embed"], len(captions), axis=0)
    for text, attribution in enumerate(clip4dm.attribute(model, any_image_ND, captions, template=template)):
        outputs[f"text{text}_words"] = np.array(attribution.without_punctuation().words)
    outputs |= of_tokens(model, torch.from_numpy(image_ND), text_NL[[text for _, text in pairs]], kept)
    return outputs | of_data_set(vectors)


def tower(vectors: Mapping[str, Array]) -> DualEncoder:
    """open_clip's CLIP around the given text tower. Its token table has the real size; rows that no text uses stay zero."""
    _, width, layers, heads, embed, context = vectors["cfg"].tolist()
    text_cfg = {
        "context_length": context, "vocab_size": VOCABULARY_SIZE, "width": width, "heads": heads, "layers": layers,
        "mlp_ratio": len(vectors["l0_fc1_b"]) / width,
    }  # fmt: skip
    vision_cfg = {"image_size": 4, "layers": 1, "width": 8, "head_width": 8, "patch_size": 4}
    model = build({"embed_dim": embed, "vision_cfg": vision_cfg, "text_cfg": text_cfg, "quick_gelu": True}).double().eval()
    given = {
        "positional_embedding": vectors["w_pos"], "text_projection": vectors["w_proj"].T,
        "ln_final.weight": vectors["lnf"][0], "ln_final.bias": vectors["lnf"][1],
    }  # fmt: skip
    for layer in range(layers):
        block = f"transformer.resblocks.{layer}"
        given |= {f"{block}.{place}": vectors[f"l{layer}_{key}"] for key, place in PLACES.items()}
        for norm in ("ln1", "ln2"):
            given |= {
                f"{block}.{norm.replace('ln', 'ln_')}.{part}": vectors[f"l{layer}_{norm}"][row]
                for row, part in enumerate(("weight", "bias"))
            }
    table = np.zeros((VOCABULARY_SIZE, width))
    table[vectors["real_bpe_ids"]] = vectors["w_tok"][: len(vectors["real_bpe_ids"])]
    table[[SOT, EOT]] = vectors["w_tok"][vectors["sot_eot"]]
    table[0] = vectors["w_tok"][0]  # padding is id 0 in either numbering
    given["token_embedding.weight"] = table
    state = {key: torch.from_numpy(np.ascontiguousarray(value)).double() for key, value in given.items()}
    loaded = model.clip.load_state_dict(state, strict=False)
    assert all(key.startswith(("visual.", "logit_")) for key in loaded.missing_keys), loaded.missing_keys
    assert not loaded.unexpected_keys
    return model


def renumbered(ids: Array, vectors: Mapping[str, Array]) -> Array:
    number_of = dict(
        zip(
            [*vectors["real_bpe_ids"].tolist(), SOT, EOT], [*range(len(vectors["real_bpe_ids"])), *vectors["sot_eot"].tolist()], strict=True
        )
    )
    return np.array([number_of.get(token, 0) if token == 0 else number_of[token] for token in ids.tolist()])


def of_pair(attribution: clip4dm.Attribution, epsilon: float) -> dict[str, Array]:
    wrong = clip4dm.misaligned(attribution, "threshold", epsilon)
    worst = clip4dm.misaligned(attribution, "most_negative")
    phrases = clip4dm.merged(wrong)
    score = clip_score(attribution.cosine)
    return {
        "word_scores": attribution.without_punctuation().score_W,
        "neg_words": np.array([f"{place}_{word}" for place, word in zip(wrong.place_M, wrong.words, strict=True)] or [""]),
        "neg_scores": wrong.score_M,
        "sum_neg": np.array(wrong.total),
        "clipscore": score,
        "fclipscore": clip4dm.f_clip_score(wrong.total, score),
        "most_negative_word": np.array(worst.words[0]),
        "most_negative_score": np.array(worst.total),
        "merged_words": np.array([phrase for phrase, _ in phrases] or [""]),
        "merged_scores": np.array([value for _, value in phrases], dtype=np.float64),
    }


def of_tokens(model: DualEncoder, image_ND: torch.Tensor, text_NL: torch.Tensor, kept: int) -> dict[str, Array]:
    """Before words: the tokens' scores of every pair; the maps, their gradients (last layer first) and R of the second pair."""
    scores, _ = clip4dm.token_attributions(model, image_ND, text_NL, -kept)
    found = attention_gradients(model, image_ND[1:2], text_NL[1:2], -kept)
    return {f"p{number}_token_scores": score_L for number, score_L in enumerate(scores)} | {
        "p1_attn": torch.cat(found.attention[::-1]).numpy(),
        "p1_grad": torch.cat(found.gradient[::-1]).numpy(),
        "p1_R": clip4dm.relevance(found)[0].numpy(),
    }


def of_data_set(vectors: Mapping[str, Array]) -> dict[str, Array]:
    is_foil, score = vectors["ds_is_foil"], vectors["ds_clipscore"]
    fine = clip4dm.f_clip_score(vectors["ds_sum_neg"], score)
    accuracy = clip4dm.location_accuracy(vectors["ds_is_correct"], is_foil)
    return {
        "ds_orig_positive": np.array([average_precision(score, ~is_foil), average_precision(fine, ~is_foil), accuracy]),
        "ds_foil_positive": np.array([average_precision(-score, is_foil), average_precision(-fine, is_foil), accuracy]),
    }
