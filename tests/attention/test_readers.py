"""The same rows read as another GPU reads them: by the reference, as a candidate says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from evalkit import kv
from evalkit.attention import backends
from evalkit.attention.backends.readers import READERS
from evalkit.candidate import KEYS
from evalkit.errors import InputError
from evalkit.kv import Scales
from evalkit.model.graft import graft


def rows(name: str) -> tuple[kv.RowFormat, Tensor]:
    """One row whose every latent tile holds 1000s, so that the older rule's scale is 1000 / 448 = 2.2321."""
    format = kv.get(name)
    cache = format.allocate(64)
    format.store(cache, torch.tensor([5]), torch.full((1, 512), 1000.0), torch.full((1, 64), 1.0), Scales())
    return format, cache


def test_every_reader_that_a_candidate_may_name_is_there() -> None:
    assert set(KEYS["reader"]) == set(READERS)


@pytest.mark.parametrize(
    ("reader", "value"),
    # 2.2321 is 2.234375 in bf16, whose 448-fold, 1001, is 1000 there again (steps of 4); its exponent alone is 2.
    [("exact", 1000.0), ("sm90_bf16", 1000.0), ("sm100_e8m0", 896.0)],
)
def test_the_reference_reads_and_attends_as_the_reader_does(reader: str, value: float) -> None:
    format, cache = rows("fp8_ds_mla_fp32scale")
    backend = backends.reading("reference", reader)
    slots = torch.tensor([[5, -1]], dtype=torch.int32)
    latent, rope = backend.read(format, cache, slots[0, :1], Scales())
    out, _ = backend.attend(
        torch.zeros(1, 2, 512), torch.zeros(1, 2, 64), cache, format, slots, 1.0, Scales()
    )
    torch.testing.assert_close(latent, torch.full_like(latent, value), rtol=1e-6, atol=0)
    torch.testing.assert_close(out, torch.full_like(out, value), rtol=1e-6, atol=0)
    assert torch.equal(rope, torch.ones(1, 64))


def test_a_reader_rounds_the_scale_and_then_the_product() -> None:
    """288 * 1.003 is 288.86; 1.003 is 1.0 in bf16 (steps of 2^-7), 1.006 is 1.0078 and 290.25 is 290 (steps of 2)."""
    format = kv.get("fp8_e4m3")
    for scale, values in ((1.003, (288.864, 288.0, 288.0)), (1.006, (289.728, 290.0, 288.0))):
        scales = Scales(latent=scale, rope=scale)
        cache = format.allocate(1)
        format.store(
            cache, torch.tensor([0]), torch.full((1, 512), 290.0), torch.full((1, 64), 290.0), scales
        )
        for reader, value in zip(READERS.values(), values, strict=True):
            for part in reader.read(format, cache, torch.tensor([0]), scales):
                assert part[0, 0].item() == pytest.approx(value, rel=1e-6)


def test_the_kernels_of_sm90_read_as_the_reader_named_after_them() -> None:
    format, cache = rows("fp8_ds_mla_fp32scale")
    arguments = (format, cache, torch.tensor([5]), Scales())
    for name in ("flashinfer", "flashmla"):
        for got, want in zip(
            backends.get(name).read(*arguments), READERS["sm90_bf16"].read(*arguments), strict=True
        ):
            assert torch.equal(got, want)


def test_powers_of_two_survive_every_reader(make_model: Any) -> None:
    """What vLLM's newer rule is for; under the older one an SM100 build that truncates reads something else."""
    model = graft(make_model())
    ids = torch.randint(2, 128, (1, 60), generator=torch.Generator().manual_seed(4))

    def logits(candidate: str) -> Tensor:
        with torch.no_grad():
            return model(ids, **model.evalkit.new_cache(candidate).argument).logits

    for reader in READERS:
        newer = logits(f"fp8_ds_mla@reference+reader={reader}")
        assert torch.equal(newer, logits("fp8_ds_mla@reference"))
    older = [logits(f"fp8_ds_mla_fp32scale@reference+reader={reader}") for reader in READERS]
    errors = [float((other - older[0]).norm() / older[0].norm()) for other in older]
    assert errors[0] == 0
    assert 0 < errors[1] < errors[2]
    assert backends.get("reference").read_scale(torch.tensor([3.0])).item() == 3


@pytest.mark.parametrize("backend", ["flashinfer", "flashmla"])
def test_a_kernel_refuses_a_reader_that_is_not_its_own(make_model: Any, backend: str) -> None:
    with pytest.raises(
        InputError,
        match=f"reader=sm100_e8m0 is for the backend reference: {backend} reads as its kernel does",
    ):
        graft(make_model(), f"bf16@{backend}+reader=sm100_e8m0")
