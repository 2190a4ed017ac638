"""Which requests share a pass, from their lengths alone: so that every candidate's passes have the same shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from evalkit.attention.paged_layer import BLOCK

# Tokens of one prefill for each sequence that decodes: a batch size fixes both shapes, and half of it halves both, down
# to one prompt a pass.
PREFILL_TOKENS_PER_SEQUENCE = 256
SHORTEST_SHARED_PREFIX = 4 * BLOCK


@dataclass(frozen=True)
class Group:
    """Requests that are prefilled together, as places in what was given, and the tokens that each is padded to."""

    members: tuple[int, ...]
    width: int


def groups(lengths: Sequence[int], sequences: int, longest: int, parts: int = 1) -> list[Group]:
    """Requests of these lengths, longest first, in groups that fit among `sequences`, each of bounded size.

    A group's tokens are at most `PREFILL_TOKENS_PER_SEQUENCE` times `sequences`, but for a single request that is
    longer. Equal groups fill the sequences up as far as they can.

    Args:
        longest: what no width may exceed; else widths are whole blocks, so that groups of about the same length have
            the same shape.
        parts: into how many groups `sequences` are divided at least, so that a group finds room before all have ended.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    found = []
    while order:
        width = min(-(-lengths[order[0]] // BLOCK) * BLOCK, longest)
        most = max(1, min(-(-sequences // parts), PREFILL_TOKENS_PER_SEQUENCE * sequences // width))
        size = sequences // -(-sequences // most)
        found.append(Group(tuple(order[:size]), width))
        order = order[size:]
    return found


def shared_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with, in whole blocks, at least one left to each; 0 where it is not worth it."""
    if len(prompts) < 2:
        return 0
    ordered = sorted(map(tuple, prompts))
    first, last = ordered[0], ordered[-1]  # of all pairs, the two that differ first
    most = min(map(len, prompts)) - 1
    same = next((i for i in range(most) if first[i] != last[i]), most) // BLOCK * BLOCK
    return same if same >= SHORTEST_SHARED_PREFIX else 0
