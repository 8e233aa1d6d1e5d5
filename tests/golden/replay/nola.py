"""NoLA: pseudo-labels, the labelling head, and three steps of prompt tuning on open_clip's own tower, in float64."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from diptych.adapt import nola
from diptych.adapt import prompt_tuning as tuning
from diptych.models import clip

Array = NDArray[np.generic]

INPUTS = (
    "findk_in", "topk_*_prob", "topk_*_sample_id", "topk_*_gt", "topk_*_k", "ls_logits", "ls_y", "dl_init_*", "dl_x", "dl_y",
    "vit_init/*", "vit_images", "vit_pseudo", "vit_cfg", "vit_lr",
)  # fmt: skip

TOLERANCE = {
    "vit_decay": (0, 0),
    "vit_lr_after": (1e-12, 0),
    "vit_final/*": (1e-5, 1e-8),
    "vit_*_names": (0, 0),
    "vit_*": (1e-6, 1e-8),
    "ls_*": (1e-6, 1e-8),
    "dl_*": (1e-6, 1e-8),
}

OFFICIAL = {"prompts": "prompt_embeddings", "head": "cde_adapter.0.weight"}


def replay(vectors: Mapping[str, Array]) -> dict[str, Array]:
    k = [nola.pictures_per_class(int(n), int(c)) for n, c in vectors["findk_in"]]
    outputs: dict[str, Array] = {"findk_out": np.asarray(k)}
    for key in vectors:
        if key.startswith("topk_") and key.endswith("_prob"):
            outputs |= selection(vectors, key.removesuffix("_prob"))
    return outputs | smoothing(vectors) | labelling(vectors) | prompts(vectors)


def selection(vectors: Mapping[str, Array], case: str) -> dict[str, Array]:
    """The released loop: over the classes that occur in the ground truth."""
    found = nola.select_pseudo_labels(vectors[f"{case}_prob"], int(vectors[f"{case}_k"]), vectors[f"{case}_gt"])
    ids = vectors[f"{case}_sample_id"][found.row_S]
    return {f"{case}_sel_id": ids, f"{case}_sel_label": found.label_S, f"{case}_sel_conf": found.confidence_S}


def smoothing(vectors: Mapping[str, Array]) -> dict[str, Array]:
    logits = torch.from_numpy(vectors["ls_logits"]).requires_grad_()
    loss = tuning.smoothed_cross_entropy(logits, torch.from_numpy(vectors["ls_y"]))
    loss.backward()
    return {"ls_loss": loss.detach().numpy(), "ls_grad": logits.grad.numpy()}


def labelling(vectors: Mapping[str, Array]) -> dict[str, Array]:
    initial = [torch.from_numpy(vectors[f"dl_init_{place}"]) for place in range(4)]
    hidden, width = initial[0].shape
    head = nola.labelling_head(width, len(initial[3]), hidden).double()
    with torch.no_grad():
        for parameter, value in zip(head.parameters(), initial, strict=True):
            parameter.copy_(value)
    losses = nola.train_head(head, zip(torch.from_numpy(vectors["dl_x"]), torch.from_numpy(vectors["dl_y"]), strict=True))
    finals = {f"dl_final_{place}": parameter.detach().numpy() for place, parameter in enumerate(head.parameters())}
    return {"dl_losses": np.asarray(losses), **finals}


def prompts(vectors: Mapping[str, Array]) -> dict[str, Array]:
    """The student that users get, from a model that is built as theirs are."""
    state = {key.partition("/")[2]: torch.from_numpy(np.asarray(vectors[key])).double() for key in vectors if key.startswith("vit_init/")}
    size, patch, width, *_ = (int(value) for value in vectors["vit_cfg"])
    student = tuning.PromptTuned(tower(vectors, state), state["prompt_embeddings"][0], state["cde_adapter.0.weight"])
    config = tuning.Config(lr=float(vectors["vit_lr"]))
    optimizer = tuning.adamw(student, config)
    images, labels = torch.from_numpy(vectors["vit_images"]).double(), torch.from_numpy(vectors["vit_pseudo"])
    assert images.shape[-1] == size
    outputs: dict[str, Array] = {"vit_logits_step0": student(images[0]).detach().numpy()}
    losses = []
    for step in range(len(images)):
        losses.append(tuning.train_step(student, optimizer, images[step], labels[step], config.label_smoothing))
        if step == 0:
            outputs["vit_grad_prompt_step0"] = student.prompts.grad.numpy()[None].copy()
            outputs["vit_grad_head_step0"] = student.head.grad.numpy().copy()
    for name, parameter in student.trained().items():
        value = parameter.detach().numpy()
        outputs[f"vit_final/{official(name)}"] = value[None] if name == "prompts" else value
    decayed, undecayed = optimizer.param_groups
    return outputs | {
        "vit_losses": np.asarray(losses),
        "vit_eval_logits_final": student(images[0]).detach().numpy(),
        "vit_decay_names": np.asarray(sorted(map(official, decayed["param_names"]))),
        "vit_nodecay_names": np.asarray(sorted(map(official, undecayed["param_names"]))),
        "vit_decay": np.asarray([decayed["weight_decay"], undecayed["weight_decay"]]),
        "vit_lr_after": np.asarray(decayed["lr"]),
        "vit_prompt_init_bound": np.asarray(tuning.prompt_bound(patch, width)),
    }


def tower(vectors: Mapping[str, Array], state: Mapping[str, torch.Tensor]) -> clip.DualEncoder:
    size, patch, width, layers, heads, embed, _ = (int(value) for value in vectors["vit_cfg"])
    vision = {"image_size": size, "layers": layers, "width": width, "head_width": width // heads, "patch_size": patch}
    text = {"context_length": 4, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1}
    model = clip.build({"embed_dim": embed, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}).double()
    prefix = "clip_model.visual."
    model.clip.visual.load_state_dict({name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)})
    return model


def official(name: str) -> str:
    return OFFICIAL.get(name, f"clip_model.{name}")
