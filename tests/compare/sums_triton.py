"""What test_sums.py runs: the Triton kernel against torch, on CPU tensors under TRITON_INTERPRET=1 or on a GPU."""

from __future__ import annotations

import torch

from evalkit.compare.figures import sums

SHAPES = ((3, 64), (5, 700), (2, 5000), (40, 1), (5, 9000))


def check(device: str) -> None:
    for number, shape in enumerate(SHAPES):
        draw = torch.Generator().manual_seed(shape[1])
        ref = torch.randn(shape, generator=draw) * torch.logspace(-4, 3, shape[0])[:, None]
        got = ref + 1e-2 * torch.randn(shape, generator=draw) * ref
        got[0] = ref[0]
        keep = torch.rand(shape, generator=draw) < 0.6
        keep[-1] = False
        twice = torch.cat([ref, ref], 1)[:, shape[1] :]  # rows that lie apart
        pairs = [(got, ref), (got.bfloat16(), ref), (got.double(), twice)]
        if device == "cpu" and number > 1:  # an interpreted pass takes seconds
            pairs = [pairs[number % 3]]
        for pair in pairs:
            for mask in (None, keep):
                one, other = (x.to(device) for x in pair)
                compare(one, other, None if mask is None else mask.to(device))
    got = torch.tensor([[1.0, torch.nan, 2.0], [1.0, 2.0, 3.0]], device=device)
    found = sums.launch(got, torch.ones_like(got), None, 0)
    assert found.sums[:, 3].isfinite().tolist() == [False, True]


def compare(got: torch.Tensor, ref: torch.Tensor, keep: torch.Tensor | None) -> None:
    found = sums.launch(got, ref, keep, 5)
    wanted = sums._in_torch(got.double(), ref.double(), keep, 5)
    torch.testing.assert_close(found.sums, wanted.sums, rtol=1e-12, atol=0)
    assert torch.equal(found.largest, wanted.largest), got.shape
    measured = wanted.largest >= 0
    errors = (got.double() - ref.double()).abs()
    at = found.at[measured, None]
    assert torch.equal(errors[measured].gather(1, at)[:, 0], wanted.largest[measured])
    assert torch.equal(found.histogram, wanted.histogram), got.shape


if __name__ == "__main__":
    check("cpu")
