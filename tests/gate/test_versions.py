"""A candidate against itself in another run."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from evalkit.gate.policy import Policy
from evalkit.gate.verdict import judge
from evalkit.gate.words import Check, Verdict
from evalkit.records import SampleRecord
from tests.gate.conftest import BASELINE, CANDIDATE, scores

MakeRun = Callable[..., Path]


def checks(here: Path, policy: Policy, there: Path) -> dict[str, Check]:
    (found,) = judge(here, policy, against=there).candidates
    return {check.name: check for check in found.checks}


ITSELF = "needle, exact_match (answer) against itself in {}"


def test_the_same_candidate_is_paired_with_itself(make_run: MakeRun, policy: Policy):
    """The new version loses 46 documents against the old one, and 16 of these against bf16."""
    old, new = make_run(0, 30, name="old"), make_run(20, 4, name="new")
    found = checks(new, policy, old)
    itself = found[ITSELF.format(old.name)]
    assert itself.verdict is Verdict.WORSE
    assert "of 400 documents" in itself.reason
    assert judge(new, policy, against=old).candidates[0].verdict is Verdict.WORSE


def test_an_unchanged_candidate_is_noninferior_to_itself(make_run: MakeRun, policy: Policy):
    old, new = make_run(name="old"), make_run(name="new")
    found = checks(new, policy, old)
    assert found[ITSELF.format(old.name)].verdict is Verdict.NON_INFERIOR
    assert "+0.0 points lost of 400" in found[ITSELF.format(old.name)].reason
    assert "same format, scales, kernel" in found["version"].reason
    assert judge(new, policy, against=old).verdict is Verdict.NON_INFERIOR


def test_a_version_that_mends_is_no_anomaly(make_run: MakeRun, policy: Policy):
    old, new = make_run(100, 2, name="old"), make_run(6, 6, name="new")
    found = checks(new, policy, old)[ITSELF.format(old.name)]
    assert found.verdict is Verdict.NON_INFERIOR
    assert "-24.5 points lost" in found.reason


def test_what_differs_in_the_candidate_is_said(make_run: MakeRun, policy: Policy):
    old = make_run(name="old", candidate={"kernel": "a kernel 1.0; index scores: torch"})
    found = checks(make_run(name="new"), policy, old)["version"]
    assert (
        "differs in kernel: a kernel 1.0; index scores: torch there, a kernel; index scores: torch here"
        in found.reason
    )
    assert found.verdict is Verdict.NON_INFERIOR


def test_other_prompts_are_not_compared(make_run: MakeRun, policy: Policy):
    def reworded(sample: SampleRecord) -> SampleRecord:
        return replace(sample, prompt_sha256="e" * 64) if sample.doc_id in (7, 9) and sample.candidate == CANDIDATE else sample  # fmt: skip

    old, new = make_run(name="old", sample=reworded), make_run(name="new")
    found = checks(new, policy, old)
    (check,) = [check for name, check in found.items() if name.startswith("version: needle")]
    assert check.verdict is Verdict.INCONCLUSIVE
    assert "2 of 400 documents are not the same" in check.reason
    assert "document 7" in check.reason
    assert ITSELF.format(old.name) not in found


def test_another_seed_is_not_compared(make_run: MakeRun, policy: Policy):
    old, new = make_run(name="old", config={"seed": 1}), make_run(name="new", config={"seed": 2})
    found = checks(new, policy, old)
    assert found["version: seed"].verdict is Verdict.INCONCLUSIVE
    assert "seed: 1 in" in found["version: seed"].reason
    assert ITSELF.format(old.name) not in found


def test_a_candidate_that_is_new_is_compared_with_its_baselines_only(make_run: MakeRun, policy: Policy):
    old = make_run(name="old", sample=lambda s: None if s.candidate == CANDIDATE else s)
    lines = (old / "records.jsonl").read_text().splitlines(keepends=True)
    (old / "records.jsonl").write_text("".join(line for line in lines if CANDIDATE not in line))
    found = checks(make_run(name="new"), policy, old)
    assert not [name for name in found if name.startswith("version") or "itself" in name]
    assert found[f"needle, exact_match (answer) against {BASELINE}"].verdict is Verdict.NON_INFERIOR


def test_documents_on_which_nothing_shows_decide_nothing(make_run: MakeRun, policy: Policy):
    perfect = {CANDIDATE: scores(400)}
    old, new = make_run(name="old", answers=perfect), make_run(name="new", answers=perfect)
    found = checks(new, policy, old)
    assert found["version: range: needle, exact_match (answer)"].verdict is Verdict.INCONCLUSIVE
    assert found[ITSELF.format(old.name)].verdict is Verdict.INCONCLUSIVE


@pytest.mark.parametrize(
    "changes", [{"environment": {"checkpoint_sha256": "d" * 64}}, {"environment": {"gpu": "another"}}]
)
def test_another_checkpoint_or_gpu_decides_nothing(
    make_run: MakeRun, policy: Policy, changes: dict[str, object]
):
    old, new = make_run(name="old", **changes), make_run(name="new")
    assert checks(new, policy, old)["comparable"].verdict is Verdict.INCONCLUSIVE
    assert judge(new, policy, against=old).verdict is Verdict.INCONCLUSIVE
    lost = make_run(name="lost", sample=lambda s: replace(s, score=0.0) if s.candidate == CANDIDATE else s)
    same = make_run(name="same")
    assert judge(lost, policy, against=same).verdict is Verdict.WORSE
    assert judge(lost, policy, against=old).verdict is Verdict.INCONCLUSIVE


def test_a_candidate_whose_tasks_there_were_stopped_decides_nothing(make_run: MakeRun, policy: Policy):
    """It is no new one: a version that loses would pass unseen."""
    old = make_run(name="old", sample=lambda s: None if s.candidate == CANDIDATE else s)
    lines = (old / "records.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if f'"tasks {CANDIDATE}"' not in line]
    assert len(kept) == len(lines) - 1
    (old / "records.jsonl").write_text("".join(kept))
    new = make_run(name="new")
    found = checks(new, policy, old)
    assert found["version: tasks"].verdict is Verdict.INCONCLUSIVE
    assert f"for {CANDIDATE} in {old.name}" in found["version: tasks"].reason
    assert judge(new, policy, against=old).verdict is Verdict.INCONCLUSIVE
