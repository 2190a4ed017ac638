"""evalkit's bytes against those of the CUDA writers themselves: recorded ones on any machine, live ones on a GPU."""

import numpy as np
import pytest

from evalkit import kv
from evalkit.kv import RowFormat, Scales, index
from evalkit.kv.index import IndexFormat
from tests.kv.cuda_writers import (
    PAGE_SIZES,
    ROWS,
    UNWRITTEN,
    WRITERS,
    finite_rows,
    of_name,
    random_slots,
    special_rows,
    written_by_evalkit,
)
from tests.kv.recorded import Recording

# Formats that an H200 can record; nvfp4_ds_mla's writer needs an SM100.
RECORDED = ("bf16", "fp8_e4m3", "fp8_ds_mla", "nvfp4_flashinfer", "indexer_fp8_ue8m0", "indexer_fp8_fp32")


@pytest.fixture(scope="module")
def recording() -> Recording:
    return Recording.read()


@pytest.mark.parametrize("name", RECORDED)
def test_the_bytes_are_those_that_the_cuda_writer_left(name: str, recording: Recording) -> None:
    """In the whole cache, at every page size, with every scale."""
    writer = WRITERS[name]
    cases = {case: cache for case, cache in recording.cases.items() if case.format == name}
    asked = {(rows, scales, page) for rows in ROWS for scales in writer.scales for page in PAGE_SIZES}
    assert {(case.rows, case.scales, case.page_size) for case in cases} == asked
    for case, cache in cases.items():
        row, slots = recording.given(case)
        got = written_by_evalkit(of_name(name), row, slots, case.scales, case.page_size)
        np.testing.assert_array_equal(got.numpy(), recording.arrays[cache], err_msg=str(case))


def test_every_writer_that_needs_no_other_gpu_is_recorded() -> None:
    assert set(RECORDED) == {name for name, writer in WRITERS.items() if writer.sm in (None, 9)}


def test_the_rows_hold_what_they_are_said_to_hold() -> None:
    latent, rope = finite_rows()
    slots = random_slots(len(latent))
    assert len(slots) < 256
    assert len(set(slots[slots >= 0].tolist())) == int((slots >= 0).sum()) == len(slots) - -(-len(slots) // 7)
    size = latent[latent != 0].abs().float()
    assert size.min() < 2**-126
    assert size.max() > 2.9e38
    assert bool(latent.isfinite().all())
    assert bool(rope.isfinite().all())
    assert bool((latent.unflatten(1, (4, 128)) == 0).all(-1).any(-1).sum() > 2)
    for part in special_rows():
        assert bool(part.isnan().any())
        assert bool(part.isinf().any())


@pytest.mark.gpu
@pytest.mark.parametrize("name", WRITERS)
def test_the_bytes_are_those_of_the_cuda_writer(name: str) -> None:
    writer = WRITERS[name]
    reason = writer.unavailable_because()
    if reason is not None:
        pytest.skip(f"{writer.call}: {reason}")
    for kind, make in ROWS.items():
        row = make()
        slots = random_slots(len(row[0]))
        on_gpu, slots_on_gpu = (row[0].cuda(), row[1].cuda()), slots.cuda()
        for scales in writer.scales:
            for page_size in PAGE_SIZES:
                where = f"{kind} rows, {scales}, pages of {page_size}"
                real = writer.write(on_gpu, slots_on_gpu, scales, page_size)
                assert bool((real != UNWRITTEN).any()), where
                cuda = written_by_evalkit(of_name(name), on_gpu, slots_on_gpu, scales, page_size)
                cpu = written_by_evalkit(of_name(name), row, slots, scales, page_size)
                np.testing.assert_array_equal(cpu.numpy(), real.cpu().numpy(), err_msg=f"on CPU, {where}")
                np.testing.assert_array_equal(
                    cuda.cpu().numpy(), real.cpu().numpy(), err_msg=f"on CUDA, {where}"
                )


@pytest.mark.gpu
@pytest.mark.parametrize(
    "format",
    [*map(kv.get, kv.names()), *map(index.get, index.names())],
    ids=[*kv.names(), *(f"index-{name}" for name in index.names())],
)
def test_evalkit_writes_the_same_bytes_on_cuda_as_on_cpu(format: RowFormat | IndexFormat) -> None:
    for kind, make in ROWS.items():
        row = make()
        slots = random_slots(len(row[0]))
        for scales in (Scales(), Scales(latent=0.00037, rope=0.0371), Scales(latent=11.3, rope=13.7)):
            for page_size in PAGE_SIZES:
                on_gpu = (row[0].cuda(), row[1].cuda())
                cuda = written_by_evalkit(format, on_gpu, slots.cuda(), scales, page_size)
                cpu = written_by_evalkit(format, row, slots, scales, page_size)
                np.testing.assert_array_equal(
                    cuda.cpu().numpy(), cpu.numpy(), err_msg=f"{kind} rows, {scales}, pages of {page_size}"
                )
