"""The main line: checkpoint, candidates, layers, tasks, report. Read top to bottom.

Everything that can be refused is refused in `prepare`, before a run directory exists. What follows is a stage of the
run each: a stage's records count whole or not at all, so a run that was killed goes on with the stage it had reached.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from evalkit import environment, kv
from evalkit.attention import backends, indexer
from evalkit.candidate import BEST, Candidate
from evalkit.compare import attribution, divergence, noise, phases, ranges
from evalkit.compare.layers import calibrate, compare, count_passes
from evalkit.compare.state import LayerState, signature
from evalkit.config import RunConfig
from evalkit.errors import InputError
from evalkit.evaluate import answers, kld
from evalkit.evaluate.documents import calibration_documents, generated_tokens, range_documents
from evalkit.evaluate.engines.choose import DEFAULT_CANDIDATES, NativeScorer, Scorer, serve
from evalkit.evaluate.engines.native import auto_batch_size
from evalkit.evaluate.lm import EvalkitLM
from evalkit.evaluate.tasks import TaskRun, load_tasks, refuse_long_prompts, run_tasks
from evalkit.evaluate.texts import read_texts
from evalkit.gate.policy import Policy
from evalkit.gate.policy import load as load_policy
from evalkit.kv import Scales, scale_files
from evalkit.kv.aliases import BF16_NAMES
from evalkit.model import rescale
from evalkit.model.load import load, resolve_checkpoint
from evalkit.model.profile import load_profile
from evalkit.model.proof import bytes_per_token
from evalkit.model.shards import sampled_identity
from evalkit.model.stream import should_stream, stream
from evalkit.progress import progress
from evalkit.records import (
    CandidateRecord,
    EnvironmentRecord,
    PolicyRecord,
    ProfileRecord,
    Record,
    RunDirectory,
    SampleRecord,
    TaskRecord,
    only,
    read_samples,
)
from evalkit.report import html, markdown, terminal
from evalkit.stats import paired

# Between the seeds of compared documents, so that calibration's lie between them.
DOCUMENT_STEP = 1_000
# What a run's numbers depend on beyond its configuration: it cannot go on where one differs.
SAME_FACTS = ("checkpoint_sha256", "device", "gpu", "dtype")


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
        compare_layers(directory, prepared)
        find_divergence(directory)
        compare_phases(directory, prepared)
        attribute_loss(directory, prepared)
        compare_tokens(directory, prepared)
        score_tasks(directory, prepared)
        compare_answers(directory)
        write_report(directory)
    return directory.path


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What a run works on, checked: the loaded model, resolved candidates with their scales, and the prompts.

    identity: what names a streamed checkpoint's bytes; to hash all of them would read them once more.
    model: None where a serving engine has it.
    scorer: what scores the tasks.
    ranges: what the profile made of the model, layer by layer; empty where it is `native`.
    requested: each candidate as it was asked for, in the order of `candidates`; the first is the bf16 baseline.
    documents: token ids [T] for the layer comparison.
    passages: what KL divergence is found on.
    calibration: token ids [T] on which a streamed checkpoint's scales are found layer by layer; otherwise `scales` has
        them.
    """

    config: RunConfig
    policy: Policy | None
    checkpoint: Path
    identity: str | None
    model: Any
    ranges: Sequence[ProfileRecord]
    lm: EvalkitLM
    scorer: Scorer
    requested: tuple[str, ...]
    candidates: tuple[Candidate, ...]
    scales: Mapping[Candidate, Mapping[int, Scales]]
    documents: Sequence[Tensor]
    passages: Sequence[kld.Passage]
    calibration: Sequence[Tensor]


def prepare(config: RunConfig) -> Prepared:
    """Load and check everything that a run needs.

    Raises:
        InputError: a checkpoint, candidate, prompt or task is not usable; nothing has been written.
    """
    checkpoint = resolve_checkpoint(config.checkpoint)
    policy = None if config.policy is None else load_policy(config.policy)
    requested = _requested(config)
    profile = load_profile(config.profile)
    if config.stages == ("tasks",) and not config.tasks:
        raise InputError("tasks is empty: name at least one, such as evalkit_needle_1024")
    dtype = None if config.dtype is None else getattr(torch, config.dtype)
    streamed = should_stream(checkpoint, config.device, dtype, config.stream)
    identity = sampled_identity(checkpoint) if streamed else None
    if config.engine != "native":
        return _served(config, policy, checkpoint, identity, requested)
    if streamed:
        _refuse_streamed(config)
    if not sys.stderr.isatty():
        disable_progress_bar()  # transformers' own, of loading weights
    environment.exact_numerics()
    if streamed:
        model = stream(checkpoint, config.device, dtype)
    else:
        model = load(checkpoint, "bf16@reference", device=config.device, dtype=dtype)
    batch_size = auto_batch_size(model) if config.batch_size == "auto" else config.batch_size
    config = config.with_values(batch_size=batch_size)
    candidates = tuple(model.evalkit.resolve(text) for text in requested)
    _refuse_twice(candidates, requested)
    lm = EvalkitLM(model, candidate=candidates[0], batch_size=batch_size)
    documents = _documents(config, lm)
    if config.phase_tokens and "layers" in config.stages:
        phases.refuse_short(documents)
    if "tasks" in config.stages and config.tasks:
        tasks = load_tasks(config.tasks, config.task_documents, config.seed, config.data)
        refuse_long_prompts(lm, tasks, config.task_documents)
    passages = _passages(config, checkpoint, lm) if "kld" in config.stages else []
    # Before calibration: scales are for the ranges that are stored.
    texts = range_documents(lm.tok_encode, lm.max_length)
    with progress("ranges", 0 if profile.is_native else 2 * len(texts)) as advance:
        given = rescale.apply(model, profile, texts, advance)
    calibration: list[Tensor] = []
    if any(candidate.scales == "calibrated" for candidate in candidates):
        calibration = calibration_documents(
            lm.tok_encode, min(config.layers_prompt_tokens, lm.max_length), config.seed
        )
    scales = {candidate: _scales(candidate, checkpoint, model, calibration) for candidate in candidates}
    return Prepared(
        config=config,
        policy=policy,
        checkpoint=checkpoint,
        identity=identity,
        model=model,
        ranges=[rescale.record(profile, one) for one in given],
        lm=lm,
        scorer=NativeScorer(
            model=model,
            candidates=candidates,
            scales=scales,
            batch_size=batch_size,
            documents=config.task_documents,
        ),
        requested=requested,
        candidates=candidates,
        scales=scales,
        documents=documents,
        passages=passages,
        calibration=calibration if streamed else [],
    )


def describe(directory: RunDirectory, prepared: Prepared) -> None:
    """Record the environment, and each candidate with the bytes that its rows were seen to take.

    What a serving engine runs is recorded with its tasks, when it has started.
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
    if model.evalkit.weights is not None:
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
    every = scorer.arms(None if prepared.policy is None else prepared.policy.damage.noise)
    arms = [arm for arm in every if not directory.done(f"tasks {arm.name}")]
    scorer.fetch(arms, directory.path)
    for arm in arms:
        with scorer.lm(arm, directory.path) as lm, directory.stage(f"tasks {arm.name}") as write:
            for proved in scorer.proof(arm, directory.path):
                write.write(proved)
            asked = (config.tasks, config.task_documents, config.seed)
            for scored in run_tasks(lm, *asked, candidate=arm.name, data=config.data):
                for sample in scored.samples:
                    write.write(sample)
                if arm.against is not None:
                    scored = replace(scored, wall_s=scored.wall_s + scorer.seconds(arm, scored.task))
                    before = _samples(directory, arm.against, scored.task)
                    for record in _task_records(arm.name, arm.against, before, scored, scorer.topk):
                        write.write(record)


def compare_answers(directory: RunDirectory) -> None:
    """Degenerate, empty and cut-off answers, their lengths, and where they leave the baseline's, from the samples."""
    if only(directory.read(), TaskRecord) and not directory.done("answers"):
        with directory.stage("answers") as write:
            for record in answers.compare_answers(directory.read(), read_samples(directory.path)):
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


def _requested(config: RunConfig) -> tuple[str, ...]:
    """The candidates in words; the first that stores bf16 leads, since everything is compared with it.

    Raises:
        InputError: a format or backend does not exist. Whether one can run is known only with the model.
    """
    default = DEFAULT_CANDIDATES[config.engine]
    named = default if config.candidates == "default" else tuple(config.candidates)
    parsed = [Candidate.parse(text) for text in named]
    for candidate in parsed:
        if candidate.backend != BEST and config.engine == "native":
            backends.get(candidate.backend)
        if candidate.format not in (*BF16_NAMES, "fp8"):
            kv.get(candidate.format)
    controls = [
        text
        for text, candidate in zip(named, parsed, strict=True)
        if candidate.format in ("bf16", *BF16_NAMES)
    ]
    leads = controls[0] if controls else "bf16"
    rest = list(named)
    if controls:
        rest.remove(leads)
    return leads, *rest


def _served(
    config: RunConfig,
    policy: Policy | None,
    checkpoint: Path,
    identity: str | None,
    requested: tuple[str, ...],
) -> Prepared:
    """What a run of tasks on a serving engine works on: no model is loaded here."""
    scorer = serve(config, checkpoint, requested)
    _refuse_twice(scorer.candidates, requested)
    return Prepared(
        config=scorer.config,
        policy=policy,
        checkpoint=checkpoint,
        identity=identity,
        model=None,
        ranges=(),
        lm=EvalkitLM(engine=scorer.asked),
        scorer=scorer,
        requested=requested,
        candidates=scorer.candidates,
        scales={},
        documents=(),
        passages=(),
        calibration=(),
    )


def _refuse_twice(candidates: Sequence[Candidate], requested: Sequence[str]) -> None:
    for place, candidate in enumerate(candidates):
        if candidate in candidates[:place]:
            raise InputError(f"candidates name {candidate} twice: {requested[place]!r} is the same again")


def _refuse_other(directory: RunDirectory, now: EnvironmentRecord, prepared: Prepared) -> None:
    """Refuse to go on with a run where what its numbers depend on has changed since."""
    then = only(directory.read(), EnvironmentRecord)[0]
    names = [record.candidate for record in only(directory.read(), CandidateRecord)]
    candidates = prepared.candidates[: len(names)]  # of a serving engine those whose tasks were scored
    facts = [(key, getattr(then, key), getattr(now, key)) for key in SAME_FACTS]
    for table in ("packages", "flags"):
        old, new = getattr(then, table), getattr(now, table)
        facts += [(key, old.get(key), new.get(key)) for key in {**old, **new}]
    stored = {"policy": next((r.sha256 for r in only(directory.read(), PolicyRecord)), None)}
    facts.append(("policy", stored["policy"], None if prepared.policy is None else prepared.policy.sha256))
    facts.append(("candidates", ", ".join(names), ", ".join(map(str, candidates))))
    was, is_now = (
        ", ".join({one.sha256 for one in found}) or "none"
        for found in (only(directory.read(), ProfileRecord), prepared.ranges)
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
        yield CandidateRecord(
            candidate=str(candidate),
            format=candidate.format,
            scales=candidate.scales,
            backend=candidate.backend,
            kernel=f"{backend.kernel_on(model.device)}; index scores: {scorer}",
            index=candidate.index,
            read=candidate.read,
            heads=model.config.num_attention_heads,
            row_bytes_per_token=kv.get(candidate.format).row_bytes,
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


def _documents(config: RunConfig, lm: EvalkitLM) -> list[Tensor]:
    """Token ids of the prompt and decode tokens to compare layers on."""
    wanted = config.layers_prompt_tokens + config.layers_decode_tokens
    longest = lm.max_length
    if wanted > longest:
        raise InputError(
            f"layers_prompt_tokens + layers_decode_tokens is {wanted}, the model holds {longest}: ask for fewer"
        )
    if config.layers_prompts is None:
        seeds = range(config.seed, config.seed + DOCUMENT_STEP * config.layers_documents, DOCUMENT_STEP)
        return [generated_tokens(lm.tok_encode, wanted, seed) for seed in seeds]
    texts = list(read_texts(config.layers_prompts))[: config.layers_documents]
    if len(texts) < config.layers_documents:
        raise InputError(
            f"{config.layers_prompts} holds {len(texts)} texts, layers_documents is {config.layers_documents}"
        )
    found = []
    for where, text in texts:
        ids = lm.tok_encode(text)[:wanted]
        if len(ids) < wanted:
            raise InputError(
                f"{where} holds {len(ids)} tokens, the layer comparison takes {wanted}: give a longer text or lower "
                "layers_prompt_tokens"
            )
        found.append(torch.tensor(ids))
    return found


def _passages(config: RunConfig, checkpoint: Path, lm: EvalkitLM) -> list[kld.Passage]:
    """What the configuration names to find KL divergence on.

    Raises:
        InputError: a text or run cannot be used, or the stage kld was asked for alone and nothing to do it on.
    """
    if config.kld_tokens > lm.max_length:
        raise InputError(f"kld_tokens is {config.kld_tokens}, the model holds {lm.max_length}: ask for fewer")
    found = kld.passages_of_files([Path(file) for file in config.kld_texts], lm.tok_encode, config.kld_tokens)
    if config.kld_run is not None:
        found += kld.passages_of_run(config.kld_run, lm, environment.sha256(checkpoint))
    if not found and config.stages == ("kld",):
        raise InputError("no text to compare on: give --text FILE or --transcripts RUN")
    return found


def _scales(
    candidate: Candidate, checkpoint: Path, model: Any, calibration: Sequence[Tensor]
) -> Mapping[int, Scales]:
    """Each layer's; empty where they are 1.0, or are found layer by layer because weights are streamed."""
    if candidate.scales == "checkpoint":
        return kv.from_checkpoint(checkpoint)
    if candidate.scales == "calibrated" and model.evalkit.weights is None:
        return calibrate(model, calibration, kv.get(candidate.format))
    return {}


def _cache(prepared: Prepared, candidate: Candidate, scales: Mapping[int, Scales]) -> Any:
    """An empty cache; with scale 1.0 where the scales are yet to be found."""
    if candidate.scales == "calibrated" and not scales:
        scales = dict.fromkeys(range(prepared.model.config.num_hidden_layers), Scales())
    return prepared.model.evalkit.new_cache(candidate, scales)


def _refuse_streamed(config: RunConfig) -> None:
    """Refuse what needs all weights at once.

    Raises:
        InputError: tasks are asked for, KL divergence on texts, a profile, or attribution of calibrated candidates.
    """
    place = f"{config.checkpoint} is streamed, one layer's weights at a time"
    if "tasks" in config.stages and config.tasks:
        raise InputError(f"{place}: tasks take them all, so run `evalkit layers`, or leave tasks empty")
    if "kld" in config.stages and (config.kld_texts or config.kld_run is not None):
        raise InputError(f"{place}: kld takes them all, so leave kld_texts and kld_run empty")
    if config.profile != "native":
        raise InputError(f"{place}: profile {config.profile} takes them all, so leave it native")
    if config.attribution and any(":calibrated" in text for text in _requested(config)):
        raise InputError(
            f"{place}: attribution takes calibrated scales before its first layer, so leave it false, or candidates "
            "without :calibrated"
        )


def _note(candidate: Candidate, scales: Mapping[int, Scales], found_by_layer: bool) -> str:
    if not scales and candidate.scales == "calibrated" and found_by_layer:
        return "scales found layer by layer: range records hold them"
    if not scales:
        return "scale 1.0" if kv.get(candidate.format).uses_scales else ""
    values = [one.latent for one in scales.values()]
    return f"scales {min(values):.3g} to {max(values):.3g} over {len(values)} layers"


def _samples(directory: RunDirectory, candidate: str, task: str) -> list[SampleRecord]:
    return [s for s in read_samples(directory.path) if s.candidate == candidate and s.task == task]


def _task_records(
    candidate: str,
    baseline: str,
    before: Sequence[SampleRecord],
    scored: TaskRun,
    topk: int,
) -> Iterator[TaskRecord]:
    for found in paired.compare(before, scored.samples):
        score, loss = found.score_interval, found.loss_interval
        yield TaskRecord(
            candidate=candidate,
            baseline=baseline,
            task=found.endpoint.task,
            metric=found.endpoint.metric,
            filter=found.endpoint.filter,
            n=found.n,
            score=found.score,
            score_lower=None if score is None else score.lower,
            score_upper=None if score is None else score.upper,
            baseline_score=found.baseline_score,
            loss=found.loss,
            loss_lower=None if loss is None else loss.lower,
            loss_upper=None if loss is None else loss.upper,
            interval_method=found.interval_method,
            lost=found.lost,
            gained=found.gained,
            mcnemar_p=found.mcnemar_p,
            wall_s=scored.wall_s,
            mean_context_tokens=scored.mean_context_tokens,
            share_over_topk=scored.share_over(topk),
            share_stored_rows=scored.share_stored,
        )
