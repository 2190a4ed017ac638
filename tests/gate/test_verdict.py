from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import get_args, get_origin

import numpy as np
import pytest

from evalkit import cli
from evalkit.arm_names import damage_arm
from evalkit.gate.policy import Exemption, Limit, Policy
from evalkit.gate.verdict import Judged, judge, store
from evalkit.gate.words import Verdict
from evalkit.records import (
    PolicyRecord,
    Record,
    RunDirectory,
    SampleRecord,
    VerdictRecord,
    last_judgement,
    only,
    to_line,
)
from evalkit.report import tables
from evalkit.schema import HINTS, KINDS
from tests.gate.conftest import BASELINE, CANDIDATE, CONTROL, DAMAGED, DOCUMENTS, scores

MakeRun = Callable[..., Path]
ORDER = [Verdict.NON_INFERIOR, Verdict.INCONCLUSIVE, Verdict.WORSE]


def judged(run: Path, policy: Policy, **options: object) -> Judged:
    (found,) = judge(run, policy, **options).candidates
    return found


def reasons(found: Judged) -> str:
    return " ".join(f"{check.reason} {check.needs}" for check in found.deciding)


def test_a_small_loss_on_documents_that_would_tell_is_noninferior(make_run: MakeRun, policy: Policy):
    judgement = judge(make_run(6, 6), policy)
    assert judgement.verdict is Verdict.NON_INFERIOR
    assert judgement.exit_code == 0


def test_a_loss_above_the_margin_is_worse(make_run: MakeRun, policy: Policy):
    judgement = judge(make_run(60, 2), policy)
    assert judgement.exit_code == 10
    assert "+14.5 points lost of 400 documents" in reasons(judgement.candidates[0])
    assert "measurably lower" in reasons(judgement.candidates[0])


def test_a_loss_about_the_margin_is_inconclusive_and_says_what_it_would_take(
    make_run: MakeRun, policy: Policy
):
    near = judged(make_run(40, 30), policy)
    assert near.verdict is Verdict.INCONCLUSIVE
    assert "the margin lies within" in reasons(near)
    assert "more documents if the true loss is 0 points and 17.5% of documents differ" in reasons(near)
    missed = judged(make_run(18, 6, name="missed"), policy)
    assert "As many documents once more in a new run" in reasons(missed)
    at = judged(make_run(24, 3, name="at"), policy)
    assert at.verdict is Verdict.INCONCLUSIVE
    assert "None will do" in reasons(at)
    assert "measurably lower" in reasons(at)


def test_more_losses_never_improve_the_verdict(make_run: MakeRun, policy: Policy):
    found = [
        ORDER.index(judged(make_run(lost, 4, name=f"lost-{lost}"), policy).verdict)
        for lost in range(0, 60, 7)
    ]
    assert found == sorted(found)
    assert set(found) == {0, 1, 2}


@pytest.mark.parametrize("damage", [40, 30, 20, 9, 0])
def test_weaker_planted_damage_never_improves_the_verdict(make_run: MakeRun, policy: Policy, damage: int):
    found = judged(make_run(answers={DAMAGED: scores(320, damage)}), policy)
    assert found.verdict is (Verdict.NON_INFERIOR if damage >= 9 else Verdict.INCONCLUSIVE)


# Every cause of ANOMALOUS


def change(arm: str, **changes: object) -> Callable[[SampleRecord], SampleRecord]:
    return lambda sample: replace(sample, **changes) if sample.candidate == arm else sample


def drop(arm: str) -> Callable[[SampleRecord], SampleRecord | None]:
    return lambda sample: None if (sample.candidate, sample.doc_id) == (arm, 7) else sample


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layers": (0.02, {"nonfinite": 3})}, "3 values of attention are not finite at layer 0"),
        ({"layers": (0.0, {"max_abs_error": 0.0})}, "bit-identical"),
        ({"layers": (0.003, {})}, "bit-identical"),
        ({"candidate": {"bytes_per_token_read_back": 1152}}, "A token changed 1152 bytes"),
        ({"sample": drop(CANDIDATE)}, "has 399 samples of needle where 400 documents were asked for"),
        ({"sample": drop(BASELINE)}, "do not pair: 1 of 400 samples missing from the baseline"),
        ({"sample": change(CANDIDATE, prompt_sha256="e" * 64)}, "400 of 400 samples missing"),
        (
            {"sample": change(CANDIDATE, truncated=True)},
            "100.0% of fp8_ds_mla@flashmla's answers were cut off",
        ),
        ({"sample": change(BASELINE, truncated=True)}, "100.0% of bf16@flashmla's answers were cut off"),
        ({"lost": 2, "gained": 60}, "a gain above the margin"),
        ({"answers": {CONTROL: scores(320, 60)}}, "loses +15.0 points against itself"),
        ({"answers": {CONTROL: scores(320, 0, 60)}}, "loses -15.0 points against itself"),
        ({"answers": {CONTROL: scores(8, n=10)}}, "Samples of bf16@flashmla, batches of 4 do not pair"),
        ({"baseline": {"bytes_per_token_read_back": 656}}, f"{BASELINE}: A token changed 656 bytes"),
        ({"layers": (0.02, {"n": 0})}, "The record of attention at layer 0"),
        ({"task": {"n": 12}}, "the record of needle, exact_match (answer) says n 12, its samples 400."),
        ({"task": {"score": 0.9}}, "says score 0.9, its samples 0.8"),
        ({"task": {"lost": 60}}, "says lost 60, its samples"),
        ({"task": {"gained": None}}, "says gained none, its samples"),
    ],
)
def test_a_measurement_that_cannot_be_is_anomalous(
    make_run: MakeRun, policy: Policy, changes: dict[str, object], said: str
):
    judgement = judge(make_run(**changes), policy)
    assert judgement.exit_code == 12
    assert said in reasons(judgement.candidates[0])


def test_a_document_twice_is_anomalous(make_run: MakeRun, policy: Policy):
    run = make_run()
    path = run / "samples" / f"{CANDIDATE}.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, lines[3]]) + "\n")
    found = judged(run, policy)
    assert found.verdict is Verdict.ANOMALOUS
    assert "come more than once in the candidate" in reasons(found)


def test_what_was_recorded_has_to_be_what_the_samples_say(make_run: MakeRun, policy: Policy):
    """The candidate's answers are replaced by the baseline's: nothing is lost, and its record says 60."""
    run = make_run(60, 0)
    assert judged(run, policy).verdict is Verdict.WORSE
    own, other = (run / "samples" / f"{arm}.jsonl" for arm in (CANDIDATE, BASELINE))
    own.write_text(other.read_text().replace(f'"{BASELINE}"', f'"{CANDIDATE}"'))
    found = judged(run, policy)
    assert found.verdict is Verdict.ANOMALOUS
    assert "says score 0.65, its samples 0.8; loss 0.15, its samples 0; lost 60, its samples 0." in reasons(
        found
    )


def test_an_endpoint_recorded_twice_is_anomalous(make_run: MakeRun, policy: Policy):
    run = make_run()
    path = run / "records.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    first = next(line for line in lines if '"kind": "task"' in line and f'"candidate": "{CANDIDATE}"' in line)
    again = first.replace('"share_over_topk": 1.0', '"share_over_topk": 0.0')
    assert again != first
    path.write_text("".join([*lines, again]))
    found = judged(run, policy)
    assert found.verdict is Verdict.ANOMALOUS
    assert "was recorded 2 times" in reasons(found)


@pytest.mark.parametrize("arm", [BASELINE, CANDIDATE])
def test_a_layer_that_others_were_compared_at_is_not_left_out(make_run: MakeRun, policy: Policy, arm: str):
    """The one that breaks a limit, or holds what is not finite, would be."""
    run = make_run()
    path = run / "records.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    kept = [x for x in lines if not ('"layer": 1' in x and f'"candidate": "{arm}"' in x)]
    assert len(kept) < len(lines)
    path.write_text("".join(kept))
    found = judged(run, policy)
    assert found.verdict is Verdict.ANOMALOUS
    assert "1 comparisons of attention that other candidates have are missing" in reasons(found)
    assert "layer 1 (isolated, decode, frozen none)" in reasons(found)


def record_of(kind: str, **changes: object) -> Record:
    """A record of any kind, with what its fields' types ask for."""
    values: dict[str, object] = {
        name: [] if get_origin(hint) is list else None if type(None) in get_args(hint) else hint("1")
        for name, hint in HINTS[kind].items()
    }  # fmt: skip
    return KINDS[kind](**(values | changes))


@pytest.mark.parametrize("arm", [BASELINE, CANDIDATE])
@pytest.mark.parametrize("kind", [kind for kind, hints in HINTS.items() if "nonfinite" in hints])
def test_a_value_that_is_not_finite_is_anomalous_wherever_it_was_counted(
    make_run: MakeRun, policy: Policy, kind: str, arm: str
):
    own = {"arm": "all"} if kind == "attribution" else {}
    run = make_run(written=[record_of(kind, candidate=arm, nonfinite=4096, **own)])
    found = judged(run, policy)
    assert found.verdict is Verdict.ANOMALOUS
    assert "4096 values of" in reasons(found)
    assert (arm == BASELINE) == (f"{BASELINE}: 4096" in reasons(found))


@pytest.mark.parametrize("arm", ["only", "without", "interaction"])
def test_a_component_alone_may_give_what_is_not_finite(make_run: MakeRun, policy: Policy, arm: str):
    """No candidate runs so: without what the others do to it, it may well overflow."""
    alone = record_of("attribution", candidate=CANDIDATE, nonfinite=4096, arm=arm)
    assert judged(make_run(written=[alone]), policy).verdict is Verdict.NON_INFERIOR


def test_anomalous_precedes_worse_and_worse_inconclusive(make_run: MakeRun, policy: Policy):
    broken = {"layers": (0.02, {"nonfinite": 3})}
    assert judged(make_run(60, 2, **broken), policy).verdict is Verdict.ANOMALOUS
    outside = {"environment": {"checkpoint_sha256": "d" * 64}}
    assert judged(make_run(60, 2, **outside, name="outside"), policy).verdict is Verdict.WORSE


# What makes a verdict at best INCONCLUSIVE


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"environment": {"checkpoint_sha256": "d" * 64}}, "checkpoint nano (dddddddddddd) is not listed"),
        (
            {"environment": {"gpu": "NVIDIA B200, SM100, CUDA 13.0"}},
            "NVIDIA B200, SM100, CUDA 13.0 is not listed",
        ),
        ({"environment": {"gpu": None}}, "cpu is not listed"),
        ({"candidate": {"kernel": "modelled: SM100"}}, "the kernel is modelled, not run"),
        ({"candidate": {"kernel": "another kernel"}}, "kernel 'another kernel' is not listed"),
        ({"candidate": {"read": "decoded"}}, "rows were decoded"),
        ({"candidate": {"heads": 128}}, "128 heads on one GPU are not listed"),
        ({"config": {"profile": "glm-5.2"}}, "profile glm-5.2"),
        ({"candidate": {"bytes_per_token_read_back": None}}, "No bytes were read back"),
        ({"task": {"share_over_topk": 0.12}}, "Only 12.0% of the scored tokens had more context than top-k"),
        ({"task": {"share_stored_rows": 0.5}}, "Only 50.0% of the scored tokens attended stored rows"),
        ({"task": {"share_over_topk": None}}, "It was not recorded how many of the scored tokens"),
        ({"right": 396, "gained": 0}, "bf16@flashmla scores 99.0%"),
        ({"right": 70, "lost": 1, "gained": 1}, "bf16@flashmla scores 17.5%"),
        ({"answers": {DAMAGED: []}}, "No damage was planted"),
        ({"answers": {DAMAGED: scores(320, 3, 2)}}, "was not found lower"),
        ({"answers": {DAMAGED: scores(320, 200)}}, "cost 50.0 points, more than the 20"),
        ({"answers": {DAMAGED: [], damage_arm(CANDIDATE, 0.2): scores(320, 46)}}, "No damage was planted into bf16"),
        ({"layers": (0.06, {})}, "layer.relative_l2 is 0.06 at layer 0; the policy asks for at most 0.05"),
        ({"answers": {CONTROL: []}}, "bf16@flashmla was not scored a second time"),
        ({"baseline": {"bytes_per_token_read_back": None}}, "bf16@flashmla: No bytes were read back"),
        ({"baseline": {"kernel": "modelled: SM100"}}, "the baseline bf16@flashmla: kernel 'modelled: SM100' is not"),
        ({"baseline": {"read": "decoded"}}, "the baseline bf16@flashmla: rows were decoded"),
        ({"baseline": {"heads": 1}}, "the baseline bf16@flashmla: 1 heads on one GPU are not listed"),
        ({"candidate": {"row_bytes_per_token": 1152, "bytes_per_token_read_back": 1152}, "layers": (0.003, {})},
         "bit-identical to those on bf16 rows, and a row has as many bytes"),
    ],
)  # fmt: skip
def test_a_run_that_cannot_show_it_is_inconclusive_and_says_why(
    make_run: MakeRun, policy: Policy, changes: dict[str, object], said: str
):
    judgement = judge(make_run(**changes), policy)
    assert judgement.exit_code == 11
    assert said in reasons(judgement.candidates[0])


def test_a_score_of_guessing_does_not_count(
    make_run: MakeRun, with_policy: Callable[..., Policy], policy: Policy
):
    (endpoint,) = policy.endpoints
    asked = with_policy(endpoints=(replace(endpoint, chance=0.78),))
    found = judged(make_run(stored=asked), asked)
    assert "not surely above the 78.0% of guessing" in reasons(found)


def test_an_endpoint_that_does_not_count_is_not_worse_either(make_run: MakeRun, policy: Policy):
    found = judged(make_run(60, 2, answers={DAMAGED: scores(320, 3, 2)}), policy)
    assert found.verdict is Verdict.INCONCLUSIVE
    assert "on documents that do not count" in reasons(found)


def test_a_candidate_or_baseline_that_did_not_run_is_inconclusive(
    make_run: MakeRun, with_policy: Callable[..., Policy]
):
    for changes in ({"decide": ("nvfp4_ds_mla",)}, {"baselines": ("bf16", "fp8_e4m3")}):
        asked = with_policy(**changes)
        found = judged(make_run(stored=asked, name=next(iter(changes))), asked)
        assert found.verdict is Verdict.INCONCLUSIVE
        assert "is not in" in reasons(found)


def test_a_candidate_of_the_baselines_own_format_may_give_the_same_outputs(make_run: MakeRun, policy: Policy):
    """bf16 on another backend of the same arithmetic: nothing says that it did not run."""
    same = {"format": "bf16", "row_bytes_per_token": 1152, "bytes_per_token_read_back": 1152}
    run = make_run(candidate=same, layers=(0.003, {}))
    assert judged(run, policy).verdict is Verdict.NON_INFERIOR


def test_a_candidate_is_not_its_own_baseline(make_run: MakeRun, with_policy: Callable[..., Policy]):
    asked = with_policy(baselines=("bf16", CANDIDATE))
    found = judged(make_run(100, 0, stored=asked), asked)
    assert any("is the candidate itself" in c.reason for c in found.checks)
    asked = with_policy(baselines=(CANDIDATE,))
    assert judged(make_run(100, 0, stored=asked, name="alone"), asked).verdict is Verdict.INCONCLUSIVE


def test_an_incumbent_has_no_control_and_the_damage_of_the_first_bf16(
    make_run: MakeRun, with_policy: Callable[..., Policy]
):
    """bf16 is judged against the fp8 that it would replace: the run holds a control and damage of bf16 alone."""
    asked = with_policy(decide=("bf16",), baselines=("fp8_ds_mla",), limits=())
    found = judged(make_run(stored=asked), asked)
    said = {check.name: check for check in found.checks}
    control = said["control: needle, exact_match (answer)"]
    assert control.verdict is Verdict.NON_INFERIOR
    assert f"{CANDIDATE} has no control" in control.reason
    assert "decides nothing" in control.reason
    assert f"(0.2 of a value of {BASELINE}) cost" in said["sensitivity: needle, exact_match (answer)"].reason
    assert found.verdict is Verdict.NON_INFERIOR


def test_answers_scored_elsewhere_bring_no_control(make_run: MakeRun, policy: Policy):
    for name, stages, verdict in (
        ("own", ["layers", "tasks"], Verdict.INCONCLUSIVE),
        ("others", ["layers"], Verdict.NON_INFERIOR),
    ):
        found = judged(make_run(answers={CONTROL: []}, config={"stages": stages}, name=name), policy)
        assert found.verdict is verdict, reasons(found)


def test_graded_scores_that_agree_with_their_control_need_no_interval(make_run: MakeRun, policy: Policy):
    before = np.random.default_rng(0).uniform(0.4, 0.9, size=DOCUMENTS)
    few = before.copy()
    few[:3] -= 0.3
    noise = np.random.default_rng(1).normal(0.0, 0.05, size=DOCUMENTS)
    answers = {BASELINE: before, CONTROL: few, DAMAGED: before - 0.1 + noise, CANDIDATE: before + noise}
    found = judged(make_run(answers={arm: x.tolist() for arm, x in answers.items()}), policy)
    assert found.verdict is Verdict.NON_INFERIOR
    assert any("in other batches loses +0.2 points" in check.reason for check in found.checks)


def test_few_clusters_are_inconclusive_and_clustered_losses_count_for_less(
    make_run: MakeRun, with_policy: Callable[..., Policy], policy: Policy
):
    (endpoint,) = policy.endpoints
    few = with_policy(endpoints=(replace(endpoint, documents_per_cluster=8),))
    found = judged(make_run(stored=few), few)
    assert found.verdict is Verdict.INCONCLUSIVE
    assert "400 documents lie in 50 clusters" in reasons(found)
    four = with_policy(endpoints=(replace(endpoint, documents_per_cluster=4),))
    # 28 documents lost in a row are 7 haystacks: four questions on one say hardly more than one does.
    assert judged(make_run(40, 2, name="apart"), policy).verdict is Verdict.WORSE
    assert judged(make_run(40, 2, stored=four, name="four"), four).verdict is Verdict.INCONCLUSIVE


def test_a_second_look_is_harder(make_run: MakeRun, with_policy: Callable[..., Policy]):
    runs = []
    for looks in (1, 2):
        asked = with_policy(looks=looks)
        runs.append(judged(make_run(16, 6, stored=asked, name=f"looks-{looks}"), asked).verdict)
    assert runs == [Verdict.NON_INFERIOR, Verdict.INCONCLUSIVE]


def test_graded_scores_are_judged_by_a_bootstrap(make_run: MakeRun, policy: Policy):
    rng = np.random.default_rng(0)
    before = rng.uniform(0.4, 0.9, size=DOCUMENTS)
    noise = rng.normal(0.0, 0.05, size=DOCUMENTS)
    damaged = {BASELINE: before.tolist(), CONTROL: before.tolist(), DAMAGED: (before - 0.1 + noise).tolist()}
    for drop_, verdict in ((0.0, Verdict.NON_INFERIOR), (0.05, Verdict.INCONCLUSIVE), (0.2, Verdict.WORSE)):
        answers = {**damaged, CANDIDATE: (before - drop_ + noise).tolist()}
        assert judged(make_run(answers=answers, name=f"graded-{drop_}"), policy).verdict is verdict


# Policy


def test_another_policy_is_post_hoc_and_exits_11(
    make_run: MakeRun, with_policy: Callable[..., Policy], policy: Policy
):
    run = make_run(6, 6)
    judgement = judge(run, with_policy(alpha=0.1))
    assert judgement.post_hoc
    assert judgement.exit_code == 11
    assert judge(make_run(6, 6, stored=None, name="without"), policy).exit_code == 11


def test_a_policy_counts_as_stored_before_the_first_stage_and_by_its_text(make_run: MakeRun, policy: Policy):
    stored = PolicyRecord(name=policy.name, sha256=policy.sha256, text=policy.to_json())
    late = make_run(stored=None, name="late", written=[stored])
    assert judge(late, policy).post_hoc
    run = make_run()
    assert not judge(run, policy).post_hoc
    path = run / "records.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(
        "".join(to_line(replace(stored, text="{}")) if '"kind": "policy"' in x else x for x in lines)
    )
    judgement = judge(run, policy)
    assert judgement.post_hoc
    assert judgement.exit_code == 11


def test_an_exception_holds_until_its_day(make_run: MakeRun, with_policy: Callable[..., Policy]):
    asked = with_policy(
        exceptions=(
            Exemption(candidate="fp8_ds_mla", limit="attention", expires=date(2026, 6, 30), reason="known."),
        )
    )
    run = make_run(layers=(0.06, {}), stored=asked)
    held = judged(run, asked, today=date(2026, 6, 30))
    assert held.verdict is Verdict.NON_INFERIOR
    assert any("Excepted until 2026-06-30: known." in check.reason for check in held.checks)
    ended = judged(run, asked, today=date(2026, 7, 1))
    assert ended.verdict is Verdict.INCONCLUSIVE
    assert "ended on 2026-06-30" in reasons(ended)


def test_a_limit_may_be_anomalous_and_one_that_was_not_measured_does_not_pass(
    make_run: MakeRun, with_policy: Callable[..., Policy]
):
    unseen = Limit(name="subnormal", figure="range.subnormal_share", at_most=0.01)
    asked = with_policy(limits=(unseen,))
    assert "was not recorded" in reasons(judged(make_run(stored=asked), asked))
    least = Limit(name="l2", figure="layer.relative_l2", at_least=0.5, breach="ANOMALOUS")
    asked = with_policy(limits=(least,))
    assert judged(make_run(stored=asked, name="least"), asked).verdict is Verdict.ANOMALOUS


# Two runs


def test_the_baseline_may_come_from_another_run(make_run: MakeRun, policy: Policy):
    here, there = make_run(60, 2, name="here"), make_run(6, 6, name="there")
    judgement = judge(here, policy, against=there)
    assert judgement.verdict is Verdict.WORSE
    assert judgement.against == there.name


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"packages": {"torch": "2.10.0"}}, "torch: 2.10.0 there, 2.11.0 here"),
        ({"commit": "4567"}, "commit: 4567 there, 0123 here"),
    ],
)
def test_another_version_is_said_and_judged(
    make_run: MakeRun, policy: Policy, environment: dict[str, object], said: str
):
    there = make_run(name="there", environment=environment)
    found = judged(make_run(), policy, against=there)
    assert found.verdict is Verdict.NON_INFERIOR
    assert any(said in check.reason for check in found.checks if check.name == "comparable")


@pytest.mark.parametrize(
    "changes",
    [
        {"environment": {"dtype": "float32"}},
        {"environment": {"flags": {"tf32": True}}},
        {"config": {"profile": "x"}},
        {"config": {"engine": "vllm"}},
    ],
)
def test_a_run_that_differs_in_more_than_the_candidate_decides_nothing(
    make_run: MakeRun, policy: Policy, changes: dict[str, object]
):
    found = judged(make_run(), policy, against=make_run(name="there", **changes))
    assert found.verdict is Verdict.INCONCLUSIVE
    assert "differs in more than the candidate" in reasons(found)


def test_a_run_of_before_there_were_engines_compares_with_a_native_one(make_run: MakeRun, policy: Policy):
    there = make_run(name="there", config={"engine": "native"})
    assert judged(make_run(), policy, against=there).verdict is Verdict.NON_INFERIOR


# False verdicts


def test_a_true_loss_at_the_margin_is_called_noninferior_in_few_runs(policy: Policy):
    """The whole of one endpoint's judgement, on 20,000 simulated runs; 5 % is what alpha allows."""
    from evalkit.gate.endpoints import compare

    rng = np.random.default_rng(0)
    (endpoint,) = policy.endpoints
    wrong = worse = 0
    drawn = Counter((int(a), int(b)) for a, b, _ in rng.multinomial(150, [0.055, 0.005, 0.94], size=20_000))
    for (lost, gained), times in drawn.items():
        before, after = (
            [
                SampleRecord(
                    candidate=arm,
                    task="needle",
                    doc_id=i,
                    prompt_sha256=f"{i}",
                    target_sha256="",
                    filter="answer",
                    metric="exact_match",
                    score=score,
                    generated_tokens=None,
                    truncated=None,
                    response="",
                )
                for i, score in enumerate(answered)
            ]
            for arm, answered in (
                (BASELINE, scores(100, n=150)),
                (CANDIDATE, scores(100, lost, gained, n=150)),
            )
        )
        outcome = compare(before, after, endpoint, policy)
        wrong += times * (outcome.p_noninferior <= 0.05)
        worse += times * (outcome.p_worse <= 0.05)
    limit = 0.05 + 3 * (0.05 * 0.95 / 20_000) ** 0.5
    assert 0.01 < wrong / 20_000 <= limit
    assert worse / 20_000 <= limit


# The command


def test_the_command_judges_stores_and_reports(
    make_run: MakeRun, policy: Policy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run, file = make_run(60, 2, stored=None), tmp_path / "policy.toml"
    file.write_text((Path(cli.__file__).parents[1] / "tasks/policies/default.toml").read_text())
    for _ in range(2):
        with pytest.raises(SystemExit) as ended:
            cli.main(["gate", str(run), "--policy", str(file)])
        assert ended.value.code == 11
    out = capsys.readouterr().out
    assert "POST-HOC" in out
    records = (run / "records.jsonl").read_text()
    assert records.count('"check": "overall"') == 1, "judging again says the same and adds nothing"
    assert "## Verdict" in (run / "summary.md").read_text()
    assert (run / "junit.xml").is_file()


def test_judgements_of_one_second_are_told_apart(make_run: MakeRun, policy: Policy):
    run, strict = make_run(6, 6, stored=None), replace(policy, name="strict", alpha=0.01)
    for one in (policy, strict, policy):
        store(run, judge(run, one))
        records = RunDirectory(run).read()
        last = last_judgement(records)
        assert {r.policy for r in last} == {one.name}
        assert [r.check for r in last].count("overall") == 1
    assert len({r.judged_utc for r in only(records, VerdictRecord)}) == 3
    assert one.name in tables.verdicts(records).caption
