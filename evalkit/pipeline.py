"""The main line: checkpoint, candidates, layers, tasks, report. Read top to bottom.

Everything that can be refused is refused in `prepare`, before a run directory exists. What follows is a stage of the
run each: a stage's records count whole or not at all, so a run that was killed goes on with the stage it had reached.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from evalkit import environment, kv, versions
from evalkit.attention import backends, indexer
from evalkit.candidate import Candidate
from evalkit.compare import attribution, engines, phases
from evalkit.compare.figures import ranges
from evalkit.compare.found import divergence
from evalkit.compare.layers import compare, count_passes
from evalkit.compare.passes import noise
from evalkit.compare.passes.resume import LayerState, signature
from evalkit.config import RunConfig
from evalkit.errors import InputError
from evalkit.evaluate import answers, kld
from evalkit.evaluate.engines.served import Served
from evalkit.evaluate.engines.shown import Shown
from evalkit.evaluate.tasks import run_tasks, task_records
from evalkit.kv import Scales, scale_files
from evalkit.model.proof import bytes_per_token, candidate_record
from evalkit.prepare import Prepared, prepare
from evalkit.progress import part, progress
from evalkit.records import (
    CandidateRecord,
    EnvironmentRecord,
    PolicyRecord,
    ProfileRecord,
    Record,
    RunDirectory,
    TaskRecord,
    only,
    read_samples,
)
from evalkit.report import html, markdown, terminal

# What a run's numbers depend on beyond its configuration: it cannot go on where one differs.
SAME_FACTS = ("commit", "checkpoint_sha256", "device", "gpu", "dtype")


def run(config: RunConfig, resume: Path | None = None) -> Path:
    """Compare layers, score tasks, write the report; returns the run directory.

    Args:
        config: what to do; that of `resume`, where it is given.
        resume: a run that was stopped, to go on with; one that has ended stays as it is.
    """
    if resume is not None and RunDirectory(resume).done("report"):
        terminal.show(resume)
        return resume
    prepared = prepare(config)
    directory = RunDirectory(resume) if resume is not None else _create(prepared.config)
    with _told_how_to_go_on(directory):
        describe(directory, prepared)
        shown = ask_engines(directory, prepared)
        if shown is None:
            compare_layers(directory, prepared)
        else:
            compare_shown_layers(directory, prepared, shown)
        find_divergence(directory)
        compare_phases(directory, prepared)
        attribute_loss(directory, prepared)
        compare_tokens(directory, prepared)
        score_tasks(directory, prepared)
        compare_answers(directory)
        write_report(directory)
    return directory.path


def describe(directory: RunDirectory, prepared: Prepared) -> None:
    """Record the environment, and each candidate with the bytes that its rows were seen to take.

    What a serving engine runs is recorded with its layers or tasks, when it has started.
    """
    device, dtype = prepared.scorer.place
    now = environment.collect(prepared.checkpoint, device, dtype, directory.command, prepared.identity)
    if directory.done("environment"):
        _refuse_other(directory, now, prepared)
        return
    with directory.stage("environment") as write:
        write.write(now)
        if (policy := prepared.policy) is not None:
            write.write(PolicyRecord(name=policy.name, sha256=policy.sha256, text=policy.to_json()))
        for record in prepared.ranges:
            write.write(record)
        for described in _candidate_records(prepared) if prepared.model is not None else ():
            write.write(described)


def ask_engines(directory: RunDirectory, prepared: Prepared) -> Shown | None:
    """All that layers and tasks take from serving engines, in one start for each arm; None of a model that is loaded here."""
    scorer, config = prepared.scorer, prepared.config
    if not isinstance(scorer, Served):
        return None
    scored = prepared.arms if "tasks" in config.stages and config.tasks else ()
    arms = [arm for arm in scored if not directory.done(f"tasks {arm.name}")]
    layers = "layers" in config.stages and not directory.done("layers")
    return scorer.fetch(arms, directory.path, layers=layers)


def compare_shown_layers(directory: RunDirectory, prepared: Prepared, shown: Shown) -> None:
    """What serving engines showed of every layer and next token, against the baseline's own first start."""
    config, scorer, starts = prepared.config, prepared.scorer, shown.starts(prepared.arms)
    if "layers" in config.stages and not directory.done("layers"):
        steps = engines.count_steps(starts, len(prepared.documents))
        with directory.stage("layers") as write, progress("layers", steps) as advance:
            for arm in prepared.arms:
                for proved in scorer.proof(arm, directory.path):
                    write.write(proved)
            for record in engines.compare(
                prepared.documents,
                starts,
                topk=scorer.topk,
                decode_tokens=config.layers_decode_tokens,
                device=scorer.place[0],
                decode=prepared.lm.tokenizer.decode,
                advance=advance,
            ):
                write.write(record)
    shown.forget()


def compare_layers(directory: RunDirectory, prepared: Prepared) -> None:
    """Every probe of every layer, isolated and propagated, prefill and decode, against bf16@reference."""
    if "layers" not in prepared.config.stages or directory.done("layers"):
        return
    config, model = prepared.config, prepared.model
    streamed = model.evalkit.weights is not None
    frozen = config.layers_frozen if config.layers_frozen is not None else not streamed
    floors = noise.floors(model, kernel_only=streamed, frozen=frozen)
    passes = count_passes(model, len(prepared.documents), len(prepared.candidates), floors, frozen)
    asked = signature(prepared.documents, config.to_json(), *prepared.candidates)
    state = LayerState(directory.path / "layers.safetensors", directory.pending("layers"), asked)
    with (
        state,
        directory.stage("layers", goes_on_at=state.records_bytes) as write,
        progress("layers", passes) as advance,
    ):
        state.sync = write.sync
        for record in compare(
            model,
            prepared.documents,
            prepared.candidates,
            scales=prepared.scales,
            decode_tokens=config.layers_decode_tokens,
            floors=floors,
            advance=advance,
            frozen=frozen,
            calibration=prepared.calibration,
            state=state,
            decode=prepared.lm.tokenizer.decode,
        ):
            write.write(record)
    state.remove()


def find_divergence(directory: RunDirectory) -> None:
    """The first layer of each candidate whose error leaves the floor, from the records of the layers."""
    if directory.done("layers") and not directory.done("divergence"):
        with directory.stage("divergence") as write:
            for record in divergence.divergences(directory.read()):
                write.write(record)


def compare_phases(directory: RunDirectory, prepared: Prepared) -> None:
    """The first tokens of the same prompts again, arriving in every way that serving has."""
    config, model = prepared.config, prepared.model
    if "layers" not in config.stages or not config.phase_tokens or directory.done("phases"):
        return
    if model is None or model.evalkit.weights is not None:
        return
    documents = [ids[: config.phase_tokens] for ids in prepared.documents]
    passes = phases.count_phase_passes(model, len(documents), prepared.candidates)
    with directory.stage("phases") as write, progress("phases", passes) as advance:
        for record in phases.compare_phases(
            model, documents, prepared.candidates, scales=prepared.scales, advance=advance
        ):
            write.write(record)


def attribute_loss(directory: RunDirectory, prepared: Prepared) -> None:
    """Which component of each candidate its loss comes from, on the first tokens of the compared prompts."""
    config = prepared.config
    if "layers" not in config.stages or not config.attribution or directory.done("attribution"):
        return
    documents = [
        ids[: config.attribution_tokens] for ids in prepared.documents[: config.attribution_documents]
    ]
    passes = attribution.count_passes(prepared.model, len(documents), prepared.candidates)
    with directory.stage("attribution") as write, progress("attribution", passes) as advance:
        for record in attribution.attribute(
            prepared.model, documents, prepared.candidates, scales=prepared.scales, advance=advance
        ):
            write.write(record)


def compare_tokens(directory: RunDirectory, prepared: Prepared) -> None:
    """KL divergence of every candidate's next token on given texts, or on another run's answers."""
    if not prepared.passages or directory.done("kld"):
        return
    passes = kld.count_passes(prepared.passages, prepared.candidates)
    with directory.stage("kld") as write, progress("kld", passes) as advance:
        for record in kld.divergences(
            prepared.model, prepared.passages, prepared.candidates, scales=prepared.scales, advance=advance
        ):
            write.write(record)


def score_tasks(directory: RunDirectory, prepared: Prepared) -> None:
    """The same documents for every candidate, each paired with the baseline's.

    The baseline itself is paired with a pass of its own in batches of half the size: other matrix shapes, in decoding
    and in prefilling, so what differs between the two is the least that can be seen.
    """
    config, scorer = prepared.config, prepared.scorer
    if "tasks" not in config.stages or not config.tasks:
        return
    known = {record.candidate for record in only(directory.read(), CandidateRecord)}
    for number, arm in enumerate(prepared.arms, 1):
        if directory.done(f"tasks {arm.name}"):
            continue
        place = f"arm {number} of {len(prepared.arms)}, {arm.name}"
        with part(place), scorer.lm(arm, directory.path) as lm, directory.stage(f"tasks {arm.name}") as write:
            for proved in scorer.proof(arm, directory.path) if arm.name not in known else ():
                write.write(proved)
            before = [] if arm.against is None else read_samples(directory.path, arm.against)
            asked = (config.tasks, config.task_documents, config.seed)
            for scored in run_tasks(lm, *asked, candidate=arm.name, data=config.data, only=arm.tasks):
                for sample in scored.samples:
                    write.write(sample)
                if arm.against is not None:
                    for record in task_records(
                        arm.name,
                        arm.against,
                        [sample for sample in before if sample.task == scored.task],
                        scored.samples,
                        wall_s=scored.wall_s + scorer.seconds(arm, scored.task),
                        mean_context_tokens=scored.mean_context_tokens,
                        share_over_topk=scored.share_over(scorer.topk),
                        share_stored_rows=scored.share_stored,
                        step=scored.step,
                    ):
                        write.write(record)


def compare_answers(directory: RunDirectory) -> None:
    """Degenerate, empty and cut-off answers, their lengths, and where they leave the baseline's, from the samples."""
    if directory.done("answers") or not only(records := directory.read(), TaskRecord):
        return
    with directory.stage("answers") as write:
        for record in answers.compare_answers(records, read_samples(directory.path)):
            write.write(record)


def write_report(directory: RunDirectory) -> None:
    """report.html, summary.md, and the tables on the terminal; with it the run has ended."""
    if not directory.done("report"):
        with directory.stage("report"):
            html.write(directory.path)
            markdown.write(directory.path)
    terminal.show(directory.path)


def _create(config: RunConfig) -> RunDirectory:
    return RunDirectory.create(config.out, config.name, config.to_json(), environment.command_line(sys.argv))


def _refuse_other(directory: RunDirectory, now: EnvironmentRecord, prepared: Prepared) -> None:
    """Refuse to go on with a run where what its numbers depend on has changed since.

    Of a checkout with changes of its own only that it has some is known (`-dirty`), not which: two such trees of one
    commit pass for the same.
    """
    records = directory.read()
    then = only(records, EnvironmentRecord)[0]
    names = [record.candidate for record in only(records, CandidateRecord)]
    candidates = prepared.candidates[: len(names)]  # of a serving engine those whose tasks were scored
    facts = [(key, getattr(then, key), getattr(now, key)) for key in SAME_FACTS]
    facts += versions.changed(then, now)
    facts += [(key, then.flags.get(key), now.flags.get(key)) for key in {**then.flags, **now.flags}]
    stored = next((record.sha256 for record in only(records, PolicyRecord)), None)
    facts.append(("policy", stored, None if prepared.policy is None else prepared.policy.sha256))
    facts.append(("candidates", ", ".join(names), ", ".join(map(str, candidates))))
    was, is_now = (
        ", ".join(sorted({one.sha256 for one in found})) or "none"
        for found in (only(records, ProfileRecord), prepared.ranges)
    )
    facts.append(("profile SHA-256", was, is_now))
    for key, before, after in facts:
        if before != after:
            raise InputError(
                f"{directory.path} was begun with {key} {before}, here it is {after}: its numbers would not "
                "compare; start a new run"
            )


def _candidate_records(prepared: Prepared) -> Iterator[Record]:
    """What each candidate resolved to, and the layers that it has no scale for."""
    model = prepared.model
    for requested, candidate in zip(prepared.requested, prepared.candidates, strict=True):
        scales = prepared.scales[candidate]
        backend = backends.reading(candidate.backend, candidate.reader, candidate.read)
        scorer = indexer.kernel_for(candidate.index, model.dtype, model.config.index_n_heads, model.device)
        yield candidate_record(
            candidate,
            kernel=f"{backend.kernel_on(model.device)}; index scores: {scorer}",
            heads=model.config.num_attention_heads,
            bytes_per_token_read_back=bytes_per_token(
                model, lambda c=candidate, s=scales: _cache(prepared, c, s)
            ),
            requested=requested,
            note=_note(candidate, scales, bool(prepared.calibration)),
        )
        if candidate.scales == "one" and kv.get(candidate.format).uses_scales:
            carried = scale_files.carried(prepared.checkpoint)
            yield from ranges.missing_scales(str(candidate), model.config.num_hidden_layers, carried)


@contextmanager
def _told_how_to_go_on(directory: RunDirectory) -> Iterator[None]:
    """Say on stderr how a run that is being stopped can go on."""
    try:
        yield
    except InputError:
        raise
    except BaseException:
        print(f"stopped; to go on: evalkit run --resume {directory.path}", file=sys.stderr)
        raise


def _cache(prepared: Prepared, candidate: Candidate, scales: Mapping[int, Scales]) -> Any:
    """An empty cache; with scale 1.0 where the scales are yet to be found."""
    if candidate.scales == "calibrated" and not scales:
        scales = dict.fromkeys(range(prepared.model.config.num_hidden_layers), Scales())
    return prepared.model.evalkit.new_cache(candidate, scales)


def _note(candidate: Candidate, scales: Mapping[int, Scales], found_by_layer: bool) -> str:
    if not scales and candidate.scales == "calibrated" and found_by_layer:
        return "scales found layer by layer: range records hold them"
    if not scales:
        return "scale 1.0" if kv.get(candidate.format).uses_scales else ""
    values = [one.latent for one in scales.values()]
    return f"scales {min(values):.3g} to {max(values):.3g} over {len(values)} layers"
