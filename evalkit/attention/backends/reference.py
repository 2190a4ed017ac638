"""Exact attention in plain torch: float32 scores, softmax and sums, on any device and every format.

Queries are taken a chunk at a time against the union of the rows that the chunk selected, so memory stays bounded
and a row is decoded once a chunk. Every query of a chunk is scored against the whole union and masked to its own
selection: more arithmetic than a gather, but matrix products instead of scattered reads. A union wider than a
selection (on a CPU, than four: so it is where sequences decode together) is gathered from instead, each query's rows
apart.

On a GPU bf16 queries go through the matrix units: every operand is written as the sum of the bf16 numbers that make
up its 24 bits, so that products are exact, and sums are float32's. Float32 products without them take ten times as long.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from evalkit.attention.backends.base import Backend, backends
from evalkit.attention.backends.readers import READERS, Reader
from evalkit.environment import has_triton
from evalkit.kv import RowFormat, Scales

SCORES_PER_CHUNK = {"cpu": 2**22, "cuda": 2**27}  # elements of [t, H, rows] held at once
ROWS_PER_CHUNK = {"cpu": 256, "cuda": 4096}
GATHERED_PER_CHUNK = 2**27  # elements of [t, K, C + R] held at once
TERMS = 3  # bf16 numbers that hold float32's 24 bits
GATHERS_OVER = {"cpu": 4, "cuda": 1}  # selections that a union is as wide as


@backends.register
class Reference(Backend):
    name = "reference"
    kernel = "torch float32 scores, softmax and sums"

    def __init__(self, reader: Reader | None = None) -> None:
        self._reader = reader or Reader()

    def reading_as(self, reader: str) -> Backend:
        return Reference(READERS[reader])

    def read_scale(self, scale: Tensor) -> Tensor:
        return self._reader.read_scale(scale)

    def read(self, format: RowFormat, cache: Tensor, slots: Tensor, scales: Scales) -> tuple[Tensor, Tensor]:
        return self._reader.read(format, cache, slots, scales)

    def unavailable_because(
        self, format: RowFormat, device: torch.device, heads: int, topk: int
    ) -> str | None:
        return None

    def attend(
        self,
        q_latent: Tensor,
        q_rope: Tensor,
        cache: Tensor,
        format: RowFormat,
        indices: Tensor,
        sm_scale: float,
        scales: Scales,
        reader: Reader | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `Backend.attend`; with a `reader`, over the rows as that one reads them."""
        slots = cache.numel() // format.row_bytes

        def rows(used: Tensor) -> tuple[Tensor, Tensor]:
            return (reader or self).read(format, cache, used, scales)

        return _attend(q_latent, q_rope, rows, slots, indices, sm_scale)


def _attend(
    q_latent: Tensor,
    q_rope: Tensor,
    rows: Callable[[Tensor], tuple[Tensor, Tensor]],
    row_count: int,
    indices: Tensor,
    sm_scale: float,
) -> tuple[Tensor, Tensor]:
    length, heads, width = q_latent.shape
    out = torch.zeros_like(q_latent)
    lse = q_latent.new_full((length, heads), -torch.inf, dtype=torch.float32)
    device = q_latent.device.type
    always = device == "cuda" and q_latent.dtype == torch.bfloat16
    widest = max(1, min(row_count, ROWS_PER_CHUNK[device] * indices.shape[1]))
    step = ROWS_PER_CHUNK[device]
    if not always:
        step = max(1, min(step, SCORES_PER_CHUNK[device] // (heads * widest)))
    query = torch.cat([q_latent, q_rope], -1)  # [T, H, C + R]
    pending = [slice(start, min(start + step, length)) for start in range(0, length, step)]
    while pending:
        part = pending.pop()
        used, places = _union(indices[part].long(), row_count)
        if used.numel() == 0:
            continue
        latent, rope = (x.float() for x in rows(used))  # [U, C], [U, R]
        keys = torch.cat([latent, rope], -1)
        if always or used.numel() > GATHERS_OVER[device] * indices.shape[1]:
            out[part], lse[part] = attend_gathered(query[part], keys, places, width, sm_scale)
            continue
        if part.stop - part.start > 1 and not bool(keys.isfinite().all()):
            # 0 · NaN is NaN: only alone do the queries that did not select a non-finite row stay clean of it.
            pending += [slice(one, one + 1) for one in range(part.start, part.stop)]
            continue
        scores = (query[part].float().flatten(0, 1) @ keys.T).mul_(sm_scale).view(-1, heads, used.numel())
        times = _counts(places, used.numel())[:, None]  # [t, 1, U]
        scores = torch.where(times > 0, scores + times.clamp(min=1).log(), -torch.inf)
        total = scores.logsumexp(-1, keepdim=True)
        # -inf - -inf is NaN: a query without any valid row keeps weight 0 everywhere.
        weights = (scores - total.clamp(min=torch.finfo(torch.float32).min)).exp_()
        out[part] = (weights.flatten(0, 1) @ latent).view(-1, heads, width).to(out.dtype)
        lse[part] = total.squeeze(-1)
    return out, lse


def attend_gathered(
    query: Tensor, keys: Tensor, numbers: Tensor, width: int, sm_scale: float
) -> tuple[Tensor, Tensor]:
    """Exact attention of each query over its own rows, gathered.

    Args:
        query: [t, H, C + R]. keys: [U, C + R] float32, of which the first `width` columns are the values.
        numbers: [t, K] int64 rows of keys, -1 where a query has fewer than K.

    Returns:
        out [t, H, width] in the queries' dtype and lse [t, H] float32.
    """
    out = query.new_empty(*query.shape[:2], width)
    lse = query.new_empty(query.shape[:2], dtype=torch.float32)
    step = max(1, GATHERED_PER_CHUNK // (max(1, numbers.shape[1]) * keys.shape[1]))
    # One more row, of zeros, stands where a query has none: 0 · NaN is NaN.
    keys = torch.cat([keys, keys.new_zeros(1, keys.shape[1])])
    narrow = query.dtype == torch.bfloat16
    parts = _terms(keys, 1 if torch.equal(keys, keys.bfloat16().float()) else TERMS) if narrow else [keys]
    for start in range(0, len(query), step):
        part = slice(start, start + step)
        chosen = numbers[part].where(numbers[part] >= 0, len(keys) - 1)
        rows = [F.embedding(chosen, x) for x in parts]  # each [t, K, C + R]
        scores = _product([query[part]], [x.transpose(1, 2) for x in rows])  # [t, H, K]
        weights, lse[part] = _weigh(scores, numbers[part], sm_scale, narrow)
        out[part] = _product(weights, [x[..., :width] for x in rows]).to(out.dtype)
    return out, lse


def _weigh(scores: Tensor, numbers: Tensor, sm_scale: float, narrow: bool) -> tuple[list[Tensor], Tensor]:
    """The softmax of scores [t, H, K], as terms where the rows are terms, and lse [t, H]; see `attend_gathered`."""
    if narrow and scores.is_cuda and has_triton():
        from evalkit.attention.backends.kernels import weighing

        return weighing.weigh(scores, numbers, sm_scale)
    scores = scores.mul_(sm_scale).masked_fill_((numbers < 0)[:, None], -torch.inf)
    total = scores.logsumexp(-1, keepdim=True)
    # As in `_attend`: a query without any valid row keeps weight 0 everywhere.
    weights = scores.sub_(total.clamp(min=torch.finfo(torch.float32).min)).exp_()
    return _terms(weights, TERMS) if narrow else [weights], total.squeeze(-1)


def _terms(x: Tensor, count: int) -> list[Tensor]:
    """bf16 tensors whose sum is x, largest first: all of float32's bits in three."""
    if count == 1:
        return [x.bfloat16()]
    # Rounding takes the largest float32 numbers to infinity, and nothing is left of an infinity: inf - inf is NaN.
    finite, most = x.isfinite(), torch.finfo(torch.bfloat16).max
    found = [x.clamp(-most, most).where(finite, x).bfloat16()]
    while len(found) < count:
        x = (x - found[-1]).where(finite, 0.0)
        found.append(x.bfloat16())
    return found


def _product(left: list[Tensor], right: list[Tensor]) -> Tensor:
    """The matrix products of two sums of terms [t, n, m] and [t, m, p], float32, without what falls below its bits."""
    total: Tensor | None = None
    for i, a in enumerate(left):
        for b in right[: TERMS - i]:
            one = (
                torch.bmm(a, b, out_dtype=torch.float32)
                if a.is_cuda and b.dtype != torch.float32
                else a.float().bmm(b.float())
            )
            total = one if total is None else total.add_(one)
    assert total is not None
    return total


def _union(indices: Tensor, row_count: int) -> tuple[Tensor, Tensor]:
    """The rows that any query selects, [U] ascending, and the indices [t, K] as places among them, -1 kept."""
    valid = indices >= 0
    spare = indices.where(valid, row_count)  # invalid entries get a column that is cut off
    present = torch.zeros(row_count + 1, dtype=torch.bool, device=indices.device)
    present[spare.flatten()] = True
    used = present[:row_count].nonzero().squeeze(-1)
    return used, (present.cumsum(0) - 1)[spare].where(valid, -1)


def _counts(places: Tensor, rows: int) -> Tensor:
    """How often each query selects each of the rows: places [t, K] -> [t, rows] float32."""
    counts = torch.zeros(places.shape[0], rows + 1, device=places.device)
    spare = places.where(places >= 0, rows)
    counts.scatter_add_(1, spare, torch.ones_like(counts[:, :1]).expand(places.shape))
    return counts[:, :-1]
