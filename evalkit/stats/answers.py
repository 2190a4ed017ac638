"""Two questions about generated tokens: does an answer end in a cycle, and where do two answers part."""

from collections.abc import Sequence
from itertools import takewhile

FEWEST_REPEATING = 12  # below, a repetition may be the answer itself
REPEATS = 3


def is_degenerate(ids: Sequence[int]) -> bool:
    """Whether the last third of these tokens is a cycle.

    That third has 12 tokens or more, and repeats exactly a piece of at most a third of it, so three times or more.
    """
    tail = list(ids[len(ids) - -(-len(ids) // 3) :])
    if len(tail) < FEWEST_REPEATING:
        return False
    return any(tail[period:] == tail[:-period] for period in range(1, len(tail) // REPEATS + 1))


def first_difference(before: Sequence[int], after: Sequence[int]) -> int | None:
    """The place of the first token that differs, which may be the end of one; None where none does.

    Until there the two had the same text before them; after it they are about different texts.
    """
    if list(before) == list(after):
        return None
    same = takewhile(lambda pair: pair[0] == pair[1], zip(before, after, strict=False))
    return sum(1 for _ in same)
