from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from evalkit.gate.policy import Policy
from evalkit.gate.verdict import judge
from evalkit.gate.words import Verdict
from evalkit.records import RunDirectory, TaskRecord, only, read_samples
from tests.gate.conftest import CANDIDATE, DOCUMENTS


def test_the_first_start_counts_and_the_spread_over_all_is_told(
    make_run: Callable[..., Path], policy: Policy
):
    """Two later starts that answer nothing right would be WORSE if their documents counted."""
    path = make_run(6, 6)
    before = judge(path, policy)
    run = RunDirectory(path)
    (first,) = (r for r in only(run.read(), TaskRecord) if r.candidate == CANDIDATE)
    for start, score, lost in ((2, 0.0, 320), (3, first.score + 0.01, 4)):
        name = f"{CANDIDATE}, start {start}"
        with run.stage(f"tasks {name}") as write:
            write.write(replace(first, candidate=name, baseline=CANDIDATE, score=score, lost=lost, gained=1))
            for sample in read_samples(path):
                if sample.candidate == CANDIDATE:
                    write.write(replace(sample, candidate=name, score=0.0))
    after = judge(path, policy)
    assert after.verdict is before.verdict is Verdict.NON_INFERIOR
    (told,) = (check for check in after.candidates[0].checks if check.name.startswith("starts: needle"))
    assert told.reason == (
        f"3 starts score 0.0 to {100 * first.score + 1:.1f} %; from the first, which counts, at most 321 of "
        f"{DOCUMENTS} documents come out otherwise."
    )
    others = [check for check in after.candidates[0].checks if check is not told]
    assert others == list(before.candidates[0].checks)


def test_starts_of_graded_scores_are_told_by_their_mean(make_run: Callable[..., Path], policy: Policy):
    path = make_run(6, 6)
    run = RunDirectory(path)
    (first,) = (r for r in only(run.read(), TaskRecord) if r.candidate == CANDIDATE)
    graded = {"lost": None, "gained": None, "loss": -0.0123}
    with run.stage("again") as write:
        write.write(replace(first, candidate=f"{CANDIDATE}, start 2", baseline=CANDIDATE, **graded))
    (told,) = (c for c in judge(path, policy).candidates[0].checks if c.name.startswith("starts: needle"))
    assert told.reason.endswith(
        f"which counts, {DOCUMENTS} graded documents lie at most 1.2 points off on average."
    )
