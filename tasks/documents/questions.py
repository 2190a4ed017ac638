"""Documents that ask one question, or several in turn with the right answers between them."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from .kinds import checked
from .layout import fill
from .puzzles import Exchange, exchange_tokens
from .words import HEADER_TOKENS, QUESTION, QUESTION_TOKENS, count_tokens


@dataclass(frozen=True, kw_only=True)
class Document:
    """Facts and the questions asked about them, the last of which is the document's own."""

    task: str
    context: str
    exchanges: tuple[Exchange, ...]

    @property
    def prompt(self) -> str:
        """All up to the last answer; earlier questions stand in it with their right answers."""
        return self.queries[-1][0]

    @property
    def target(self) -> str:
        """What must follow `prompt`, character by character."""
        return self.exchanges[-1].answer

    @property
    def queries(self) -> list[tuple[str, str]]:
        """Every question's prompt and target, in turn."""
        said, found = self.context, []
        for exchange in self.exchanges:
            said += QUESTION + exchange.question
            found.append((said, exchange.answer))
            said += exchange.answer
        return found


def document(task: str, length: int, seed: int, index: int, **options: int) -> Document:
    """Document `index` of a task: a prompt of at most `length` tokens, at least 95 % of them used.

    Raises:
        ValueError: an unknown task or option, or facts that do not fit into `length` tokens.
    """
    make = checked(task, options)
    rng = Random(f"{task}/{length}/{seed}/{index}/{sorted(options.items())}")
    room = length - HEADER_TOKENS - QUESTION_TOKENS
    puzzle = make(rng, room, **options)
    exchanges = rng.sample(puzzle.exchanges, puzzle.turns)
    room -= puzzle.tokens + count_tokens(exchanges[-1].question)
    room -= sum(exchange_tokens(exchange) for exchange in exchanges[:-1])
    if room < 0:
        raise ValueError(
            f"task {task!r} with {options or 'its defaults'} does not fit into {length} tokens: {-room} too many"
        )
    context = fill(rng, puzzle.facts, room)
    for blank, values in puzzle.in_order.items():
        for value in values:
            context = context.replace(blank, value, 1)
    return Document(task=task, context=context, exchanges=tuple(exchanges))


def generate(task: str, *, length: int, count: int, seed: int, **options: int) -> list[Document]:
    """`count` documents of a task; document i does not depend on how many are asked for."""
    return [document(task, length, seed, index, **options) for index in range(count)]
