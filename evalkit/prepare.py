"""What a run works on: everything it needs, loaded and checked, so that what can be refused is refused before it begins."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evalkit import environment, kv
from evalkit.attention import backends
from evalkit.candidate import BEST, Candidate
from evalkit.compare import phases
from evalkit.compare.layers import calibrate
from evalkit.config import RunConfig
from evalkit.errors import InputError
from evalkit.evaluate import kld
from evalkit.evaluate.documents import calibration_documents, generated_tokens, range_documents
from evalkit.evaluate.engines.arms import Arm
from evalkit.evaluate.engines.choose import DEFAULT_CANDIDATES, NativeScorer, Scorer, serve
from evalkit.evaluate.engines.native import auto_batch_size
from evalkit.evaluate.lm import EvalkitLM
from evalkit.evaluate.tasks import load_tasks, refuse_long_prompts, scored
from evalkit.evaluate.texts import read_texts
from evalkit.gate import beforehand
from evalkit.gate.policy import Policy
from evalkit.gate.policy import load as load_policy
from evalkit.kv import Scales
from evalkit.kv.aliases import BF16_NAMES
from evalkit.model.checkpoint import resolve_checkpoint
from evalkit.model.load import load_reference
from evalkit.model.ranges import rescale
from evalkit.model.ranges.profile import load_profile
from evalkit.model.weights.shards import sampled_identity
from evalkit.model.weights.stream import should_stream, stream
from evalkit.progress import progress
from evalkit.records import ProfileRecord

# Between the seeds of compared documents, so that calibration's lie between them.
DOCUMENT_STEP = 1_000


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What a run works on, checked: the loaded model, resolved candidates with their scales, and the prompts.

    identity: what names a streamed checkpoint's bytes; to hash all of them would read them once more.
    model: None where a serving engine has it.
    scorer: what scores the tasks.
    ranges: what the profile made of the model, layer by layer; empty where it is `native`.
    requested: each candidate as it was asked for, in the order of `candidates`; the first is the bf16 baseline.
    documents: token ids [T] for the layer comparison.
    arms: every pass over the documents of tasks, each after what it is paired with.
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
    arms: Sequence[Arm]
    requested: tuple[str, ...]
    candidates: tuple[Candidate, ...]
    scales: Mapping[Candidate, Mapping[int, Scales]]
    documents: Sequence[Tensor]
    passages: Sequence[kld.Passage]
    calibration: Sequence[Tensor]


def prepare(config: RunConfig) -> Prepared:
    """Load and check everything that a run needs.

    Raises:
        InputError: a checkpoint, candidate, prompt or task is not usable, or a policy asks for what the run will not
            have; nothing has been written.
    """
    checkpoint = resolve_checkpoint(config.checkpoint)
    policy = None if config.policy is None else load_policy(config.policy)
    requested = _requested(config)
    profile = load_profile(config.profile)
    if config.stages == ("tasks",) and not config.tasks:
        raise InputError("tasks is empty: name at least one, such as evalkit_needle_1024")
    if policy is not None:
        _refuse_unanswered(policy, config)
    dtype = None if config.dtype is None else getattr(torch, config.dtype)
    streamed = should_stream(checkpoint, config.device, dtype, config.stream)
    identity = sampled_identity(checkpoint) if streamed else None
    if config.engine != "native":
        return _served(config, policy, checkpoint, identity, requested)
    if streamed:
        _refuse_streamed(config)
    if streamed:
        model = stream(checkpoint, config.device, dtype)
    else:
        model = load_reference(checkpoint, config.device, dtype)
    batch_size = auto_batch_size(model) if config.batch_size == "auto" else config.batch_size
    config = config.with_values(batch_size=batch_size)
    candidates = tuple(model.evalkit.resolve(text) for text in requested)
    _refuse_twice(candidates, requested)
    _refuse_absent(policy, config, requested, candidates)
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
    scorer = NativeScorer(
        model=model,
        candidates=candidates,
        scales=scales,
        batch_size=batch_size,
        documents=config.task_documents,
    )
    return Prepared(
        config=config,
        policy=policy,
        checkpoint=checkpoint,
        identity=identity,
        model=model,
        ranges=[rescale.record(profile, one) for one in given],
        lm=lm,
        scorer=scorer,
        arms=_arms(scorer, policy, config.task_documents),
        requested=requested,
        candidates=candidates,
        scales=scales,
        documents=documents,
        passages=passages,
        calibration=calibration if streamed else [],
    )


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
    """What a run on serving engines works on: no model is loaded here."""
    environment.exact_numerics()  # what engines show of their layers is compared here
    scorer = serve(config, checkpoint, requested)
    _refuse_twice(scorer.candidates, requested)
    _refuse_absent(policy, config, requested, scorer.candidates)
    lm, documents = EvalkitLM(engine=scorer.asked), []
    if "layers" in config.stages:
        documents = _documents(config, lm)
        scorer.asked.documents = [ids.tolist() for ids in documents]
        print(
            f"engine {config.engine}: a prompt is compared in one piece, and what is decoded after it; phase_tokens does not apply",
            file=sys.stderr,
        )
    return Prepared(
        config=scorer.config,
        policy=policy,
        checkpoint=checkpoint,
        identity=identity,
        model=None,
        ranges=(),
        lm=lm,
        scorer=scorer,
        arms=_arms(scorer, policy, config.task_documents),
        requested=requested,
        candidates=scorer.candidates,
        scales={},
        documents=documents,
        passages=(),
        calibration=(),
    )


def _arms(scorer: Scorer, policy: Policy | None, documents: int) -> list[Arm]:
    if policy is None:
        return scorer.arms(None)
    if told := beforehand.unplanned(policy, documents):
        print(told, file=sys.stderr)
    return scorer.arms(policy.damage.noise, tuple(dict.fromkeys(one.task for one in policy.endpoints)))


def _refuse_twice(candidates: Sequence[Candidate], requested: Sequence[str]) -> None:
    for place, candidate in enumerate(candidates):
        if candidate in candidates[:place]:
            raise InputError(f"candidates name {candidate} twice: {requested[place]!r} is the same again")


def _refuse_unanswered(policy: Policy, config: RunConfig) -> None:
    """Refuse endpoints and limits that the run records nothing of."""
    asked = config.tasks if "tasks" in config.stages else ()
    tasks = load_tasks(asked, config.task_documents, config.seed, config.data) if asked else ()
    beforehand.refuse_unscored(policy, f"policy {config.policy}", scored(tasks))
    beforehand.refuse_unmeasured(policy, f"policy {config.policy}", config)


def _refuse_absent(
    policy: Policy | None, config: RunConfig, requested: Sequence[str], candidates: Sequence[Candidate]
) -> None:
    if policy is not None:
        named = dict(zip(requested, map(str, candidates), strict=True))
        beforehand.refuse_absent(policy, f"policy {config.policy}", named)


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
        passes = int(model.config.num_hidden_layers) * len(calibration)
        with progress(f"scales of {candidate}", passes) as advance:
            return calibrate(model, calibration, kv.get(candidate.format), advance)
    return {}


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
