"""CLIP: loss on one process and on two, clamp, learning rates, zero-shot, retrieval, linear probe, overlap, tokens, pixels, the model."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from _ranks import run_ranks
from numpy.typing import NDArray

from diptych.adapt import linear_probe
from diptych.evaluate import overlap, retrieval, zero_shot
from diptych.objectives.clip import clamp_logit_scale, clip_logits, clip_loss
from diptych.train.schedule import constant_with_cooldown, cosine

Array = NDArray[np.generic]

INPUTS: tuple[str, ...] = ("*/in/*", "model/sd/*")

TOLERANCE: dict[str, tuple[float, float]] = {
    "retr/out/image_to_text_true_recall": (1e-6, 0),  # a mean of float32 shares: the order of the sum shows
    "retr/*": (0, 0),
    "zs/out/top*": (0, 0),
    "tok/*": (0, 0),
    "clamp/*": (1e-12, 0),
    "lr/*": (1e-12, 1e-18),
    "probe/out/accuracy": (0, 0),
    "probe/*": (1e-4, 5e-5),  # the reference stops at a gradient of 1e-8, up to 1e-5 short of the minimum
    "prep/*": (0, 2 / 255 / 0.26),
    "model/*": (1e-6, 1e-9),
    "*": (1e-9, 1e-11),
}


def replay(vectors: Mapping[str, Array]) -> dict[str, Array]:
    """Every output of the file, from its inputs."""
    cases = {key.split("/")[0] for key in vectors}
    parts = {"dist": distributed, "clamp": clamp, "lr": learning_rates, "zs": zero_shot_case, "retr": retrieval_case}
    parts |= {"probe": probe, "overlap": overlap_case, "tok": tokens, "prep": preprocess, "model": model}
    outputs: dict[str, Array] = {}
    for case in sorted(cases):
        given = {key.removeprefix(f"{case}/in/"): vectors[key] for key in vectors if key.startswith(f"{case}/")}
        found = (loss if case.startswith("loss_") else parts[case])(given)
        outputs |= {f"{case}/out/{name}": np.asarray(value) for name, value in found.items()}
    return outputs


# ---------------------------------------------------------------- loss

Case = dict[str, Array]


def leaves(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Image features, text features and the log scale as float64 leaves."""
    image, text, log_scale = (torch.tensor(np.asarray(case[name]), dtype=torch.float64) for name in ("image", "text", "log_scale"))
    return image.requires_grad_(), text.requires_grad_(), log_scale.requires_grad_()


def gradients(case: Case, local_loss: bool, gather_with_grad: bool) -> dict[str, Array]:
    image, text, log_scale = leaves(case)
    value = clip_loss(image, text, log_scale.exp(), local_loss=local_loss, gather_with_grad=gather_with_grad)
    value.backward()
    grads = {"grad_image": image.grad, "grad_text": text.grad, "grad_log_scale": log_scale.grad}
    return {"loss": value.detach().numpy(), **{name: grad.numpy() for name, grad in grads.items()}}


def loss(case: Case) -> dict[str, Array]:
    image, text, log_scale = (leaf.detach() for leaf in leaves(case))
    logits = clip_logits(image, text, log_scale.exp(), local_loss=False, gather_with_grad=False)
    return {**gradients(case, False, False), "logits_per_image": logits.image.numpy()}


def distributed(case: Case) -> dict[str, Array]:
    world_size = int(case["world_size"])
    by_rank = run_ranks(world_size, on_rank, {name: np.asarray(value) for name, value in case.items()})
    outputs: dict[str, Array] = {f"single_{name}": value for name, value in gradients(case, False, False).items()}
    for variant in by_rank[0]:
        for name in by_rank[0][variant]:
            values = [result[variant][name] for result in by_rank]
            outputs[f"{variant}_rank_{name}"] = np.stack(values) if values[0].ndim == 0 else np.concatenate(values)
    return outputs


def on_rank(rank: int, world_size: int, case: Case) -> dict[str, dict[str, Array]]:
    """The four variants on this rank's contiguous share of the rows."""
    own = {**case, **{name: np.array_split(case[name], world_size)[rank] for name in ("image", "text")}}
    variants = [(local, grad) for local in (False, True) for grad in (False, True)]
    return {f"local{local:d}_grad{grad:d}": gradients(own, local, grad) for local, grad in variants}


def clamp(case: Case) -> dict[str, Array]:
    log_scale = torch.nn.Parameter(torch.tensor(np.asarray(case["log_scale"])))
    clamp_logit_scale(log_scale)
    return {"log_scale": log_scale.detach().numpy(), "scale": log_scale.detach().exp().numpy()}


def learning_rates(case: Case) -> dict[str, Array]:
    base, warmup, total = float(case["base_lr"]), int(case["warmup"]), int(case["total"])
    cooldown = int(case["cooldown_steps"]), float(case["cooldown_power"]), float(case["cooldown_end_lr"])
    steps = [int(step) for step in case["step"]]
    return {
        "cosine": np.array([cosine(step, base, warmup, total) for step in steps]),
        "const_cooldown": np.array([constant_with_cooldown(step, base, warmup, total, *cooldown) for step in steps]),
    }


# ---------------------------------------------------------------- evaluation


def zero_shot_case(case: Case) -> dict[str, Array]:
    weight_DC = zero_shot.classifier(np.asarray(case["template_emb"], np.float64))
    logit_NC = zero_shot.logits(zero_shot.normalise(np.asarray(case["image"], np.float64)), weight_DC)
    label_N = np.asarray(case["label"])
    return {
        "classifier": weight_DC,
        "logits": logit_NC,
        "top1": zero_shot.top_k_accuracy(logit_NC, label_N, 1),
        "topk": zero_shot.top_k_accuracy(logit_NC, label_N, int(case["k"])),
        "mean_per_class": zero_shot.mean_per_class(logit_NC.argmax(axis=1) == label_N, label_N),
    }


def retrieval_case(case: Case) -> dict[str, Array]:
    image_ND, text_MD = (zero_shot.normalise(np.asarray(case[name])) for name in ("image", "text"))
    image_of_M, ks = np.asarray(case["text_image_index"]), [int(k) for k in case["k"]]
    by_text = retrieval.text_to_image_ranks(text_MD, image_ND, image_of_M)
    by_image = retrieval.image_to_text_ranks(image_ND, text_MD, image_of_M)
    return {
        "text_to_image": np.array([share(by_text < k) for k in ks]),
        "image_to_text": np.array([share(by_image < k) for k in ks]),
        "image_to_text_true_recall": np.array([true_recall(image_ND, text_MD, image_of_M, k) for k in ks]),
    }


def share(hit: Array) -> float:
    """A mean as the reference took it, in float32."""
    return float(np.float32(hit.sum()) / np.float32(len(hit)))


def true_recall(image_ND: Array, text_MD: Array, image_of_M: Array, k: int) -> float:
    """What the platform does not report: the share of an image's captions that are found, averaged over the images."""
    found, _ = retrieval.top(image_ND, text_MD, k)
    own = (image_of_M[found] == np.arange(len(image_ND))[:, None]).sum(axis=1)
    return float((own / np.bincount(image_of_M)).mean())


def probe(case: Case) -> dict[str, Array]:
    rows = (case["train_x"], case["train_y"], case["test_x"], case["test_y"])
    fits = [linear_probe.probe(*rows, C=float(C)) for C in case["C"]]
    return {name: np.array([getattr(fit, name) for fit in fits]) for name in ("accuracy", "coef", "intercept")}


def overlap_case(case: Case) -> dict[str, Array]:
    rows = [overlap.contamination(overlap.Counts(*(int(value) for value in row))) for row in case["counts"]]
    names = {"p_value": "p_value", "ci_low": "low", "ci_high": "high", "all_minus_clean": "all_minus_clean"}
    return {name: np.array([getattr(row, attribute) for row in rows]) for name, attribute in names.items()}


# ---------------------------------------------------------------- model


def tokens(case: Case) -> dict[str, Array]:
    from diptych.models.tokenizer import Tokenizer

    texts = [str(text) for text in case["text"]]
    return {"ids_77": Tokenizer(77).encode(texts), "ids_short": Tokenizer(int(case["short_context"])).encode(texts)}


def preprocess(case: Case) -> dict[str, Array]:
    from diptych.models.preprocess import openai_preprocess

    return {"tensor": np.asarray(openai_preprocess(np.asarray(case["image"]), int(case["n_px"])))}


def model(case: Case) -> dict[str, Array]:
    from diptych.models.openai_weights import build_openai

    state = {key.removeprefix("model/sd/"): torch.from_numpy(np.array(value)) for key, value in case.items() if key.startswith("model/sd/")}
    clip = build_openai(state, torch.float64, text_heads=int(case["transformer_heads"]))
    with torch.no_grad():
        image_ND = clip.encode_image(torch.tensor(np.asarray(case["image"]), dtype=torch.float64), normalize=False)
        text_ND = clip.encode_text(torch.tensor(np.asarray(case["tokens"])), normalize=False)
        unit_image, unit_text = (torch.nn.functional.normalize(feature, dim=-1) for feature in (image_ND, text_ND))
        logits = clip.logit_scale.exp() * unit_image @ unit_text.T
    return {"image_features": image_ND.numpy(), "text_features": text_ND.numpy(), "logits_per_image": logits.numpy()}
