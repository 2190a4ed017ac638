"""Top-k selection: which cached tokens a query may attend.

Tie rule: of equal scores the earlier token is kept. `torch.topk` promises no order among ties, so two devices may
select differently; the indexer's relu makes exact zeros, hence ties, common.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
