"""Documents are what they claim: repeatable, of the asked length, with the answer that their facts imply."""

import re
from random import Random

import pytest
from tokenizers import Tokenizer

from evalkit.train.tokenizer import train
from tasks import documents

CASES = [
    ("needle", {}),
    ("multi_key", {"keys": 40}),
    ("siblings", {"keys": 30}),
    ("variables", {"chains": 8, "hops": 4}),
    ("walk", {"steps": 32}),
    ("registers", {"registers": 8, "steps": 24}),
    ("registers", {"registers": 4, "steps": 32}),
]
LABELS = [" ".join([task, *(f"{k}={v}" for k, v in options.items())]) for task, options in CASES]
each_case = pytest.mark.parametrize(("task", "options"), CASES, ids=LABELS)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train()


def solve(prompt: str) -> str:
    """The answer, worked out anew from the prompt's text alone."""
    context, question = prompt.split("\nAnswer:")
    sentences = [sentence + "." for sentence in context.removeprefix("Facts:").split(".")]
    if question.startswith((" The", " Note")):
        (fact,) = [sentence for sentence in sentences if sentence.startswith(question + " ")]
        return fact.removeprefix(question)
    if question.startswith(" Let"):
        return _solve_variables(sentences, question)
    return _solve_trace(sentences, question)


def _solve_variables(sentences: list[str], question: str) -> str:
    values = dict(m.groups() for s in sentences if (m := re.fullmatch(r" Let (\w+) be (\w+)\.", s)))
    name = re.fullmatch(r" Let (\w+) be", question)[1]
    answer = ""
    while True:
        value = values[name]
        answer += f" {value}"
        if value.isdigit():
            return answer + "."
        name = value
        answer += f" Let {name} be"


def _solve_trace(sentences: list[str], question: str) -> str:
    steps = {}
    for sentence in sentences:
        if found := re.fullmatch(r" At (\w+) (.+) then (\w+)\.", sentence):
            assert found[1] not in steps
            steps[found[1]] = (found[2], found[3])
    node, registers, answer = question.removeprefix(" At "), {"": 0}, ""
    while node != "end":
        operation, after = steps[node]
        *register, verb, operand = operation.split()
        register = register[0] if register else ""
        if verb == "add":
            registers[register] = (registers[register] + int(operand)) % 100
        elif verb == "set":
            registers[register] = int(operand)
        else:
            assert verb == "take"
            registers[register] = registers[operand]
            operation += f" {registers[operand]:02d}"
        named = f"{register} " if register else ""
        answer += f" At {node} {operation} then {after} makes {named}{registers[register]:02d}"
        node = after
    return answer.removeprefix(question) + "."


@each_case
def test_the_target_is_what_the_facts_imply(task, options):
    for document in documents.generate(task, length=1024, count=12, seed=1, **options):
        assert solve(document.prompt) == document.target


@each_case
@pytest.mark.parametrize("length", [1024, 2048, 4096])
def test_prompts_fill_their_length_and_never_pass_it(tokenizer, task, options, length):
    for document in documents.generate(task, length=length, count=3, seed=2, **options):
        tokens = len(tokenizer.encode(document.prompt, add_special_tokens=False).ids)
        assert 0.95 * length <= tokens <= length
        assert tokens == documents.count_tokens(document.prompt)


@each_case
def test_prompt_and_target_join_where_tokens_do(tokenizer, task, options):
    document = documents.document(task, 1024, 3, 0, **options)
    apart = [
        token
        for text in (document.prompt, document.target)
        for token in tokenizer.encode(text, add_special_tokens=False).ids
    ]
    assert tokenizer.encode(document.prompt + document.target, add_special_tokens=False).ids == apart
    assert document.target.startswith(" ")
    assert document.target.find(".") == len(document.target) - 1


@each_case
def test_a_document_depends_on_its_seed_and_index_alone(task, options):
    few = documents.generate(task, length=1024, count=2, seed=4, **options)
    many = documents.generate(task, length=1024, count=5, seed=4, **options)
    assert many[:2] == few
    assert len({document.prompt for document in many}) == 5
    assert documents.generate(task, length=1024, count=2, seed=5, **options) != few


def test_a_trace_takes_every_step():
    document = documents.document("registers", 2048, 1, 1, registers=8, steps=24)
    assert document.target.count("makes") == 24
    assert documents.document("walk", 2048, 1, 1, steps=32).target.count("makes") == 32


def test_siblings_share_all_but_one_word():
    document = documents.document("siblings", 2048, 1, 1, keys=100)
    keys = [m.split() for m in re.findall(r" The code of (\w+ \w+ \w+) is", document.prompt.split("\n")[0])]
    assert len(keys) == 100
    for key in keys[:20]:
        assert any(sum(a != b for a, b in zip(key, other, strict=True)) == 1 for other in keys)


def test_training_documents_answer_their_questions_and_fit(tokenizer):
    rng = Random(6)
    for length, count in ((94, 400), (254, 200), (1022, 20), (2430, 10)):
        for _ in range(count):
            document = documents.training_document(rng, length)
            assert 1 <= len(document.exchanges) <= 21
            tokens = len(tokenizer.encode(document.text, add_special_tokens=False).ids)
            assert 0.9 * length <= tokens <= length
            for exchange in document.exchanges:
                assert solve(document.context + documents.QUESTION + exchange.question) == exchange.answer


def test_words_are_256_and_no_template_holds_one():
    assert len(set(documents.WORDS)) == len(documents.WORDS) == 256
    assert all(3 <= len(word) <= 6 for word in documents.WORDS)
    fixed = set(re.findall("[A-Za-z]+", " ".join(documents.TEMPLATES))) | set(documents.REGISTERS)
    assert not fixed & set(documents.WORDS)


@pytest.mark.parametrize(
    ("task", "length", "options", "message"),
    [
        ("neddle", 1024, {}, "unknown task 'neddle'; known: needle, "),
        ("walk", 1024, {"keys": 3}, "task 'walk' has no option 'keys'; its options: steps, chains"),
        ("needle", 1024, {"keys": 3}, "its options: none"),
        ("walk", 1024, {"steps": 0}, "steps must be a whole number from 1 to 120, not 0"),
        ("multi_key", 1024, {"keys": 180}, "does not fit into 1024 tokens: 246 too many"),
        ("walk", 4096, {"steps": 2.5}, "not 2.5"),
    ],
)
def test_what_cannot_be_made_is_refused(task, length, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        documents.document(task, length, 1, 0, **options)
