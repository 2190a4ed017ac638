"""What an engine is: token ids in, greedy tokens and log-likelihoods out, for one candidate.

Text is the business of `evalkit.evaluate.lm`, which refuses what no engine can do (sampling, too long a prompt) before
an engine sees it. The only text that an engine meets are stop strings: it ends an answer there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol


@dataclass(frozen=True)
class Label:
    """Whose request it is, for messages and coverage."""

    task: str | None
    doc_id: int | None

    def __str__(self) -> str:
        return f"{self.task or 'request'} document {'?' if self.doc_id is None else self.doc_id}"


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Token ids to continue greedily.

    ids: at least one. max_new: the most tokens to generate, at least 1; with the prompt within `Engine.max_length`.
    until: the answer ends with the token that completes one of these strings; none of them is empty.
    """

    label: Label
    ids: Sequence[int]
    max_new: int
    until: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Span:
    """Tokens to score after their context; both have at least one."""

    label: Label
    context: Sequence[int]
    continuation: Sequence[int]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What was generated after a prompt.

    ids: the generated tokens, the last of them the one that ended the answer; at least one.
    ended: "stop" where that is an end-of-text token or completed a stop string, "length" where `max_new` were
        generated without either.
    logprobs: each generated token's log-probability in nats, where the engine tells them.
    """

    ids: Sequence[int]
    ended: Literal["stop", "length"]
    logprobs: Sequence[float] | None = None


class Engine(Protocol):
    """Runs one candidate. Answers come in any order, each with its request's place in what was given.

    Two engines of one checkpoint are given the same requests, and the shapes that they compute in must not depend on
    what is answered: a difference between candidates does not come from there. What company changes beyond that, a
    control in batches of another size has to show.
    """

    @property
    def tokenizer(self) -> Any:
        """transformers' tokenizer of the checkpoint."""

    @property
    def max_length(self) -> int:
        """The longest prompt plus generated tokens, or context plus continuation less its last token."""

    @property
    def stop_ids(self) -> Sequence[int]:
        """End-of-text tokens, at least one: each ends an answer."""

    def stored(self, request: Prompt | Span) -> bool:
        """Whether the attention of this request's scored tokens reads the candidate's stored rows."""

    def generate(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Answer]]:
        """The greedy continuation of every prompt, as they come."""

    def score(self, spans: Sequence[Span]) -> Iterator[tuple[int, tuple[float, bool]]]:
        """Of every continuation its log-likelihood in nats, and whether it is the greedy one, as they come."""
