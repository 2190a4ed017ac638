"""Whether a run's measurement can be believed: causes of ANOMALOUS, from records alone."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from evalkit.gate.evidence import Evidence
from evalkit.gate.policy import Policy, PrimaryEndpoint
from evalkit.gate.recount import recount
from evalkit.gate.words import Check, Verdict
from evalkit.records import CandidateRecord, LayerRecord, Record, only, output_probe

PASSED = Verdict.NON_INFERIOR
# Of an attribution, those that are the candidate itself: a component alone may well need what it was taken from.
OWN_ARMS = ("all", "apart")


def layer_checks(
    run: Evidence, candidate: CandidateRecord, baselines: Sequence[CandidateRecord]
) -> Iterator[Check]:
    """Rows, attention outputs and finiteness of one candidate."""
    yield _rows(candidate)
    yield _finite(run, candidate)
    yield from _compared(run, candidate)
    for baseline in baselines:
        # Rows of more bytes may hold a baseline's exactly.
        if (
            candidate.format != baseline.format
            and candidate.row_bytes_per_token <= baseline.row_bytes_per_token
        ):
            yield _differs(run, candidate, baseline)


def baseline_checks(run: Evidence, baseline: CandidateRecord, place: str = "") -> Iterator[Check]:
    """The same of what a candidate is compared with; `place` names a run that is not the candidate's."""
    whose = f"{baseline.candidate}{place}"
    for check in layer_checks(run, baseline, []):
        yield replace(check, name=f"{check.name}: {whose}", reason=f"{whose}: {check.reason}")


def sample_checks(
    run: Evidence, arm: str, endpoint: PrimaryEndpoint, policy: Policy, place: str = ""
) -> Iterator[Check]:
    """Number and completeness of an arm's answers to one endpoint's documents, and what was recorded of them.

    `place` names a run that is not the candidate's.
    """
    answered, whose = run.scored(arm, endpoint), f"{arm}{place}"
    if not run.asked(endpoint):
        yield Check(
            name=f"samples: {endpoint}",
            verdict=Verdict.INCONCLUSIVE,
            reason=f"{run.path.name} did not score {endpoint}.",
            needs="A run whose tasks have this metric and filter, or a policy that names what they have.",
        )
        return
    if run.documents is not None and len(answered) != run.documents:
        yield Check(
            name=f"samples: {endpoint}",
            verdict=Verdict.ANOMALOUS,
            reason=f"{whose} has {len(answered)} samples of {endpoint.task} where {run.documents} documents were asked for.",
            needs="Every document once: run the task again.",
        )
    cut = sum(s.truncated is True for s in answered) / len(answered) if answered else 0.0
    if not cut <= policy.coverage.truncated:
        yield Check(
            name=f"truncation: {endpoint}",
            verdict=Verdict.ANOMALOUS,
            reason=f"{cut:.1%} of {whose}'s answers were cut off at their length limit, the policy allows "
            f"{policy.coverage.truncated:.1%}: such a score measures the limit.",
            needs="A larger max_gen_toks, for every arm alike.",
        )
    wrong = recount(run, arm, endpoint)
    if wrong is not None:
        yield Check(
            name=f"records: {endpoint}",
            verdict=Verdict.ANOMALOUS,
            reason=f"{whose}: {wrong}",
            needs="The run as it was written, or the tasks run again.",
        )


def _rows(candidate: CandidateRecord) -> Check:
    wanted, found = candidate.row_bytes_per_token, candidate.bytes_per_token_read_back
    name = "rows read back"
    if found is None:
        return Check(
            name=name,
            verdict=Verdict.INCONCLUSIVE,
            reason="No bytes were read back, so nothing shows that this format was stored.",
            needs="A run that reads them back.",
        )
    if found != wanted:
        return Check(
            name=name,
            verdict=Verdict.ANOMALOUS,
            reason=f"A token changed {found} bytes of the cache, a row of {candidate.format} has {wanted}: "
            "another format was stored.",
            needs="A cache that holds what the candidate names.",
        )
    return Check(name=name, verdict=PASSED, reason=f"{found} bytes a token, as {candidate.format} has.")


def _finite(run: Evidence, candidate: CandidateRecord) -> Check:
    name = "finite values"
    own = [r for r in run.records if getattr(r, "candidate", None) == candidate.candidate]
    counted = [r for r in own if hasattr(r, "nonfinite") and getattr(r, "arm", OWN_ARMS[0]) in OWN_ARMS]
    broken = next((r for r in counted if r.nonfinite), None)
    if broken is not None:
        return Check(
            name=name,
            verdict=Verdict.ANOMALOUS,
            reason=_broken(broken),
            needs="A writer and a kernel that give finite numbers.",
        )
    layers = only(own, LayerRecord)
    if not layers:
        return Check(
            name=name,
            verdict=Verdict.INCONCLUSIVE,
            reason="Layers were not compared, so neither finiteness nor a difference in the outputs was seen.",
            needs="A run with the stage layers.",
        )
    return Check(name=name, verdict=PASSED, reason=f"All values of {len(counted)} records are finite.")


def _broken(record: Record) -> str:
    held = {name: getattr(record, name, None) for name in ("layer", "mode", "phase", "axis", "arm")}
    layer = held.pop("layer")
    where = "the model's end" if layer is None else f"layer {layer}"
    how = ", ".join(str(value) for value in held.values() if value is not None)
    what = getattr(record, "probe", record.kind)
    return f"{getattr(record, 'nonfinite', 0)} values of {what} are not finite at {where} ({how})."


def _compared(run: Evidence, candidate: CandidateRecord) -> Iterator[Check]:
    """A layer at which others were compared and this was not, or a comparison of no value: records were lost or taken."""
    probe, name = output_probe(run.records), "layers compared"
    measured = [r for r in only(run.records, LayerRecord) if not r.rung.startswith("floor:")]
    mine = [r for r in measured if r.candidate == candidate.candidate]
    empty = next((r for r in mine if r.n < 1), None)
    if empty is not None:
        yield Check(
            name=name,
            verdict=Verdict.ANOMALOUS,
            reason=f"The record of {empty.probe} at {_named(_place(empty))} is of {empty.n} values.",
            needs="Records of values that were compared.",
        )
    known = {c.candidate for c in run.candidates}
    totals = [r for r in measured if (r.probe, r.rung) == (probe, "total") and r.candidate in known]
    own = {_place(r) for r in totals if r.candidate == candidate.candidate}
    missing = [place for place in dict.fromkeys(map(_place, totals)) if place not in own]
    if mine and missing:
        yield Check(
            name=name,
            verdict=Verdict.ANOMALOUS,
            reason=f"{len(missing)} comparisons of {probe} that other candidates have are missing, the first is "
            f"{_named(missing[0])}.",
            needs="Every candidate compared at every layer: run the stage layers again.",
        )


def _differs(run: Evidence, candidate: CandidateRecord, baseline: CandidateRecord) -> Check:
    """Other rows that change nothing were not read, or not written."""
    name = f"outputs differ from {baseline.candidate}"
    layers = [r for r in only(run.records, LayerRecord) if r.candidate == candidate.candidate]
    exact = [r.max_abs_error for r in layers if (r.probe, r.rung) == ("attention", "format")]
    probe = output_probe(run.records)
    own = {_place(r): _figures(r) for r in layers if (r.probe, r.rung) == (probe, "total")}
    other = {
        _place(r): _figures(r)
        for r in only(run.records, LayerRecord)
        if (r.candidate, r.probe, r.rung) == (baseline.candidate, probe, "total")
    }
    shared = own.keys() & other.keys()
    if not shared:
        return Check(
            name=name,
            verdict=Verdict.INCONCLUSIVE,
            reason="Attention outputs of the two were not recorded at the same places.",
            needs="A run that compares the layers of both.",
        )
    fewer = candidate.row_bytes_per_token < baseline.row_bytes_per_token
    same_rows = fewer and bool(exact) and all(error == 0 for error in exact)
    if not same_rows and any(own[place] != other[place] for place in shared):
        return Check(
            name=name, verdict=PASSED, reason=f"Attention outputs differ, at {len(shared)} places compared."
        )
    identical = f"Attention outputs are bit-identical to those on {baseline.format} rows"
    if fewer:
        return Check(
            name=name,
            verdict=Verdict.ANOMALOUS,
            reason=f"{identical}, though a row has fewer bytes: the candidate did not run.",
            needs="A candidate whose rows reach the kernel.",
        )
    return Check(
        name=name,
        verdict=Verdict.INCONCLUSIVE,
        reason=f"{identical}, and a row has as many bytes: two formats may round alike, or one of them did not run.",
        needs="Longer prompts in the stage layers, where the two formats differ, or another baseline.",
    )


def _place(record: LayerRecord) -> tuple[int | None, str, str, str]:
    return record.layer, record.phase, record.mode, record.frozen


def _named(place: tuple[int | None, str, str, str]) -> str:
    layer, phase, mode, frozen = place
    return f"layer {layer} ({mode}, {phase}, frozen {frozen})"


def _figures(record: LayerRecord) -> tuple[float | None, ...]:
    """Equal to the last bit only where the outputs are."""
    return record.relative_l2, record.cosine, record.symmetric_distance, record.max_abs_error
