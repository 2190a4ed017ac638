from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from evalkit import cli
from evalkit.errors import InputError
from evalkit.gate.endpoints import Outcome, still_needed
from evalkit.gate.planning import plan, words
from evalkit.gate.policy import Policy
from evalkit.stats.power import Damage, Design, planned_documents, sensitivity
from tests.gate.conftest import CONTROL, scores


def test_documents_come_from_the_discordance_given(policy: Policy):
    """Loss and planted damage are shown at once with power .8, so each with .9."""
    (found,) = plan(policy, discordance=0.08)
    design = Design(margin=0.05, alpha=0.05, power=0.9, discordance=0.08)
    assert found.documents == planned_documents(design) > found.sensitive
    assert found.hours is None


def test_a_verdict_asks_for_the_documents_that_the_plan_names(policy: Policy):
    (endpoint,) = policy.endpoints
    seen = Outcome(n=250, score=0.8, baseline_score=0.8, loss=0.0, discordance=0.08, apart=(10, 10, 250))
    (found,) = plan(policy, discordance=0.08)
    assert found.documents == 250 + still_needed(seen, endpoint, policy)


def test_where_bf16_hardly_differs_planted_damage_decides_how_many_documents(policy: Policy):
    (found,) = plan(policy, discordance=0.001, damaged=0.16)
    assert found.documents == found.sensitive
    damage = Damage(loss=0.1, discordance=0.16, at_most=policy.damage.loss_at_most, alpha=0.05)
    assert sensitivity(found.documents, damage) >= 0.9
    assert f"{found.sensitive} of them to find planted damage of 10 points" in "\n".join(
        words(policy, [found])
    )


def test_two_endpoints_need_more_documents_each(policy: Policy, with_policy: Callable[..., Policy]):
    (endpoint,) = policy.endpoints
    both = plan(with_policy(endpoints=(endpoint, replace(endpoint, task="walk"))), discordance=0.04)
    assert both[0].documents == both[1].documents
    assert both[0].documents > plan(policy, discordance=0.04)[0].documents


def test_a_run_measures_discordance_and_time(make_run: Callable[..., Path], policy: Policy):
    """By hand: 12 of 400 differ; a document takes 36 s / 400 on each of control, damage, baseline and candidate."""
    (found,) = plan(policy, run=make_run(answers={CONTROL: scores(320, 7, 5)}))
    assert found.discordance == 0.03
    assert found.hours == pytest.approx(0.09 * found.documents * 4 / 3600)
    assert 0 < found.carries < 0.05
    said = "\n".join(words(policy, [found]))
    assert f"3.00% of documents differ (bf16@flashmla against {CONTROL}, 400 documents)" in said


@pytest.mark.parametrize(("margin", "fewest"), [(0.02, 149), (0.05, 100)])
def test_clustered_documents_lie_in_enough_clusters_to_see_one_that_is_lost_whole(
    with_policy: Callable[..., Policy], margin: float, fewest: int
):
    """0.98^149 is the first power of it below .05; at 5 points 59 would do, and a design effect takes 100."""
    (endpoint,) = with_policy().endpoints
    clustered = replace(endpoint, margin=margin, documents_per_cluster=50)
    asked = with_policy(endpoints=(clustered,))
    (found,) = plan(asked, discordance=0.01)
    assert found.clusters == fewest
    assert found.documents == 50 * fewest
    assert f"in {fewest} clusters of 50 at least" in "\n".join(words(asked, [found]))


def test_a_plan_for_graded_scores_says_what_they_take_at_least(
    make_run: Callable[..., Path], with_policy: Callable[..., Policy]
):
    run = make_run(answers={CONTROL: [0.5] * 400})
    (endpoint,) = with_policy().endpoints
    with pytest.raises(InputError, match=r"is graded: .* it takes 149 at least"):
        plan(with_policy(endpoints=(replace(endpoint, margin=0.02),)), run=run)


def test_a_plan_says_whether_the_documents_that_the_policy_names_will_do(with_policy: Callable[..., Policy]):
    needed = plan(with_policy(), discordance=0.08)[0].documents
    assert needed is not None
    for documents, said in ((needed, "enough"), (needed - 1, "too few")):
        asked = with_policy(documents=documents)
        assert f"the policy plans {documents}: {said}" in "\n".join(
            words(asked, plan(asked, discordance=0.08))
        )
    silent = with_policy()
    assert "the policy plans" not in "\n".join(words(silent, plan(silent, discordance=0.08)))


def test_without_either_the_plan_is_refused(policy: Policy):
    with pytest.raises(InputError, match="give --discordance"):
        plan(policy)


def test_the_command_prints_a_line_an_endpoint(capsys: pytest.CaptureFixture[str]):
    policies = Path(cli.__file__).parents[1] / "tasks" / "policies"
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", str(policies / "deepseek-v3.2-gsm8k-5shot.toml"), "--discordance", "0.04"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "gsm8k, exact_match (flexible-extract): margin 2 points, 4.00% of documents differ (given)" in out
