"""The lightning indexer: scores every cached token for every query.

score[t, s] = Σ_i weight[t, i] · relu(query[t, i] · key[s]), the weights carrying the scales of heads and queries.
Keys and queries come as the candidate's `index` format encodes them (evalkit/kv/index/); a key's scale multiplies its
scores, a query's its weights. DeepSeek's own code rotates both with a Hadamard matrix first; vLLM and this module do
not.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCORES_PER_CHUNK = {"cpu": 2**22, "cuda": 2**28}  # elements of [B, t, I, S] held at once


def index_scores(query: Tensor, keys: Tensor, weights: Tensor, key_scale: Tensor | None = None) -> Tensor:
    """Scores of every cached token for the last T tokens of each sequence, the tokens after a query left out.

    Args:
        query: [B, T, I, 128].
        keys: [B, S, 128], S >= T; query t stands at column S - T + t.
        weights: [B, T, I], head weights times every constant scale.
        key_scale: [B, S], where keys are stored as scaled codes.

    Returns:
        [B, T, S] float32, -inf at columns after the query's own.
    """
    batch, length, heads, width = query.shape
    cached = keys.shape[1]
    transposed = keys.float().transpose(1, 2)  # [B, 128, S]
    step = max(1, SCORES_PER_CHUNK[query.device.type] // max(1, batch * heads * cached))
    scores = query.new_full((batch, length, cached), -torch.inf, dtype=torch.float32)
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
