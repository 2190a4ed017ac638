"""Proof of what ran: a candidate's record, and how many bytes of the pages a token is seen to cost."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from evalkit import kv
from evalkit.attention.cache import PagedCache
from evalkit.attention.paged_layer import BLOCK
from evalkit.candidate import Candidate
from evalkit.records import CandidateRecord

TOKENS = 16
FILLS = (0x00, 0xFF)


def candidate_record(candidate: Candidate, **seen: Any) -> CandidateRecord:
    """What a candidate resolved to, with the fields that were `seen` of it: the rest, and any that ran otherwise."""
    known: dict[str, Any] = {
        key: getattr(candidate, key) for key in ("format", "scales", "backend", "index", "read")
    }
    known |= {"candidate": str(candidate), "row_bytes_per_token": kv.get(candidate.format).row_bytes}
    return CandidateRecord(**(known | seen))


@torch.no_grad()
def bytes_per_token(model: Any, make_cache: Any, seed: int = 0) -> int:
    """Bytes of layer 0's pages that a token changes, counted over two runs on differently filled pages.

    A byte is counted where it differs from the fill in either run, so that no written value can hide.

    Args:
        model: what `evalkit.load` returns.
        make_cache: makes an empty cache of the candidate.
        seed: of the random tokens.

    Raises:
        ValueError: tokens changed a number of bytes that is no multiple of their count.
    """
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.config.vocab_size, (1, TOKENS), generator=draw).to(model.device)
    changed = torch.stack([_changed(model, make_cache(), ids, fill) for fill in FILLS]).any(0).sum()
    each, rest = divmod(int(changed), TOKENS)
    if rest:
        raise ValueError(
            f"{TOKENS} tokens changed {int(changed)} bytes of layer 0's pages: no whole row each"
        )
    return each


def _changed(model: Any, cache: PagedCache, ids: Tensor, fill: int) -> Tensor:
    layer = cache.state.layers[0]
    layer.rows = layer.format.allocate(BLOCK, BLOCK, ids.device).fill_(fill)
    # The table of one block is set by hand: growing it would replace the filled pages.
    layer.block_table = torch.zeros(1, 1, dtype=torch.int64, device=ids.device)
    hidden = model.model.embed_tokens(ids)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    with model.evalkit.weights_of(0):
        model.model.layers[0](
            hidden,
            attention_mask=None,
            position_ids=positions,
            **cache.argument,
            position_embeddings=model.model.rotary_emb(hidden, position_ids=positions),
        )
    return layer.rows != fill
