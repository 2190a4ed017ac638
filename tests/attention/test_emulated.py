"""The modelled SM100 kernel: its arithmetic by hand and in a float64 loop, its Triton kernel, and what records say."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from evalkit import kv
from evalkit.attention import backends
from evalkit.attention.backends.emulated import Emulated
from evalkit.attention.backends.sm100 import arithmetic
from evalkit.attention.backends.sm100.arithmetic import Operands, ProbModel
from evalkit.compare.layers import compare
from evalkit.compare.passes.noise import kernel_floor
from evalkit.errors import InputError
from evalkit.kv import Scales
from evalkit.kv.numerics.e4m3 import to_e4m3
from evalkit.model.graft import graft
from evalkit.records import LayerRecord
from tests.interpreter import interpret

SM_SCALE = 192**-0.5
SCALES = Scales(latent=0.0123, rope=0.0123, query=0.037)
COUNTS = (0, 1, 700, 2048)
EMULATED = backends.get("emulated")


def problem(
    heads: int,
    counts: tuple[int, ...] = COUNTS,
    slots: int = 4096,
    device: str = "cpu",
    largest: float = 0.5,
    times: int = 4,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Queries, rows whose magnitudes differ, and selections; slots from 7/8 on are never selected.

    With `largest` at 0.5 no key dominates, so that a P that rounds to a neighbouring code in one implementation and
    not in the other, as one at a tie may, does not move a row by 1e-3.
    """
    draw = torch.Generator().manual_seed(5)
    rows = times * len(counts)
    q_latent = torch.randn(rows, heads, 512, generator=draw)
    q_rope = torch.randn(rows, heads, 64, generator=draw)
    size = torch.logspace(-2, math.log10(largest), slots)[torch.randperm(slots, generator=draw)]
    latent = torch.randn(slots, 512, generator=draw) * size[:, None]
    rope = torch.randn(slots, 64, generator=draw) * size[:, None]
    indices = torch.full((rows, max(counts)), -1, dtype=torch.int32)
    for row in range(rows):
        count = counts[row % len(counts)]
        # Anywhere in the row, not only in front.
        places = torch.randperm(max(counts), generator=draw)[:count]
        indices[row, places] = torch.randperm(slots * 7 // 8, generator=draw)[:count].int()
    values = (x.bfloat16().to(device) for x in (q_latent, q_rope, latent, rope))
    return *values, indices.to(device)  # type: ignore[return-value]


def filled(name: str, latent: Tensor, rope: Tensor, scales: Scales = SCALES) -> tuple[kv.RowFormat, Tensor]:
    format = kv.get(name)
    cache = format.allocate(len(latent), device=latent.device)
    format.store(cache, torch.arange(len(latent), device=latent.device), latent, rope, scales)
    return format, cache


def given(name: str, heads: int, **options: Any) -> tuple[Operands, Tensor]:
    q_latent, q_rope, latent, rope, indices = problem(heads, **options)
    format, cache = filled(name, latent, rope)
    return arithmetic.operands(q_latent, q_rope, cache, format, SM_SCALE, SCALES), indices


def relative(got: Tensor, want: Tensor) -> Tensor:
    """Relative L2 of each row [T, H, C]."""
    return (got - want).float().flatten(1).norm(dim=-1) / want.float().flatten(1).norm(dim=-1)


def loop(operands: Operands, indices: Tensor, prob: ProbModel) -> tuple[Tensor, Tensor]:
    """One query, head and tile at a time, in float64, P rescaled to the largest score of all at the end."""
    length, heads = operands.query.shape[:2]
    out = torch.zeros(length, heads, 512, dtype=torch.float64)
    lse = torch.full((length, heads), -torch.inf, dtype=torch.float64)
    for t in range(length):
        for h in range(heads):
            seen, parts = -math.inf, []
            for slots in indices[t].split(prob.tile):
                keys = operands.rows.view(operands.rows.dtype)[slots[slots >= 0].long()].double()
                if not len(keys):
                    continue
                scores = keys @ operands.query[t, h].double() * operands.score_scale
                seen = max(seen, float(scores.max()))
                weights = (scores - seen).exp()
                if operands.is_fp8:
                    rounded = to_e4m3((weights * prob.scale).float()).double() / prob.scale
                else:
                    rounded = weights.bfloat16().double()
                parts.append((seen, float(weights.sum()), rounded @ keys[:, :512]))
            if parts:
                total = sum(weight * math.exp(at - seen) for at, weight, _ in parts)
                summed = sum(value * math.exp(at - seen) for at, _, value in parts)
                out[t, h] = summed * operands.value_scale / total
                lse[t, h] = seen + math.log(total)
    return out, lse


@pytest.mark.parametrize("name", ["fp8_e4m3", "bf16"])
@pytest.mark.parametrize("prob", [ProbModel(), ProbModel(tile=16), ProbModel(scale=1.0)], ids=str)
def test_it_equals_a_float64_loop_over_queries_heads_and_tiles(name: str, prob: ProbModel) -> None:
    operands, indices = given(name, 3, counts=(0, 1, 70, 200), slots=320)
    got, lse = arithmetic.attend(operands, indices, prob)
    want, want_lse = loop(operands, indices, prob)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)


def test_chunks_change_nothing_but_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    operands, indices = given("fp8_e4m3", 3, counts=(0, 1, 70, 200), slots=320)
    whole, _ = arithmetic.attend(operands, indices, ProbModel())
    monkeypatch.setitem(arithmetic.ROWS_PER_CHUNK, "cpu", 3)
    chunked, _ = arithmetic.attend(operands, indices, ProbModel())
    torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-6)


def two_keys(size: float = 1.0) -> tuple[kv.RowFormat, Tensor]:
    """Key 0 is `size` in dimension 0, key 1 in dimension 1, both without rope."""
    return filled("fp8_e4m3", torch.eye(512)[:2] * size, torch.zeros(2, 64), Scales())


def ask(
    value: float,
    selected: list[int],
    scales: Scales | None = None,
    backend: backends.Backend = EMULATED,
    sm_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Attention of one head whose query is `value` in dimension 0, over `two_keys`."""
    query = torch.zeros(1, 1, 512)
    query[..., 0] = value
    indices = torch.tensor([selected], dtype=torch.int32)
    format, cache = two_keys()
    return backend.attend(query, torch.zeros(1, 1, 64), cache, format, indices, sm_scale, scales or Scales())


@pytest.mark.parametrize(
    ("value", "scale", "score"),
    # e4m3 has steps of 1/8 from 1 on and of 16 from 128 to 256; 448 is its largest.
    [(1.05, 1.0, 1.0), (1.07, 1.0, 1.125), (1000.0, 1.0, 448.0), (1000.0, 4.0, 1024.0), (1e-4, 1.0, 0.0)],
)
def test_the_query_is_rounded_to_e4m3_with_its_scale(value: float, scale: float, score: float) -> None:
    _, lse = ask(value, [0], Scales(query=scale))
    assert lse.item() == pytest.approx(score, rel=1e-6, abs=1e-7)
    _, exact = ask(value, [0], backend=backends.get("reference"))
    assert exact.item() == pytest.approx(value, rel=1e-6)


def test_the_row_scale_multiplies_scores_and_sums() -> None:
    out, lse = ask(2.0, [0], Scales(latent=0.5, rope=0.5))
    assert lse.item() == pytest.approx(1.0)
    assert out[0, 0, :2].tolist() == [0.5, 0.0]


def test_one_selected_row_comes_back_as_it_is_stored() -> None:
    latent = torch.randn(1, 512, generator=torch.Generator().manual_seed(0))
    format, cache = filled("fp8_e4m3", latent, torch.zeros(1, 64))
    out, _ = EMULATED.attend(
        torch.ones(1, 2, 512),
        torch.ones(1, 2, 64),
        cache,
        format,
        torch.tensor([[-1, 0]], dtype=torch.int32),
        SM_SCALE,
        SCALES,
    )
    stored, _ = EMULATED.read(format, cache, torch.tensor([0]), SCALES)
    torch.testing.assert_close(out, stored.expand(2, 512)[None], rtol=1e-6, atol=0)


def test_p_is_rounded_after_its_scale_and_summed_before() -> None:
    """P of 2^-12 is 7 · 2^-6 after 448, a code; without, it is below half the smallest. 0.6 is 256/448 or 0.625."""
    small = 2.0**-12
    for scale, kept in ((448.0, small), (1.0, 0.0)):
        out, lse = ask(8.0, [0, 1], backend=Emulated(ProbModel(scale=scale)), sm_scale=12 * math.log(2) / 8)
        torch.testing.assert_close(out[0, 0, :2], torch.tensor([1.0, kept]) / (1 + small), rtol=1e-6, atol=0)
        # e^score of the two keys is 2^12 and 1, whatever P is rounded to.
        assert lse.item() == pytest.approx(math.log(4096 + 1))
    for scale, rounded in ((448.0, 256 / 448), (1.0, 0.625)):
        out, _ = ask(8.0, [0, 1], backend=Emulated(ProbModel(scale=scale)), sm_scale=-math.log(0.6) / 8)
        torch.testing.assert_close(out[0, 0, :2], torch.tensor([1.0, rounded]) / 1.6, rtol=1e-6, atol=0)


def test_p_is_relative_to_the_largest_score_until_its_tile() -> None:
    """Sixteen times key 1, then key 0, whose score is larger by ln 3: 448/3 is no code, 448 is."""
    for tile, rounded in ((16, 1 / 3), (32, 144 / 448)):
        out, _ = ask(8.0, [1] * 16 + [0], backend=Emulated(ProbModel(tile=tile)), sm_scale=math.log(3) / 8)
        want = torch.tensor([1.0, 16 * rounded]) / (1 + 16 / 3)
        torch.testing.assert_close(out[0, 0, :2], want, rtol=1e-6, atol=0)


def test_rows_without_a_slot_and_rows_of_nan_stay_where_they_are() -> None:
    operands, indices = given("fp8_e4m3", 3, counts=(0, 1, 70, 200), slots=320)
    for slot in (0, int(indices[2][indices[2] > 0][0])):
        operands.rows.view(torch.uint8)[slot] = 0x7F
        out, lse = arithmetic.attend(operands, indices, ProbModel())
        hit, empty = (indices == slot).any(-1), (indices < 0).all(-1)
        assert out[hit].isnan().all()
        assert out[~hit].isfinite().all()
        assert (out[empty] == 0).all()
        assert (lse[empty] == -torch.inf).all()
    nothing, lse = arithmetic.attend(operands, indices[:, :0], ProbModel())
    assert (nothing == 0).all()
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize(("name", "bound"), [("fp8_e4m3", 6e-2), ("bf16", 6e-3)])
def test_it_is_near_exact_attention_and_no_nearer_than_its_rounding(name: str, bound: float) -> None:
    q_latent, q_rope, latent, rope, indices = problem(4, counts=(0, 1, 70, 700), slots=1024)
    format, cache = filled(name, latent, rope)
    arguments = (q_latent.float(), q_rope.float(), cache, format, indices, SM_SCALE, SCALES)
    got, lse = EMULATED.attend(*arguments)
    want, want_lse = backends.get("reference").attend(*arguments)
    many = (indices >= 0).sum(-1) > 1
    error = relative(got[many], want[many])
    assert float(error.max()) <= bound
    assert float(error.min()) >= bound / 50
    torch.testing.assert_close(lse[many], want_lse[many], rtol=0, atol=bound)


def test_a_row_takes_one_scale() -> None:
    with pytest.raises(InputError, match=r"one scale for a whole row, latent has 0.5 and rope 0.25"):
        ask(1.0, [0], Scales(latent=0.5, rope=0.25))


@pytest.mark.parametrize("options", [{"tile": 100}, {"tile": 256}, {"scale": 0.0}, {"scale": 500.0}])
def test_a_model_of_p_that_no_kernel_has_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="right"):
        ProbModel(**options)


def test_it_reads_what_the_kernel_reads() -> None:
    cpu = torch.device("cpu")
    for name in kv.names():
        reason = EMULATED.unavailable_because(kv.get(name), cpu, 128, 2048)
        if name in ("bf16", "fp8_e4m3"):
            assert reason is None
        else:
            assert reason == f"the SM100 kernel reads bf16, fp8_e4m3, not {name}"
    assert kv.resolve("fp8", "emulated") == "fp8_e4m3"


def test_without_triton_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    gpu, fp8 = torch.device("cuda"), kv.get("fp8_e4m3")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert EMULATED.unavailable_because(fp8, gpu, 128, 2048) == (
        "the package triton is not installed (pip install triton)"
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert EMULATED.unavailable_because(fp8, gpu, 128, 2048) is None
    assert EMULATED.kernel_on(gpu).startswith("modelled: SM100")
    assert EMULATED.kernel_on(gpu).endswith("in Triton")


def test_records_say_that_it_is_modelled_and_how() -> None:
    assert EMULATED.kernel_on(torch.device("cpu")) == (
        "modelled: SM100 sparse MLA, query and P in the rows' dtype, fp8 P x 448 in tiles of 128 keys, in torch"
    )
    assert "fp8 P x 1 in tiles of 64 keys" in Emulated(ProbModel(tile=64, scale=1.0)).kernel


def test_nobody_gets_it_who_did_not_ask(make_model: Any) -> None:
    for format in ("bf16", "fp8_e4m3"):
        assert backends.best(format, "cpu", 16, 512) == "reference"
    assert "emulated" not in backends.PREFERENCE
    floor, _ = kernel_floor(graft(make_model()))
    assert floor is None or floor.backend != "emulated"


def test_a_model_runs_on_it_and_its_rounding_is_the_kernel_gap(make_model: Any) -> None:
    model = graft(make_model(), rounding=torch.bfloat16)
    ids = torch.randint(2, 128, (60,), generator=torch.Generator().manual_seed(4))
    asked = ("fp8_e4m3@emulated", "bf16@emulated", "fp8_e4m3@reference")
    candidates = [model.evalkit.resolve(text) for text in asked]
    assert model.evalkit.resolve("fp8@emulated") == candidates[0]
    found = compare(model, [ids], candidates, decode_tokens=2)
    gaps: dict[str, float] = {}
    for record in found:
        if isinstance(record, LayerRecord) and (record.layer, record.phase, record.mode, record.rung) == (
            1,
            "prefill",
            "isolated",
            "kernel",
        ):
            assert record.relative_l2 is not None
            gaps[record.candidate] = record.relative_l2
    fp8, bf16, exact = (gaps[str(candidate)] for candidate in candidates)
    assert 1e-2 < fp8 < 1e-1
    assert 5e-4 < bf16 < 6e-3
    assert exact == 0


@pytest.mark.slow
def test_the_triton_kernel_agrees_with_torch_under_its_interpreter() -> None:
    interpret("tests.attention.sm100_triton")


@pytest.fixture
def modelled() -> None:
    """The Triton kernel is what a GPU runs, unless it is the one that is modelled."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    reason = EMULATED.unavailable_because(kv.get("fp8_e4m3"), torch.device("cuda"), 128, 2048)
    if reason is not None:
        pytest.skip(reason)
    if not EMULATED.kernel_on(torch.device("cuda")).startswith("modelled"):
        pytest.skip("this GPU has the kernel itself")


@pytest.mark.gpu
@pytest.mark.usefixtures("modelled")
@pytest.mark.parametrize("name", ["fp8_e4m3", "bf16"])
@pytest.mark.parametrize("heads", [8, 16, 20, 128])
def test_the_triton_kernel_is_within_1e_3_of_torch_on_the_same_gpu(name: str, heads: int) -> None:
    q_latent, q_rope, latent, rope, indices = problem(heads, device="cuda")
    format, cache = filled(name, latent, rope)
    poison = torch.full_like(latent[:512], torch.nan)
    format.store(cache, torch.arange(3584, 4096, device="cuda"), poison, poison[:, :64], SCALES)
    arguments = (q_latent, q_rope, cache, format, indices, SM_SCALE, SCALES)
    got, lse = EMULATED.attend(*arguments)
    assert got.dtype == torch.bfloat16
    fine, fine_lse = EMULATED.attend(q_latent.float(), q_rope.float(), *arguments[2:])
    operands = arithmetic.operands(q_latent, q_rope, cache, format, SM_SCALE, SCALES)
    want, want_lse = arithmetic.attend(operands, indices, ProbModel())
    empty = (indices < 0).all(-1)
    for out, found in ((got, lse), (fine, fine_lse)):
        assert (out[empty] == 0).all()
        assert (found[empty] == -torch.inf).all()
        torch.testing.assert_close(found[~empty], want_lse[~empty], rtol=1e-5, atol=1e-4)
    error = relative(fine[~empty], want[~empty])
    assert float(error.max()) <= 1e-3, error
    assert torch.equal(got, fine.bfloat16())


@pytest.mark.gpu
@pytest.mark.usefixtures("modelled")
@pytest.mark.parametrize(("name", "bound"), [("fp8_e4m3", 6e-2), ("bf16", 6e-3)])
@pytest.mark.parametrize("heads", [8, 16, 128])
def test_the_triton_kernel_is_near_exact_attention(name: str, bound: float, heads: int) -> None:
    q_latent, q_rope, latent, rope, indices = problem(heads, device="cuda")
    format, cache = filled(name, latent, rope)
    arguments = (q_latent.float(), q_rope.float(), cache, format, indices, SM_SCALE, SCALES)
    got, _ = EMULATED.attend(*arguments)
    want, _ = backends.get("reference").attend(*arguments)
    some = (indices >= 0).any(-1)
    error = relative(got[some], want[some])
    assert float(error.max()) <= bound, error


@pytest.mark.gpu
@pytest.mark.usefixtures("modelled")
@pytest.mark.parametrize("heads", [8, 128])
def test_a_row_does_not_depend_on_its_neighbours(heads: int) -> None:
    q_latent, q_rope, latent, rope, indices = problem(heads, device="cuda", largest=3.0)
    format, cache = filled("fp8_e4m3", latent, rope)

    def attend(part: slice) -> tuple[Tensor, Tensor]:
        return EMULATED.attend(q_latent[part], q_rope[part], cache, format, indices[part], SM_SCALE, SCALES)

    out, lse = attend(slice(None))
    for row in range(len(indices)):
        alone, alone_lse = attend(slice(row, row + 1))
        assert torch.equal(alone[0], out[row])
        assert torch.equal(alone_lse[0], lse[row])


@pytest.mark.gpu
@pytest.mark.usefixtures("modelled")
def test_the_kernel_rounds_and_decodes_e4m3_as_cuda_does() -> None:
    from tests.attention.sm100_triton import check_decoding, check_rounding

    check_rounding("cuda")
    check_decoding("cuda")


@pytest.mark.gpu
@pytest.mark.usefixtures("modelled")
def test_a_model_runs_on_the_triton_kernel(make_model: Any) -> None:
    model = graft(make_model().bfloat16().cuda(), "fp8_e4m3@reference")
    ids = torch.randint(2, 128, (2, 96), generator=torch.Generator().manual_seed(1)).cuda()
    with torch.no_grad():
        want = model(ids).logits.float()
        cache = model.evalkit.new_cache("fp8_e4m3@emulated")
        prompt = model(ids[:, :90], **cache.argument).logits
        steps = [prompt] + [model(ids[:, t : t + 1], **cache.argument).logits for t in range(90, 96)]
    error = (torch.cat(steps, 1).float() - want).norm(dim=-1) / want.norm(dim=-1)
    # The query's rounding, and selections and expert choices that flip with it.
    assert 0 < float(error.median()) <= 0.2
