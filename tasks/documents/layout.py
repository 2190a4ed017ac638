"""Facts in random order among filler sentences."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from .words import FILLERS, HEADER, SHORTEST_FILLER, WORDS


def fill(rng: Random, facts: list[str], tokens: int) -> str:
    """The facts in random order among filler sentences that take at most `tokens` tokens."""
    sentences = facts[:]
    while tokens >= SHORTEST_FILLER[1]:
        filler, cost, words = FILLERS[int(rng.random() * len(FILLERS))]
        if cost > tokens:
            filler, cost, words = SHORTEST_FILLER
        sentences.append(filler % tuple(rng.choices(WORDS, k=words)))
        tokens -= cost
    rng.shuffle(sentences)
    return HEADER + "".join(sentences)


def shuffled_words(rng: Random) -> Iterator[str]:
    return iter(rng.sample(WORDS, len(WORDS)))
