"""Documents with several questions, for training only."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from random import Random

from .layout import fill, shuffled_words
from .puzzles import (
    REGISTER_FACT_TOKENS,
    WALK_FACT_TOKENS,
    Exchange,
    Puzzle,
    exchange_tokens,
    lookups,
    notes,
    register_chains,
    sibling_keys,
    variables,
    walks,
)
from .words import HEADER_TOKENS, QUESTION, REGISTERS, WORDS

TRAINING_MIXTURE: Mapping[str, float] = {
    "multi_key": 0.22,
    "siblings": 0.10,
    "variables": 0.15,
    "walk": 0.20,
    "registers": 0.27,
    "copy": 0.06,
}


@dataclass(frozen=True, kw_only=True)
class TrainingDocument:
    """Facts followed by several questions, for training only."""

    context: str
    exchanges: tuple[Exchange, ...]

    @property
    def text(self) -> str:
        return self.context + "".join(QUESTION + e.question + e.answer for e in self.exchanges)


def _log_uniform(rng: Random, low: int, high: int) -> int:
    """A whole number from `low` to `high`, as often between 2 and 4 as between 20 and 40."""
    if high <= low:
        return low
    return min(high, int(low * math.exp(rng.random() * math.log((high + 1) / low))))


def _training_puzzle(task: str, rng: Random, names: Iterator[str], free: int, room: int) -> Puzzle:
    """A puzzle of random size whose facts and one full answer fit into `room` tokens, with at most `free` names."""
    if task == "multi_key":
        keys = _log_uniform(rng, 1, min(160, free, (room - 13) // 7))
        return lookups("needle" if keys == 1 else task, rng, [next(names) for _ in range(keys)])
    if task == "siblings":
        keys = _log_uniform(rng, 2, min(140, (room - 20) // 9))
        return lookups(task, rng, sibling_keys(rng, names, keys))
    if task == "variables":
        hops = rng.randrange(1, 7)
        while hops > 1 and 19 + 9 * hops > room:
            hops -= 1
        each = 8 + 5 * hops
        chains = _log_uniform(rng, 1, max(1, min(40, free // (hops + 1), (room - 11 - 4 * hops) // each)))
        return variables(rng, names, chains, hops)
    if task == "walk":
        steps = _log_uniform(rng, 2, min(40, free, (room - 6) // (WALK_FACT_TOKENS + 9)))
        each = steps * WALK_FACT_TOKENS
        chains = _log_uniform(rng, 1, max(1, min(8, free // steps, (room - 6 - 9 * steps) // each)))
        return walks(rng, names, chains, steps)
    if task == "registers":
        steps = _log_uniform(rng, 2, min(48, free, (room - 6) // (REGISTER_FACT_TOKENS + 11)))
        each = steps * REGISTER_FACT_TOKENS
        chains = _log_uniform(rng, 1, max(1, min(6, free // steps, (room - 6 - 11 * steps) // each)))
        return register_chains(rng, names, chains, steps, rng.randrange(2, len(REGISTERS) + 1))
    length = _log_uniform(rng, 6, min(60, (room - 7) // 2))
    count = _log_uniform(rng, 1, max(1, min(10, (room - length - 6) // (length + 2))))
    return notes(rng, count, length)


def training_document(
    rng: Random, length: int, mixture: Mapping[str, float] = TRAINING_MIXTURE
) -> TrainingDocument:
    """Facts of one task, or of two in a quarter of the documents, and 1 to 20 questions: at most `length` tokens."""
    tasks = rng.choices(list(mixture), list(mixture.values()), k=2 if rng.random() < 0.25 else 1)
    names = shuffled_words(rng)
    room = length - HEADER_TOKENS
    share = room // len(tasks)
    facts: list[str] = []
    candidates: list[Exchange] = []
    chosen: list[Exchange] = []
    for task in tasks:
        puzzle = _training_puzzle(task, rng, names, len(WORDS) // len(tasks), share)
        rng.shuffle(puzzle.exchanges)
        facts += puzzle.facts
        room -= puzzle.tokens
        chosen.append(puzzle.exchanges[0])
        candidates += puzzle.exchanges[1:]
    room -= sum(exchange_tokens(exchange) for exchange in chosen)
    rng.shuffle(candidates)
    for exchange in candidates[: rng.randrange(20)]:
        cost = exchange_tokens(exchange)
        if cost <= room:
            room -= cost
            chosen.append(exchange)
    rng.shuffle(chosen)
    return TrainingDocument(context=fill(rng, facts, room), exchanges=tuple(chosen))
