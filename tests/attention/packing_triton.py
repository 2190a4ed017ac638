"""What test_packing.py runs: the Triton kernels against torch, on CPU tensors under TRITON_INTERPRET=1 or on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from evalkit import kv
from evalkit.attention.backends import decoded
from evalkit.attention.backends.kernels import packing, unpacking, weighing
from evalkit.kv import Scales

SCALES = Scales(latent=0.0123, rope=0.0171)  # neither is a bf16 number


def check_taking(device: str) -> None:
    for shape in ((3, 1), (5, 70), (2, 2048), (3, 2500)):
        draw = torch.Generator().manual_seed(shape[1])
        indices = torch.randint(-shape[1] // 4, 1000, shape, generator=draw).clamp(min=-1).to(device)
        indices[0] = -1
        indices[1] = 7
        strided = torch.cat([indices, indices], -1)[:, : shape[1]]
        for given in (indices, indices.int(), strided, indices.T.contiguous().T):
            slots = torch.full((indices.numel() + 3,), -9, dtype=torch.int32, device=device)
            counts = packing.take_slots(given, slots)
            assert counts.tolist() == (indices >= 0).sum(-1).tolist()
            assert slots[:-3].tolist() == indices.flatten().tolist()
            assert (slots[-3:] == -9).all()


def check_query(device: str) -> None:
    draw = torch.Generator().manual_seed(1)
    for given, heads, queries, width in ((3, 64, 3, 64), (3, 5, 4, 64), (2, 70, 2, 128), (0, 8, 3, 64)):
        latent, rope = (torch.randn(given, heads, n, generator=draw).bfloat16().to(device) for n in (512, 64))
        whole = torch.cat([latent, rope], -1)
        want = whole.new_zeros(queries, width, 576)
        want[:given, :heads] = whole
        apart = [q.transpose(0, 1).contiguous().transpose(0, 1) for q in (latent, rope)]
        outer = [q.movedim(2, 0).contiguous().movedim(0, 2) for q in (latent, rope)]
        for pair in ((latent, rope), apart, outer, (whole[..., :512], whole[..., 512:])):
            got = packing.query(*pair, queries, width)
            assert torch.equal(got.view(torch.int16), want.view(torch.int16)), (given, heads)


def check_weighing(device: str) -> None:
    for queries, heads, keys in ((3, 5, 64), (2, 8, 700), (1, 3, 2048)):
        draw = torch.Generator().manual_seed(keys)
        scores = (30 * torch.randn(queries, heads, keys, generator=draw)).to(device)
        numbers = torch.randint(-3, 9, (queries, keys), generator=draw).clamp(min=-1).to(device)
        numbers[0] = -1
        terms, lse = weighing.weigh(scores, numbers, 0.13)
        wanted = (scores.double() * 0.13).masked_fill((numbers < 0)[:, None], -torch.inf)
        weights = wanted.softmax(-1).nan_to_num(0.0)
        got = sum(term.double() for term in terms)
        torch.testing.assert_close(got, weights, rtol=2e-6, atol=1e-12)
        torch.testing.assert_close(lse.double(), wanted.logsumexp(-1), rtol=1e-6, atol=1e-6)
        assert not got[0].any()
        assert lse[0].isneginf().all()
    scores[0, 0, 5], scores[0, 1, 6], numbers[:] = torch.nan, torch.inf, 1
    terms, lse = weighing.weigh(scores, numbers, 0.13)
    assert terms[0].isnan().any(-1).tolist() == [[True, True, False]]
    assert lse.isfinite().tolist() == [[False, False, True]]


def check_results(device: str) -> None:
    draw = torch.Generator().manual_seed(2)
    for all_queries, width, queries, heads in (
        (4, 64, 4, 64),
        (4, 64, 3, 64),
        (5, 128, 3, 70),
        (2, 64, 2, 1),
    ):
        out = torch.randn(all_queries, width, 512, generator=draw).bfloat16().to(device)
        lse = torch.randn(all_queries, width, generator=draw).to(device)
        lse[0] = torch.inf
        lse[1, 0], lse[1, 1:5] = torch.nan, -torch.inf
        want = lse[:queries, :heads].nan_to_num(nan=torch.nan, posinf=-torch.inf, neginf=-torch.inf)
        for given in (lse, lse.T.contiguous().T):
            got, got_lse = packing.results(out, given, queries, heads)
            assert torch.equal(got, out[:queries, :heads])
            assert got.is_contiguous()
            torch.testing.assert_close(got_lse, want, rtol=0, atol=0, equal_nan=True)


def check_unpacking(device: str) -> None:
    for name in kv.names():
        format = kv.get(name)
        assert format.layout is not None, name
        cache = rows(format, device)
        planes = format.byte_planes(cache)
        indices = torch.tensor([[3, -1, 129, 0], [129, 7, 64, -1]], dtype=torch.int32, device=device)
        for slots in (None, indices, indices.long(), indices.T):
            # The interpreter cuts bf16 off instead of rounding.
            dtype = torch.float32 if device == "cpu" else torch.bfloat16
            unpacked, numbers = unpacking.unpack(format.layout, planes, slots, SCALES, dtype)
            got = unpacked.bfloat16()
            chosen = None if slots is None else slots.flatten().clamp(min=0)
            want = decoded._eager(format, planes, chosen, SCALES)
            different = (got.view(torch.int16) != want.view(torch.int16)) & ~(want.isnan() & got.isnan())
            if device == "cpu":  # it knows no NaN in e4m3 and no subnormals in bf16
                different &= want.abs() >= torch.finfo(torch.bfloat16).tiny
            assert not different.any(), (name, got[different][:4], want[different][:4])
            if slots is not None:
                assert numbers is not None
                assert (numbers.shape, numbers.dtype) == (slots.shape, torch.int32)
                count = torch.arange(slots.numel(), device=device).view(slots.shape)
                assert torch.equal(numbers.long(), torch.where(slots >= 0, count, -1))


def rows(format: kv.RowFormat, device: str) -> Tensor:
    """A cache whose first rows are written numbers, the last one NaN, and the others any bytes at all."""
    draw = torch.Generator().manual_seed(3)
    size = torch.logspace(-3, 1, 130)[torch.randperm(130, generator=draw)][:, None]
    latent, rope = torch.randn(130, 512, generator=draw) * size, torch.randn(130, 64, generator=draw)
    latent[-1] = rope[-1] = torch.nan
    cache = format.allocate(130, page_size=65)
    format.store(cache, torch.arange(130), latent, rope, SCALES)
    for plane in format.byte_planes(cache):
        plane[64:128] = torch.randint(256, (64, plane.shape[1]), generator=draw).byte()
    return cache.to(device)


def main(device: str = "cpu") -> None:
    check_taking(device)
    check_query(device)
    check_weighing(device)
    check_results(device)
    check_unpacking(device)


if __name__ == "__main__":
    main()
