"""Masked language modelling on the text tower of a dual encoder, which may look at the picture while it guesses.

Devlin et al., "BERT" (2019), section 3.1, for the masks; Nie et al., "LightCLIP" (2023), for the fusion with the picture's unmasked embedding. The
tower's own blocks read the masked words, in both directions (its causal mask serves the contrastive pass alone); fusion layers and the head
belong to the objective and are gone after training.

Shape legend: N captions, L tokens, M masked words, V tokens that may be told, W width of the text tower, S what is looked at, U its width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from diptych.core import chance
from diptych.core.errors import ConfigError
from diptych.models.clip import DualEncoder, ignores_padding
from diptych.objectives.gather import gather, world_size

STREAM = chance.key_hash("masked words")
MASK_TOKEN, OTHER_TOKEN = 0.8, 0.9
"""Of the masked words, 80 % become the mask token, 10 % another word; the rest stay and must be told all the same."""


class Masked(NamedTuple):
    """Captions with words to tell: the ids that are read `[N, L]`; where the mask token stands and what is to be told, bool `[N, L]`."""

    text_NL: Tensor
    token_NL: Tensor
    told_NL: Tensor


def text_tower(model: DualEncoder) -> Any:
    """The text tower, if its blocks can be run one by one. Raises ConfigError for others."""
    tower: Any = getattr(model.clip, "text", model.clip)
    transformer = getattr(tower, "transformer", None)
    if not ignores_padding(tower) or not hasattr(tower, "token_embedding") or not getattr(transformer, "batch_first", False):
        expected = "a causal text tower of open_clip"
        raise ConfigError.at("The text tower cannot read masked words", "model", type(tower).__name__, expected)
    return tower


def words_of(real_NL: Tensor) -> Tensor:
    """Which tokens are words, bool `[N, L]`: the real ones but the first, the start, and the last, the end."""
    words_NL = torch.zeros_like(real_NL)
    words_NL[:, 1:-1] = real_NL[:, 2:]
    return words_NL


def mask_words(text_NL: Tensor, words_NL: Tensor, share: float, token_V: Tensor, *, seed: int, row_N: Tensor, step: int) -> Masked:
    """Masks a share of the words, drawn by `(seed, row, step, place)`; the other words that come in are drawn from `token_V`."""
    row_N1 = row_N.cpu().numpy().astype(np.uint64)[:, None]
    place_L = np.arange(text_NL.shape[1], dtype=np.uint64)
    draws = [chance.uniform(seed, STREAM, step, what, row_N1, place_L) for what in range(3)]
    chosen_NL, kind_NL, other_NL = (torch.from_numpy(draw_NL).to(text_NL.device) for draw_NL in draws)
    told_NL = words_NL & (chosen_NL < share)
    word_NL = token_V[(other_NL * len(token_V)).long()]
    read_NL = torch.where(told_NL & (kind_NL >= MASK_TOKEN) & (kind_NL < OTHER_TOKEN), word_NL, text_NL)
    return Masked(read_NL, told_NL & (kind_NL < MASK_TOKEN), told_NL)


class Fusion(nn.Module):
    """`h + gate * attention(h, picture)`, the gate a learnt scalar that starts at 0, so that the tower starts as it is."""

    def __init__(self, width: int, heads: int, seen_width: int) -> None:
        super().__init__()
        self.ln_words, self.ln_seen = nn.LayerNorm(width), nn.LayerNorm(seen_width)
        self.attention = nn.MultiheadAttention(width, heads, kdim=seen_width, vdim=seen_width, batch_first=True)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, word_NLW: Tensor, seen_NSU: Tensor) -> Tensor:
        """The words' states `[N, L, W]` after a look at `[N, S, U]`."""
        seen_NSU = self.ln_seen(seen_NSU)
        mixed_NLW = self.attention(self.ln_words(word_NLW), seen_NSU, seen_NSU, need_weights=False)[0]
        fused_NLW: Tensor = word_NLW + self.gate * mixed_NLW
        return fused_NLW


class MaskedWords(nn.Module):
    """What masked language modelling adds to a text tower: the mask token, the fusion layers, the head.

    Args:
        tower: the text tower (`text_tower`).
        seen_width: U, of what the fusion looks at.
        layers: blocks behind which the words look at the picture; negative: from the end.
        token_V: ids that may be told, int64, rising.

    Raises ConfigError for a layer that is not there.
    """

    token_V: Tensor

    def __init__(self, tower: Any, seen_width: int, layers: Sequence[int], token_V: Tensor) -> None:
        super().__init__()
        blocks = tower.transformer.resblocks
        width, heads = tower.token_embedding.weight.shape[1], blocks[0].attn.num_heads
        for layer in layers:
            if not -len(blocks) <= layer < len(blocks):
                raise ConfigError.at("There is no such layer to fuse at", "train.objective.fusion", layer, f"below {len(blocks)}")
        self.fusions = nn.ModuleDict({str(layer % len(blocks)): Fusion(width, heads, seen_width) for layer in layers})
        self.mask_W = nn.Parameter(0.02 * torch.randn(width))
        self.head = nn.Linear(width, len(token_V))
        self.register_buffer("token_V", token_V)

    def states(self, tower: Any, masked: Masked, real_NL: Tensor, seen_NSU: Tensor) -> Tensor:
        """The tower's states `[N, L, W]` of masked captions, after the last norm."""
        word_NLW = tower.token_embedding(masked.text_NL)
        word_NLW = torch.where(masked.token_NL[..., None], self.mask_W.to(word_NLW.dtype), word_NLW)
        word_NLW = word_NLW + tower.positional_embedding[: word_NLW.shape[1]]
        heads, length = tower.transformer.resblocks[0].attn.num_heads, real_NL.shape[1]
        hidden_NL = torch.zeros_like(real_NL, dtype=word_NLW.dtype).masked_fill(~real_NL, -torch.inf)
        mask = hidden_NL[:, None, None].expand(-1, heads, length, -1).flatten(0, 1)
        for index, block in enumerate(tower.transformer.resblocks):
            word_NLW = block(word_NLW, attn_mask=mask)
            if str(index) in self.fusions:
                word_NLW = self.fusions[str(index)](word_NLW, seen_NSU)
        state_NLW: Tensor = tower.ln_final(word_NLW)
        return state_NLW

    def logits(self, tower: Any, masked: Masked, real_NL: Tensor, seen_NSU: Tensor) -> Tensor:
        """Logits `[M, V]` of the words that are to be told, row by row."""
        logits_MV: Tensor = self.head(self.states(tower, masked, real_NL, seen_NSU)[masked.told_NL])
        return logits_MV

    def targets(self, text_NL: Tensor, told_NL: Tensor) -> Tensor:
        """The words that are to be told as places in `token_V`, int64 `[M]`."""
        target_M = torch.searchsorted(self.token_V, text_NL[told_NL])
        assert (self.token_V[target_M.clamp(max=len(self.token_V) - 1)] == text_NL[told_NL]).all(), "a caption has a token unseen before"
        return target_M


def masked_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy in nats, the mean over the masked words of all ranks, for `[…, V]` logits and `[…]` targets, -100 where there is none.

    A rank's own sum is divided by the mean count of a rank, so that the mean over the ranks is right; 0 if nothing is masked.
    """
    count = gather((target >= 0).sum()[None], with_grad=False).sum().clamp(min=1) / world_size()
    return cross_entropy(logits.flatten(0, -2), target.flatten(), ignore_index=-100, reduction="sum") / count
