"""KL divergence of each candidate from the reference on given texts, all of a text's tokens at once.

Teacher-forced: reference and candidate read the same tokens, whatever they would have said themselves. The texts are
files, or what a run's baseline was asked and answered. Memory is O(vocabulary) beside one text's hidden states.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from evalkit.candidate import Candidate
from evalkit.compare.figures.tokens import Place, TokenAccumulator
from evalkit.compare.passes.variants import REFERENCE
from evalkit.config import RunConfig
from evalkit.errors import InputError
from evalkit.evaluate.documents import Encode
from evalkit.evaluate.lm import EvalkitLM
from evalkit.evaluate.tasks import load_tasks, refuse_long_prompts
from evalkit.evaluate.texts import read_texts
from evalkit.kv import Scales
from evalkit.records import (
    CandidateRecord,
    EnvironmentRecord,
    RunDirectory,
    SampleRecord,
    TokenRecord,
    only,
    read_samples,
)

TEXT: Final = "text"
PROMPT: Final = "prompt"
RESPONSE: Final = "response"
ROWS: Final = 512  # tokens whose logits are held at once


@dataclass(frozen=True, kw_only=True)
class Passage:
    """Token ids [T] int64 that are read at once, of document `document` of `source`.

    spans: which positions count under which phase; at each, both distributions are of the token after it.
    """

    source: str
    document: int
    ids: Tensor
    spans: Mapping[str, slice]


def passages_of_files(files: Sequence[Path], encode: Encode, tokens: int) -> list[Passage]:
    """Texts in windows of `tokens` that know nothing of each other; a text's windows are one document.

    A file is one text, except that each line of a `.jsonl` file is one. Files of one name go by their paths.

    Raises:
        InputError: a file is no UTF-8 text or named twice, or a text has fewer than two tokens.
    """
    found: list[Passage] = []
    names = Counter(file.name for file in files)
    for file in files:
        if files.count(file) > 1:
            raise InputError(f"{file} is named {files.count(file)} times: its documents count once")
        source = file.name if names[file.name] == 1 else str(file)
        for document, (where, text) in enumerate(read_texts(file)):
            ids = torch.tensor(encode(text))
            if len(ids) < 2:
                raise InputError(f"{where}: {len(ids)} tokens, and a next token takes two at least")
            windows = [part for part in ids.split(tokens) if len(part) > 1]
            found += [
                Passage(source=source, document=document, ids=part, spans={TEXT: slice(0, len(part) - 1)})
                for part in windows
            ]
    return found


def passages_of_run(run: Path, lm: EvalkitLM, checkpoint_sha256: str) -> list[Passage]:
    """What a run's baseline was asked and answered, a document each: its tasks' prompts, made again, and its tokens.

    Raises:
        InputError: the run is of another checkpoint, has no answers of its baseline, or was asked other prompts.
    """
    directory = RunDirectory(run)
    samples = answers(directory, checkpoint_sha256)
    config = RunConfig.from_json(directory.config)
    tasks = load_tasks(config.tasks, config.task_documents, config.seed, config.data)
    refuse_long_prompts(lm, tasks, config.task_documents)  # builds them, too
    prompts = {
        (request.task_name, request.doc_id): str(request.args[0])
        for task in tasks
        for request in task.instances
    }
    found = []
    for (task, document), sample in samples.items():
        prompt = prompts.get((task, document))
        if prompt is None or hashlib.sha256(prompt.encode()).hexdigest() != sample.prompt_sha256:
            raise InputError(
                f"{run}: {task} document {document} was asked something else than this version asks: run its tasks again"
            )
        before = lm.tok_encode(prompt)
        ids = torch.tensor([*before, *(sample.generated_ids or [])])
        # The prompt's last position is where the response's first token is chosen.
        spans = {PROMPT: slice(0, len(before) - 1), RESPONSE: slice(len(before) - 1, len(ids) - 1)}
        found.append(Passage(source=task, document=document, ids=ids, spans=spans))
    return found


def answers(run: RunDirectory, checkpoint_sha256: str) -> dict[tuple[str, int], SampleRecord]:
    """The baseline's generated answers by task and document.

    Raises:
        InputError: the run is of another checkpoint, or its baseline's generated tokens are not there.
    """
    records = run.read()
    if not only(records, CandidateRecord):
        raise InputError(f"{run.path} has recorded nothing: it stopped at its start; run it again")
    theirs = only(records, EnvironmentRecord)[0].checkpoint_sha256
    if theirs != checkpoint_sha256:
        raise InputError(
            f"{run.path} is of checkpoint {theirs[:12]}, this is {checkpoint_sha256[:12]}: their tokens differ"
        )
    baseline = only(records, CandidateRecord)[0].candidate
    samples = {
        (s.task, s.doc_id): s
        for s in read_samples(run.path)
        if s.candidate == baseline and s.generated_ids is not None
    }
    if not samples:
        raise InputError(
            f"{run.path} holds no generated tokens of {baseline}: run a task that generates, with this version"
        )
    return samples


def count_passes(passages: Sequence[Passage], candidates: Sequence[Candidate]) -> int:
    """How often `divergences` calls `advance`."""
    return len(passages) * (1 + len(candidates))


@torch.inference_mode()
def divergences(
    model: Any,
    passages: Sequence[Passage],
    candidates: Sequence[Candidate],
    *,
    scales: Mapping[Candidate, Mapping[int, Scales]] | None = None,
    advance: Callable[[], None] = lambda: None,
) -> Iterator[TokenRecord]:
    """A record for each candidate, source and phase.

    Args:
        model: what `evalkit.load` returns, on any device.
        passages: at least one.
        candidates: resolved ones.
        scales: each candidate's scales by layer; 1.0 where there are none.
        advance: called `count_passes(...)` times.

    Raises:
        InputError: there is no passage, or one is longer than the model's positions.
    """
    longest = int(model.config.max_position_embeddings)
    if not passages:
        raise InputError("no text to compare on: name a text file, or a run that generated")
    for one in passages:
        if len(one.ids) > longest:
            raise InputError(
                f"{one.source} document {one.document} has {len(one.ids)} tokens, the model holds {longest}"
            )
    found: dict[tuple[Candidate, str, str], TokenAccumulator] = {}
    for passage in passages:
        ref = _hidden(model, passage, REFERENCE, {})
        advance()
        for candidate in candidates:
            got = _hidden(model, passage, candidate, (scales or {}).get(candidate, {}))
            advance()
            for phase, span in passage.spans.items():
                into = found.setdefault((candidate, passage.source, phase), TokenAccumulator())
                _add(into, model, passage, span, got, ref)
    for (candidate, source, phase), accumulator in found.items():
        if accumulator.n:
            yield TokenRecord(
                candidate=str(candidate),
                phase=phase,
                frozen="none",
                source=source,
                **asdict(accumulator.result()),
            )


def _hidden(model: Any, passage: Passage, candidate: Candidate, scales: Mapping[int, Scales]) -> Tensor:
    """Hidden states [T, D] before the head, the whole passage in one step on an empty cache."""
    hidden: Tensor = model.base_model(
        input_ids=passage.ids.to(model.device)[None],
        **model.evalkit.new_cache(candidate, scales).argument,
        use_cache=True,
    ).last_hidden_state[0]
    return hidden


def _add(into: TokenAccumulator, model: Any, passage: Passage, span: slice, got: Tensor, ref: Tensor) -> None:
    """Compare the logits of a span, `ROWS` at a time."""
    head = model.get_output_embeddings()
    for start, stop in pairwise([*range(span.start, span.stop, ROWS), span.stop]):
        place = Place(document=passage.document, start=start, targets=passage.ids[start + 1 : stop + 1])
        into.add(head(got[start:stop]), head(ref[start:stop]), place)
