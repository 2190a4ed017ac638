"""The rows and indexer keys of one layer in pages, under the interface of transformers' cache layers.

Token column j of sequence b lives in slot `block_table[b, j // 64] * 64 + j % 64`. Padding has columns, so that
columns line up with transformers' attention mask, but its slots are never written. Each layer tracks its own length:
layers can be advanced one after the other over all chunks, or all layers chunk by chunk. `attention/ragged.py` gives
sequences lengths of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from evalkit.kv import RowFormat
from evalkit.kv.index import IndexFormat, Keys, resolve

BLOCK = 64


class PagedLayer(CacheLayerMixin):
    """One layer's rows and indexer keys.

    index: how a candidate says that keys are stored; their format is known once there are keys.
    """

    is_croppable = True
    is_sliding = False
    # [B, 1] slots of one more token of every sequence, and [B, S] of every column it may see: see attention/ragged.py.
    step: tuple[Tensor, Tensor] | None = None

    def __init__(self, format: RowFormat, index: str) -> None:
        super().__init__()
        self.format, self.index = format, index
        self.reset()

    def reset(self) -> None:
        self.step = None
        self.length = 0
        self.block_table = torch.empty(0, 0, dtype=torch.int64)  # [B, blocks]
        self.rows: Tensor | None = None
        self.index_format: IndexFormat | None = None
        self.index_rows: Tensor | None = None  # pages of `index_format`, numbered as those of `rows`

    def extend(self, batch: int, length: int, device: torch.device) -> Tensor:
        """Make room for `length` more columns of each sequence; returns their slots [B, length]."""
        if self.step is not None:
            return self.step[0]
        if self.length == 0 and self.block_table.shape[0] != batch:
            self.block_table = torch.empty(batch, 0, dtype=torch.int64, device=device)
            self.rows = None
        if self.block_table.shape[0] != batch:
            raise ValueError(f"the cache holds {self.block_table.shape[0]} sequences, this step has {batch}")
        start, self.length = self.length, self.length + length
        missing = -(-self.length // BLOCK) - self.block_table.shape[1]
        if missing > 0:
            used = self.block_table.numel()
            self._reserve(used + batch * missing, device)
            fresh = torch.arange(used, used + batch * missing, device=device).view(batch, missing)
            self.block_table = torch.cat([self.block_table, fresh], 1)
        return self.slots(start, self.length)

    def slots(self, start: int, stop: int) -> Tensor:
        """Slots of columns start to stop, [B, stop - start] int64."""
        if self.step is not None:
            return self.step[1][:, start:stop]
        columns = torch.arange(start, stop, device=self.block_table.device)
        return self.block_table[:, columns // BLOCK] * BLOCK + columns % BLOCK

    def written(self, slots: Tensor, valid: Tensor | None) -> Tensor:
        """The slots [B, T] that `extend` gave last, -1 where `valid` [B, S] says that the column is padding."""
        if valid is None or self.step is not None:  # who advances a token at a time has no padding
            return slots
        return slots.where(valid[:, self.length - slots.shape[1] : self.length], -1)

    def reserve(self, blocks: int, device: torch.device) -> None:
        """Empty rows of so many blocks at once."""
        self.reset()
        self._reserve(blocks, device)

    def turn_to(self, block_table: Tensor, length: int) -> None:
        """Go on with the sequences of this block table [B, blocks], `length` columns of which are there."""
        self.step, self.block_table, self.length = None, block_table, length

    def copy(self, to: Tensor, source: Tensor) -> None:
        """Copy rows and indexer keys of the blocks `source` [n] to the blocks `to` [n]."""
        assert self.rows is not None
        _copy_blocks(self.format, self.rows, to, self.rows, source)
        if self.index_rows is not None:
            self.index_rows[to] = self.index_rows[source]

    def store_index(self, slots: Tensor, keys: Tensor) -> None:
        """Keep indexer keys [n, 128] at `slots` [n]."""
        if self.index_format is None:
            self.index_format = resolve(self.index, keys.dtype)
        if self.index_rows is None or len(self.index_rows) < self.capacity:
            fresh = self.index_format.allocate(self.capacity * BLOCK, BLOCK, keys.device)
            if self.index_rows is not None:
                fresh[: len(self.index_rows)] = self.index_rows
            self.index_rows = fresh
        self.index_format.store(self.index_rows, slots, keys)

    def stored_index(self) -> Keys:
        """The keys of every column as they are stored: codes [B, S, 128], scale [B, S]."""
        assert self.index_format is not None
        assert self.index_rows is not None
        if self.step is not None and not self.index_format.scaled:
            # Blocks lie side by side: a view, where a block table would need a copy.
            every = self.index_format.planes(self.index_rows[: self.block_table.numel()]).codes
            return Keys(every.unflatten(0, self.block_table.shape).flatten(1, 2)[:, : self.length], None)
        blocks = self.block_table[:, : -(-self.length // BLOCK)]
        # Whole pages move faster than tokens.
        taken = self.index_format.planes(self.index_rows[blocks.flatten()])
        codes, scale = (None if x is None else x.unflatten(0, blocks.shape).flatten(1, 2) for x in taken)
        assert codes is not None
        return Keys(codes[:, : self.length], None if scale is None else scale[:, : self.length])

    @property
    def capacity(self) -> int:
        """Blocks that the rows have room for."""
        return 0 if self.rows is None else self.rows.numel() // (self.format.row_bytes * BLOCK)

    def _reserve(self, blocks: int, device: torch.device) -> None:
        if blocks <= self.capacity:
            return
        held = self.capacity
        rows = self.format.allocate(max(blocks, 2 * held) * BLOCK, BLOCK, device)
        if self.rows is not None:
            everything = torch.arange(held, device=device)
            _copy_blocks(self.format, rows, everything, self.rows, everything)
        self.rows = rows

    def take(self, sequences: Tensor) -> None:
        """Keep the given sequences, each with blocks of its own, so that copies can diverge."""
        if self.rows is None:
            return
        held = self.block_table[sequences.to(self.block_table.device)]  # [B', blocks]
        fresh = torch.arange(held.numel(), device=held.device).view_as(held)
        rows = self.format.allocate(held.numel() * BLOCK, BLOCK, held.device)
        _copy_blocks(self.format, rows, fresh.flatten(), self.rows, held.flatten())
        self.rows, self.block_table = rows, fresh
        self.index_rows = None if self.index_rows is None else self.index_rows[held.flatten()]

    # transformers' interface

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise TypeError("a PagedCache layer is written by the sparse MLA path only")

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        raise TypeError("a PagedCache is read by the sparse MLA path only: load the model with evalkit.load")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length if self.step is None else self.length - 1

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:  # what older transformers took as the length to keep
            raise ValueError(
                f"crop({tokens_to_remove}): a negative number is needed, of how many tokens to remove"
            )
        self.length = max(0, self.length + tokens_to_remove)  # its blocks stay with their sequence

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.take(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.take(torch.arange(self.block_table.shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.take(indices)


def _copy_blocks(format: RowFormat, to: Tensor, to_blocks: Tensor, source: Tensor, blocks: Tensor) -> None:
    """Copy whole blocks between two caches of one format."""
    for target, plane in zip(format.byte_planes(to), format.byte_planes(source), strict=True):
        target.unflatten(0, (-1, BLOCK))[to_blocks] = plane.unflatten(0, (-1, BLOCK))[blocks]
