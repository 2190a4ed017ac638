"""Each real kernel against exact attention on the same rows, read as that kernel reads them, and against itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from evalkit import kv
from evalkit.attention import backends
from evalkit.attention.backends import flashinfer
from evalkit.kv import Scales

# Torch's compiler, which fuses decoding, warns about what it imports.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

SM_SCALE = 192**-0.5
COUNTS = (0, 1, 700, 2048)  # valid slots of a query, in turn
SLOTS = 4096
READS = [("flashinfer", name) for name in ("bf16", "fp8_e4m3", "fp8_group128")] + [
    ("flashmla", name) for name in ("bf16", "fp8_ds_mla", "fp8_ds_mla_fp32scale")
]
DECODED = [(name, format) for name in ("flashinfer", "flashmla") for format in kv.names()]
ALL = [(*read, "native") for read in READS] + [(*read, "decoded") for read in DECODED]


def problem(
    heads: int, seed: int = 0, counts: tuple[int, ...] = 4 * COUNTS
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Queries, rows and selections on the GPU; magnitudes differ by row, slots from 3584 up are never selected."""
    draw = torch.Generator(device="cuda").manual_seed(seed)
    rows = len(counts)
    q_latent = torch.randn(rows, heads, 512, device="cuda", generator=draw)
    q_rope = torch.randn(rows, heads, 64, device="cuda", generator=draw)
    size = torch.logspace(-2, 0.5, SLOTS, device="cuda")[torch.randperm(SLOTS, device="cuda", generator=draw)]
    latent = torch.randn(SLOTS, 512, device="cuda", generator=draw) * size[:, None]
    rope = torch.randn(SLOTS, 64, device="cuda", generator=draw) * size[:, None]
    indices = torch.full((rows, 2048), -1, dtype=torch.int32, device="cuda")
    for row, count in enumerate(counts):
        indices[row, :count] = torch.randperm(3584, device="cuda", generator=draw)[:count].int()
    return q_latent.bfloat16(), q_rope.bfloat16(), latent.bfloat16(), rope.bfloat16(), indices


@pytest.fixture(params=READS, ids=lambda read: "@".join(reversed(read)))
def read(request: pytest.FixtureRequest) -> tuple[backends.Backend, kv.RowFormat]:
    backend, format = backends.get(request.param[0]), kv.get(request.param[1])
    reason = backend.unavailable_because(format, torch.device("cuda"), 128, 2048)
    if reason is not None:
        pytest.skip(reason)
    return backend, format


@pytest.fixture(params=ALL, ids=lambda read: f"{read[1]}@{read[0]}+{read[2]}")
def any_read(request: pytest.FixtureRequest) -> tuple[backends.Backend, kv.RowFormat]:
    """Every kernel with every format that it reads, and every format decoded for it."""
    backend, format = backends.reading(request.param[0], read=request.param[2]), kv.get(request.param[1])
    reason = backend.unavailable_because(format, torch.device("cuda"), 128, 2048)
    if reason is not None:
        pytest.skip(reason)
    return backend, format


def stored(format: kv.RowFormat, latent: Tensor, rope: Tensor) -> Tensor:
    cache = format.allocate(SLOTS, device="cuda")
    format.store(cache, torch.arange(SLOTS, device="cuda"), latent, rope, Scales())
    return cache


@pytest.mark.parametrize("heads", [8, 16, 128])
def test_every_query_is_within_3e_3_of_exact_attention(
    read: tuple[backends.Backend, kv.RowFormat], heads: int
) -> None:
    backend, format = read
    q_latent, q_rope, latent, rope, indices = problem(heads)
    scales = Scales(latent=0.0123, rope=0.0123) if format.uses_scales else Scales()
    cache = format.allocate(SLOTS, device="cuda")
    slots = torch.arange(SLOTS, device="cuda")
    format.store(cache, slots, latent, rope, scales)
    poison = torch.full_like(latent[:1], torch.nan).expand(512, -1)
    format.store(cache, slots[3584:], poison, poison[:, :64], scales)
    # The kernel runs first, so that memory freed by the reference cannot hold the answer.
    got, lse = backend.attend(q_latent, q_rope, cache, format, indices, SM_SCALE, scales)
    reference = backends.get("reference")
    want, want_lse = reference.attend(
        q_latent.float(),
        q_rope.float(),
        cache,
        format,
        indices,
        SM_SCALE,
        scales,
        reader=backend,
    )
    empty = (indices < 0).all(-1)
    assert (got[empty] == 0).all()
    assert (lse[empty] == -torch.inf).all()
    error = (got.float() - want)[~empty].flatten(1).norm(dim=-1) / want[~empty].flatten(1).norm(dim=-1)
    assert float(error.max()) <= 3e-3, error
    torch.testing.assert_close(lse[~empty], want_lse[~empty], rtol=1e-3, atol=2e-3)


def test_a_batch_of_many_more_rows_than_one_launch_takes_is_as_near_to_exact_attention(
    read: tuple[backends.Backend, kv.RowFormat],
) -> None:
    backend, format = read
    q_latent, q_rope, latent, rope, indices = problem(16)
    cache = format.allocate(SLOTS, device="cuda")
    format.store(cache, torch.arange(SLOTS, device="cuda"), latent, rope, Scales())
    times = 9000 // len(indices)
    many, _ = backend.attend(
        q_latent.repeat(times, 1, 1),
        q_rope.repeat(times, 1, 1),
        cache,
        format,
        indices.repeat(times, 1),
        SM_SCALE,
        Scales(),
    )
    want, _ = backends.get("reference").attend(
        q_latent.float(), q_rope.float(), cache, format, indices, SM_SCALE, Scales(), reader=backend
    )
    got = many.float().unflatten(0, (times, len(indices)))  # [times, T, H, C]
    empty = (indices < 0).all(-1)
    assert (got[:, empty] == 0).all()
    error = (got - want)[:, ~empty].flatten(2).norm(dim=-1) / want[~empty].flatten(1).norm(dim=-1)
    assert float(error.max()) <= 3e-3, error.amax(0)


def test_the_model_runs_on_every_kernel_and_agrees_with_the_reference(
    read: tuple[backends.Backend, kv.RowFormat], make_model: object
) -> None:
    from evalkit.model.graft import graft

    backend, format = read
    model = graft(make_model().bfloat16().cuda(), f"{format.name}@reference")  # type: ignore[operator]
    ids = torch.randint(2, 128, (2, 96), generator=torch.Generator().manual_seed(1)).cuda()
    with torch.no_grad():
        want = model(ids).logits.float()
        chosen = model.evalkit.new_cache(f"{format.name}@{backend.name}")
        prompt = model(ids[:, :90], **chosen.argument).logits
        steps = [prompt] + [model(ids[:, t : t + 1], **chosen.argument).logits for t in range(90, 96)]
    got = torch.cat(steps, 1).float()
    # Selections and expert choices may flip at near-ties, so the typical token is compared.
    error = (got - want).norm(dim=-1) / want.norm(dim=-1)
    assert float(error.median()) <= 5e-2


@pytest.mark.parametrize("heads", [16, 64, 128])
def test_a_query_does_not_depend_on_the_others_in_its_call(
    any_read: tuple[backends.Backend, kv.RowFormat], heads: int
) -> None:
    """Bit for bit: alone, among five, and among three hundred of other lengths."""
    backend, format = any_read
    others = torch.randint(0, 2049, (297,), generator=torch.Generator().manual_seed(2)).tolist()
    q_latent, q_rope, latent, rope, indices = problem(heads, counts=(2048, 700, 1, *others))
    cache = stored(format, latent, rope)

    def attend(rows: list[int]) -> tuple[Tensor, Tensor]:
        return backend.attend(q_latent[rows], q_rope[rows], cache, format, indices[rows], SM_SCALE, Scales())

    out, lse = attend(list(range(300)))
    for row in range(3):
        for call in ([row], [7, row, 250, 31, 120]):
            got, got_lse = attend(call)
            assert torch.equal(got[call.index(row)], out[row]), (row, len(call))
            assert torch.equal(got_lse[call.index(row)], lse[row]), (row, len(call))


def flashinfer_or_skip() -> flashinfer.FlashInfer:
    """A backend of its own, without plans."""
    backend = flashinfer.FlashInfer()
    reason = backend.unavailable_because(kv.get("bf16"), torch.device("cuda"), 128, 2048)
    if reason is not None:
        pytest.skip(reason)
    return backend


def test_left_to_split_flashinfer_gives_a_query_other_bits_alone() -> None:
    """What the padding is against, and what floor:split measures."""
    padded = flashinfer_or_skip()
    splitting, format = padded.splitting(), kv.get("bf16")
    assert splitting is not None
    q_latent, q_rope, latent, rope, indices = problem(128, counts=(2048,))
    call = (q_latent, q_rope, stored(format, latent, rope), format, indices, SM_SCALE, Scales())
    want, got = (backend.attend(*call)[0].float() for backend in (padded, splitting))
    assert not torch.equal(got, want)
    assert float((got - want).norm() / want.norm()) <= 5e-3


def test_a_kept_plan_reads_the_slots_of_this_call(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, format = flashinfer_or_skip(), kv.get("bf16")
    plan, made = flashinfer._plan, []

    def counted(*arguments: Any) -> Any:
        made.append(arguments)
        return plan(*arguments)

    monkeypatch.setattr(flashinfer, "_plan", counted)
    for counts in ((2048,) * 70, (2048, 700, 1)):
        made.clear()
        for seed in range(3):
            q_latent, q_rope, latent, rope, indices = problem(128, seed, counts)
            call = (q_latent, q_rope, stored(format, latent, rope), format, indices, SM_SCALE, Scales())
            got = backend.attend(*call)
            assert len(made) == 1
            monkeypatch.setattr(flashinfer, "_plan", plan)
            want = flashinfer.FlashInfer().attend(*call)
            monkeypatch.setattr(flashinfer, "_plan", counted)
            assert torch.equal(got[0], want[0])
            assert torch.equal(got[1], want[1])


def test_queries_need_not_be_contiguous(any_read: tuple[backends.Backend, kv.RowFormat]) -> None:
    """The path's einsum leaves heads outermost in memory."""
    backend, format = any_read
    for counts in ((2048, 5, 0), (2048,) * 130):
        q_latent, q_rope, latent, rope, indices = problem(16, counts=counts)
        cache = stored(format, latent, rope)
        strided = [q.transpose(0, 1).contiguous().transpose(0, 1) for q in (q_latent, q_rope)]
        got = backend.attend(*strided, cache, format, indices, SM_SCALE, Scales())
        want = backend.attend(q_latent, q_rope, cache, format, indices, SM_SCALE, Scales())
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])


def test_a_call_of_empty_queries_alone_gives_zeros(any_read: tuple[backends.Backend, kv.RowFormat]) -> None:
    backend, format = any_read
    q_latent, q_rope, latent, _rope, indices = problem(16, counts=(0, 0))
    poison = torch.full_like(latent, torch.nan)
    cache = stored(format, poison, poison[:, :64])
    out, lse = backend.attend(q_latent, q_rope, cache, format, indices, SM_SCALE, Scales())
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
