"""Selections: recall, margins and lost mass worked out by hand."""

from __future__ import annotations

import pytest
import torch

from evalkit.compare.figures.selection import SelectionAccumulator, kept, margin, mass_lost, recall


def test_recall_counts_the_references_keys_and_ignores_padding():
    ref = torch.tensor([[0, 1, 2, 3], [0, 2, -1, -1]])
    got = torch.tensor([[0, 1, 5, 6], [2, 0, 7, -1]])
    assert recall(got, ref).tolist() == [0.5, 1.0]
    assert kept(got, ref).tolist() == [[True, True, False, False], [True, True, False, False]]


def test_a_narrower_selection_loses_recall():
    assert recall(torch.tensor([[4]]), torch.tensor([[4, 8]])).tolist() == [0.5]


def test_recall_of_nothing_raises():
    with pytest.raises(ValueError, match="token 1"):
        recall(torch.tensor([[0], [0]]), torch.tensor([[0], [-1]]))


def test_the_margin_is_in_standard_deviations_of_the_tokens_scores():
    """Scores 4, 2, 1, 1: mean 2, variance (4 + 0 + 1 + 1) / 4; between second and third lies 1."""
    scores = torch.tensor([[4.0, 1.0, 2.0, 1.0], [5.0, 3.0, -torch.inf, -torch.inf]])
    assert margin(scores, 2).tolist() == pytest.approx([1 / 1.5**0.5]), (
        "the second token sees no more than two keys"
    )


def test_lost_mass_is_the_softmax_weight_of_the_dropped_keys():
    generator = torch.Generator().manual_seed(0)
    q_latent, q_rope = torch.randn(3, 2, 8, generator=generator), torch.randn(3, 2, 4, generator=generator)
    latent, rope = torch.randn(6, 8, generator=generator), torch.randn(6, 4, generator=generator)
    selection = torch.tensor([[0, 2, 5], [1, 3, 4], [0, 1, -1]])
    lost = torch.tensor([[False, True, False], [False, False, False], [True, False, False]])
    scores = (torch.einsum("thc,sc->ths", q_latent, latent) + torch.einsum("thr,sr->ths", q_rope, rope)) * 0.3
    picked = scores.gather(2, selection.clamp(min=0)[:, None].expand(3, 2, 3))
    picked = picked.masked_fill((selection < 0)[:, None], -torch.inf)
    weights = picked.softmax(-1)
    found = mass_lost(q_latent, q_rope, latent, rope, selection, lost, picked.logsumexp(-1), 0.3)
    assert found[0] == pytest.approx(float(weights[0, :, 1].mean()), rel=1e-5)
    assert found[1] == 0.0
    assert found[2] == pytest.approx(float(weights[2, :, 0].mean()), rel=1e-5)


def test_accumulated_chunks_equal_the_whole():
    accumulator = SelectionAccumulator()
    accumulator.add(torch.tensor([1.0, 0.5]), torch.tensor([0.2]), torch.tensor([0.0, 0.3]))
    accumulator.add(torch.tensor([0.75]), torch.tensor([0.4, 0.6]))
    found = accumulator.result()
    assert found.recall_mean == 0.75
    assert found.recall_min == 0.5
    assert found.n == 3
    assert found.margin_p50 == pytest.approx(0.4)
    assert found.mass_lost_mean == pytest.approx(0.15)


def test_no_token_at_all_raises():
    with pytest.raises(ValueError, match="no selection"):
        SelectionAccumulator().result()
