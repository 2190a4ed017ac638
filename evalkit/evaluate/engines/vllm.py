"""vLLM as an engine: one process a candidate, the same token ids for each, proof from inside of the path it took.

A worker (`worker.py`) holds vLLM; this process never imports it. Answers are kept on disk as they come (`kept.py`):
where a worker dies, a fresh one is started and asked for the rest. vLLM batches continuously, so which requests share
a step depends on what is answered; greedy decoding, seeds and no prefix cache are all that is fixed, and what is left
shows in a control arm, an engine of the same candidate in another folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from evalkit.errors import InputError
from evalkit.evaluate.engines.base import Answer, Prompt, Span
from evalkit.evaluate.engines.kept import Kept, key_of
from evalkit.evaluate.engines.launch import ENVIRONMENT, Launch
from evalkit.evaluate.engines.process import EngineDiedError, Worker
from evalkit.progress import progress
from evalkit.records import write_whole

WORKER = "evalkit.evaluate.engines.worker"
ANSWERS, LOG, PROOF = "answers.jsonl", "engine.log", "proof.json"
TRIES = 3  # a death is an accident twice


class VllmEngine:
    """One candidate in vLLM.

    Args:
        launch: what to start it with.
        folder: its answers, log and proof; a killed run goes on with the same one.
        logprobs: how many of the likeliest tokens to tell beside each generated one; None tells none.
        environment: added to the worker's.
        python: the interpreter of vLLM's environment; None is this one.

    Attributes:
        proof: its own account of its path, of this start or, before one, of the last in this folder.

    Raises:
        InputError: vLLM cannot run this candidate here, or ran another path than it was asked for.
        EngineDiedError: the worker ended for another reason.
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

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the worker; the next question would start another."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def start(self) -> dict[str, Any]:
        """Start the worker, unless it runs, and return the proof of its path: see `inside.describe`.

        Raises:
            InputError: it cannot start, or its cache or backend is not what the candidate names.
        """
        if self._worker is None:
            self.starts += 1
            log = self.folder / (LOG if self.starts == 1 else f"engine-{self.starts}.log")
            self._worker = Worker(WORKER, log, self._environment, self.python)
            before = self.proof
            try:
                message = {
                    "do": "start",
                    "launch": self.launch.to_json(),
                    "stop_ids": list(self.stop_ids),
                }
                (reply,) = self._worker.ask(message)
                self.proof = reply["started"] | {"log": self._worker.telling()}
                refuse_other_path(self.launch, self.proof)
                if before:
                    self._refuse_changed(before)
            except BaseException:
                self.close()
                raise
            write_whole(self.folder / PROOF, json.dumps(self.proof, indent=1))
        return self.proof

    def adopt(self, other: VllmEngine) -> None:
        """Take the answers of an engine of the same launch, which was given its share of the documents."""
        if other.launch.fingerprint != self.launch.fingerprint:
            raise ValueError(f"{other.folder} holds the answers of another launch than {self.folder}")
        for key, answer in other._kept.answers.items():
            if key not in self._kept.answers:
                self._kept.keep(key, answer)

    def stored(self, request: Prompt | Span) -> bool:
        """Whether its scored tokens read stored rows: newer versions attend prompts up to top-k densely, past them.

        What is generated after the first token reads them always.
        """
        proof = {} if self.launch.force_stored else self.proof or self.start()
        if not proof.get("dense_prefill_tokens"):
            return True
        if isinstance(request, Prompt):
            return bool(request.max_new > 1 or len(request.ids) > proof["dense_prefill_tokens"])
        return bool(len(request.context) + len(request.continuation) > proof["dense_prefill_tokens"])

    def generate(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Answer]]:
        """As `Engine.generate`; an answer is on disk before it is given."""
        questions = [
            {"ids": list(one.ids), "max_new": one.max_new, "until": list(one.until)} for one in prompts
        ]
        labels = [str(one.label) for one in prompts]
        for place, found in self._asked("generate", "answer", "prompts", questions, labels):
            yield place, Answer(ids=found["ids"], ended=found["ended"], logprobs=found.get("logprobs"))

    def score(self, spans: Sequence[Span]) -> Iterator[tuple[int, tuple[float, bool]]]:
        """As `Engine.score`; a continuation that ties with the likeliest one counts as greedy."""
        questions = [{"context": list(one.context), "continuation": list(one.continuation)} for one in spans]
        labels = [str(one.label) for one in spans]
        for place, found in self._asked("score", "score", "spans", questions, labels):
            yield place, (found["nats"], found["greedy"])

    def keep(
        self, documents: Sequence[Sequence[int]], layers: bool = False, told: Callable[[], None] | None = None
    ) -> list[Path]:
        """One safetensors file a document, by its number: its logits [T - 1, V], and with `layers` every layer's tensors.

        Files that are there are not made again. Documents run alone, one after the other.

        Args:
            told: called after each document.
        """
        if layers and not self.launch.eager:
            raise InputError("layers are captured without CUDA graphs only: eager = true")
        folder = self.folder / ("layers" if layers else "logits")
        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / f"{number:04}.safetensors" for number in range(len(documents))]

        def ask() -> None:
            missing = [number for number, file in enumerate(files) if not file.with_suffix(".json").exists()]
            asked = [
                {"id": number, "ids": list(documents[number]), "file": str(files[number])}
                for number in missing
            ]
            for reply in self._ask({"do": "keep", "documents": asked, "layers": layers}) if asked else ():
                found = reply["kept"]
                # Last, so that a file whose writing was cut off counts as missing.
                files[found["id"]].with_suffix(".json").write_text(json.dumps(found))
                if told is not None:
                    told()

        self._with_restarts(ask)
        return files

    def _asked(
        self,
        kind: str,
        reply_name: str,
        list_name: str,
        questions: list[dict[str, Any]],
        labels: Sequence[str],
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Each question's place and answer, those first that are on disk."""
        keys = [key_of(kind, one | {"label": label}) for one, label in zip(questions, labels, strict=True)]
        places: dict[str, list[int]] = {}
        for place, key in enumerate(keys):
            places.setdefault(key, []).append(place)
        fresh: list[tuple[int, dict[str, Any]]] = []
        known = [key for key in places if key in self._kept.answers]
        for key in known:
            yield from ((place, self._kept.answers[key]) for place in places[key])

        def ask() -> None:
            missing = [key for key in places if key not in self._kept.answers]
            if not missing:
                return
            asked = [questions[places[key][0]] | {"id": key} for key in missing]
            for reply in self._ask({"do": kind, list_name: asked, "logprobs": self.logprobs}):
                found = reply[reply_name]
                key = found.pop("id")
                self._kept.keep(key, found)
                fresh.extend((place, found) for place in places[key])
                step()

        with progress(f"vLLM {self.launch.candidate}", len(places) - len(known)) as step:
            self._with_restarts(ask)
        yield from fresh

    def _refuse_changed(self, before: Mapping[str, Any]) -> None:
        for fact in ("vllm", "backend"):
            if before[fact] != self.proof[fact]:
                raise InputError(
                    f"{self.folder} was begun with {fact} {before[fact]}, here it is {self.proof[fact]}: name a fresh "
                    "folder"
                )

    def _ask(self, message: dict[str, Any]) -> Iterator[dict[str, Any]]:
        self.start()
        assert self._worker is not None
        return self._worker.ask(message)

    def _with_restarts(self, ask: Callable[[], None]) -> None:
        """Ask until all is answered: a worker that dies is replaced, and asked for what is missing."""
        for left in reversed(range(TRIES)):
            try:
                return ask()
            except EngineDiedError:
                if not left or self._worker is None:  # what cannot start will not start again
                    raise
                self.close()
        return None


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
