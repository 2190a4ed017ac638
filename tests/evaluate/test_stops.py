import random

import pytest
from transformers import AutoTokenizer

from evalkit.evaluate.engines.stops import SILENT_TOKENS, Stops
from evalkit.model.checkpoint import resolve_checkpoint

UNTIL = [["."], ["Answer:", "\n\n"], ["é"], ["the code "], ["日本"], []]


@pytest.fixture(scope="module")
def nano():
    return AutoTokenizer.from_pretrained(resolve_checkpoint("dsa-nano"))


def plainly(tokenizer, stop_ids, until, ids):
    """The end by its definition: decode at every token."""
    window = max((len(stop.encode()) for stop in until), default=0) + SILENT_TOKENS
    for place, token in enumerate(ids):
        tail = tokenizer.decode(ids[max(0, place + 1 - window) : place + 1])
        if token in stop_ids or any(stop in tail for stop in until):
            return place
    return None


@pytest.mark.parametrize("until", UNTIL, ids=str)
def test_an_answer_ends_where_decoding_every_token_says(nano, tokenizer, until):
    rng = random.Random(0)
    texts = ["the code of é is 日本.", "Answer:\n\n", " the code ", "no stop at all", "ééé", "日日本"]
    ended = 0
    for model in (nano, tokenizer):
        for _ in range(60):
            ids = [rng.randrange(3, len(model)) for _ in range(12)]
            for text in rng.sample(texts, 2):
                place = rng.randrange(len(ids))
                ids[place:place] = model(text, add_special_tokens=False)["input_ids"]
            want = plainly(model, [2], until, ids)
            ended += want is not None
            assert Stops(model, [2], until).end(ids) == want
    assert ended or not until


def test_only_new_tokens_are_looked_at(nano):
    ids = nano("one. two. three", add_special_tokens=False)["input_ids"]
    stops = Stops(nano, [2], ["."])
    first = stops.end(ids)
    assert nano.decode(ids[: first + 1]) == "one."
    assert nano.decode(ids[: stops.end(ids, first + 1) + 1]) == "one. two."


def test_an_end_of_text_token_ends_an_answer_without_a_stop_string(nano):
    assert Stops(nano, [7], []).end([5, 6, 7, 8]) == 2
    assert Stops(nano, [7], []).end([5, 6]) is None


class Pieces:
    """Words that carry the space before them, which is dropped at the beginning of a text, as in sentencepiece."""

    words = ("a", " b", " c", "</s>")

    def decode(self, ids):
        return "".join(self.words[i] for i in ids).lstrip(" ")


@pytest.mark.parametrize("stop", ["a ", " b", "b c", "b "])
def test_a_stop_string_that_ends_in_a_space_is_found_where_no_token_alone_prints_it(stop):
    ids = [0, 1, 2, 0]
    want = plainly(Pieces(), [3], [stop], ids)
    assert want is not None
    assert Stops(Pieces(), [3], [stop]).end(ids) == want


def test_hardly_any_text_is_decoded(nano):
    """Decoding at every token of every answer took longer than generating them."""
    ids = nano("At river add 4 then stone makes 42 " * 20, add_special_tokens=False)["input_ids"]
    decoded = []

    class Counting:
        def decode(self, some):
            decoded.append(len(some))
            return nano.decode(some)

    stops = Stops(Counting(), [2], ["."])
    assert stops.end(ids) is None
    assert len(decoded) == len(set(ids))
    assert stops.end(ids) is None
    assert len(decoded) == len(set(ids))


def test_an_answer_ends_with_the_token_that_completes_a_stop_string(nano):
    ids = nano("one. two", add_special_tokens=False)["input_ids"]
    end = Stops(nano, [2], ["."]).end(ids)
    assert nano.decode(ids[: end + 1]) == "one."
    assert Stops(nano, [2], ["."]).end(ids[: end + 1]) == end
    assert Stops(nano, [2], ["."]).end(ids[:end]) is None
    assert Stops(nano, [2], ["?"]).end(ids) is None
