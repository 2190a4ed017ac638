"""Any server that speaks OpenAI's completions (vLLM, SGLang) as an engine: token ids go in, layers stay unseen.

Nothing proves which path such a server takes: its own statements are recorded (`proof`), and no more. A server that
reads fewer tokens of a prompt than it was sent has cut it, which makes the measurement ANOMALOUS and ends it. Answers
are kept on disk as they come, as in `vllm.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from threading import Event
from typing import Any

import requests

from evalkit.errors import EngineDiedError, InputError, TruncatedError
from evalkit.evaluate.engines.base import Answer, Prompt, Span
from evalkit.evaluate.engines.kept import Kept, Questions
from evalkit.evaluate.engines.stops import Stops
from evalkit.evaluate.engines.vllm import ANSWERS, PROOF, text_of
from evalkit.progress import progress
from evalkit.records import write_whole

UNSEEN = "layers are unseen: cache format, kernel and scales are the server's word, not proved"
# What servers say of themselves, and where; each answers some. vLLM tells its whole configuration (`server_info`) where it
# was started with VLLM_SERVER_DEV_MODE=1.
STATEMENTS = ("version", "server_info", "get_server_info", "v1/models")
TRIES, WAIT_S, LONGEST_WAIT_S = 4, 2.0, 60.0
# Refusals that pass: of a request that took too long to arrive, and of too many.
PASSING = (408, 429)
SILENT = 1  # a prompt's scores come with one generated token, which nobody reads


class NoServerError(InputError):
    """Nothing answers at a URL."""


class EndpointEngine:
    """One candidate behind a URL.

    Args:
        url: of the server, with or without `/v1`.
        checkpoint: whose tokenizer and end-of-text tokens are used; the server's must be the same.
        folder: answers and the server's statements.
        model: its name there; the only one that is served by default.
        max_length: the server's own (`max_model_len` of /v1/models) by default; it may only be less.
        at_once: requests in flight.
        timeout_s: for one answer.

    Raises:
        InputError: no server there, no such model, no length known, or a longer one than the server's.
    """

    def __init__(
        self,
        url: str,
        checkpoint: Path,
        folder: Path,
        *,
        model: str | None = None,
        max_length: int | None = None,
        at_once: int = 16,
        timeout_s: float = 600.0,
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.at_once, self.timeout_s = at_once, timeout_s
        self.tokenizer, self.stop_ids = text_of(checkpoint)
        self.proof: dict[str, Any] = {"note": UNSEEN, "url": self.url} | self._statements()
        card = _card(self.url, self.proof.get("v1/models"), model)
        self.model = str(card["id"])
        self.max_length = _length(self.url, card.get("max_model_len"), max_length)
        self._stops: dict[tuple[str, ...], Stops] = {}
        said = json.dumps([self.model, self.proof.get("version"), str(checkpoint)])
        self._kept = Kept(folder / ANSWERS, hashlib.sha256(said.encode()).hexdigest()[:16])
        self._ended = Event()
        write_whole(folder / PROOF, json.dumps(self.proof, indent=1))

    def close(self) -> None:
        """Nothing is held; the server goes on."""

    def stored(self, request: Prompt | Span) -> bool:
        """What is generated after the first token reads stored rows; whether a prompt did, a server does not say."""
        return isinstance(request, Prompt) and request.max_new > 1

    def seconds(self, requests: Sequence[Prompt | Span]) -> float:
        """What asking for these took, in whichever processes."""
        return self._kept.seconds(requests)

    def generate(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Answer]]:
        """As `Engine.generate`. Where a server does not tell its token ids, its text is tokenised again."""
        for place, found in self._asked(prompts, self._generated):
            yield place, Answer(ids=found["ids"], ended=found["ended"], logprobs=found["logprobs"])

    def score(self, spans: Sequence[Span]) -> Iterator[tuple[int, tuple[float, bool]]]:
        """As `Engine.score`; a continuation that ties with the likeliest one counts as greedy."""
        for place, found in self._asked(spans, self._scored):
            yield place, (found["nats"], found["greedy"])

    def _generated(self, question: dict[str, Any]) -> dict[str, Any]:
        options = {
            "max_tokens": question["max_new"],
            "stop_token_ids": list(self.stop_ids),
            "return_token_ids": True,
            "logprobs": 1,
            # OpenAI's own limit; the answer is cut by all of them below.
            "stop": question["until"][:4] or None,
            "include_stop_str_in_output": True,
        }
        choice = self._completion(question["ids"], options, question["label"])
        ids = choice.get("token_ids")
        logprobs = (choice.get("logprobs") or {}).get("token_logprobs")
        if ids is None:
            ids, logprobs = self.tokenizer(choice["text"], add_special_tokens=False)["input_ids"], None
        until = tuple(question["until"])
        end = self._stops.setdefault(until, Stops(self.tokenizer, self.stop_ids, until)).end(ids)
        ended = choice["finish_reason"] == "stop" or end is not None
        if not ids:
            # A text that ended at once: its end-of-text token is not told.
            ids, logprobs, end = [self.stop_ids[0]], None, None
        if not ended and len(ids) < question["max_new"] and choice.get("token_ids") is not None:
            raise TruncatedError(
                f"ANOMALOUS: {question['label']}: {self.url} stopped after {len(ids)} of {question['max_new']} "
                f"tokens and says {choice['finish_reason']!r}"
            )
        last = len(ids) if end is None else end + 1
        kept = logprobs[:last] if logprobs is not None and len(logprobs) >= last else None
        return {"ids": ids[:last], "ended": "stop" if ended else "length", "logprobs": kept}

    def _scored(self, question: dict[str, Any]) -> dict[str, Any]:
        ids, first = question["context"] + question["continuation"], len(question["context"])
        options = {"max_tokens": SILENT, "echo": True, "logprobs": 1}
        told = self._completion(ids, options, question["label"]).get("logprobs") or {}
        own = (told.get("token_logprobs") or [])[first : len(ids)]
        likeliest = (told.get("top_logprobs") or [])[first : len(ids)]
        if len(own) != len(question["continuation"]) or len(likeliest) != len(own):
            raise InputError(
                f"{self.url} tells no log-probabilities of a prompt (echo with logprobs): it cannot score"
            )
        greedy = all(a >= max(top.values(), default=a) for a, top in zip(own, likeliest, strict=True))
        return {"nats": float(sum(own)), "greedy": greedy}

    def _completion(self, ids: list[int], options: dict[str, Any], label: str) -> dict[str, Any]:
        body = {"model": self.model, "prompt": ids, "temperature": 0.0, "seed": 0, **options}
        answer = self._post({key: value for key, value in body.items() if value is not None})
        read = (answer.get("usage") or {}).get("prompt_tokens")
        if read is None:
            raise InputError(
                f"{self.url} does not say how many prompt tokens it read (usage.prompt_tokens): a cut prompt would not show"
            )
        if read != len(ids):
            raise TruncatedError(
                f"ANOMALOUS: {label}: {self.url} read {read} prompt tokens, {len(ids)} were sent: it cuts prompts, "
                "or adds tokens of its own"
            )
        choice: dict[str, Any] = answer["choices"][0]
        return choice

    def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        """Ask, again after a while where the server fails, is too busy, or is gone: it may be starting anew."""
        for attempt in range(TRIES):
            stated = None
            try:
                answer = requests.post(f"{self.url}/v1/completions", json=body, timeout=self.timeout_s)
            except requests.RequestException as error:
                failure = f"{type(error).__name__}"
            else:
                found = _object(answer) if answer.ok else None
                if found is not None and found.get("choices"):
                    return found
                failure = f"HTTP {answer.status_code}: {' '.join(answer.text.split())[:200]}"
                if 400 <= answer.status_code < 500 and answer.status_code not in PASSING:
                    raise InputError(f"{self.url} refuses a request: {failure}")
                stated = answer.headers.get("Retry-After")
            if attempt + 1 == TRIES or self._ended.wait(_wait_s(attempt, stated)):
                break
        raise EngineDiedError(f"{self.url} gives no answer after {attempt + 1} tries: {failure}")

    def _asked(
        self, requests: Sequence[Prompt | Span], ask: Callable[[dict[str, Any]], dict[str, Any]]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Each request's place and answer: first those on disk, then as they come."""
        questions = Questions(self._kept, requests)
        yield from questions.known()
        missing = questions.missing()
        questions.begin()
        self._ended.clear()
        with (
            progress(f"{self.model} at {self.url}", len(missing)) as step,
            ThreadPoolExecutor(self.at_once) as pool,
        ):
            try:
                futures = {pool.submit(ask, one): key for key, one in missing.items()}
                for future in as_completed(futures):
                    found = questions.keep(futures[future], future.result())
                    step()
                    yield from found
            finally:
                # Where one failed, or nobody wants the rest: what is in flight is awaited, and not asked again.
                self._ended.set()
                pool.shutdown(wait=False, cancel_futures=True)

    def _statements(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name in STATEMENTS:
            try:
                answer = requests.get(f"{self.url}/{name}", timeout=30)
            except requests.RequestException as error:
                raise NoServerError(
                    f"no server answers at {self.url} ({type(error).__name__}): start one, or name its address"
                ) from None
            if answer.ok and (said := _object(answer)) is not None:
                found[name] = said
        return found


def _object(answer: requests.Response) -> dict[str, Any] | None:
    """The JSON object that a server answers; None where it is something else, as a line of text."""
    try:
        found = answer.json()
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _wait_s(attempt: int, stated: str | None) -> float:
    """Seconds before another try: longer each time, and as long as the server asks (Retry-After), within reason."""
    wanted: float = WAIT_S * 2**attempt
    if stated is None or not stated.isdecimal() or float(stated) > LONGEST_WAIT_S:
        return wanted
    return max(wanted, float(stated))


def _card(url: str, models: Any, wanted: str | None) -> dict[str, Any]:
    served: dict[str, dict[str, Any]] = {str(one["id"]): one for one in (models or {}).get("data") or []}
    if wanted is None and len(served) == 1:
        (only,) = served.values()
        return only
    if wanted not in served:
        names = ", ".join(served) or "none"
        raise InputError(f"{url} serves {names}: " + (f"no {wanted}" if wanted else "name one of them"))
    return served[wanted]


def _length(url: str, told: Any, wanted: int | None) -> int:
    if told is None and wanted is None:
        raise InputError(f"{url} does not say how long its contexts may be (max_model_len): give max_length")
    if told is not None and wanted is not None and wanted > int(told):
        raise InputError(f"max_length {wanted} is over the {told} tokens of {url}")
    # As in vLLM, which wants room for one more token after a prompt.
    return (int(told) if wanted is None else wanted) - 2
