"""`PagedCache`: rows of one candidate in pages, under the interface that transformers' models and generate() use.

Its layers (`paged_layer.py`) hold the rows.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Final

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from evalkit.attention.state import PathState

# What models call the cache, as an argument and in what they return: `cache` from transformers 5.24 on, which warns of
# the name that it had before.
OLD_ARGUMENT: Final = "past_key_values"
ARGUMENT: Final = (
    "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else OLD_ARGUMENT
)


class PagedCache(Cache):
    """The paged rows of every layer, and with them the `PathState` of the candidate that wrote them.

    is_transient: made for one forward pass that keeps no cache.
    """

    is_transient = False

    def __init__(self, state: PathState) -> None:
        super().__init__(layers=state.layers)
        self.state = state

    @property
    def argument(self) -> dict[str, PagedCache]:
        """What hands this cache to a model: `model(ids, **cache.argument)`."""
        return {ARGUMENT: self}

    def reset(self) -> None:
        super().reset()
        self.state.valid = None
        self.state.selections.clear()

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if self.state.valid is not None:
            self.state.valid = self.state.valid[:, : self.get_seq_length()]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._take_valid(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        sequences = torch.arange(self.layers[0].block_table.shape[0])
        super().batch_repeat_interleave(repeats)
        self._take_valid(sequences.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._take_valid(indices)

    def _take_valid(self, sequences: Tensor) -> None:
        if self.state.valid is not None:
            self.state.valid = self.state.valid[sequences.to(self.state.valid.device)]
