"""Exact attention: against a float64 loop over queries, and on the rows that it must not read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from evalkit import kv
from evalkit.attention import backends
from evalkit.attention.backends import reference
from evalkit.kv import Scales

SM_SCALE = 192**-0.5
COUNTS = (0, 1, 70, 256)


def problem(
    heads: int = 8, slots: int = 512, selected: int = 256
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    q_latent = torch.randn(len(COUNTS) * 3, heads, 512, generator=draw)
    q_rope = torch.randn(len(COUNTS) * 3, heads, 64, generator=draw)
    latent = torch.randn(slots, 512, generator=draw)
    rope = torch.randn(slots, 64, generator=draw)
    indices = torch.full((len(COUNTS) * 3, selected), -1, dtype=torch.int32)
    for row in range(len(indices)):
        count = COUNTS[row % len(COUNTS)]
        # Slots from 400 up are never selected.
        indices[row, :count] = torch.randperm(400, generator=draw)[:count].int()
    return q_latent, q_rope, latent, rope, indices


def loop(
    q_latent: Tensor, q_rope: Tensor, latent: Tensor, rope: Tensor, indices: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention one query at a time, in float64."""
    out = torch.zeros(q_latent.shape, dtype=torch.float64)
    lse = torch.full(q_latent.shape[:2], -torch.inf, dtype=torch.float64)
    for row, chosen in enumerate(indices.long()):
        chosen = chosen[chosen >= 0]
        if len(chosen):
            scores = q_latent[row].double() @ latent[chosen].double().T
            scores = (scores + q_rope[row].double() @ rope[chosen].double().T) * SM_SCALE
            out[row] = scores.softmax(-1) @ latent[chosen].double()
            lse[row] = scores.logsumexp(-1)
    return out, lse


def attend(
    q_latent: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    rope: Tensor,
    indices: Tensor,
    sm_scale: float = SM_SCALE,
) -> tuple[Tensor, Tensor]:
    """The reference over these very rows."""
    format = kv.get("fp32")
    cache = format.allocate(len(latent))
    format.store(cache, torch.arange(len(latent)), latent, rope, Scales())
    return backends.get("reference").attend(q_latent, q_rope, cache, format, indices, sm_scale, Scales())


def test_it_equals_a_float64_loop_over_queries() -> None:
    q_latent, q_rope, latent, rope, indices = problem()
    out, lse = attend(q_latent, q_rope, latent, rope, indices)
    want, want_lse = loop(q_latent, q_rope, latent, rope, indices)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-6, atol=1e-5)


def test_a_row_without_a_valid_slot_gives_zero_and_minus_infinity() -> None:
    q_latent, q_rope, latent, rope, indices = problem()
    out, lse = attend(q_latent, q_rope, latent, rope, indices)
    empty = (indices < 0).all(-1)
    assert empty.any()
    assert (out[empty] == 0).all()
    assert (lse[empty] == -torch.inf).all()


def test_rows_that_nobody_selected_may_hold_nan() -> None:
    q_latent, q_rope, latent, rope, indices = problem()
    latent[400:], rope[400:] = torch.nan, torch.nan
    out, _ = attend(q_latent, q_rope, latent, rope, indices)
    assert out.isfinite().all()


def test_a_nan_row_reaches_only_the_queries_that_selected_it() -> None:
    q_latent, q_rope, latent, rope, indices = problem()
    poisoned = int(indices[1, 0])
    latent[poisoned] = torch.nan
    out, _ = attend(q_latent, q_rope, latent, rope, indices)
    hit = (indices == poisoned).any(-1)
    assert hit.any()
    assert not hit.all()
    assert out[hit].isnan().all()
    assert out[~hit].isfinite().all()


def test_chunking_changes_nothing_but_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = problem()
    whole, _ = attend(*inputs)
    monkeypatch.setitem(reference.SCORES_PER_CHUNK, "cpu", 5000)
    chunked, _ = attend(*inputs)
    torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-5)


def test_a_slot_selected_twice_counts_twice() -> None:
    q_latent, q_rope, latent, rope, _ = problem()
    twice = torch.tensor([[5, 5, 9]], dtype=torch.int32)
    out, lse = attend(q_latent[:1], q_rope[:1], latent, rope, twice)
    want, want_lse = loop(q_latent[:1], q_rope[:1], latent, rope, twice)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", kv.names())
def test_every_format_is_attended_as_its_decoded_rows(name: str) -> None:
    q_latent, q_rope, latent, rope, indices = problem()
    format = kv.get(name)
    scales = Scales(latent=0.25, rope=0.5) if format.uses_scales else Scales()
    cache = format.allocate(latent.shape[0])
    slots = torch.arange(latent.shape[0])
    format.store(cache, slots, latent, rope, scales)
    got, _ = backends.get("reference").attend(q_latent, q_rope, cache, format, indices, SM_SCALE, scales)
    want, _ = loop(q_latent, q_rope, *format.load(cache, slots, scales), indices)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_gathered_rows_give_what_the_union_of_rows_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU gathers; with repeated, missing and non-finite rows, and chunks that end in the middle."""
    draw = torch.Generator().manual_seed(6)
    q_latent, q_rope = (torch.randn(50, 3, width, generator=draw) for width in (512, 64))
    latent, rope = (torch.randn(200, width, generator=draw) for width in (512, 64))
    indices = torch.stack([torch.randperm(200, generator=draw)[:16] for _ in range(50)]).int()
    indices[3], indices[4, 5:], indices[5, 1] = -1, -1, indices[5, 0]
    latent[int(indices[7, 0])] = torch.nan
    monkeypatch.setitem(reference.GATHERS_OVER, "cpu", 1000)
    whole = attend(q_latent, q_rope, latent, rope, indices, 0.1)
    monkeypatch.setitem(reference.GATHERS_OVER, "cpu", 0)
    monkeypatch.setattr(reference, "GATHERED_PER_CHUNK", 7 * 16 * 576)
    seen: list[int] = []
    real = reference.attend_gathered
    monkeypatch.setattr(
        reference, "attend_gathered", lambda *given: seen.append(len(given[0])) or real(*given)
    )
    gathered = attend(q_latent, q_rope, latent, rope, indices, 0.1)
    assert sum(seen) >= 48
    for got, wanted in zip(gathered, whole, strict=True):
        torch.testing.assert_close(got, wanted, equal_nan=True)
    assert gathered[0][3].eq(0).all()
    assert gathered[1][3].isneginf().all()
    assert gathered[0][7].isnan().any()


@pytest.mark.parametrize("column", [7, 570])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, 3.4e38, -3.4e38])
def test_bf16_queries_over_a_row_that_bf16_does_not_hold(
    monkeypatch: pytest.MonkeyPatch, value: float, column: int
) -> None:
    """In latent or rope, beside rows that take several bf16 terms; 3.4e38 rounds to infinity."""
    draw = torch.Generator().manual_seed(9)
    query = (torch.randn(20, 3, 576, generator=draw) * 1e-3).bfloat16()
    query[..., 570] = -query[..., 570].abs() * 1e-34  # a weight of nearly one, or of zero
    keys = torch.randn(60, 576, generator=draw)
    indices = torch.stack([torch.randperm(60, generator=draw)[:8] for _ in range(20)]).int()
    keys[int(indices[0, 3]), column] = value
    parts = (query[..., :512], query[..., 512:], keys[:, :512], keys[:, 512:])
    monkeypatch.setitem(reference.GATHERS_OVER, "cpu", 1000)
    whole = attend(*parts, indices, 0.1)
    monkeypatch.setitem(reference.GATHERS_OVER, "cpu", 0)
    gathered = attend(*parts, indices, 0.1)
    for got, wanted in zip(gathered, whole, strict=True):
        torch.testing.assert_close(got, wanted, equal_nan=True)


@pytest.mark.parametrize("stored", ["in bf16", "in float32"])
def test_bf16_queries_over_gathered_rows_are_exact(monkeypatch: pytest.MonkeyPatch, stored: str) -> None:
    """As sums of bf16 terms, rows and weights keep float32's bits."""
    draw = torch.Generator().manual_seed(8)
    q_latent, q_rope = (torch.randn(50, 3, width, generator=draw).bfloat16() for width in (512, 64))
    latent, rope = (torch.randn(200, width, generator=draw) for width in (512, 64))
    if stored == "in bf16":
        latent, rope = latent.bfloat16().float(), rope.bfloat16().float()
    indices = torch.stack([torch.randperm(200, generator=draw)[:16] for _ in range(50)]).int()
    monkeypatch.setitem(reference.GATHERS_OVER, "cpu", 0)
    query, keys = torch.cat([q_latent, q_rope], -1), torch.cat([latent, rope], -1)
    rows = keys[indices.long()].double()
    scores = torch.einsum("thc,tkc->thk", query.double(), rows) * 0.1
    wanted = torch.einsum("thk,tkc->thc", scores.softmax(-1), rows[..., :512])
    out, lse = reference.attend_gathered(query, keys, indices.long(), 512, 0.1)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-6, atol=1e-6)
    assert (out.double() - wanted).norm() / wanted.norm() < 2.0**-9  # the output's own rounding


def test_a_product_of_terms_keeps_float32s_bits() -> None:
    draw = torch.Generator().manual_seed(9)
    left = torch.rand(2, 8, 64, generator=draw)
    right = torch.randn(2, 64, 16, generator=draw) * torch.logspace(-3, 3, 16)
    got = reference._product(*(reference._terms(x, reference.TERMS) for x in (left, right)))
    wanted = left.double() @ right.double()
    assert ((got - wanted).norm(dim=1) / wanted.norm(dim=1)).max() < 1e-6
    only = reference._product(*(reference._terms(x, 2) for x in (left, right)))
    assert ((only - wanted).norm(dim=1) / wanted.norm(dim=1)).max() > 1e-6
