"""vLLM as an engine: one process a candidate, the same token ids for each, proof from inside of the path it took.

A worker (`worker.py`) holds vLLM; this process never imports it. Answers are kept on disk as they come (`kept.py`):
where a worker dies, a fresh one is started and asked for the rest. vLLM batches continuously, so which requests share
a step depends on what is answered; greedy decoding, seeds and no prefix cache are all that is fixed, and what is left
shows in a control arm, an engine of the same candidate in another folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, Self

from evalkit.errors import EngineDiedError, InputError
from evalkit.evaluate.engines.base import Answer, Prompt, Span
from evalkit.evaluate.engines.kept import Kept, Questions
from evalkit.evaluate.engines.launch import ENVIRONMENT, Launch
from evalkit.evaluate.engines.process import Worker
from evalkit.progress import progress
from evalkit.records import write_whole

WORKER = "evalkit.evaluate.engines.worker"
ANSWERS, PROOF = "answers.jsonl", "proof.json"
LOG, LOGS = "engine.log", "engine*.log"
TRIES = 3  # a death is an accident twice


class VllmEngine:
    """One candidate in vLLM.

    Args:
        launch: what to start it with.
        folder: its answers, a log of every start, and its proof; a killed run goes on with the same one.
        logprobs: how many of the likeliest tokens to tell beside each generated one; None tells none.
        environment: added to the worker's.
        python: the interpreter of vLLM's environment; None is this one.

    Attributes:
        proof: its own account of its path, of this start or, before one, of the last in this folder.

    Raises:
        InputError: vLLM cannot run this candidate here, or ran another path than it was asked for.
        EngineDiedError: the worker ended for another reason, or the engine was closed.
    """

    def __init__(
        self,
        launch: Launch,
        folder: Path,
        *,
        logprobs: int | None = None,
        environment: Mapping[str, str] | None = None,
        python: Path | None = None,
    ) -> None:
        self.launch, self.folder, self.logprobs, self.python = launch, folder, logprobs, python
        self.max_length = launch.max_length - 2  # vLLM wants room for one more token after a prompt
        self.tokenizer, self.stop_ids = text_of(launch.checkpoint)
        self.starts = 0
        self._environment = {**ENVIRONMENT, **(environment or {})}
        if launch.gpus:
            self._environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, launch.gpus))
        self._kept = Kept(folder / ANSWERS, launch.fingerprint)
        told = folder / PROOF
        self.proof: dict[str, Any] = json.loads(told.read_text()) if told.exists() else {}
        self._worker: Worker | None = None
        self._closed, self._lock = False, Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the worker, from any thread, and start no other: what has to ask raises EngineDiedError from now on."""
        with self._lock:
            self._closed = True
        self._end()

    def start(self) -> dict[str, Any]:
        """Start the worker, unless it runs, and return the proof of its path: see `inside.describe`.

        Raises:
            InputError: it cannot start, or its cache or backend is not what the candidate names.
            EngineDiedError: it ended while it started, or the engine was closed.
        """
        self._running()
        return self.proof

    def adopt(self, other: VllmEngine) -> None:
        """Take the answers of an engine of the same launch, which was given its share of the documents."""
        if other.launch.fingerprint != self.launch.fingerprint:
            raise ValueError(f"{other.folder} holds the answers of another launch than {self.folder}")
        for key, answer in other._kept.answers.items():
            if key not in self._kept.answers:
                self._kept.keep(key, answer)

    def stored(self, request: Prompt | Span) -> bool:
        """Whether its scored tokens read stored rows: vLLM attends prompts up to top-k densely, past them.

        What is generated after the first token reads them always.
        """
        dense = int((self.proof or self.start())["dense_prefill_tokens"])
        if isinstance(request, Prompt):
            return request.max_new > 1 or len(request.ids) > dense
        return len(request.context) + len(request.continuation) > dense

    def seconds(self, requests: Sequence[Prompt | Span]) -> float:
        """What asking for these took, in whichever processes; what was adopted took this engine nothing."""
        return self._kept.seconds(requests)

    def generate(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Answer]]:
        """As `Engine.generate`; an answer is on disk before it is given."""
        for place, found in self._asked(prompts, "generate", "prompts", "answer"):
            yield place, Answer(ids=found["ids"], ended=found["ended"], logprobs=found.get("logprobs"))

    def score(self, spans: Sequence[Span]) -> Iterator[tuple[int, tuple[float, bool]]]:
        """As `Engine.score`; a continuation that ties with the likeliest one counts as greedy."""
        for place, found in self._asked(spans, "score", "spans", "score"):
            yield place, (found["nats"], found["greedy"])

    def keep(
        self,
        documents: Sequence[Sequence[int]],
        *,
        decode: int = 0,
        layers: bool = False,
        operands: bool = False,
        told: Callable[[], None] | None = None,
    ) -> list[Path]:
        """One safetensors file a document, by its number: its logits [T, V], and with `layers` every layer's tensors.

        Files that are there are not made again, and a folder that has one of other tokens, or decoded otherwise, is refused.
        Documents run alone, one after the other.

        Args:
            documents: token ids of each, T of them.
            decode: how many of the last tokens are decoded, one by one, after a prompt of the others.
            operands: whether a layer's tensors include its query in latent space, and latent and rope before its writer
                rounds them; in a folder of files with layers, all have them or none.
            told: called after each document.

        Raises:
            InputError: layers are wanted of an engine with CUDA graphs, a document has no prompt, or the folder has files
                of other documents.
        """
        if layers and not self.launch.eager:
            raise InputError("layers are captured without CUDA graphs only: eager = true")
        for number, ids in enumerate(documents):
            if len(ids) <= decode:
                raise InputError(
                    f"document {number} has {len(ids)} tokens, of which {decode} are decoded: its prompt needs at least 1"
                )
        folder = self.folder / ("layers" if layers else "logits")
        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / f"{number:04}.safetensors" for number in range(len(documents))]
        identities = [hashlib.sha256(json.dumps([decode, *ids]).encode()).hexdigest() for ids in documents]
        for file, identity in zip(files, identities, strict=True):
            _refuse_other_document(file, identity)

        def ask() -> None:
            missing = [number for number, file in enumerate(files) if not file.with_suffix(".json").exists()]
            asked = [
                {"id": number, "ids": list(documents[number]), "file": str(files[number])}
                for number in missing
            ]
            message = {
                "do": "keep", "documents": asked, "decode": decode, "layers": layers, "operands": operands,
            }  # fmt: skip
            for reply in self._running().ask(message) if asked else ():
                found = reply["kept"] | {"identity": identities[reply["kept"]["id"]]}
                # Last, so that a file whose writing was cut off counts as missing.
                write_whole(files[found["id"]].with_suffix(".json"), json.dumps(found))
                if told is not None:
                    told()

        self._with_restarts(ask)
        return files

    def _asked(
        self, requests: Sequence[Prompt | Span], kind: str, list_name: str, reply_name: str
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Each request's place and answer, those first that are on disk."""
        questions = Questions(self._kept, requests)
        yield from questions.known()
        fresh: list[tuple[int, dict[str, Any]]] = []

        def ask() -> None:
            asked = [one | {"id": key} for key, one in questions.missing().items()]
            message = {"do": kind, list_name: asked, "logprobs": self.logprobs}
            worker = self._running() if asked else None
            questions.begin()  # an engine's start is none of its answers' time
            for reply in worker.ask(message) if worker is not None else ():
                found = reply[reply_name]
                fresh.extend(questions.keep(found.pop("id"), found))
                step()

        with progress(f"vLLM {self.launch.candidate}", len(questions.missing())) as step:
            self._with_restarts(ask)
        yield from fresh

    def _running(self) -> Worker:
        """The worker; a fresh one where there is none, once it has proved its path."""
        with self._lock:
            if self._closed:
                raise EngineDiedError(f"the engine of {self.folder} was closed")
            if self._worker is not None:
                return self._worker
            self.starts += 1
            before = len(list(self.folder.glob(LOGS)))
            log = self.folder / (f"engine-{before + 1}.log" if before else LOG)
            worker = self._worker = Worker(WORKER, log, self._environment, self.python)
        try:
            message = {"do": "start", "launch": self.launch.to_json(), "stop_ids": list(self.stop_ids)}
            (reply,) = worker.ask(message)
            proof = reply["started"] | {"log": worker.telling()}
            refuse_other_path(self.launch, proof)
            self._refuse_changed(proof)
        except BaseException:
            self._end()
            raise
        self.proof = proof
        write_whole(self.folder / PROOF, json.dumps(proof, indent=1))
        return worker

    def _end(self) -> None:
        """End the worker, where there is one."""
        with self._lock:
            # Before it dies: whoever waits for it must not take it for one that died by itself, and is to be replaced.
            worker, self._worker = self._worker, None
        if worker is not None:
            worker.close()

    def _with_restarts(self, ask: Callable[[], None]) -> None:
        """Ask until all is answered: a worker that dies is replaced, and asked for what is missing."""
        for left in reversed(range(TRIES)):
            try:
                return ask()
            except EngineDiedError:
                # What cannot start will not start again; nor does what was closed.
                if not left or self._worker is None:
                    raise
                self._end()
        return None

    def _refuse_changed(self, proof: Mapping[str, Any]) -> None:
        for fact in ("vllm", "backend"):
            if self.proof and self.proof[fact] != proof[fact]:
                raise InputError(
                    f"{self.folder} was begun with {fact} {self.proof[fact]}, here it is {proof[fact]}: name a fresh "
                    "folder"
                )


def _refuse_other_document(file: Path, identity: str) -> None:
    account = file.with_suffix(".json")
    if account.exists() and json.loads(account.read_text()).get("identity") != identity:
        raise InputError(
            f"{file} is of another document, or decodes another number of its tokens: name a fresh folder"
        )


def refuse_other_path(launch: Launch, proof: Mapping[str, Any]) -> None:
    """Raise InputError where an engine's own account of itself is not its candidate.

    Raises:
        InputError: another backend, another row, or a k_scale other than the candidate's; the line says which layer.
    """
    said = f"vLLM {proof['vllm']} runs {launch.candidate} otherwise"
    if not proof["layers"]:
        raise InputError(f"{said}: it has no MLA layer; the checkpoint is no DeepSeek-V3.2 or GLM-MoE-DSA")
    for layer in proof["layers"]:
        if layer["backend"] != proof["backend"]:
            raise InputError(f"{said}: layer {layer['layer']} on {layer['backend']}, not {proof['backend']}")
        if layer["row_bytes"] != launch.row_bytes:
            raise InputError(
                f"{said}: layer {layer['layer']} stores {layer['row_bytes']} bytes a token, not {launch.row_bytes}"
            )
        wanted = launch.scales.get(layer["layer"], 1.0)
        if abs(layer["k_scale"] - wanted) > 1e-6 * wanted:
            raise InputError(
                f"{said}: layer {layer['layer']} uses k_scale {layer['k_scale']:g}, not {wanted:g}"
            )


@lru_cache(maxsize=4)
def text_of(checkpoint: Path) -> tuple[Any, list[int]]:
    """The checkpoint's tokenizer, and the tokens that end a text."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    except (OSError, ValueError) as error:
        raise InputError(f"{checkpoint} has no tokenizer that loads: {str(error).splitlines()[0]}") from error
    for name in ("generation_config.json", "config.json"):
        file = Path(checkpoint) / name
        eos = json.loads(file.read_text()).get("eos_token_id") if file.exists() else None
        if eos is not None:
            return tokenizer, [int(one) for one in (eos if isinstance(eos, list) else [eos])]
    if tokenizer.eos_token_id is None:
        raise InputError(f"{checkpoint} names no end-of-text token; set eos_token_id in its config.json")
    return tokenizer, [int(tokenizer.eos_token_id)]
