"""One endpoint: whole losses that were not seen, questions asked again, scores that are none."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from evalkit.gate.endpoints import Outcome, compare
from evalkit.gate.policy import Policy
from evalkit.gate.verdict import judge
from evalkit.gate.words import Verdict
from evalkit.records import SampleRecord
from evalkit.stats.paired import PairingError
from tests.gate.conftest import BASELINE, CANDIDATE, CONTROL, DAMAGED, DOCUMENTS, scores


def samples(arm: str, scored: Sequence[float | None], prompts: int | None = None) -> list[SampleRecord]:
    """One document a score; of `prompts` different prompts, in turn."""
    return [
        SampleRecord(
            candidate=arm,
            task="needle",
            doc_id=doc_id,
            prompt_sha256=f"{doc_id % (prompts or len(scored)):064}",
            target_sha256="b" * 64,
            filter="answer",
            metric="exact_match",
            score=score,
            generated_tokens=4,
            truncated=False,
            response="blue",
        )
        for doc_id, score in enumerate(scored)
    ]


def outcome(
    before: Sequence[float | None],
    after: Sequence[float | None],
    policy: Policy,
    prompts: int | None = None,
    **endpoint: float,
) -> Outcome:
    asked = replace(policy.endpoints[0], **endpoint)
    return compare(samples(BASELINE, before, prompts), samples(CANDIDATE, after, prompts), asked, policy)


def test_clusters_of_which_none_differs_leave_open_that_some_fall_whole(policy: Policy):
    right = [1.0] * 8 + [0.0] * 2
    few = outcome(right * 100, right * 100, policy, margin=0.02, documents_per_cluster=10)
    assert few.p_noninferior >= 0.98**100
    assert few.upper > 0.02
    assert "100 clusters, of which 0 lost and 0 gained more than half" in few.unseen
    assert few.needs == "About 49 more clusters of 10, if no larger share is lost."
    many = outcome(right * 149, right * 149, policy, margin=0.02, documents_per_cluster=10)
    assert many.p_noninferior <= 0.05
    assert many.upper < 0.02
    assert not many.unseen


def test_graded_documents_that_differ_harmlessly_leave_open_that_some_fail(policy: Policy):
    def graded(n: int) -> Outcome:
        jitter = [0.5 + (0.02, -0.02, 0.0, 0.0)[i % 4] for i in range(n)]
        return outcome([0.5] * n, jitter, policy, margin=0.02)

    assert graded(40).p_noninferior >= 0.98**40
    assert graded(40).upper > 0.02
    assert "About 109 more documents" in graded(40).needs
    assert graded(160).p_noninferior <= 0.05
    assert graded(160).upper < 0.02


def test_graded_scores_of_a_larger_range_fail_by_more(policy: Policy):
    before = [50.0 + i % 50 for i in range(100)]
    after = [x + 0.01 * (-1) ** i for i, x in enumerate(before)]
    assert outcome(before, after, policy).p_noninferior > (1 - 0.05 / 49) ** 101


def test_the_gate_says_what_unseen_losses_take(
    make_run: Callable[..., Path], with_policy: Callable[..., Policy], policy: Policy
):
    """100 clusters of 4, none differs, margin 2: a sample without a loss has a chance of 13 % where 2 % fail whole."""
    stored = with_policy(endpoints=(replace(policy.endpoints[0], margin=0.02, documents_per_cluster=4),))
    planted = [float(i < 320 and i % 8 != 0) for i in range(DOCUMENTS)]
    answers = {CONTROL: scores(320), DAMAGED: planted, CANDIDATE: scores(320)}
    judgement = judge(make_run(stored=stored, answers=answers), stored)
    assert judgement.verdict is Verdict.INCONCLUSIVE
    (check,) = judgement.candidates[0].deciding
    assert (
        "the margin lies within, for 100 clusters, of which 0 lost and 0 gained more than half of what one can, leave"
        in check.reason
    )
    assert check.needs == "About 49 more clusters of 4, if no larger share is lost."


def test_a_question_asked_eight_times_counts_once(policy: Policy):
    before, after = scores(40, n=50), scores(40, 1, n=50)
    once, again = outcome(before, after, policy), outcome(before * 8, after * 8, policy, prompts=50)
    assert again.n == 50
    assert replace(again, repeats=0) == once
    assert once.counted == "50 documents"
    assert again.counted == "50 documents (350 more repeat one of them and count once)"


def test_repeats_that_were_scored_differently_count_once_with_their_mean(policy: Policy):
    before = [1.0] * 400
    after = [0.0] * 4 + [1.0] * 396  # of 200 questions asked twice, 4 lost once
    found = outcome(before, after, policy, prompts=200)
    assert (found.n, found.apart) == (200, (2.0, 0.0, 200))
    assert found.loss == pytest.approx(0.01)
    assert found.score == pytest.approx(0.99)


def test_one_prompt_with_other_targets_is_another_question(policy: Policy):
    arms = [
        [replace(s, target_sha256=f"{s.doc_id:064}") for s in samples(arm, [1.0] * 60, prompts=1)]
        for arm in (BASELINE, CANDIDATE)
    ]
    assert compare(*arms, policy.endpoints[0], policy).n == 60


def test_the_gate_says_how_many_documents_repeat_a_question(make_run: Callable[..., Path], policy: Policy):
    run = make_run(
        answers={
            arm: scores(40, lost, n=50) * 8
            for arm, lost in ((CONTROL, 0), (BASELINE, 0), (DAMAGED, 7), (CANDIDATE, 1))
        },
        sample=lambda sample: replace(sample, prompt_sha256=f"{sample.doc_id % 50:064}"),
    )
    judgement = judge(run, policy)
    assert judgement.verdict is Verdict.INCONCLUSIVE
    assert "of 50 documents (350 more repeat one of them and count once)" in " ".join(
        check.reason for check in judgement.candidates[0].deciding
    )


@pytest.mark.parametrize(
    ("score", "said"),
    [
        (None, "missing"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
        (int("9" * 400), "larger than any float"),
    ],
)
def test_a_score_that_is_none_is_named_by_its_document(policy: Policy, score: float | None, said: str):
    for n in (1, 40):
        with pytest.raises(PairingError, match=rf"needle document 0 .*: its score is {said}$"):
            outcome([1.0] * n, [score, *[1.0] * (n - 1)], policy)
