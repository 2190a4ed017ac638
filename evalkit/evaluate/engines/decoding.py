"""Sequences of one cache, each at its own place, advanced together by greedy steps.

On a GPU a small model's step is bound by the launches of its kernels. Steps are therefore recorded in a CUDA graph
where the candidate's backend never waits for the device; a graph runs the same kernels on the same shapes. Generated
tokens are fetched once every `STEPS_AT_ONCE` steps, and each such call is timed, less what prompts took before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from evalkit.attention.backends import Backend
from evalkit.attention.paged_layer import BLOCK
from evalkit.attention.ragged import Ragged
from evalkit.evaluate.damage import generators
from evalkit.evaluate.engines.timing import Call, clock

STEPS_AT_ONCE = {"cpu": 1, "cuda": 16}
TIMED_CALLS = 10  # an interval needs 8


class Decoder:
    """Room for `sequences` sequences of `columns` columns, of which any can be filled and all are advanced.

    Those that nobody filled, or whose answer has ended, are advanced too and not read: what a step multiplies has
    the same shapes whatever was answered.

    Args:
        model: one that has the sparse MLA path.
        cache: an empty `PagedCache` of the candidate.
        shared: tokens that every prompt begins with: computed once, and then copied.
        graphs: whether steps may be recorded in a CUDA graph.

    Attributes:
        timed: the calls of `steps` after those that warm up: the first, or, where steps may be recorded, all that come
            before a recording may be made and those that make one.
    """

    def __init__(
        self,
        model: Any,
        cache: Any,
        sequences: int,
        columns: int,
        shared: Sequence[int] = (),
        graphs: bool = True,
    ) -> None:
        self._body, self._head, self._cache = model.base_model, model.get_output_embeddings(), cache
        self._topk, self._device = model.config.index_topk, torch.device(model.device)
        self._records = graphs and self._device.type == "cuda"
        self._ragged = Ragged(cache, sequences, columns, self._device, spare=1 if shared else 0)
        self._next = torch.zeros(sequences, dtype=torch.int64, device=self._device)
        # As `Ragged.column`, known without asking the device.
        self._column = [columns - 1] * sequences
        self._steps = 0
        self._recorded: dict[Backend, torch.cuda.CUDAGraph] = {}
        self._replays = 0
        self._clock, self.timed = clock(self._device), list[Call]()
        self._shared = len(shared)
        if shared:
            self._pass(torch.tensor([list(shared)], device=self._device), [sequences], 0)

    def fill(self, sequences: Sequence[int], prompts: Sequence[Sequence[int]], width: int) -> None:
        """Begin these sequences anew with the prompts [P], each less than what all share, padded to `width` tokens.

        Padding follows a prompt: no token sees it, and what is generated takes its place.
        """
        start, rest = self._shared, [list(prompt[self._shared :]) for prompt in prompts]
        ids = torch.tensor([row + row[-1:] * (width - len(row)) for row in rest], device=self._device)
        place = torch.tensor(sequences, device=self._device)
        if start:
            self._ragged.copy(len(self._column), place, start)
        hidden = self._pass(ids, sequences, start)  # [P, width, D]
        lengths = torch.tensor([len(row) for row in rest], device=self._device)
        last = hidden[torch.arange(len(rest), device=self._device), lengths - 1]
        self._next[place] = self._head(last).argmax(-1)
        self._ragged.column[place] = lengths + start
        for sequence, row in zip(sequences, rest, strict=True):
            self._column[sequence] = start + len(row)

    def steps(self, count: int) -> list[list[int]]:
        """Advance every sequence by `count` tokens.

        Returns:
            [sequences][count + 1]: the token that each had last, and those that followed.
        """
        visible = min(self._ragged.columns, -(-(max(self._column) + count) // BLOCK) * BLOCK)
        before, recorded, replays = self._steps, len(self._recorded), self._replays
        start = self._clock.mark()
        tokens = [self._next.clone()]
        for _ in range(count):
            self._advance(visible)
            tokens.append(self._next.clone())
        end = self._clock.mark()
        self._column = [min(column + count, self._ragged.columns - 1) for column in self._column]
        found: list[list[int]] = torch.stack(tokens, 1).tolist()
        warm = before >= (STEPS_AT_ONCE["cuda"] if self._records else 1) and recorded == len(self._recorded)
        if count and warm:
            graph = self._replays - replays == count
            self.timed.append(
                Call(
                    seconds=self._clock.seconds(start, end),
                    steps=count,
                    sequences=len(self._column),
                    columns=self._ragged.columns if graph else visible,
                    graph=graph,
                )
            )
        return found

    def time_on(self) -> None:
        """Advance further, read by nobody, until enough calls are timed: answers may be shorter than that takes."""
        count = STEPS_AT_ONCE[self._device.type]
        if self._records and self._steady() is None and len(self.timed) < TIMED_CALLS:
            # A step that is not recorded takes as long as several that are. One a call is enough.
            self.steps(max(0, STEPS_AT_ONCE["cuda"] - self._steps))
            count = 1
        for _ in range(TIMED_CALLS + 2):  # of which two at most warm up
            if len(self.timed) < TIMED_CALLS:
                self.steps(count)

    def _pass(self, ids: Tensor, sequences: Sequence[int], start: int) -> Tensor:
        """Hidden states [P, T, D] of ids [P, T], which extend these sequences from column `start` on."""
        self._ragged.prefill(torch.tensor(sequences, device=self._device), start)
        places = torch.arange(start, start + ids.shape[1], device=self._device)[None]
        return self._forward(input_ids=ids, position_ids=places)

    def _forward(self, **inputs: Tensor) -> Tensor:
        hidden: Tensor = self._body(**inputs, **self._cache.argument, use_cache=True).last_hidden_state
        return hidden

    def _step(self, visible: int) -> None:
        mask, places = self._ragged.step(visible)
        hidden = self._forward(input_ids=self._next[:, None], attention_mask=mask, position_ids=places)
        self._next.copy_(self._head(hidden)[:, 0].argmax(-1))
        self._ragged.advance()

    def _advance(self, visible: int) -> None:
        self._steps += 1
        # A graph pays only where many steps follow.
        if not self._records or self._steps <= STEPS_AT_ONCE["cuda"]:
            self._step(visible)
            return
        backend, steady = self._cache.state.backend, self._steady()
        if steady is None:
            self._step(visible)
        elif steady in self._recorded:
            self._recorded[steady].replay()
            self._replays += 1
        else:
            self._cache.state.backend = steady
            try:
                # The first step prepares what a recording may not: plans, compiled kernels, workspaces.
                self._step(self._ragged.columns)
                self._recorded[steady] = self._record()
            finally:
                self._cache.state.backend = backend

    def _steady(self) -> Backend | None:
        """The backend for a step that can be recorded now."""
        steady: Backend | None = self._cache.state.backend.steady(full=min(self._column) + 1 >= self._topk)
        return steady

    def _record(self) -> torch.cuda.CUDAGraph:
        """A step that sees every column. Recording computes nothing."""
        graph = torch.cuda.CUDAGraph()
        for generator in generators(self._cache.state.format):
            graph.register_generator_state(generator)
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._step(self._ragged.columns)
        return graph
