"""The SM100 kernel's arithmetic in torch, on any device: what goes into its matrix products, and the products.

What is known of the kernel and what is modelled stands in `emulated.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from evalkit.errors import InputError
from evalkit.kv import RowFormat, Scales
from evalkit.kv.numerics.e4m3 import E4M3_MAX, constant, to_e4m3

LATENT = 512
LOG2_E = math.log2(math.e)
ROWS_PER_CHUNK = {"cpu": 64, "cuda": 1024}  # each gathers a tile of rows of its own, in float32


@dataclass(frozen=True, kw_only=True)
class ProbModel:
    """How P is rounded for the second matrix product.

    tile: keys scored before their P is rounded, relative to the largest score until then: a power of two.
    scale: what P, at most 1, is multiplied by before it becomes e4m3; its reciprocal goes into the output's scale.
    """

    tile: int = 128
    scale: float = E4M3_MAX

    def __post_init__(self) -> None:
        if self.tile not in (16, 32, 64, 128):
            raise InputError(f"a tile of {self.tile} keys: 16, 32, 64 or 128 are right")
        if not 0 < self.scale <= E4M3_MAX:
            raise InputError(f"P is scaled by {self.scale}: above 0 and at most {E4M3_MAX:g} is right")


@dataclass(frozen=True, kw_only=True, eq=False)
class Operands:
    """What the kernel is given.

    query: [T, H, C + R] codes. rows: [N, C + R] of the same dtype, e4m3 or bf16.
    score_scale: times a product of codes is the score (`bmm1_scale`).
    value_scale: times a weighted sum of codes is the output (`bmm2_scale`).
    """

    query: Tensor
    rows: Tensor
    score_scale: float
    value_scale: float

    @property
    def is_fp8(self) -> bool:
        """Whether query, rows and P are e4m3; they are bf16 otherwise."""
        return self.rows.dtype == torch.float8_e4m3fn


def operands(
    q_latent: Tensor, q_rope: Tensor, cache: Tensor, format: RowFormat, sm_scale: float, scales: Scales
) -> Operands:
    """The arguments of `Backend.attend` as vLLM prepares them: a query of the rows' dtype, two scales for the sums.

    Raises:
        InputError: latent and rope of fp8 rows have scales of their own.
    """
    query, rows = torch.cat([q_latent, q_rope], -1), format.planes(cache).rows
    if rows.dtype != torch.float8_e4m3fn:
        return Operands(query=query.to(rows.dtype), rows=rows, score_scale=sm_scale, value_scale=1.0)
    if scales.latent != scales.rope:
        raise InputError(
            f"the SM100 kernel takes one scale for a whole row, latent has {scales.latent:g} and rope "
            f"{scales.rope:g}: give both the same"
        )
    # vLLM's writer multiplies by the float32 reciprocal.
    codes = to_e4m3(query.float() * (constant(1.0, query) / constant(scales.query, query)))
    return Operands(
        query=codes,
        rows=rows,
        score_scale=sm_scale * scales.query * scales.latent,
        value_scale=scales.latent,
    )


def attend(given: Operands, indices: Tensor, prob: ProbModel) -> tuple[Tensor, Tensor]:
    """Attention of given.query over the rows `indices` [T, K]: out [T, H, C] and lse [T, H], both float32."""
    length, heads = given.query.shape[:2]
    out = given.query.new_empty((length, heads, LATENT), dtype=torch.float32)
    lse = given.query.new_empty((length, heads), dtype=torch.float32)
    step = ROWS_PER_CHUNK.get(given.query.device.type, ROWS_PER_CHUNK["cpu"])
    for start in range(0, length, step):
        part = slice(start, start + step)
        out[part], lse[part] = _attend(given, given.query[part].float(), indices[part], prob)
    return out, lse


def _attend(given: Operands, query: Tensor, indices: Tensor, prob: ProbModel) -> tuple[Tensor, Tensor]:
    """query [t, H, C + R] float32: online softmax over tiles of keys, in the order of the slots."""
    out = query.new_zeros((*query.shape[:2], LATENT))
    total = query.new_zeros(query.shape[:2])
    highest = torch.full_like(total, -torch.inf)  # of the scores so far, in base 2
    scale = prob.scale if given.is_fp8 else 1.0
    for start in range(0, indices.shape[1], prob.tile):
        slots = indices[:, start : start + prob.tile]
        keys = _take(given.rows, slots)  # [t, k, C + R]
        scores = (query @ keys.mT) * (given.score_scale * LOG2_E)
        scores = scores.masked_fill((slots < 0)[:, None], -torch.inf)
        before, highest = highest, torch.maximum(highest, scores.amax(-1))
        base = highest.masked_fill(highest == -torch.inf, 0)  # -inf - -inf is NaN
        weights, fade = (scores - base[..., None]).exp2(), (before - base).exp2()
        total = total * fade + weights.sum(-1)
        rounded = to_e4m3(weights * scale) if given.is_fp8 else weights.bfloat16()
        out = out * fade[..., None] + rounded.float() @ keys[..., :LATENT]
    # A NaN total stays one; without a valid slot the sum and the total are both zero.
    factor = torch.where(total == 0, 0, given.value_scale / (total * scale))
    return out * factor[..., None], (highest + total.log2()) / LOG2_E


def _take(rows: Tensor, slots: Tensor) -> Tensor:
    """Rows at `slots` [t, k] as [t, k, C + R] float32, zeros where a slot is -1: what slot 0 holds may be NaN."""
    stored = rows.view(torch.uint8)
    taken = stored.index_select(0, slots.clamp(min=0).flatten())
    taken = taken.masked_fill((slots < 0).view(-1, 1), 0)
    return taken.view(rows.dtype).view(*slots.shape, -1).float()
