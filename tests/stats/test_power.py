from dataclasses import replace
from math import inf

import numpy as np
import pytest

from evalkit.errors import InputError
from evalkit.stats.exact import NONINFERIOR, p_value
from evalkit.stats.paired import mcnemar_p
from evalkit.stats.power import (
    Damage,
    Design,
    detectable_margin,
    documents_still_needed,
    each_power,
    planned_documents,
    power,
    sensitive_documents,
    sensitivity,
)

DESIGN = Design(margin=0.02, alpha=0.05, power=0.8, discordance=0.02)


def test_power_is_how_often_simulated_runs_show_noninferiority():
    n, runs = 400, 20_000
    draws = np.random.default_rng(0).multinomial(n, [0.01, 0.01, 0.98], size=runs)
    shown = sum(p_value(int(a), int(b), n, 0.02, NONINFERIOR) <= 0.05 for a, b, _ in draws)
    assert shown / runs == pytest.approx(power(n, DESIGN), abs=4 * (0.25 / runs) ** 0.5)


@pytest.mark.parametrize(
    ("discordance", "loss", "target", "published"),
    [
        (0.01, 0.0, 0.8, 255),
        (0.01, 0.005, 0.9, 599),
        (0.02, 0.0, 0.8, 401),
        (0.02, 0.01, 0.8, 1490),
        (0.04, 0.0, 0.9, 930),
        (0.08, 0.0, 0.8, 1268),
    ],
)
def test_planned_documents_have_the_power_and_little_more(discordance, loss, target, published):
    design = replace(DESIGN, discordance=discordance, loss=loss, power=target)
    n = planned_documents(design)
    assert target <= power(n, design) <= target + 0.03
    assert power(int(n * 0.95), design) < target
    assert n == pytest.approx(published, rel=0.03)


def test_sensitivity_is_how_often_simulated_runs_find_the_damage():
    """At 236 documents, and at so many that a loss above what counts is what fails."""
    for n, at_most in ((236, 0.08), (600, 0.05)):
        damage = Damage(loss=0.04, discordance=0.064, at_most=at_most, alpha=0.05)
        draws = np.random.default_rng(1).multinomial(n, [0.052, 0.012, 0.936], size=10_000)
        found = sum(
            a > b and a - b <= n * at_most + 1e-9 and mcnemar_p(int(a), int(b)) <= 0.05 for a, b, _ in draws
        )
        assert found / 10_000 == pytest.approx(sensitivity(n, damage), abs=4 * (0.25 / 10_000) ** 0.5)


def test_the_documents_that_find_the_damage_are_no_more_than_it_takes():
    damage = Damage(loss=0.04, discordance=0.064, at_most=0.08, alpha=0.05)
    n = sensitive_documents(damage, 0.9)
    assert sensitivity(n, damage) >= 0.9 > sensitivity(n - 10, damage)
    assert sensitive_documents(replace(damage, at_most=0.0401), 0.9) is None
    with pytest.raises(InputError, match="the loss below what counts"):
        replace(damage, at_most=0.04)


def test_several_endpoints_are_shown_at_once_with_the_power_asked_for():
    assert each_power(0.8, 1) == 0.8
    assert each_power(0.8, 4) == pytest.approx(0.95)
    assert 1 - 4 * (1 - each_power(0.8, 4)) == pytest.approx(0.8)


def test_no_number_of_documents_excludes_a_loss_that_is_assumed():
    assert planned_documents(replace(DESIGN, discordance=0.1, loss=0.02)) is None


def test_none_will_do_while_the_loss_seen_is_at_the_margin():
    assert documents_still_needed(250, 7, 2, DESIGN) == inf
    assert 0 < documents_still_needed(250, 5, 3, DESIGN) < inf


def test_what_is_still_needed_and_what_there_is_make_the_plan():
    design = replace(DESIGN, discordance=0.04)
    assert 250 + documents_still_needed(250, 6, 4, DESIGN) == planned_documents(design)


def test_the_detectable_margin_is_the_one_that_these_documents_were_planned_for():
    n = planned_documents(DESIGN)
    assert detectable_margin(n, DESIGN) == pytest.approx(0.02, abs=5e-4)
    assert detectable_margin(4 * n, DESIGN) < 0.012


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"discordance": 0.01, "loss": 0.015}, "cannot be fewer than those lost"),
        ({"power": 1.0}, "power 1.0"),
        ({"margin": 0.0}, "margin"),
    ],
)
def test_a_design_that_cannot_be_is_refused(changes, said):
    with pytest.raises(InputError, match=said):
        replace(DESIGN, **changes)
