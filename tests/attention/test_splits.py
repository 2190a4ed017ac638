"""That no kernel cuts a query's slots: the padding, and the plan that FlashInfer keeps, without a GPU."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from evalkit import kv
from evalkit.attention import backends
from evalkit.attention.backends import flashinfer, flashmla
from evalkit.attention.backends.flashinfer import FlashInfer, padding_against_splits
from evalkit.kv import Scales


def is_cut(lengths: list[int], heads: int, processors: int) -> bool:
    """Step 0 of FlashInfer's MLAPlan (scheduler.cuh, 0.7.2 to 0.7.4), for one query a request and no causal mask."""
    cluster = 2 if heads > 64 else 1
    clusters, tile = processors // cluster, 64 * cluster
    total = sum(-(-heads // tile) * length for length in lengths)
    average = max(-(-total // clusters), 1)
    if average <= 8:
        limit = 32
    elif average <= 16:
        limit = 64
    elif average <= 32:
        limit = 128
    elif average <= 64:
        limit = 192
    else:
        limit = -(-average // 256) * 256
    return max(lengths) > limit


@pytest.mark.parametrize("processors", [78, 132])
@pytest.mark.parametrize("heads", [8, 64, 96, 128, 256])
@pytest.mark.parametrize("longest", [1, 32, 33, 64, 65, 128, 129, 192, 193, 256, 257, 512, 700, 2048, 2049])
def test_padding_is_the_least_with_which_flashinfer_cuts_no_query(
    longest: int, heads: int, processors: int
) -> None:
    draw = torch.Generator().manual_seed(longest)
    for queries in (1, 2, 57, 58, 200):
        lengths = [longest, *torch.randint(0, longest + 1, (queries - 1,), generator=draw).tolist()]
        padding = padding_against_splits(lengths, heads, processors)
        assert not is_cut(lengths + [longest] * padding, heads, processors)
        assert padding == 0 or is_cut(lengths + [longest] * (padding - 1), heads, processors)


def test_flashinfer_cuts_nothing_from_the_sizes_that_were_measured_on_132_processors() -> None:
    assert padding_against_splits([2048] * 58, 128, 132) == 0
    assert padding_against_splits([2048] * 57, 128, 132) == 1
    assert padding_against_splits([2048] * 116, 64, 132) == 0
    assert padding_against_splits([2048] * 115, 64, 132) == 1


@pytest.mark.parametrize("heads", [64, 128])
@pytest.mark.parametrize("processors", [78, 114, 132, 148])
def test_flashmla_makes_one_part_of_a_query_from_the_padded_size_on(heads: int, processors: int) -> None:
    def parts(queries: int) -> int:
        return max(processors // queries // (heads // 64), 1)  # Decode_Sm90_Impl::get_meta

    least = flashmla.unsplit_queries(heads, processors)
    assert parts(least) == 1
    assert parts(least - 1) > 1


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The lengths of every plan made, in place of FlashInfer's own planner."""
    made: list[list[int]] = []

    def plan(slots: Any, lengths: list[int], *_: Any) -> Any:
        made.append(lengths)
        return f"wrapper {len(made)}"

    monkeypatch.setattr(flashinfer, "_plan", plan)
    return made


def planned(plan: flashinfer._Plan, indices: list[list[int]], padding: int = 0) -> tuple[Any, list[int]]:
    """The wrapper for a selection and the slots that it would read."""
    given = torch.tensor(indices)
    query = torch.zeros(len(indices), 8, 512, dtype=torch.bfloat16)
    wrapper = plan.prepared(given, plan.take(given), padding, query, torch.bfloat16, 0.1)
    assert plan.slots is not None
    return wrapper, plan.slots[: sum(plan.lengths)].tolist()


def test_other_slots_of_the_same_lengths_go_into_the_plan_that_there_is(plans: list[list[int]]) -> None:
    plan = flashinfer._Plan()
    assert planned(plan, [[3, 1, 2], [4, -1, -1]]) == ("wrapper 1", [3, 1, 2, 4])
    assert planned(plan, [[7, 8, 9], [-1, 5, -1]]) == ("wrapper 1", [7, 8, 9, 5])
    assert plans == [[3, 1]]
    assert planned(plan, [[7, 8, 9], [6, 5, -1]]) == ("wrapper 2", [7, 8, 9, 6, 5])
    assert planned(plan, [[7, 8, 9], [6, 5, 4]]) == ("wrapper 3", [7, 8, 9, 6, 5, 4])
    assert plans == [[3, 1], [3, 2], [3, 3]]


def test_padding_repeats_the_longest_selection_after_the_others(plans: list[list[int]]) -> None:
    got = planned(flashinfer._Plan(), [[9, -1, -1], [4, -1, 6], [-1, -1, -1]], padding=2)
    assert got == ("wrapper 1", [9, 4, 6, 4, 6, 4, 6])
    assert plans == [[1, 2, 0, 2, 2]]


def test_a_selection_without_columns_has_no_slots() -> None:
    assert flashinfer._Plan().take(torch.empty(3, 0, dtype=torch.int32)) == [0, 0, 0]


def test_slots_that_inference_mode_made_serve_outside_it_too(plans: list[list[int]]) -> None:
    plan = flashinfer._Plan()
    with torch.inference_mode():
        planned(plan, [[3, 1, 2], [4, -1, -1]])
    assert planned(plan, [[7, 8, 9], [-1, 5, -1]]) == ("wrapper 1", [7, 8, 9, 5])


def exactly(query: Tensor, rows: Tensor, indices: Tensor, sm_scale: float) -> tuple[Tensor, Tensor]:
    """Exact attention over bf16 rows [N, C + R], with +inf for a query without a slot, as FlashMLA gives it."""
    reference = backends.get("reference")
    cache = rows.view(-1, 576).view(torch.uint8)
    queries = query[..., :512], query[..., 512:]
    out, lse = reference.attend(*queries, cache, kv.get("bf16"), indices, sm_scale, Scales())
    return out, lse.where(lse > -torch.inf, torch.inf)


class ExactWrapper:
    """In place of FlashInfer's wrapper: exact attention over the slots that were planned."""

    def __init__(self, slots: Tensor, lengths: list[int], query: Tensor, _: Any, sm_scale: float) -> None:
        self.slots, self.lengths, self.sm_scale = slots, lengths, sm_scale

    def run(self, *, query: Any, kv_cache: Any, out: Tensor, lse: Tensor, **_: Any) -> None:
        rows = torch.cat([part.squeeze(1) for part in kv_cache], -1)
        assert [len(part) for part in (*query, out, lse)] == [len(self.lengths)] * 4
        start = 0
        for number, length in enumerate(self.lengths):
            one = torch.cat([part[number : number + 1] for part in query], -1)
            slots = self.slots[start : start + length][None]
            out[number], lse[number] = (part[0] for part in exactly(one, rows, slots, self.sm_scale))
            start += length
        lse.masked_fill_(lse == torch.inf, -torch.inf)  # FlashInfer's word for a query without a slot


@pytest.fixture
def processors(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)


@pytest.mark.usefixtures("processors")
@pytest.mark.parametrize("backend", ["flashinfer", "flashmla"])
@pytest.mark.parametrize("heads", [8, 64, 128])
@pytest.mark.parametrize("counts", [(70, 3, 0), (70,) * 5, (0, 0), (70,) * 80])
def test_what_is_added_to_a_call_leaves_no_trace_in_its_result(
    backend: str, heads: int, counts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries, heads and slots are filled up for the kernel; queries and slots in two calls are served in two."""
    seen: list[torch.Size] = []

    def prefill(query: Tensor, rows: Tensor, indices: Tensor, sm_scale: float) -> tuple[Tensor, Tensor]:
        seen.append(query.shape)
        assert query.shape[1] in (64, 128)
        assert (len(indices), indices.shape[1] % 128, indices.dtype) == (len(query), 0, torch.int32)
        return exactly(query, rows, indices, sm_scale)

    monkeypatch.setattr(flashmla, "_prefill", prefill)
    monkeypatch.setattr(flashinfer, "_plan", ExactWrapper)
    monkeypatch.setattr(flashmla, "ROWS_PER_CALL", 60)
    monkeypatch.setattr(flashinfer, "WORK_ITEMS_PER_PLAN", 60)
    draw = torch.Generator().manual_seed(8)
    rows = torch.randn(96, 576, generator=draw).bfloat16()
    indices = torch.full((len(counts), 72), -1, dtype=torch.int32)
    for number, count in enumerate(counts):
        indices[number, :count] = torch.randperm(96, generator=draw)[:count].int()
    query = torch.randn(len(counts), heads, 576, generator=draw).bfloat16()
    want, want_lse = exactly(query, rows, indices, 0.07)
    cache, given = rows.view(torch.uint8), FlashInfer() if backend == "flashinfer" else backends.get(backend)
    for _ in range(2):  # the second on a kept plan
        inputs = query[..., :512], query[..., 512:], cache, kv.get("bf16"), indices, 0.07, Scales()
        out, lse = given.attend(*inputs)
        torch.testing.assert_close(out, want, rtol=0, atol=2e-2)
        torch.testing.assert_close(lse, want_lse.where(want_lse < torch.inf, -torch.inf))
        assert out.is_contiguous()
    if backend == "flashmla":
        assert [shape[0] for shape in seen] == 2 * ([60, 20] if len(counts) == 80 else [len(counts)])


@pytest.mark.usefixtures("processors")
@pytest.mark.parametrize(("heads", "least"), [(8, 67), (128, 34)])
def test_flashmla_decodes_no_fewer_queries_than_it_leaves_uncut(
    heads: int, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    format, seen = kv.get("fp8_ds_mla"), []

    def decode(query: Tensor, rows: Tensor, indices: Tensor, sm_scale: float) -> tuple[Tensor, Tensor]:
        seen.append((len(query), tuple(indices.shape), bool((indices[3:] == -1).all())))
        cache = rows.flatten(1)
        queries = query[..., :512], query[..., 512:]
        return backends.get("reference").attend(*queries, cache, format, indices, sm_scale, Scales())

    monkeypatch.setattr(flashmla, "_decode", decode)
    draw = torch.Generator().manual_seed(9)
    cache = format.allocate(64)
    latent, rope = torch.randn(64, 512, generator=draw), torch.randn(64, 64, generator=draw)
    format.store(cache, torch.arange(64), latent, rope, Scales())
    q_latent = torch.randn(3, heads, 512, generator=draw).bfloat16()
    q_rope = torch.randn(3, heads, 64, generator=draw).bfloat16()
    indices = torch.arange(20, dtype=torch.int32).repeat(3, 1)
    inputs = q_latent, q_rope, cache, format, indices, 0.07, Scales()
    out, lse = backends.get("flashmla").attend(*inputs)
    want, want_lse = backends.get("reference").attend(*inputs)
    assert seen == [(least, (least, 64), True)]
    torch.testing.assert_close(out, want, rtol=0, atol=2e-2)
    torch.testing.assert_close(lse, want_lse)


class StrictWrapper:
    """FlashInfer's wrapper with the rule of 0.7.4: a cache must cover the slots that the plan saw."""

    planned: ClassVar[list[tuple[int, ...]]] = []  # the slots that each plan saw

    def __init__(self, workspace: Tensor, backend: str) -> None:
        assert (workspace.dtype, backend) == (torch.uint8, "fa3")

    def plan(self, *, metadata: SimpleNamespace, sm_scale: float, **_: Any) -> None:
        starts = metadata.kv_indptr.tolist()
        seen = metadata.kv_indices[starts[0] : starts[-1]]
        self.pages = int(seen.max()) + 1
        assert int(seen.min()) >= 0
        self.planned.append(tuple(seen.tolist()))
        self.exact = ExactWrapper(
            metadata.kv_indices, metadata.kv_len_arr.tolist(), torch.empty(0), None, sm_scale
        )

    def run(self, *, kv_cache: Any, **given: Any) -> None:
        if len(kv_cache[0]) < self.pages:
            raise ValueError("KV cache does not cover the planned CSR page indices.")
        self.exact.run(kv_cache=kv_cache, **given)


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> type[StrictWrapper]:
    """A package flashinfer whose wrapper is `StrictWrapper`."""
    mla = ModuleType("flashinfer.mla")
    mla.BatchMLAPagedAttentionWrapper = StrictWrapper  # type: ignore[attr-defined]
    mla.MLAPlanMetadata = SimpleNamespace(csr=SimpleNamespace)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flashinfer", ModuleType("flashinfer"))
    monkeypatch.setitem(sys.modules, "flashinfer.mla", mla)
    monkeypatch.setattr(StrictWrapper, "planned", [])
    return StrictWrapper


@pytest.mark.usefixtures("processors")
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("sizes", [(4096, 64), (64, 4096, 128, 64)])
def test_a_plan_made_on_a_large_cache_serves_a_smaller_one(
    sizes: tuple[int, ...], full: bool, strict: type[StrictWrapper]
) -> None:
    """Whichever slots a plan was made for, and whether queries have all their slots."""
    backend, draw = FlashInfer(full=full), torch.Generator().manual_seed(3)
    for slots in sizes:
        rows = torch.randn(slots, 576, generator=draw).bfloat16()
        indices = (slots - 1 - torch.arange(40).repeat(3, 1)).int()
        if not full:
            indices[1, 30:] = -1
            indices[2] = -1
        query = torch.randn(3, 8, 576, generator=draw).bfloat16()
        want, want_lse = exactly(query, rows, indices, 0.07)
        inputs = query[..., :512], query[..., 512:], rows.view(torch.uint8), kv.get("bf16"), indices, 0.07
        out, lse = backend.attend(*inputs, Scales())
        torch.testing.assert_close(out, want, rtol=0, atol=2e-2)
        torch.testing.assert_close(lse, want_lse.where(want_lse < torch.inf, -torch.inf))
    assert len(strict.planned) == 1  # the later calls are on the kept plan
    assert not any(strict.planned[0])


@pytest.mark.usefixtures("strict")
def test_a_plan_leaves_the_slots_as_they_were() -> None:
    slots, query = torch.tensor([7, 5, 9, 11], dtype=torch.int32), torch.zeros(2, 8, 512)
    flashinfer._plan(slots, [1, 2], query, torch.bfloat16, 0.1)
    assert slots.tolist() == [7, 5, 9, 11]
