"""Top-k with its tie rule."""

from __future__ import annotations

import pytest
import torch

from evalkit.attention import selection
from evalkit.attention.indexer import index_scores
from evalkit.attention.indexer.exact import Exact
from evalkit.attention.selection import select, top_k

INF = torch.inf


def test_the_best_columns_come_back_in_ascending_order() -> None:
    assert top_k(torch.tensor([[1.0, 9.0, 3.0, 7.0]]), 2).tolist() == [[1, 3]]


def test_of_equal_scores_the_earlier_token_is_kept() -> None:
    assert top_k(torch.tensor([[0.0, 5.0, 0.0, 0.0]]), 3).tolist() == [[0, 1, 2]]


def test_a_row_with_fewer_visible_columns_is_padded_with_minus_one() -> None:
    scores = torch.tensor([[2.0, -INF, -INF, -INF], [-INF] * 4, [-INF, -1.0, -3.0, -2.0]])
    assert top_k(scores, 2).tolist() == [[0, -1], [-1, -1], [1, 3]]


def test_a_context_within_k_is_selected_whole() -> None:
    assert top_k(torch.tensor([[0.5, -INF, 0.25]]), 8).tolist() == [[0, 2, -1]]


def test_a_nan_score_is_selected_so_that_it_shows() -> None:
    assert top_k(torch.tensor([[1.0, float("nan"), 2.0, 3.0]]), 2).tolist() == [[1, 3]]


def test_it_agrees_with_torch_topk_where_scores_are_distinct() -> None:
    scores = torch.randn(50, 300, generator=torch.Generator().manual_seed(0))
    expected = scores.topk(64, dim=-1).indices.sort(-1).values
    assert torch.equal(top_k(scores, 64), expected)


def asked(length: int = 7, cached: int = 40) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    return (
        torch.randn(2, length, 4, 128, generator=draw),
        torch.randn(2, cached, 128, generator=draw),
        torch.randn(2, length, 4, generator=draw),
    )


@pytest.mark.parametrize("chunk", [1, 3 * 80, 1 << 20])
def test_a_selection_does_not_depend_on_its_chunks(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(selection.SCORES_PER_CHUNK, "cpu", chunk)
    valid = torch.ones(2, 40, dtype=torch.bool)
    valid[1, :9] = False
    got, scores = select(*asked(), None, 35, scorer=Exact(), valid=valid, keep_scores=True)
    want = index_scores(*asked()).masked_fill(~valid[:, None], -INF)
    assert scores is not None
    torch.testing.assert_close(scores, want)
    assert torch.equal(got, top_k(want.flatten(0, 1), 35).unflatten(0, (2, 7)))
    assert torch.equal(select(*asked(), None, 35, scorer=Exact(), valid=valid)[0], got)


def test_no_more_scores_than_a_chunk_are_held_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(selection.SCORES_PER_CHUNK, "cpu", 2 * 2 * 40)
    sizes = []

    class Counting(Exact):
        def scores(self, *given: torch.Tensor | None) -> torch.Tensor:
            found = super().scores(*given)
            sizes.append(found.numel())
            return found

    columns, scores = select(*asked(), None, 4, scorer=Counting())
    assert scores is None
    assert columns.shape == (2, 7, 4)
    assert len(sizes) == 4
    assert max(sizes) <= 2 * 2 * 40


@pytest.mark.gpu
def test_on_a_gpu_ties_nans_and_short_rows_are_selected_as_on_a_cpu() -> None:
    draw = torch.Generator().manual_seed(1)
    scores = torch.randint(-3, 4, (64, 5000), generator=draw).float()  # ties everywhere
    scores[:, ::7] = -INF
    scores[3, 11], scores[4] = torch.nan, -INF
    scores[5, 100:] = -INF
    for k in (1, 512, 2048, 6000):
        assert torch.equal(top_k(scores.cuda(), k).cpu(), top_k(scores, k))
