"""What scores indexer keys: one implementation of the indexer's sum for the keys that it can read."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from evalkit.kv.index import IndexFormat


class Scorer(ABC):
    """Computes score[t, s] = key_scale[s] · Σ_i weight[t, i] · relu(query[t, i] · key[s])."""

    name: str
    kernel: str

    @abstractmethod
    def unavailable_because(self, keys: IndexFormat, heads: int, device: torch.device) -> str | None:
        """Why it cannot score such keys with that many indexer heads here, in one line, or None where it can."""

    @abstractmethod
    def scores(self, query: Tensor, keys: Tensor, weights: Tensor, key_scale: Tensor | None) -> Tensor:
        """Scores of every key for the last T tokens of each sequence, the tokens after a query left out.

        Args:
            query: [B, T, I, 128] codes.
            keys: [B, S, 128] codes, S >= T; query t stands at column S - T + t.
            weights: [B, T, I], head weights times every constant scale and the query's own.
            key_scale: [B, S] float32, where keys are scaled codes.

        Returns:
            [B, T, S] float32, -inf at columns after the query's own.
        """
