"""Whether a run's measurement can be believed: causes of ANOMALOUS, from records alone."""

from collections.abc import Iterator, Sequence

from evalkit.gate.evidence import Evidence
from evalkit.gate.policy import Policy, PrimaryEndpoint
from evalkit.gate.words import Check, Verdict
from evalkit.records import CandidateRecord, LayerRecord, SampleRecord, only, output_probe

PASSED = Verdict.NON_INFERIOR


def layer_checks(
    run: Evidence, candidate: CandidateRecord, baselines: Sequence[CandidateRecord]
) -> Iterator[Check]:
    """Rows, attention outputs and finiteness of one candidate."""
    yield _rows(candidate)
    layers = [r for r in only(run.records, LayerRecord) if r.candidate == candidate.candidate]
    yield _finite(layers)
    for baseline in baselines:
        if candidate.row_bytes_per_token < baseline.row_bytes_per_token:
            yield _differs(run, layers, baseline)


def sample_checks(
    run: Evidence,
    arms: Sequence[str],
    samples: Sequence[Sequence[SampleRecord]],
    endpoint: PrimaryEndpoint,
    policy: Policy,
) -> Iterator[Check]:
    """Number and completeness of each arm's answers to one endpoint's documents."""
    for arm, answered in zip(arms, samples, strict=True):
        if run.documents is not None and len(answered) != run.documents:
            yield Check(
                name=f"samples: {endpoint}",
                verdict=Verdict.ANOMALOUS,
                reason=f"{arm} has {len(answered)} samples of {endpoint.task} where {run.documents} documents were asked for.",
                needs="Every document once: run the task again.",
            )
        cut = sum(s.truncated is True for s in answered) / len(answered) if answered else 0.0
        if not cut <= policy.coverage.truncated:
            yield Check(
                name=f"truncation: {endpoint}",
                verdict=Verdict.ANOMALOUS,
                reason=f"{cut:.1%} of {arm}'s answers were cut off at their length limit, the policy allows "
                f"{policy.coverage.truncated:.1%}: such a score measures the limit.",
                needs="A larger max_gen_toks, for every arm alike.",
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


def _finite(layers: Sequence[LayerRecord]) -> Check:
    name = "finite values"
    broken = next((r for r in layers if r.nonfinite), None)
    if broken is not None:
        where = "the model's end" if broken.layer is None else f"layer {broken.layer}"
        return Check(
            name=name,
            verdict=Verdict.ANOMALOUS,
            reason=f"{broken.nonfinite} values of {broken.probe} are not finite at {where} ({broken.mode}, {broken.phase}).",
            needs="A writer and a kernel that give finite numbers.",
        )
    if not layers:
        return Check(
            name=name,
            verdict=Verdict.INCONCLUSIVE,
            reason="Layers were not compared, so neither finiteness nor a difference in the outputs was seen.",
            needs="A run with the stage layers.",
        )
    return Check(name=name, verdict=PASSED, reason=f"All values of {len(layers)} records are finite.")


def _differs(run: Evidence, layers: Sequence[LayerRecord], baseline: CandidateRecord) -> Check:
    """A smaller row that changes nothing was not read, or not written."""
    name = f"outputs differ from {baseline.candidate}"
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
    same_rows = bool(exact) and all(error == 0 for error in exact)
    if same_rows or all(own[place] == other[place] for place in shared):
        return Check(
            name=name,
            verdict=Verdict.ANOMALOUS,
            reason=f"Attention outputs are bit-identical to those on {baseline.format} rows, though a row has "
            "fewer bytes: the candidate did not run.",
            needs="A candidate whose rows reach the kernel.",
        )
    return Check(
        name=name, verdict=PASSED, reason=f"Attention outputs differ, at {len(shared)} places compared."
    )


def _place(record: LayerRecord) -> tuple[int | None, str, str, str]:
    return record.layer, record.phase, record.mode, record.frozen


def _figures(record: LayerRecord) -> tuple[float | None, ...]:
    """Equal to the last bit only where the outputs are."""
    return record.relative_l2, record.cosine, record.symmetric_distance, record.max_abs_error
