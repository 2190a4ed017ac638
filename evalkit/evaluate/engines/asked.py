"""What engines will be asked, before any has started: tasks' requests as token ids, and documents for layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from evalkit.evaluate.engines.base import Answer, Prompt, Span
from evalkit.evaluate.engines.vllm import text_of


class Asked:
    """An engine that answers nothing and keeps what it is asked.

    Args:
        checkpoint: whose tokenizer is used.
        max_length: what is longer is refused, as any engine's is.
    """

    def __init__(self, checkpoint: Path, max_length: int) -> None:
        self.tokenizer: Any
        self.stop_ids: Sequence[int]
        self.tokenizer, self.stop_ids = text_of(checkpoint)
        self.max_length = max_length
        self.prompts: dict[str, list[Prompt]] = {}
        self.spans: dict[str, list[Span]] = {}
        self.documents: Sequence[Sequence[int]] = ()  # whose layers are shown

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys([*self.prompts, *self.spans]))

    @property
    def longest(self) -> int:
        """Tokens of the longest request, what it may generate included; 0 where there is none."""
        prompts = (len(one.ids) + one.max_new for each in self.prompts.values() for one in each)
        spans = (len(one.context) + len(one.continuation) for each in self.spans.values() for one in each)
        return max([*prompts, *spans, *map(len, self.documents)], default=0)

    def stored(self, request: Prompt | Span) -> bool:
        return False

    def generate(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Answer]]:
        for place, prompt in enumerate(prompts):
            self.prompts.setdefault(str(prompt.label.task), []).append(prompt)
            yield place, Answer(ids=[self.stop_ids[0]], ended="stop")

    def score(self, spans: Sequence[Span]) -> Iterator[tuple[int, tuple[float, bool]]]:
        for place, span in enumerate(spans):
            self.spans.setdefault(str(span.label.task), []).append(span)
            yield place, (0.0, False)
