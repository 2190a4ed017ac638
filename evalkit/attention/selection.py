"""Top-k selection: which cached tokens a query may attend.

Tie rule: of equal scores the earlier token is kept. `torch.topk` promises no order among ties, so two devices may
select differently; the indexer's relu makes exact zeros, hence ties, common.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from evalkit.attention.indexer import Scorer

# Elements of [B, t, S] held at once; top-k takes ten times as much.
SCORES_PER_CHUNK = {"cpu": 2**23, "cuda": 2**26}


def select(
    query: Tensor,
    keys: Tensor,
    weights: Tensor,
    key_scale: Tensor | None,
    k: int,
    *,
    scorer: Scorer,
    valid: Tensor | None = None,
    keep_scores: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The k best-scored columns of each query, a chunk of queries at a time, so that memory stays bounded.

    Args:
        query, keys, weights, key_scale: as in `Scorer.scores`.
        k: how many to keep.
        scorer: what scores the keys.
        valid: [B, S] bool, False at columns that nobody may select.
        keep_scores: also return the scores that were selected by, [B, T, S] float32, -inf where not selectable.

    Returns:
        [B, T, min(k, S)] int64 columns as `top_k` orders them, and the scores or None.
    """
    batch, length = query.shape[:2]
    cached = keys.shape[1]
    step = max(1, SCORES_PER_CHUNK[query.device.type] // (batch * cached))
    columns = torch.full((batch, length, min(k, cached)), -1, dtype=torch.int64, device=query.device)
    kept = []
    for start in range(0, length, step):
        part = slice(start, min(start + step, length))
        seen = cached - length + part.stop  # no query of this chunk looks further
        scale = None if key_scale is None else key_scale[:, :seen]
        scores = scorer.scores(query[:, part], keys[:, :seen], weights[:, part], scale)
        if valid is not None:
            scores = scores.masked_fill(~valid[:, None, :seen], -torch.inf)
        best = top_k(scores.flatten(0, 1), k)
        columns[:, part, : best.shape[1]] = best.unflatten(0, scores.shape[:2])
        if keep_scores:
            kept.append(F.pad(scores, (0, cached - seen), value=-torch.inf))
    return columns, torch.cat(kept, 1) if keep_scores else None


def top_k(scores: Tensor, k: int) -> Tensor:
    """The k best-scored columns of each row.

    Args:
        scores: [T, S] float, -inf where a column may not be selected. A NaN ranks first, as in `torch.topk`, so
            that it reaches the attention output instead of hiding.
        k: how many to keep.

    Returns:
        [T, min(k, S)] int64 columns, ascending, padded with -1 where a row has fewer candidates.
    """
    rows, columns = scores.shape
    k = min(k, columns)
    scores = torch.nan_to_num(scores, nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    if columns <= k:
        keep = scores > -torch.inf
    else:
        kth = scores.topk(k, dim=-1).values[:, -1:]  # [T, 1]
        above = scores > kth
        ties = (scores == kth) & (kth > -torch.inf)
        room = k - above.sum(-1, keepdim=True)
        keep = above | (ties & (ties.cumsum(-1) <= room))
    # A kept column's place is the number of kept columns before it; the others go to a spare place that is cut off.
    place = torch.where(keep, keep.cumsum(-1) - 1, k)
    numbers = torch.arange(columns, device=scores.device).expand(rows, columns)
    selected = torch.full((rows, k + 1), -1, dtype=torch.int64, device=scores.device)
    return selected.scatter_(1, place, numbers)[:, :k].contiguous()
