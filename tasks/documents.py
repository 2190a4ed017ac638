"""Documents of the long-context tasks: facts in filler text, one question, and the answer a program works out.

Everything comes from an explicit seed and the words below; nothing is downloaded. A prompt reads

    Facts: The code of river is 47. A lamp can see a goat. ...
    Answer: The code of river is

and its target starts with a space and ends with a full stop, the only one in it, so that `until: ["."]` ends a
generation. A question repeats its fact's beginning verbatim. Traces (variables, walk, registers) go on until a value
or the node `end` closes them, so that nothing has to be counted.

Lengths are in tokens of the checkpoint's tokenizer, which splits text as `PIECE` does and has every word used here
as one entry: a token is a word with its leading space, one or two digits with theirs if they have one, or one run
of punctuation. Values are two digits, so that a value is one token. `count_tokens` is that rule.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from random import Random

PIECE = re.compile(r" ?[A-Za-z]+| ?[0-9]{1,2}| ?[^\sA-Za-z0-9]+|\s")

WORDS = tuple(
    re.findall(
        "[a-z]+",
        """
    ant ape arm art ash bag ball band bank bar barn bay beam bean bear bed bee bell bird boat bowl box
    bread cake camp candle cap car card cat cherry chest clock cloth cloud coal coat coin cook cow crab
    crow crown cup dam desk dish dock dog donkey door dove duck dust eagle ear egg engine face fan farm
    fence fern field fig fish flag flame flour flute fly foam fog food foot fork frog fruit garden ghost
    gift glass goat goose grain grape grass grove guitar gun hand harp hawk hay head hen herb hill honey
    hook horn horse house ice ink inn iron island jacket jeep jet jewel judge kettle key king knife lace
    ladder lake lamb lane leaf leg lemon lid lily lion lock maid mask mat meat melon milk mint monk moon
    mouse mouth mud mug nail neck nest net nose nut ocean oil olive onion orange oven owl page paint palm
    park peach pear pen piano pie pig pill pillow pipe plane plum pond pool pot potato prince queen quilt
    rabbit rain rake ram rat ring river rock roof room root rose rug salt sand sauce saw school seal seat
    seed sheep ship shoe shop silk sink sky sled snake sock soup spider spoon stone stool stove straw
    sugar suit sun swan sword table tail tank tent thorn toad tooth torch towel tower town toy train tray
    tree tub turkey turtle vase wagon wall wasp water well whale wheat wheel whip wind wine wing wire
    wood wool worm zebra
    """,
    )
)
REGISTERS = ("red", "blue", "green", "gold", "pink", "gray", "black", "white")

HEADER = "Facts:"
QUESTION = "\nAnswer:"
_HEADER_TOKENS, _QUESTION_TOKENS = 2, 3

# Each: the sentence, its tokens, how many words it takes.
_FILLERS = (
    (" The %s is old.", 5, 1),
    (" A %s can see the %s.", 7, 2),
    (" We put the %s on a %s.", 8, 2),
    (" He met a %s and a %s by the %s.", 11, 3),
    (" The %s and the %s met a %s in the %s.", 12, 4),
)
_SHORTEST_FILLER = _FILLERS[0]

# Every sentence that a document may hold, for whoever must know its words.
TEMPLATES = (
    " The code of %s is %s.",
    " Let %s be %s.",
    " At %s add %s then %s makes %s.",
    " At %s %s set %s then end.",
    " At %s %s take %s then end.",
    " Note %s.",
    *(filler for filler, _, _ in _FILLERS),
)


def count_tokens(text: str) -> int:
    """Tokens of a text made of this module's words."""
    return len(PIECE.findall(text))


@dataclass(frozen=True, kw_only=True)
class Document:
    """One prompt with its answer. `target` is what must follow `prompt`, character by character."""

    prompt: str
    target: str
    task: str


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """One question of a document: `question` ends where `answer` starts."""

    task: str
    question: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class TrainingDocument:
    """Facts followed by several questions, for training only."""

    context: str
    exchanges: tuple[Exchange, ...]

    @property
    def text(self) -> str:
        return self.context + "".join(QUESTION + e.question + e.answer for e in self.exchanges)


@dataclass(kw_only=True)
class _Puzzle:
    """Facts to scatter over a document, with the questions they can answer."""

    facts: list[str]
    tokens: int
    exchanges: list[Exchange]


# --- Facts ------------------------------------------------------------------------------------------------------


def _value(rng: Random, tokens: int = 1) -> str:
    return " ".join(f"{rng.randrange(100):02d}" for _ in range(tokens))


def _lookups(task: str, rng: Random, keys: list[str]) -> _Puzzle:
    # A lone value could be found without its key, by being the only number: it is longer.
    value_tokens = 3 if len(keys) == 1 else 1
    facts, exchanges = [], []
    for key in keys:
        question, answer = f" The code of {key} is", f" {_value(rng, value_tokens)}."
        facts.append(question + answer)
        exchanges.append(Exchange(task=task, question=question, answer=answer))
    # "The code of", "is" and the full stop are 5 tokens.
    tokens = sum(5 + 1 + key.count(" ") + value_tokens for key in keys)
    return _Puzzle(facts=facts, tokens=tokens, exchanges=exchanges)


def _sibling_keys(rng: Random, names: Iterator[str], keys: int) -> list[str]:
    """Keys of three words in families that share two of them."""
    found: list[str] = []
    while len(found) < keys:
        family = [next(names), next(names), next(names)]
        place = rng.randrange(3)
        for variant in rng.sample(WORDS, min(8, keys - len(found))):
            family[place] = variant
            found.append(" ".join(family))
    return found


def _variables(rng: Random, names: Iterator[str], chains: int, hops: int) -> _Puzzle:
    facts, exchanges = [], []
    for _ in range(chains):
        name = next(names)
        lines = [f" Let {name} be {_value(rng)}"]
        for _ in range(hops):
            name, source = next(names), name
            lines.append(f" Let {name} be {source}")
        facts += [line + "." for line in lines]
        trace = "".join(reversed(lines)) + "."
        question = f" Let {name} be"
        exchanges.append(Exchange(task="variables", question=question, answer=trace[len(question) :]))
    return _Puzzle(facts=facts, tokens=chains * (5 + 5 * hops), exchanges=exchanges)


@dataclass(frozen=True)
class _Step:
    """`said` in the fact; the trace adds `read`, what a step reads of an earlier one, and `made`, what it leads to."""

    said: str
    made: str
    read: str = ""


def _chain(task: str, nodes: list[str], steps: list[_Step]) -> tuple[list[str], Exchange]:
    """Facts and full trace of a chain: step i leads from node i to node i + 1, the last one to `end`."""
    ways = list(zip(nodes, steps, [*nodes[1:], "end"], strict=True))
    facts = [f" At {node} {step.said} then {after}." for node, step, after in ways]
    lines = [f" At {node} {step.said}{step.read} then {after} makes {step.made}" for node, step, after in ways]
    question = f" At {nodes[0]}"
    return facts, Exchange(task=task, question=question, answer="".join(lines)[len(question) :] + ".")


def _walks(rng: Random, names: Iterator[str], chains: int, steps: int) -> _Puzzle:
    facts, exchanges = [], []
    for _ in range(chains):
        total, additions = 0, []
        for _ in range(steps):
            addition = rng.randrange(1, 10)
            total = (total + addition) % 100
            additions.append(_Step(f"add {addition}", f"{total:02d}"))
        lines, exchange = _chain("walk", [next(names) for _ in range(steps)], additions)
        facts += lines
        exchanges.append(exchange)
    return _Puzzle(facts=facts, tokens=chains * steps * WALK_FACT_TOKENS, exchanges=exchanges)


def _register_chains(rng: Random, names: Iterator[str], chains: int, steps: int, registers: int) -> _Puzzle:
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
            operations.append(_Step(said, f"{name} {state[name]:02d}", read))
        lines, exchange = _chain("registers", [next(names) for _ in range(steps)], operations)
        facts += lines
        exchanges.append(exchange)
    return _Puzzle(facts=facts, tokens=chains * steps * REGISTER_FACT_TOKENS, exchanges=exchanges)


def _notes(rng: Random, count: int, length: int) -> _Puzzle:
    facts, exchanges = [], []
    for _ in range(count):
        words = rng.choices(WORDS, k=length)
        question = f" Note {words[0]} {words[1]}"
        answer = " " + " ".join(words[2:]) + "."
        facts.append(question + answer)
        exchanges.append(Exchange(task="copy", question=question, answer=answer))
    return _Puzzle(facts=facts, tokens=count * (length + 2), exchanges=exchanges)


WALK_FACT_TOKENS = 7
REGISTER_FACT_TOKENS = 8


# --- Text around the facts --------------------------------------------------------------------------------------


def _fill(rng: Random, facts: list[str], tokens: int) -> str:
    """The facts in random order among filler sentences that take at most `tokens` tokens."""
    sentences = facts[:]
    while tokens >= _SHORTEST_FILLER[1]:
        filler, cost, words = _FILLERS[int(rng.random() * len(_FILLERS))]
        if cost > tokens:
            filler, cost, words = _SHORTEST_FILLER
        sentences.append(filler % tuple(rng.choices(WORDS, k=words)))
        tokens -= cost
    rng.shuffle(sentences)
    return HEADER + "".join(sentences)


def _names(rng: Random) -> Iterator[str]:
    return iter(rng.sample(WORDS, len(WORDS)))


def _most(room: int, tokens_each: int, names_each: int) -> int:
    return min(room // tokens_each, len(WORDS) // names_each)


# --- Documents with one question --------------------------------------------------------------------------------


def _needle(rng: Random, room: int) -> _Puzzle:
    return _multi_key(rng, room, keys=1)


def _multi_key(rng: Random, _room: int, keys: int = 120) -> _Puzzle:
    names = _names(rng)
    task = "needle" if keys == 1 else "multi_key"
    return _lookups(task, rng, [next(names) for _ in range(keys)])


def _siblings(rng: Random, _room: int, keys: int = 100) -> _Puzzle:
    return _lookups("siblings", rng, _sibling_keys(rng, _names(rng), keys))


def _variable_tracking(rng: Random, _room: int, chains: int = 16, hops: int = 4) -> _Puzzle:
    return _variables(rng, _names(rng), chains, hops)


def _walk(rng: Random, room: int, steps: int = 32, chains: int = 3) -> _Puzzle:
    chains = max(1, min(chains, _most(room, steps * WALK_FACT_TOKENS, steps)))
    return _walks(rng, _names(rng), chains, steps)


def _registers(rng: Random, room: int, steps: int = 24, registers: int = 8, chains: int = 3) -> _Puzzle:
    chains = max(1, min(chains, _most(room, steps * REGISTER_FACT_TOKENS, steps)))
    return _register_chains(rng, _names(rng), chains, steps, registers)


TASKS: Mapping[str, Callable[..., _Puzzle]] = {
    "needle": _needle,
    "multi_key": _multi_key,
    "siblings": _siblings,
    "variables": _variable_tracking,
    "walk": _walk,
    "registers": _registers,
}
_LIMITS = {"keys": 200, "chains": 50, "hops": 10, "steps": 120, "registers": len(REGISTERS)}


def _checked(task: str, options: Mapping[str, int]) -> Callable[..., _Puzzle]:
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


def document(task: str, length: int, seed: int, index: int, **options: int) -> Document:
    """Document `index` of a task: a prompt of at most `length` tokens, at least 95 % of them used.

    Raises:
        ValueError: an unknown task or option, or facts that do not fit into `length` tokens.
    """
    make = _checked(task, options)
    rng = Random(f"{task}/{length}/{seed}/{index}/{sorted(options.items())}")
    room = length - _HEADER_TOKENS - _QUESTION_TOKENS
    puzzle = make(rng, room, **options)
    exchange = puzzle.exchanges[rng.randrange(len(puzzle.exchanges))]
    room -= puzzle.tokens + count_tokens(exchange.question)
    if room < 0:
        raise ValueError(
            f"task {task!r} with {options or 'its defaults'} does not fit into {length} tokens: {-room} too many"
        )
    prompt = _fill(rng, puzzle.facts, room) + QUESTION + exchange.question
    return Document(prompt=prompt, target=exchange.answer, task=task)


def generate(task: str, *, length: int, count: int, seed: int, **options: int) -> list[Document]:
    """`count` documents of a task; document i does not depend on how many are asked for."""
    return [document(task, length, seed, index, **options) for index in range(count)]


# --- Documents for training -------------------------------------------------------------------------------------

TRAINING_MIXTURE: Mapping[str, float] = {
    "multi_key": 0.22,
    "siblings": 0.10,
    "variables": 0.15,
    "walk": 0.20,
    "registers": 0.27,
    "copy": 0.06,
}


def _log_uniform(rng: Random, low: int, high: int) -> int:
    """A whole number from `low` to `high`, as often between 2 and 4 as between 20 and 40."""
    if high <= low:
        return low
    return min(high, int(low * math.exp(rng.random() * math.log((high + 1) / low))))


def _training_puzzle(task: str, rng: Random, names: Iterator[str], free: int, room: int) -> _Puzzle:
    """A puzzle of random size whose facts and one full answer fit into `room` tokens, with at most `free` names."""
    if task == "multi_key":
        keys = _log_uniform(rng, 1, min(160, free, (room - 13) // 7))
        return _lookups("needle" if keys == 1 else task, rng, [next(names) for _ in range(keys)])
    if task == "siblings":
        keys = _log_uniform(rng, 2, min(140, (room - 20) // 9))
        return _lookups(task, rng, _sibling_keys(rng, names, keys))
    if task == "variables":
        hops = rng.randrange(1, 7)
        while hops > 1 and 19 + 9 * hops > room:
            hops -= 1
        each = 8 + 5 * hops
        chains = _log_uniform(rng, 1, max(1, min(40, free // (hops + 1), (room - 11 - 4 * hops) // each)))
        return _variables(rng, names, chains, hops)
    if task == "walk":
        steps = _log_uniform(rng, 2, min(40, free, (room - 6) // (WALK_FACT_TOKENS + 9)))
        each = steps * WALK_FACT_TOKENS
        chains = _log_uniform(rng, 1, max(1, min(8, free // steps, (room - 6 - 9 * steps) // each)))
        return _walks(rng, names, chains, steps)
    if task == "registers":
        steps = _log_uniform(rng, 2, min(48, free, (room - 6) // (REGISTER_FACT_TOKENS + 11)))
        each = steps * REGISTER_FACT_TOKENS
        chains = _log_uniform(rng, 1, max(1, min(6, free // steps, (room - 6 - 11 * steps) // each)))
        return _register_chains(rng, names, chains, steps, rng.randrange(2, len(REGISTERS) + 1))
    length = _log_uniform(rng, 6, min(60, (room - 7) // 2))
    count = _log_uniform(rng, 1, max(1, min(10, (room - length - 6) // (length + 2))))
    return _notes(rng, count, length)


def training_document(
    rng: Random, length: int, mixture: Mapping[str, float] = TRAINING_MIXTURE
) -> TrainingDocument:
    """Facts of one task, or of two in a quarter of the documents, and 1 to 20 questions: at most `length` tokens."""
    tasks = rng.choices(list(mixture), list(mixture.values()), k=2 if rng.random() < 0.25 else 1)
    names = _names(rng)
    room = length - _HEADER_TOKENS
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
    room -= sum(_exchange_tokens(exchange) for exchange in chosen)
    rng.shuffle(candidates)
    for exchange in candidates[: rng.randrange(20)]:
        cost = _exchange_tokens(exchange)
        if cost <= room:
            room -= cost
            chosen.append(exchange)
    rng.shuffle(chosen)
    return TrainingDocument(context=_fill(rng, facts, room), exchanges=tuple(chosen))


def _exchange_tokens(exchange: Exchange) -> int:
    return _QUESTION_TOKENS + count_tokens(exchange.question) + count_tokens(exchange.answer)
