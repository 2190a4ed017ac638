"""read=decoded: what is handed to the bf16 kernel is what a kernel's own dequantisation would make of the rows."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from evalkit import kv
from evalkit.attention import backends
from evalkit.attention.backends import decoded
from evalkit.attention.backends.flashmla import FlashMLA
from evalkit.attention.backends.readers import READERS
from evalkit.errors import InputError
from evalkit.kv import Scales
from evalkit.model.graft import graft

SM_SCALE = 192**-0.5
SCALES = Scales(latent=0.0123, rope=0.0171)  # neither is a bf16 number
SLOTS = 130
# Torch's compiler warns about what it imports, and of slow settings that are exact on purpose.
compiles = pytest.mark.filterwarnings("default")


def filled(format: kv.RowFormat, device: str = "cpu", slots: int = SLOTS) -> Tensor:
    """A cache whose rows differ by four orders of magnitude; the last row is NaN where the format has one."""
    draw = torch.Generator().manual_seed(3)
    size = torch.logspace(-3, 1, slots)[torch.randperm(slots, generator=draw)][:, None]
    latent, rope = torch.randn(slots, 512, generator=draw) * size, torch.randn(slots, 64, generator=draw)
    latent[-1] = rope[-1] = torch.nan
    cache = format.allocate(slots, device=device)
    numbers = torch.arange(slots, device=device)
    format.store(cache, numbers, latent.to(device), rope.to(device), SCALES)
    return cache


def selection(queries: int, width: int, device: str = "cpu", slots: int = SLOTS) -> Tensor:
    """Slots [T, K] int32 below the last, some of them -1, the last query without any."""
    draw = torch.Generator().manual_seed(4)
    found = torch.randint(-slots // 4, slots - 1, (queries, width), generator=draw).clamp(min=-1).int()
    found[-1] = -1
    return found.to(device)


def sizes() -> list[Any]:
    return [pytest.param(3, 8, id="few"), pytest.param(5, 40, id="more-than-the-cache-holds")]


@pytest.mark.parametrize("name", kv.names())
@pytest.mark.parametrize(("queries", "width"), sizes())
def test_rows_are_decoded_to_what_a_bf16_kernel_would_make_of_them(
    name: str, queries: int, width: int
) -> None:
    format = kv.get(name)
    cache, indices = filled(format), selection(queries, width)
    rows, numbers = decoded.decode(format, cache, indices, SCALES)
    assert torch.equal(numbers < 0, indices < 0)
    valid = indices >= 0
    values = kv.get("bf16").planes(rows).rows[numbers[valid].long()].float()
    latent, rope = READERS["sm90_bf16"].read(format, cache, indices[valid], SCALES)
    assert torch.equal(values, torch.cat([latent, rope], -1))


def test_no_more_rows_are_decoded_than_are_selected_or_stored() -> None:
    format = kv.get("nvfp4_ds_mla")
    cache = filled(format, slots=128)
    assert len(decoded.decode(format, cache, selection(3, 8), SCALES)[0]) == 24
    assert len(decoded.decode(format, cache, selection(4, 32), SCALES)[0]) == 128


@pytest.mark.parametrize("name", kv.names())
@pytest.mark.parametrize(("queries", "width"), sizes())
def test_attention_is_that_over_rows_read_as_the_kernel_reads_them(
    name: str, queries: int, width: int
) -> None:
    format, backend = kv.get(name), backends.reading("reference", read="decoded")
    cache, indices = filled(format), selection(queries, width)
    draw = torch.Generator().manual_seed(5)
    q_latent = torch.randn(queries, 4, 512, generator=draw)
    q_rope = torch.randn(queries, 4, 64, generator=draw)
    out, lse = backend.attend(q_latent, q_rope, cache, format, indices, SM_SCALE, SCALES)
    like = backends.reading("reference", reader="sm90_bf16")
    want, want_lse = like.attend(q_latent, q_rope, cache, format, indices, SM_SCALE, SCALES)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-5)
    assert (out[-1] == 0).all()
    assert (lse[-1] == -torch.inf).all()


def test_scales_are_rounded_in_integers_as_a_cast_to_bf16_rounds_them() -> None:
    draw = torch.Generator().manual_seed(6)
    drawn = torch.randint(-(2**31), 2**31, (1 << 20,), generator=draw).int()
    ties = torch.arange(1 << 16, dtype=torch.int32) << 16 | 0x8000
    bits = torch.cat([drawn, ties, ties - 1, ties + 1, ties & -0x1_0000])
    got, want = (x(bits.view(torch.float32)) for x in (decoded._round_to_bf16, kv.round_to_bf16))
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", kv.names())
@compiles
def test_a_format_is_traced_whole_and_once_whatever_its_scales(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One graph for all rows and one for selected ones; what the compiler makes of it is another matter."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.utils.counters.clear()
    format = kv.get(name)
    run = decoded.fused.__wrapped__(format)
    for slots, latent in ((130, 0.5), (200, 0.0123), (300, 0.7)):
        planes = format.byte_planes(filled(format, slots=slots))
        scales = Scales(latent=latent, rope=latent * 1.1)
        given = decoded._Given(*(torch.tensor(scale) for scale in (scales.latent, scales.rope)))
        for index in (None, torch.randint(slots, (slots // 2,))):
            got = run(planes, index, given)
            want = decoded._eager(format, planes, index, scales)
            assert torch.equal(got.view(torch.int16), want.view(torch.int16))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_a_model_runs_on_decoded_rows_and_says_so(make_model: Any) -> None:
    model = graft(make_model(), "nvfp4_ds_mla:one@reference+read=decoded")
    state = model.evalkit.new_cache().state
    assert str(state.candidate) == "nvfp4_ds_mla:one@reference+read=decoded"
    assert state.backend.kernel_on(model.device).endswith(", on rows decoded to bf16")
    ids = torch.randint(2, 128, (1, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got = model(ids).logits
        like = model.evalkit.new_cache("nvfp4_ds_mla@reference+reader=sm90_bf16")
        plain = model.evalkit.new_cache("bf16@reference")
        want, other = (model(ids, **cache.argument).logits for cache in (like, plain))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(got, other, rtol=1e-3, atol=1e-4)


def test_decoded_rows_take_no_other_reader() -> None:
    with pytest.raises(InputError, match="reader=sm100_e8m0 goes with read=native"):
        backends.reading("reference", "sm100_e8m0", "decoded")


def test_only_what_the_kernel_says_of_bf16_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def reads_bf16(self: FlashMLA, format: kv.RowFormat, *_: Any) -> str | None:
        return None if format.name == "bf16" else f"not {format.name}"

    monkeypatch.setattr(FlashMLA, "unavailable_because", reads_bf16)
    backends.refuse_unavailable("flashmla", "nvfp4_ds_mla", "cpu", 8, 64, "decoded")
    hint = r"not nvfp4_ds_mla; nvfp4_ds_mla@flashmla\+read=decoded decodes its rows to bf16 first"
    with pytest.raises(InputError, match=hint):
        backends.refuse_unavailable("flashmla", "nvfp4_ds_mla", "cpu", 8, 64)
    assert backends.best("nvfp4_ds_mla", "cpu", 8, 64, read="decoded") == "flashmla"
    assert backends.best("nvfp4_ds_mla", "cpu", 8, 64) == "reference"


@pytest.mark.skipif(torch.cuda.is_available(), reason="it can run there")
def test_a_kernel_that_cannot_run_here_is_refused_under_its_whole_name() -> None:
    with pytest.raises(InputError, match=r"^fp8_ds_mla@flashinfer\+read=decoded cannot run here: "):
        backends.refuse_unavailable("flashinfer", "fp8_ds_mla", "cpu", 8, 64, "decoded")


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["kernel", "compiled"])
@pytest.mark.parametrize("name", kv.names())
@compiles
def test_decoding_on_a_gpu_has_the_bits_of_the_eager_one(
    name: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the kernel that reads the format's layout, and as torch.compile fuses a format that has none."""
    format = kv.get(name)
    if compiled:
        monkeypatch.setattr(type(format), "layout", None)
    for slots, queries, width in ((4096, 1, 2048), (4096, 5, 2048), (70_000, 3, 512), (512, 64, 512)):
        cache = filled(format, "cuda", slots)
        indices = selection(queries, width, "cuda", slots)
        rows, numbers = decoded.decode(format, cache, indices, SCALES)
        valid = indices >= 0
        assert torch.equal(numbers >= 0, valid)
        got = kv.get("bf16").planes(rows).rows[numbers[valid].long()]
        want = decoded._eager(format, format.byte_planes(cache), indices[valid], SCALES)
        assert torch.equal(got.view(torch.int16), want.view(torch.int16))
    assert name not in decoded._EAGER, "torch.compile refused this format"


@pytest.mark.parametrize("name", ["fp8_ds_mla", "nvfp4_flashinfer"])
@compiles
def test_compiled_code_has_the_bits_of_the_eager_one(name: str) -> None:
    """Inductor's own, on a CPU: of stored scales, and of planes with zeros of both signs."""
    format = kv.get(name)
    planes = format.byte_planes(filled(format))
    given = decoded._Given(torch.tensor(SCALES.latent), torch.tensor(SCALES.rope))
    got = decoded.fused.__wrapped__(format)(planes, None, given)[:-1]
    want = decoded._eager(format, planes, None, SCALES)[:-1]
    assert not format.four_bit or ((want == 0) & want.signbit()).any()
    assert torch.equal(got.view(torch.int16), want.view(torch.int16))


def test_rows_that_are_bf16_already_stay_where_they_are() -> None:
    format = kv.get("bf16")
    cache = filled(format)
    for queries, width in ((3, 8), (5, 40)):
        indices = selection(queries, width)
        rows, numbers = decoded.decode(format, cache, indices, SCALES)
        assert numbers is indices
        assert rows.data_ptr() == cache.data_ptr()


NATIVE = [("flashinfer", name) for name in ("fp8_e4m3", "fp8_group128")]
NATIVE += [("flashmla", name) for name in ("fp8_ds_mla", "fp8_ds_mla_fp32scale")]


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize(("backend", "name"), NATIVE)
@compiles
def test_decoded_and_native_agree_within_1e_3_query_by_query_and_over_all(
    backend: str, name: str, heads: int
) -> None:
    """FlashInfer multiplies both in one way; FlashMLA's two kernels sum in different orders, which bf16 shows."""
    format, native = kv.get(name), backends.get(backend)
    reason = native.unavailable_because(format, torch.device("cuda"), heads, 2048)
    if reason is not None:
        pytest.skip(reason)
    slots = 4096
    cache, indices = filled(format, "cuda", slots), selection(70, 2048, "cuda", slots)
    draw = torch.Generator(device="cuda").manual_seed(7)
    q_latent = torch.randn(70, heads, 512, device="cuda", generator=draw).bfloat16()
    q_rope = torch.randn(70, heads, 64, device="cuda", generator=draw).bfloat16()
    inputs = (q_latent, q_rope, cache, format, indices, SM_SCALE, SCALES)
    got, got_lse = backends.reading(backend, read="decoded").attend(*inputs)
    want, want_lse = native.attend(*inputs)
    difference = (got.float() - want.float()).flatten(1).norm(dim=-1)[:-1]
    size = want.float().flatten(1).norm(dim=-1)[:-1]
    row, whole = float((difference / size).max()), float(difference.norm() / size.norm())
    print(f"{name}@{backend}, {heads} heads: worst query {row:.2e}, all {whole:.2e}")
    assert row <= 1e-3, (row, whole)
    assert whole <= 1e-3, (row, whole)
    torch.testing.assert_close(got_lse, want_lse, rtol=1e-4, atol=1e-3)
