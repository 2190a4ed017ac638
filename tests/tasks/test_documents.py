"""Documents are what they claim: repeatable, of the asked length, with the answer that their facts imply."""

import re
from random import Random

import pytest
from tokenizers import Tokenizer

from evalkit.train.tokenizer import Encoder, train
from tasks import documents
from tests.tasks.solver import solve

CASES = [
    ("needle", {}),
    ("multi_key", {"keys": 40}),
    ("siblings", {"keys": 30}),
    ("variables", {"chains": 8, "hops": 4}),
    ("walk", {"steps": 32}),
    ("registers", {"registers": 8, "steps": 24}),
    ("registers", {"registers": 4, "steps": 32}),
    ("second_turn", {"keys": 30}),
    ("multi_query", {"keys": 30, "queries": 5}),
    ("multi_value", {"keys": 6, "values": 5}),
    ("word_count", {"words": 10, "most": 12}),
]
LABELS = [" ".join([task, *(f"{k}={v}" for k, v in options.items())]) for task, options in CASES]
each_case = pytest.mark.parametrize(("task", "options"), CASES, ids=LABELS)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train()


@each_case
def test_the_target_is_what_the_facts_imply(task, options):
    for document in documents.generate(task, length=1024, count=12, seed=1, **options):
        assert solve(document.prompt) == document.target


@pytest.mark.parametrize(
    ("task", "turns"),
    [("needle", 1), ("second_turn", 2), ("multi_query", 4), ("multi_value", 2), ("word_count", 3)],
)
def test_earlier_questions_stand_in_the_prompt_with_their_right_answers(task, turns):
    for document in documents.generate(task, length=1024, count=6, seed=1):
        assert len(document.queries) == turns
        assert document.prompt.count("\nAnswer:") == turns
        for prompt, target in document.queries:
            assert solve(prompt) == target
            assert (prompt + target)[: len(document.prompt)] in document.prompt + document.target
        assert len({e.question for e in document.exchanges}) == turns


def test_a_keys_values_are_told_in_the_documents_order():
    document = documents.document("multi_value", 1024, 1, 0, keys=5, values=4)
    key = document.exchanges[-1].question
    places = [document.context.index(f"{key} {value}.") for value in document.target[1:-1].split(" then ")]
    assert places == sorted(places)
    assert len(places) == 4
    assert "?" not in document.prompt


def test_every_word_of_a_document_is_one_of_the_tokenizers():
    encoder = Encoder(train())
    for task, options in CASES:
        encoder("".join(documents.document(task, 1024, 9, 0, **options).queries[-1]))


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
        ("multi_query", 1024, {"keys": 3}, "4 different keys are asked for, keys is 3"),
        ("multi_value", 1024, {"keys": 1}, "another is asked; keys is 1"),
        ("word_count", 1024, {"words": 2}, "a third is asked; words is 2"),
        ("word_count", 384, {"words": 40, "most": 20}, "does not fit into 384 tokens"),
    ],
)
def test_what_cannot_be_made_is_refused(task, length, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        documents.document(task, length, 1, 0, **options)
