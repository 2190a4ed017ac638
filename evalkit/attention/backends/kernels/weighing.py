"""A Triton kernel that turns scores into weights, in one pass: float32 softmax, and its bits as three bf16 terms."""

import torch
import triton
import triton.language as tl
from torch import Tensor


def weigh(scores: Tensor, numbers: Tensor, sm_scale: float) -> tuple[list[Tensor], Tensor]:
    """Softmax of scores [t, H, K] float32 times `sm_scale` over the keys that `numbers` [t, K] does not mark with -1.

    Returns:
        Three bf16 tensors [t, H, K] whose sum is the weights, 0 for what is marked, and lse [t, H] float32, natural
        log, -inf where every key is.
    """
    queries, heads, keys = scores.shape
    terms = [torch.empty(scores.shape, dtype=torch.bfloat16, device=scores.device) for _ in range(3)]
    lse = scores.new_empty(queries, heads)
    if scores.numel():
        with torch.cuda.device_of(scores):
            _weigh[(queries * heads,)](
                *(scores, numbers.contiguous(), *terms, lse),
                *(sm_scale, heads, keys),
                BLOCK=triton.next_power_of_2(keys),
                num_warps=8,
            )
    return terms, lse


@triton.jit
def _weigh(
    scores: tl.tensor,  # [t, H, K], contiguous, as are all
    numbers: tl.tensor,  # [t, K]
    high: tl.tensor,  # [t, H, K]
    middle: tl.tensor,
    low: tl.tensor,
    lse: tl.tensor,  # [t, H]
    sm_scale: float,
    heads: int,
    keys: int,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < keys
    valid = tl.load(numbers + row // heads * keys + column, mask=inside, other=-1) >= 0
    score = tl.load(scores + row * keys + column, mask=inside, other=0.0) * sm_scale
    score = tl.where(valid, score, -float("inf"))
    most = tl.max(score, 0)
    # -inf - -inf is NaN: a query without any valid key keeps weight 0 everywhere.
    share = tl.exp(score - tl.where(most == -float("inf"), 0.0, most))
    total = tl.sum(share, 0)
    weight = tl.where(valid, share / tl.where(total == 0.0, 1.0, total), 0.0)
    place = row * keys + column
    first = weight.to(tl.bfloat16)
    rest = weight - first.to(tl.float32)
    second = rest.to(tl.bfloat16)
    tl.store(high + place, first, mask=inside)
    tl.store(middle + place, second, mask=inside)
    tl.store(low + place, (rest - second.to(tl.float32)).to(tl.bfloat16), mask=inside)
    tl.store(lse + row, tl.where(most == float("inf"), most, most + tl.log(total)))
