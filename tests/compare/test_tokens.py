"""Divergence of next-token distributions, worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from evalkit.compare.figures.tokens import TokenAccumulator, kl_nats


def test_kl_of_two_coins():
    """Reference (1/2, 1/2), candidate (3/4, 1/4): ln(2/3)/2 + ln(2)/2."""
    got = torch.tensor([[math.log(3.0), 0.0]])
    found = kl_nats(got, torch.zeros(1, 2))
    assert float(found) == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2))


def test_identical_logits_diverge_by_exactly_nothing():
    logits = torch.randn(9, 50, generator=torch.Generator().manual_seed(0))
    tokens = TokenAccumulator()
    tokens.add(logits, logits.clone())
    found = tokens.result()
    assert found.kl_mean_nats == found.kl_max_nats == 0.0
    assert found.top1_agreement == 1.0
    assert found.n == 9


def test_a_token_the_reference_excludes_counts_nothing():
    ref = torch.tensor([[0.0, 0.0, -math.inf]])
    assert float(kl_nats(ref.clone(), ref)) == 0.0


def test_percentiles_and_agreement_over_chunks():
    ref, got = torch.zeros(100, 2), torch.zeros(100, 2)
    ref[:, 0] = 1.0
    got[:, 0] = torch.linspace(-0.5, 1.0, 100)
    tokens = TokenAccumulator()
    tokens.add(got[:30], ref[:30])
    tokens.add(got[30:], ref[30:])
    found, each = tokens.result(), kl_nats(got, ref)
    assert found.kl_mean_nats == pytest.approx(float(each.mean()))
    assert found.kl_p90_nats == pytest.approx(float(each.quantile(0.9)))
    assert found.kl_max_nats == pytest.approx(float(each[0]))
    assert found.top1_agreement == pytest.approx(float((got[:, 0] >= 0).double().mean()))


def test_one_nan_leaves_no_mean():
    got = torch.zeros(3, 4)
    got[1, 2] = math.nan
    tokens = TokenAccumulator()
    tokens.add(got, torch.zeros(3, 4))
    assert tokens.result().kl_mean_nats is None
    assert tokens.result().kl_max_nats is None


def test_no_token_and_other_shapes_raise():
    with pytest.raises(ValueError, match="no logits"):
        TokenAccumulator().result()
    with pytest.raises(ValueError, match="same tokens"):
        TokenAccumulator().add(torch.zeros(2, 3), torch.zeros(3, 3))


def test_a_divergence_is_never_negative():
    """Of nearly equal distributions, float64's rounding alone would leave some below zero."""
    ref = torch.randn(2000, 50, generator=torch.Generator().manual_seed(0))
    kl = kl_nats(ref.double() * (1 + 1e-12), ref)
    assert bool((kl >= 0).all())
    assert float(kl.max()) < 1e-15
