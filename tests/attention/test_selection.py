"""Top-k with its tie rule."""

from __future__ import annotations

import torch

from evalkit.attention.selection import top_k

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
