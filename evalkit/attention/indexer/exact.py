"""Index scores in plain torch, float32 throughout: every device, every key format, any number of heads."""

from __future__ import annotations

import torch
from torch import Tensor

from evalkit.attention.indexer.base import Scorer
from evalkit.kv.index import IndexFormat

DOTS_PER_CHUNK = {"cpu": 2**22, "cuda": 2**28}  # elements of [B, t, I, S] held at once


class Exact(Scorer):
    name, kernel = "torch", "torch float32"

    def unavailable_because(self, keys: IndexFormat, heads: int, device: torch.device) -> str | None:
        return None

    def scores(self, query: Tensor, keys: Tensor, weights: Tensor, key_scale: Tensor | None) -> Tensor:
        return index_scores(query, keys, weights, key_scale)


def index_scores(query: Tensor, keys: Tensor, weights: Tensor, key_scale: Tensor | None = None) -> Tensor:
    """As `Scorer.scores`."""
    batch, length, heads, width = query.shape
    cached = keys.shape[1]
    transposed = keys.float().transpose(1, 2)  # [B, 128, S]
    step = max(1, DOTS_PER_CHUNK[query.device.type] // max(1, batch * heads * cached))
    scores = torch.full((batch, length, cached), -torch.inf, device=query.device)
    for start in range(0, length, step):
        part = slice(start, min(start + step, length))
        seen = cached - length + part.stop  # no query of this chunk looks further
        dots = query[:, part].float().reshape(batch, -1, width) @ transposed[..., :seen]  # [B, t * I, seen]
        dots = dots.relu_().view(batch, -1, heads, seen)
        scores[:, part, :seen] = (weights[:, part, None].float() @ dots).squeeze(2)
    if key_scale is not None:
        scores *= key_scale[:, None]
    columns = torch.arange(cached, device=scores.device)
    return scores.masked_fill_(columns > columns[cached - length :, None], -torch.inf)
