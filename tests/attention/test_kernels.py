"""Each real kernel against exact attention on the same rows, read as that kernel reads them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from evalkit import kv
from evalkit.attention import backends
from evalkit.kv import Scales

pytestmark = pytest.mark.gpu

SM_SCALE = 192**-0.5
COUNTS = (0, 1, 700, 2048)  # valid slots of a query, in turn
SLOTS = 4096
READS = [("flashinfer", name) for name in ("bf16", "fp8_e4m3", "fp8_group128")] + [
    ("flashmla", name) for name in ("bf16", "fp8_ds_mla", "fp8_ds_mla_fp32scale")
]


def problem(heads: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Queries, rows and selections on the GPU; magnitudes differ by row, slots from 3584 up are never selected."""
    draw = torch.Generator(device="cuda").manual_seed(seed)
    rows = 4 * len(COUNTS)
    q_latent = torch.randn(rows, heads, 512, device="cuda", generator=draw)
    q_rope = torch.randn(rows, heads, 64, device="cuda", generator=draw)
    size = torch.logspace(-2, 0.5, SLOTS, device="cuda")[torch.randperm(SLOTS, device="cuda", generator=draw)]
    latent = torch.randn(SLOTS, 512, device="cuda", generator=draw) * size[:, None]
    rope = torch.randn(SLOTS, 64, device="cuda", generator=draw) * size[:, None]
    indices = torch.full((rows, 2048), -1, dtype=torch.int32, device="cuda")
    for row in range(rows):
        count = COUNTS[row % len(COUNTS)]
        indices[row, :count] = torch.randperm(3584, device="cuda", generator=draw)[:count].int()
    return q_latent.bfloat16(), q_rope.bfloat16(), latent.bfloat16(), rope.bfloat16(), indices


@pytest.fixture(params=READS, ids=lambda read: "@".join(reversed(read)))
def read(request: pytest.FixtureRequest) -> tuple[backends.Backend, kv.RowFormat]:
    backend, format = backends.get(request.param[0]), kv.get(request.param[1])
    reason = backend.unavailable_because(format, torch.device("cuda"), 128, 2048)
    if reason is not None:
        pytest.skip(reason)
    return backend, format


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
    from evalkit.model.load import graft

    backend, format = read
    model = graft(make_model().bfloat16().cuda(), f"{format.name}@reference")  # type: ignore[operator]
    ids = torch.randint(2, 128, (2, 96), generator=torch.Generator().manual_seed(1)).cuda()
    with torch.no_grad():
        want = model(ids).logits.float()
        chosen = model.evalkit.new_cache(f"{format.name}@{backend.name}")
        prompt = model(ids[:, :90], past_key_values=chosen).logits
        steps = [prompt] + [model(ids[:, t : t + 1], past_key_values=chosen).logits for t in range(90, 96)]
    got = torch.cat(steps, 1).float()
    # Selections and expert choices may flip at near-ties, so the typical token is compared.
    error = (got - want).norm(dim=-1) / want.norm(dim=-1)
    assert float(error.median()) <= 5e-2
