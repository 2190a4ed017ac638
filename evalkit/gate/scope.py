"""Whether a run lies where its policy's verdicts hold, and whether two runs can be compared."""

from collections.abc import Iterator

from evalkit import versions
from evalkit.gate.evidence import Evidence
from evalkit.gate.policy import Policy, PrimaryEndpoint
from evalkit.gate.words import Check, Verdict
from evalkit.records import CandidateRecord

# Other differences between two runs are noted and decide nothing.
DECIDING = ("checkpoint_sha256", "gpu", "dtype", "flags")
NOTED = ("commit", "python")  # and packages
# And whether it decides: documents depend on their number and on the seed.
SAME_SETTINGS = {"profile": True, "engine": True, "seed": True, "task_documents": True, "batch_size": False}
SAME_DOCUMENTS = "The same task, documents and task files in both runs."
EARLIER = {"engine": "native"}  # what runs did before a setting was written down


def check_scope(run: Evidence, candidate: CandidateRecord, policy: Policy) -> Check:
    """At best INCONCLUSIVE outside: every reason is named."""
    where, scope = run.environment, policy.scope
    gpu = where.gpu or "cpu"
    profile = str(run.config.get("profile", "native"))
    outside = {
        f"checkpoint {where.checkpoint} ({where.checkpoint_sha256[:12]}) is not listed": where.checkpoint_sha256
        not in scope.checkpoints.values(),
        f"its ranges were given by profile {profile}": profile not in scope.profiles,
        f"{gpu} is not listed": not gpu.startswith(scope.gpus),
    }
    reasons = [*(reason for reason, applies in outside.items() if applies), *_unlisted(candidate, policy)]
    if not reasons:
        return Check(
            name="scope",
            verdict=Verdict.NON_INFERIOR,
            reason=f"{where.checkpoint} on {gpu}, {candidate.kernel}, {candidate.heads} heads.",
        )
    return Check(
        name="scope",
        verdict=Verdict.INCONCLUSIVE,
        reason=f"The policy does not reach here: {'; '.join(reasons)}.",
        needs="A run within the policy's scope.",
    )


def check_baseline_scope(baseline: CandidateRecord, policy: Policy, place: str = "") -> Check:
    """What a candidate is compared with ran where the policy reaches, too; `place` names another run."""
    name, reasons = f"scope: {baseline.candidate}{place}", _unlisted(baseline, policy)
    if not reasons:
        return Check(
            name=name,
            verdict=Verdict.NON_INFERIOR,
            reason=f"{baseline.candidate}{place}: {baseline.kernel}, {baseline.heads} heads.",
        )
    return Check(
        name=name,
        verdict=Verdict.INCONCLUSIVE,
        reason=f"The policy does not reach the baseline {baseline.candidate}{place}: {'; '.join(reasons)}.",
        needs="A baseline within the policy's scope.",
    )


def _unlisted(candidate: CandidateRecord, policy: Policy) -> list[str]:
    scope = policy.scope
    outside = {
        f"kernel {candidate.kernel!r} is not listed": not candidate.kernel.startswith(scope.kernels),
        f"{candidate.heads} heads on one GPU are not listed": candidate.heads not in scope.heads,
        "the kernel is modelled, not run": candidate.kernel.startswith("modelled"),
        "rows were decoded for a bf16 kernel": candidate.read == "decoded",
    }
    return [reason for reason, applies in outside.items() if applies]


def differences(run: Evidence, other: Evidence) -> Iterator[tuple[str, bool]]:
    """What differs between two runs, in words, and whether it forbids a verdict."""
    for name in (*DECIDING, *NOTED):
        here, there = getattr(run.environment, name), getattr(other.environment, name)
        if isinstance(here, dict):
            for key in sorted({**here, **there}):
                if here.get(key) != there.get(key):
                    yield f"{key}: {there.get(key)} there, {here.get(key)} here", name in DECIDING
        elif here != there:
            yield f"{name}: {there} there, {here} here", name in DECIDING
    for name, there, here in versions.changed(other.environment, run.environment):
        yield f"{name}: {there} there, {here} here", False
    for name, decides in SAME_SETTINGS.items():
        here, there = (place.config.get(name, EARLIER.get(name)) for place in (run, other))
        if here != there:
            yield f"{name}: {there} there, {here} here", decides


def comparable(run: Evidence, other: Evidence) -> bool:
    """Whether a loss between two runs, or within one, is the candidate's: else it decides nothing, WORSE neither."""
    return run is other or not any(decides for _, decides in differences(run, other))


def check_comparable(run: Evidence, other: Evidence) -> Check:
    """Whether a loss between two runs is the candidate's."""
    found = list(differences(run, other))
    deciding = [text for text, decides in found if decides]
    noted = "; ".join(text for text, _ in found)
    if deciding:
        return Check(
            name="comparable",
            verdict=Verdict.INCONCLUSIVE,
            reason=f"{other.path.name} differs in more than the candidate: {noted}.",
            needs="Two runs of one checkpoint, dtype, GPU, engine, seed and number of documents.",
        )
    return Check(
        name="comparable",
        verdict=Verdict.NON_INFERIOR,
        reason=f"{other.path.name} is of the same checkpoint, dtype and GPU"
        + (f"; it differs in {noted}." if noted else "."),
    )


def other_documents(
    run: Evidence, name: str, other: Evidence, theirs: str, endpoint: PrimaryEndpoint
) -> str | None:
    """Why the documents that two arms of two runs were asked are not the same; None where they are."""
    here, there = (
        {s.doc_id: (s.prompt_sha256, s.target_sha256) for s in place.scored(arm, endpoint)}
        for place, arm in ((run, name), (other, theirs))
    )
    every = {**here, **there}
    apart = sorted(document for document in every if here.get(document) != there.get(document))
    if not here or not there:
        return f"{name if not here else theirs} has no samples of it."
    if not apart:
        return None
    return (
        f"{len(apart)} of {len(every)} documents are not the same in {other.path.name}, the first is "
        f"document {apart[0]}."
    )
