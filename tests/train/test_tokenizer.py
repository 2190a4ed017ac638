"""Any text survives the tokenizer, and every word of the documents is one entry."""

from pathlib import Path
from random import Random

import pytest

import evalkit.train
from evalkit.train import tokenizer
from tasks import documents

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis makes the texts: pip install -e .[dev]")
given, settings, st = hypothesis.given, hypothesis.settings, hypothesis.strategies

TOKENIZER = tokenizer.train()
EMBEDDED = Path(evalkit.train.__file__).parent.parent / "checkpoints" / "dsa-nano"


def ids(text):
    return TOKENIZER.encode(text, add_special_tokens=False).ids


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back(text):
    assert TOKENIZER.decode(ids(text), skip_special_tokens=False) == text


def test_it_has_1024_entries():
    assert TOKENIZER.get_vocab_size() == tokenizer.VOCAB_SIZE == 1024


def test_every_word_is_one_token_with_its_space():
    words = (*documents.WORDS, *documents.REGISTERS, *tokenizer.TEMPLATE_WORDS)
    assert {word: len(ids(f" {word}")) for word in words} == dict.fromkeys(words, 1)


def test_a_number_is_cut_into_pairs_of_digits():
    assert [TOKENIZER.decode([i]) for i in ids(" 47 29 3.")] == [" 47", " 29", " 3", "."]


def test_it_is_the_one_in_the_checkpoint(tmp_path):
    tokenizer.save(TOKENIZER, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (EMBEDDED / name).read_text() == (tmp_path / name).read_text()


def test_transformers_loads_it():
    transformers = pytest.importorskip("transformers")
    loaded = transformers.AutoTokenizer.from_pretrained(EMBEDDED)
    text = "Grüße, 世界 😀\n\tThe code of river is 47 29 13."
    assert loaded.decode(loaded(text, add_special_tokens=False).input_ids) == text
    assert loaded(" river").input_ids == [TOKENIZER.token_to_id("<|bos|>"), *ids(" river")]
    assert (loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id) == (0, 1, 2)


@pytest.mark.parametrize("length", [250, 1000, 4000])
def test_the_encoder_says_what_the_tokenizer_says(length):
    encoder = tokenizer.Encoder(TOKENIZER)
    rng = Random(f"encoder {length}")
    for _ in range(20):
        text = documents.training_document(rng, length).text
        assert encoder(text) == ids(text)


def test_the_encoder_refuses_what_is_no_word_of_the_documents():
    with pytest.raises(ValueError, match=r"'zyzzyva' is \d tokens"):
        tokenizer.Encoder(TOKENIZER)("zyzzyva")
