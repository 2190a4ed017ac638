"""That no kernel cuts a query's slots: the padding, and the plan that FlashInfer keeps, without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from evalkit.attention.backends import flashinfer, flashmla
from evalkit.attention.backends.flashinfer import FlashInfer, padding_against_splits


def is_cut(lengths: list[int], heads: int, processors: int) -> bool:
    """Step 0 of FlashInfer's MLAPlan (scheduler.cuh, 0.7.2), for one query a request and no causal mask."""
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


def planned(backend: FlashInfer, indices: list[list[int]], padding: int = 0) -> tuple[Any, list[int]]:
    """The wrapper for a selection and the slots that it would read."""
    given = torch.tensor(indices)
    lengths = flashinfer._lengths(given)
    query = torch.zeros(len(indices), 8, 512, dtype=torch.bfloat16)
    wrapper = backend._planned(given, lengths, padding, query, torch.bfloat16, 0.1)
    (plan,) = backend._plans.values()
    assert plan.slots is not None
    return wrapper, plan.slots[: sum(plan.lengths)].tolist()


def test_other_slots_of_the_same_lengths_go_into_the_plan_that_there_is(plans: list[list[int]]) -> None:
    backend = FlashInfer()
    assert planned(backend, [[3, 1, 2], [4, -1, -1]]) == ("wrapper 1", [3, 1, 2, 4])
    assert planned(backend, [[7, 8, 9], [-1, 5, -1]]) == ("wrapper 1", [7, 8, 9, 5])
    assert plans == [[3, 1]]
    assert planned(backend, [[7, 8, 9], [6, 5, -1]]) == ("wrapper 2", [7, 8, 9, 6, 5])
    assert planned(backend, [[7, 8, 9], [6, 5, 4]]) == ("wrapper 3", [7, 8, 9, 6, 5, 4])
    assert plans == [[3, 1], [3, 2], [3, 3]]


def test_padding_repeats_the_longest_selection_after_the_others(plans: list[list[int]]) -> None:
    got = planned(FlashInfer(), [[9, -1, -1], [4, -1, 6], [-1, -1, -1]], padding=2)
    assert got == ("wrapper 1", [9, 4, 6, 4, 6, 4, 6])
    assert plans == [[1, 2, 0, 2, 2]]


def test_a_selection_without_columns_has_no_slots() -> None:
    assert flashinfer._lengths(torch.empty(3, 0, dtype=torch.int32)) == [0, 0, 0]
