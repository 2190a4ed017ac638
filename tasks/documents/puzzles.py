"""Facts with the questions that they answer: lookups, variables, traces, notes.

The order of random draws is part of a document: another order makes other documents of the same seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from random import Random

from .words import QUESTION_TOKENS, REGISTERS, WORDS, count_tokens

WALK_FACT_TOKENS = 7
REGISTER_FACT_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """One question of a document: `question` ends where `answer` starts."""

    task: str
    question: str
    answer: str


@dataclass(kw_only=True)
class Puzzle:
    """Facts to scatter over a document, with the questions they can answer.

    tokens: of all facts.
    turns: how many of the questions a document asks.
    in_order: facts that are written once the order is known: what stands for them, and they, first to last.
    """

    facts: list[str]
    tokens: int
    exchanges: list[Exchange]
    turns: int = 1
    in_order: Mapping[str, list[str]] = field(default_factory=dict)


def exchange_tokens(exchange: Exchange) -> int:
    """Tokens of a question and its answer, "Answer:" included."""
    return QUESTION_TOKENS + count_tokens(exchange.question) + count_tokens(exchange.answer)


def value_of(rng: Random, tokens: int = 1) -> str:
    return " ".join(f"{rng.randrange(100):02d}" for _ in range(tokens))


def lookups(task: str, rng: Random, keys: list[str]) -> Puzzle:
    # A lone value could be found without its key, by being the only number: it is longer.
    value_tokens = 3 if len(keys) == 1 else 1
    facts, exchanges = [], []
    for key in keys:
        question, answer = f" The code of {key} is", f" {value_of(rng, value_tokens)}."
        facts.append(question + answer)
        exchanges.append(Exchange(task=task, question=question, answer=answer))
    # "The code of", "is" and the full stop are 5 tokens.
    tokens = sum(5 + 1 + key.count(" ") + value_tokens for key in keys)
    return Puzzle(facts=facts, tokens=tokens, exchanges=exchanges)


def many_values(rng: Random, keys: list[str], values: int) -> Puzzle:
    """Several facts a key; the answer tells their values in the order in which the document does."""
    in_order, exchanges = {}, []
    for key in keys:
        question = f" The code of {key} is"
        told = [f"{value:02d}" for value in rng.sample(range(100), values)]
        in_order[f"{question} ?."] = [f"{question} {value}." for value in told]
        exchanges.append(Exchange(task="multi_value", question=question, answer=f" {' then '.join(told)}."))
    facts = [blank for blank in in_order for _ in range(values)]
    return Puzzle(facts=facts, tokens=7 * len(facts), exchanges=exchanges, turns=2, in_order=in_order)


def counts(rng: Random, words: list[str], most: int) -> Puzzle:
    """Words noted 1 to `most` times each; the answer is how often."""
    facts, exchanges = [], []
    for word in words:
        times = rng.randrange(1, most + 1)
        facts += [f" Note {word}."] * times
        exchanges.append(Exchange(task="word_count", question=f" Note {word} makes", answer=f" {times:02d}."))
    return Puzzle(facts=facts, tokens=3 * len(facts), exchanges=exchanges, turns=3)


def sibling_keys(rng: Random, names: Iterator[str], keys: int) -> list[str]:
    """Keys of three words in families that share two of them."""
    found: list[str] = []
    while len(found) < keys:
        family = [next(names), next(names), next(names)]
        place = rng.randrange(3)
        for variant in rng.sample(WORDS, min(8, keys - len(found))):
            family[place] = variant
            found.append(" ".join(family))
    return found


def variables(rng: Random, names: Iterator[str], chains: int, hops: int) -> Puzzle:
    facts, exchanges = [], []
    for _ in range(chains):
        name = next(names)
        lines = [f" Let {name} be {value_of(rng)}"]
        for _ in range(hops):
            name, source = next(names), name
            lines.append(f" Let {name} be {source}")
        facts += [line + "." for line in lines]
        trace = "".join(reversed(lines)) + "."
        question = f" Let {name} be"
        exchanges.append(Exchange(task="variables", question=question, answer=trace[len(question) :]))
    return Puzzle(facts=facts, tokens=chains * (5 + 5 * hops), exchanges=exchanges)


@dataclass(frozen=True)
class Step:
    """`said` in the fact; the trace adds `read`, what a step reads of an earlier one, and `made`, what it leads to."""

    said: str
    made: str
    read: str = ""


def chain(task: str, nodes: list[str], steps: list[Step]) -> tuple[list[str], Exchange]:
    """Facts and full trace of a chain: step i leads from node i to node i + 1, the last one to `end`."""
    ways = list(zip(nodes, steps, [*nodes[1:], "end"], strict=True))
    facts = [f" At {node} {step.said} then {after}." for node, step, after in ways]
    lines = [
        f" At {node} {step.said}{step.read} then {after} makes {step.made}" for node, step, after in ways
    ]
    question = f" At {nodes[0]}"
    return facts, Exchange(task=task, question=question, answer="".join(lines)[len(question) :] + ".")


def walks(rng: Random, names: Iterator[str], chains: int, steps: int) -> Puzzle:
    facts, exchanges = [], []
    for _ in range(chains):
        total, additions = 0, []
        for _ in range(steps):
            addition = rng.randrange(1, 10)
            total = (total + addition) % 100
            additions.append(Step(f"add {addition}", f"{total:02d}"))
        lines, exchange = chain("walk", [next(names) for _ in range(steps)], additions)
        facts += lines
        exchanges.append(exchange)
    return Puzzle(facts=facts, tokens=chains * steps * WALK_FACT_TOKENS, exchanges=exchanges)


def register_chains(rng: Random, names: Iterator[str], chains: int, steps: int, registers: int) -> Puzzle:
    facts, exchanges = [], []
    for _ in range(chains):
        state: dict[str, int] = {}
        operations = []
        pool = rng.sample(REGISTERS, registers)
        for _ in range(steps):
            name = pool[int(rng.random() * registers)]
            digit = rng.randrange(1, 10)
            others = [other for other in state if other != name]
            if name not in state:
                # A first touch sets, so that no step depends on anything before this trace.
                state[name] = digit
                said, read = f"{name} set {digit}", ""
            elif others and rng.random() < 0.4:
                other = others[int(rng.random() * len(others))]
                state[name] = state[other]
                said, read = f"{name} take {other}", f" {state[other]:02d}"
            else:
                state[name] = (state[name] + digit) % 100
                said, read = f"{name} add {digit}", ""
            operations.append(Step(said, f"{name} {state[name]:02d}", read))
        lines, exchange = chain("registers", [next(names) for _ in range(steps)], operations)
        facts += lines
        exchanges.append(exchange)
    return Puzzle(facts=facts, tokens=chains * steps * REGISTER_FACT_TOKENS, exchanges=exchanges)


def notes(rng: Random, count: int, length: int) -> Puzzle:
    facts, exchanges = [], []
    for _ in range(count):
        words = rng.choices(WORDS, k=length)
        question = f" Note {words[0]} {words[1]}"
        answer = " " + " ".join(words[2:]) + "."
        facts.append(question + answer)
        exchanges.append(Exchange(task="copy", question=question, answer=answer))
    return Puzzle(facts=facts, tokens=count * (length + 2), exchanges=exchanges)
