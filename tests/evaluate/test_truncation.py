import pytest

from evalkit.evaluate.lm import EvalkitLM


@pytest.fixture
def answer(grafted_model, tokenizer, ask):
    """The greedy text after one prompt, so that a stop string can be one that comes."""

    def generate(**options):
        lm = EvalkitLM(grafted_model, tokenizer=tokenizer)
        wanted = {"until": [], "do_sample": False, "max_gen_toks": 6, **options}
        (text,) = lm.generate_until(ask("generate_until", ("abcabcabc", wanted)))
        return text, lm.coverage[0]

    return generate


def test_an_answer_that_ends_at_its_length_limit_is_truncated(answer):
    text, covered = answer()
    assert text
    assert covered.truncated is True
    assert covered.scored_tokens == 6


def test_an_answer_that_ends_at_a_stop_string_is_not(answer):
    text, _ = answer()
    stopped, covered = answer(until=[text[2]])
    assert len(stopped) <= 2
    assert covered.truncated is False


def test_a_stop_at_the_last_allowed_token_is_a_stop(answer):
    text, _ = answer()
    first = text.index(text[0])
    _, covered = answer(until=[text[0]], max_gen_toks=first + 1)
    assert covered.truncated is False


def test_scored_continuations_are_not_generated_and_read_stored_rows(
    grafted_model, plain_model, tokenizer, ask
):
    for model, stored in ((grafted_model, True), (plain_model, False)):
        lm = EvalkitLM(model, tokenizer=tokenizer)
        lm.loglikelihood(ask("loglikelihood", ("abc", "de")))
        assert (lm.coverage[0].truncated, lm.coverage[0].stored) == (None, stored)
