"""Sequences of different lengths in one `PagedCache`: prefilled a few at a time, then advanced together, a token each.

Each sequence has its blocks side by side, so that column j of sequence b lies in slot b * room + j, and its columns are
its positions: there is no padding before a prompt. A step of all sequences has the same shapes whatever their lengths
are, and everything that it reads lies where it lay at the step before, as a CUDA graph wants.
"""

from __future__ import annotations

import torch
from torch import Tensor

from evalkit.attention.cache import PagedCache
from evalkit.attention.paged_layer import BLOCK


class Ragged:
    """Room for `sequences` sequences of `columns` columns in an empty cache, and for `spare` more that no step extends.

    column: [B] int64, the column that each sequence's next token goes to; at first the last one.
    """

    def __init__(
        self, cache: PagedCache, sequences: int, columns: int, device: torch.device, spare: int = 0
    ) -> None:
        self.cache, self.columns = cache, columns
        blocks, count = -(-columns // BLOCK), sequences + spare
        self.column = torch.full((sequences,), columns - 1, device=device)
        self._table = torch.arange(count * blocks, device=device).view(count, blocks)
        self._slots = torch.arange(sequences * blocks * BLOCK, device=device).view(sequences, -1)
        self._numbers = torch.arange(columns, device=device)
        for layer in cache.state.layers:
            layer.reserve(count * blocks, device)

    def prefill(self, sequences: Tensor, start: int) -> None:
        """The next passes extend these sequences [P], of which `start` columns are there."""
        self.cache.state.valid = None
        for layer in self.cache.state.layers:
            layer.turn_to(self._table[sequences], start)

    def step(self, visible: int) -> tuple[Tensor, Tensor]:
        """The next pass extends every sequence by the token at its `column`, and sees at most `visible` columns.

        Returns:
            What it takes: attention_mask [B, visible] and position_ids [B, 1].
        """
        column = self.column[:, None]
        own = self._slots.gather(1, column)
        for layer in self.cache.state.layers:
            layer.turn_to(self._table[: len(column)], visible)
            layer.step = own, self._slots
        return self._numbers[:visible] <= column, column

    def advance(self) -> None:
        """Every sequence is a token longer; one without room writes its last column again."""
        torch.clamp(self.column + 1, max=self.columns - 1, out=self.column)

    def copy(self, source: int, to: Tensor, columns: int) -> None:
        """Give the sequences `to` [P] the first columns of another, in whole blocks."""
        blocks = self._table[:, : -(-columns // BLOCK)]
        for layer in self.cache.state.layers:
            layer.copy(blocks[to].flatten(), blocks[source].repeat(len(to)))
