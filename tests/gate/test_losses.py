"""What documents decide at a number that was planned, and at another."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from evalkit.gate.endpoints import compare
from evalkit.gate.evidence import Evidence
from evalkit.gate.losses import Compared, check_losses
from evalkit.gate.policy import Policy
from evalkit.gate.words import Check, Verdict
from tests.gate.conftest import BASELINE, CANDIDATE, DOCUMENTS

INCONCLUSIVE, NON_INFERIOR = Verdict.INCONCLUSIVE, Verdict.NON_INFERIOR


@pytest.fixture
def check(make_run: Callable[..., Path], policy: Policy) -> Callable[..., Check]:
    """`check(documents, looks, lost=, gained=)`: 400 documents under a policy that plans so many."""

    def make(documents: int | None, looks: int = 1, lost: int = 6, gained: int = 6) -> Check:
        asked = replace(policy, documents=documents, looks=looks)
        run = Evidence.read(make_run(lost, gained))
        (endpoint,) = asked.endpoints
        outcome = compare(run.scored(BASELINE, endpoint), run.scored(CANDIDATE, endpoint), endpoint, asked)
        one = Compared(endpoint=endpoint, baseline=BASELINE, outcome=outcome, counts=True)
        (found,) = check_losses([one], asked)
        return found

    return make


@pytest.mark.parametrize(
    ("documents", "looks", "verdict"),
    [
        (None, 1, NON_INFERIOR),
        (None, 2, NON_INFERIOR),
        (DOCUMENTS, 1, NON_INFERIOR),
        (DOCUMENTS + 1, 1, INCONCLUSIVE),
        (DOCUMENTS - 1, 1, INCONCLUSIVE),
        (DOCUMENTS // 2, 1, INCONCLUSIVE),
        (DOCUMENTS // 2, 2, NON_INFERIOR),
        (DOCUMENTS // 2, 3, NON_INFERIOR),
        (DOCUMENTS // 4, 3, INCONCLUSIVE),
        (DOCUMENTS // 4, 4, NON_INFERIOR),
    ],
)
def test_a_loss_decides_at_the_documents_that_were_planned_and_at_no_other_number(
    check: Callable[..., Check], documents: int | None, looks: int, verdict: Verdict
):
    """Else documents could be added until the loss looks small."""
    found = check(documents, looks)
    assert found.verdict is verdict
    assert ("were planned" in found.reason) == (verdict is INCONCLUSIVE)
    assert "lost of 400 documents" in found.reason


def test_what_was_planned_is_asked_for(check: Callable[..., Check]):
    assert "500 were planned" in check(500).reason
    assert check(500).needs == "As many documents as the policy plans, 500."
    assert "150, or a multiple of it up to 450, were planned" in check(150, looks=3).reason
    assert check(150, looks=3).needs.endswith("plans, 150, or a multiple of it up to 450.")


def test_a_loss_above_the_margin_is_not_asked_for_until_it_shows_either(check: Callable[..., Check]):
    assert check(DOCUMENTS, lost=60).verdict is Verdict.WORSE
    assert check(DOCUMENTS // 2, lost=60).verdict is INCONCLUSIVE


def test_a_gain_that_no_format_brings_is_anomalous_at_any_number(check: Callable[..., Check]):
    assert check(DOCUMENTS // 2, lost=0, gained=60).verdict is Verdict.ANOMALOUS


def test_more_documents_are_asked_for_at_the_next_look_or_in_a_new_run(check: Callable[..., Check]):
    near = {"lost": 40, "gained": 30}
    assert check(None, **near).needs.endswith("documents differ.")
    assert check(200, looks=3, **near).needs.endswith("The policy's next look is at 600.")
    assert check(200, looks=2, **near).needs.endswith("They take a new run, under a policy that plans them.")
