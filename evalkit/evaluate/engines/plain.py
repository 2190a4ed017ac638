"""Greedy decoding of a plain transformers model: batch after batch, padded on the left, each to its last answer's end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from evalkit.attention.cache import ARGUMENT
from evalkit.evaluate.engines.base import Answer, Prompt
from evalkit.evaluate.engines.stops import Stops


@torch.inference_mode()
def decode(
    model: Any, batch: Sequence[Prompt], ids: Tensor, mask: Tensor, stops: Callable[[Prompt], Stops]
) -> list[Answer]:
    """Answer prompts whose padded ids and mask are [B, T].

    Finished rows go on unread: dropping them would make shapes depend on what is answered.
    """
    columns, cache = positions(mask), None
    generated: list[list[int]] = [[] for _ in batch]
    answers: dict[int, Answer] = {}
    while True:
        out = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=columns,
            **{ARGUMENT: cache},
            use_cache=True,
            logits_to_keep=1,
        )
        cache = out[ARGUMENT]
        ids = out.logits[:, -1:].argmax(-1)  # [B, 1]
        for row, token in enumerate(ids.flatten().tolist()):
            if row in answers:
                continue
            generated[row].append(token)
            if stops(batch[row]).end(generated[row], len(generated[row]) - 1) is not None:
                answers[row] = Answer(ids=generated[row], ended="stop")
            elif len(generated[row]) == batch[row].max_new:
                answers[row] = Answer(ids=generated[row], ended="length")
        if len(answers) == len(batch):
            return [answers[row] for row in range(len(batch))]
        columns = columns[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(batch), 1)], dim=1)


def positions(mask: Tensor) -> Tensor:
    """Each token's place in its text, [B, T], from a mask that is 0 at padding."""
    return (mask.cumsum(-1) - 1).clamp(min=0)
