"""What a document can ask: each kind of task with its options, and which values of them mean something."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from random import Random

from .layout import shuffled_words
from .puzzles import (
    REGISTER_FACT_TOKENS,
    WALK_FACT_TOKENS,
    Puzzle,
    counts,
    lookups,
    many_values,
    register_chains,
    sibling_keys,
    variables,
    walks,
)
from .words import REGISTERS, WORDS


def _most(room: int, tokens_each: int, names_each: int) -> int:
    return min(room // tokens_each, len(WORDS) // names_each)


def _needle(rng: Random, room: int) -> Puzzle:
    return _multi_key(rng, room, keys=1)


def _multi_key(rng: Random, _room: int, keys: int = 120) -> Puzzle:
    names = shuffled_words(rng)
    task = "needle" if keys == 1 else "multi_key"
    return lookups(task, rng, [next(names) for _ in range(keys)])


def _siblings(rng: Random, _room: int, keys: int = 100) -> Puzzle:
    return lookups("siblings", rng, sibling_keys(rng, shuffled_words(rng), keys))


def _variable_tracking(rng: Random, _room: int, chains: int = 16, hops: int = 4) -> Puzzle:
    return variables(rng, shuffled_words(rng), chains, hops)


def _walk(rng: Random, room: int, steps: int = 32, chains: int = 3) -> Puzzle:
    chains = max(1, min(chains, _most(room, steps * WALK_FACT_TOKENS, steps)))
    return walks(rng, shuffled_words(rng), chains, steps)


def _registers(rng: Random, room: int, steps: int = 24, registers: int = 8, chains: int = 3) -> Puzzle:
    chains = max(1, min(chains, _most(room, steps * REGISTER_FACT_TOKENS, steps)))
    return register_chains(rng, shuffled_words(rng), chains, steps, registers)


def _second_turn(rng: Random, _room: int, keys: int = 40) -> Puzzle:
    return _in_turns(rng, "second_turn", keys, 2)


def _multi_query(rng: Random, _room: int, keys: int = 40, queries: int = 4) -> Puzzle:
    return _in_turns(rng, "multi_query", keys, queries)


def _in_turns(rng: Random, task: str, keys: int, turns: int) -> Puzzle:
    if keys < turns:
        raise ValueError(f"task {task!r}: {turns} different keys are asked for, keys is {keys}")
    names = shuffled_words(rng)
    puzzle = lookups(task, rng, [next(names) for _ in range(keys)])
    puzzle.turns = turns
    return puzzle


def _multi_value(rng: Random, _room: int, keys: int = 8, values: int = 4) -> Puzzle:
    if keys < 2:
        raise ValueError(
            f"task 'multi_value': one key shows how to answer and another is asked; keys is {keys}"
        )
    names = shuffled_words(rng)
    return many_values(rng, [next(names) for _ in range(keys)], values)


def _word_count(rng: Random, _room: int, words: int = 12, most: int = 9) -> Puzzle:
    if words < 3:
        raise ValueError(
            f"task 'word_count': two words show how to answer and a third is asked; words is {words}"
        )
    names = shuffled_words(rng)
    return counts(rng, [next(names) for _ in range(words)], most)


TASKS: Mapping[str, Callable[..., Puzzle]] = {
    "needle": _needle,
    "multi_key": _multi_key,
    "siblings": _siblings,
    "variables": _variable_tracking,
    "walk": _walk,
    "registers": _registers,
    "second_turn": _second_turn,
    "multi_query": _multi_query,
    "multi_value": _multi_value,
    "word_count": _word_count,
}
_LIMITS = {
    "keys": 200,
    "chains": 50,
    "hops": 10,
    "steps": 120,
    "registers": len(REGISTERS),
    "queries": 20,
    "values": 8,
    "words": 40,
    "most": 20,
}


def checked(task: str, options: Mapping[str, int]) -> Callable[..., Puzzle]:
    """The task's maker: `make(rng, room, **options)`, where `room` is in tokens.

    Raises:
        ValueError: an unknown task or option, or a value that an option cannot take.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; known: {', '.join(TASKS)}")
    known = list(inspect.signature(TASKS[task]).parameters)[2:]
    for option, value in options.items():
        if option not in known:
            raise ValueError(
                f"task {task!r} has no option {option!r}; its options: {', '.join(known) or 'none'}"
            )
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _LIMITS[option]:
            raise ValueError(
                f"task {task!r}: {option} must be a whole number from 1 to {_LIMITS[option]}, not {value!r}"
            )
    return TASKS[task]
