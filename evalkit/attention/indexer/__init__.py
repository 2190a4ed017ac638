"""The lightning indexer: scores every cached token for every query.

score[t, s] = Σ_i weight[t, i] · relu(query[t, i] · key[s]), the weights carrying the scales of heads and queries.
Keys and queries come as the candidate's `index` format encodes them (evalkit/kv/index/); a key's scale multiplies its
scores, a query's its weights. DeepSeek's own code rotates both with a Hadamard matrix first; vLLM and this module do
not.

What computes it follows from the keys' format, the number of heads and the device alone: `choose`.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

from evalkit.attention.indexer.base import Scorer
from evalkit.attention.indexer.deepgemm import DeepGemm
from evalkit.attention.indexer.exact import Exact, index_scores
from evalkit.attention.indexer.fused import Fused
from evalkit.kv.index import IndexFormat, resolve

__all__ = ["SCORERS", "Choice", "Scorer", "choose", "index_scores", "kernel_for"]

SCORERS: tuple[Scorer, ...] = (DeepGemm(), Fused(), Exact())  # the one nearest to what a server runs first


class Choice(NamedTuple):
    """scorer: what scores the keys. why: what was preferred to it and cannot, each with its reason; else empty."""

    scorer: Scorer
    why: str


@cache
def choose(keys: IndexFormat, heads: int, device: torch.device) -> Choice:
    """The first of `SCORERS` that can score such keys with that many heads here, for as long as the process lives."""
    refused: list[str] = []
    for scorer in SCORERS:
        reason = scorer.unavailable_because(keys, heads, device)
        if reason is None:
            return Choice(scorer, "; ".join(refused))
        refused.append(f"not {scorer.name}: {reason}")
    raise AssertionError("torch scores every format of keys")


def kernel_for(index: str, dtype: torch.dtype, heads: int, device: torch.device) -> str:
    """What scores the keys of a candidate's `index=` in a model of `dtype` here, in words for a record."""
    return choose(resolve(index, dtype), heads, device).scorer.kernel
