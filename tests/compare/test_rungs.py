"""Rungs and floors: a call split by hand, noise of a known size."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from evalkit import kv
from evalkit.attention import backends
from evalkit.attention.state import AttentionCall
from evalkit.compare.figures.metrics import relative_l2
from evalkit.compare.passes.noise import HALF_ULP, kernel_floor, row_noise
from evalkit.compare.passes.rungs import rungs
from evalkit.kv import Scales

SAME = torch.clone


def call(format: str, shift: int = 0) -> AttentionCall:
    """Six queries over 40 rows, all in one format; `shift` moves the selection."""
    generator = torch.Generator().manual_seed(0)
    latent, rope = torch.randn(40, 512, generator=generator), torch.randn(40, 64, generator=generator)
    q_latent, q_rope = torch.randn(6, 2, 512, generator=generator), torch.randn(6, 2, 64, generator=generator)
    rows = kv.get(format)
    cache = rows.allocate(64)
    rows.store(cache, torch.arange(40), latent, rope, Scales())
    indices = torch.arange(8, dtype=torch.int32).repeat(6, 1) + shift
    reference = backends.get("reference")
    out, lse = reference.attend(q_latent, q_rope, cache, rows, indices, 0.05, Scales())
    return AttentionCall(
        q_latent=q_latent,
        q_rope=q_rope,
        cache=cache,
        format=rows,
        indices=indices,
        sm_scale=0.05,
        scales=Scales(),
        out=out,
        lse=lse,
    )


def test_on_the_reference_backend_the_format_gap_is_the_total():
    found = rungs(call("bf16"), call("fp8_e4m3"), "reference", SAME)
    assert relative_l2(*found.kernel) == 0.0
    assert relative_l2(*found.format) == relative_l2(*found.total)
    assert (relative_l2(*found.total) or 0) > 1e-3


def test_a_kernel_that_is_off_shows_in_the_kernel_gap_alone():
    got = call("fp8_e4m3")
    off = replace(got, out=got.out * 1.25)
    found = rungs(call("bf16"), off, "flashinfer", SAME)
    assert relative_l2(*found.kernel) == pytest.approx(0.25)
    assert relative_l2(*found.format) == relative_l2(got.out, call("bf16").out)


def test_a_reader_that_rounds_scales_is_not_blamed_on_the_format():
    """At scale 1.0 bf16 rounding changes nothing: exact attention read so is the output."""
    found = rungs(call("bf16"), call("fp8_e4m3"), "flashinfer", SAME)
    assert relative_l2(*found.kernel) == 0.0


def test_another_selection_counts_in_the_total_and_in_no_other_rung():
    found = rungs(call("bf16"), call("bf16", shift=5), "reference", SAME)
    assert relative_l2(*found.format) == relative_l2(*found.kernel) == 0.0
    assert (relative_l2(*found.total) or 0) > 0.1


def test_other_queries_have_no_rungs():
    got = call("bf16")
    with pytest.raises(ValueError, match="isolated"):
        rungs(call("bf16"), replace(got, q_latent=got.q_latent * 2), "reference", SAME)


def test_row_noise_is_of_its_size_repeats_with_its_seed_and_ends_with_its_block(model: Any):
    layer = model.model.layers[0]
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        clean = layer.self_attn.kv_a_proj_with_mqa(x)
        runs = []
        for seed in (1, 1, 2):
            with row_noise(layer, HALF_ULP, seed):
                runs.append(layer.self_attn.kv_a_proj_with_mqa(x))
        after = layer.self_attn.kv_a_proj_with_mqa(x)
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert torch.equal(after, clean)
    assert torch.equal(runs[0][:, :512], clean[:, :512]), "the latent is disturbed after its norm"
    relative = ((runs[0] - clean) / clean)[:, 512:].abs()
    assert HALF_ULP / 2 < float(relative.max()) <= HALF_ULP * 1.01


def test_row_noise_of_half_a_unit_survives_a_model_that_computes_in_bf16():
    """Rounded to nearest, every value goes back to where it was and the floor reads zero."""
    attention = torch.nn.Module()
    attention.latent = 512
    attention.kv_a_layernorm = torch.nn.LayerNorm(512)
    attention.kv_a_proj_with_mqa = torch.nn.Linear(64, 576)
    layer = torch.nn.Module()
    layer.self_attn = attention
    layer.bfloat16()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 512, generator=generator).bfloat16()
    x[0, :2] = torch.tensor([math.nan, math.inf])
    with torch.no_grad():
        clean = attention.kv_a_layernorm(x[1:])
        with row_noise(layer, HALF_ULP, seed=1):
            got, broken = attention.kv_a_layernorm(x[1:]), attention.kv_a_layernorm(x[:1])
    error, size = (got - clean).double(), clean.double()
    # What float32 values, uniform within half a unit, differ by once both are rounded: half the noise times a unit.
    assert 1.5e-3 < float(error.norm() / size.norm()) < 3e-3
    assert abs(float((error * size).sum() / size.square().sum())) < 1e-4, "the noise has no mean"
    assert bool(((error / size).abs()[size != 0] <= 2.0**-7 + HALF_ULP).all()), "one unit at most"
    assert bool(broken.isnan().all()), "what is not finite stays so"


def test_without_another_kernel_every_backend_says_why(model: Any):
    found, reasons = kernel_floor(model)
    if found is not None:
        pytest.skip(f"{found} runs here")
    assert "flashinfer" in reasons
    assert "flashmla" in reasons
