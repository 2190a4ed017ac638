import dataclasses
from collections.abc import Sequence

import pytest

from evalkit.evaluate import transcripts
from evalkit.evaluate.answers import DEGENERATE, EMPTY, LIMITED, compare_answers
from evalkit.evaluate.transcripts import characters, transcript
from evalkit.records import (
    AnswerLengthRecord,
    AnswerShareRecord,
    FirstDifferenceRecord,
    SampleRecord,
    TaskRecord,
    only,
)
from tests.test_records import example

STOP = 99
BASE, CONTROL, CANDIDATE, PLANTED = (
    "bf16@reference",
    "bf16@reference, batches of 4",
    "fp8@reference",
    "planted",
)
PAIRS = [
    example(TaskRecord, candidate=BASE, baseline=CONTROL),
    example(TaskRecord, candidate=CANDIDATE, baseline=BASE),
]


def sample(candidate: str, document: int, ids: Sequence[int] | None, *, truncated: bool = False, text: str = "an answer") -> SampleRecord:  # fmt: skip
    return dataclasses.replace(
        example(SampleRecord),
        candidate=candidate,
        task="t",
        doc_id=document,
        generated_ids=None if ids is None else list(ids),
        generated_text=text,
        truncated=truncated,
    )


def found(samples: Sequence[SampleRecord], kind: type, candidate: str = CANDIDATE) -> list:
    return [r for r in only(list(compare_answers(PAIRS, samples)), kind) if r.candidate == candidate]


def test_measures_are_of_the_answer_without_its_stop():
    cycle = [*range(24), *[7] * 12]
    samples = [sample(BASE, n, [1, 2, STOP]) for n in range(4)]
    samples += [
        sample(CANDIDATE, 0, [*cycle, STOP]),  # the stop is no part of the cycle
        sample(CANDIDATE, 1, cycle, truncated=True),
        sample(CANDIDATE, 2, [STOP], text=" \n"),
        sample(CANDIDATE, 3, [1, 2, STOP]),
    ]
    counts = {r.measure: (r.count, r.share, r.baseline_count, r.n) for r in found(samples, AnswerShareRecord)}
    assert counts == {DEGENERATE: (2, 0.5, 0, 4), EMPTY: (1, 0.25, 0, 4), LIMITED: (1, 0.25, 0, 4)}


def test_shares_are_paired_and_a_candidate_that_mends_has_a_negative_difference():
    samples = [sample(BASE, n, [1, STOP], truncated=n < 3) for n in range(20)]
    samples += [sample(CANDIDATE, n, [1, STOP], truncated=n == 19) for n in range(20)]
    (limited,) = [r for r in found(samples, AnswerShareRecord) if r.measure == LIMITED]
    assert (limited.count, limited.baseline_count) == (1, 3)
    assert limited.difference == pytest.approx(-0.1)
    assert limited.difference_lower < -0.1 < limited.difference_upper
    assert limited.share_lower < 0.05 < limited.share_upper


def test_lengths_differ_by_document_and_have_an_interval_from_forty_on():
    def of(count: int) -> AnswerLengthRecord:
        samples = [sample(BASE, n, [1] * (5 + n % 7)) for n in range(count)]
        samples += [sample(CANDIDATE, n, [1] * (7 + n % 5)) for n in range(count)]
        (record,) = found(samples, AnswerLengthRecord)
        return record

    few, many = of(39), of(40)
    assert few.lower_tokens is None
    assert few.interval_method.startswith("none (39 documents, 40 are needed")
    assert many.difference_tokens == pytest.approx(many.mean_tokens - many.baseline_mean_tokens)
    assert many.lower_tokens < many.difference_tokens < many.upper_tokens
    assert many.mean_tokens == pytest.approx(sum(7 + n % 5 for n in range(40)) / 40)


def test_a_token_after_the_first_that_differs_is_not_at_risk():
    samples = [sample(BASE, n, [1, 2, 3, 4, STOP]) for n in range(3)]
    samples += [
        sample(CANDIDATE, 0, [1, 2, 3, 4, STOP]),  # 5 tokens at risk, no event
        sample(CANDIDATE, 1, [1, 9, 8, 7, STOP]),  # the second differs
        sample(CANDIDATE, 2, [1, 2, 3, STOP]),  # the fourth: one stops
    ]
    (record,) = found(samples, FirstDifferenceRecord)
    assert (record.differing, record.tokens_at_risk, record.n) == (2, 5 + 2 + 4, 3)
    assert record.per_1000_tokens == pytest.approx(1000 * 2 / 11)
    assert record.lower is None
    assert record.interval_method == "none (3 documents, 2 of them differ; 40 and 10 are needed)"


def test_answers_that_all_differ_at_once_have_a_rate_and_say_why_no_interval():
    samples = [sample(BASE, n, [1, 2, STOP]) for n in range(60)]
    samples += [sample(CANDIDATE, n, [9, 9, STOP]) for n in range(60)]
    (record,) = found(samples, FirstDifferenceRecord)
    assert record.per_1000_tokens == 1000
    assert record.lower is None
    assert record.interval_method == "none (60 documents, all alike)"


def test_every_arm_is_held_against_its_own_baseline():
    samples = [sample(arm, 0, [1, STOP]) for arm in (BASE, CONTROL, CANDIDATE, PLANTED)]
    lengths = only(list(compare_answers(PAIRS, samples)), AnswerLengthRecord)
    assert {r.candidate: r.baseline for r in lengths} == {BASE: CONTROL, CANDIDATE: BASE, PLANTED: BASE}


def test_what_generated_nothing_is_left_out():
    samples = [sample(arm, 0, None) for arm in (BASE, CONTROL, CANDIDATE)]
    assert list(compare_answers(PAIRS, samples)) == []


def test_a_document_with_two_metrics_counts_once():
    samples = [sample(arm, 0, [1, STOP]) for arm in (BASE, CANDIDATE)]
    samples += [dataclasses.replace(one, metric="another") for one in samples]
    (record,) = found(samples, AnswerLengthRecord)
    assert record.n == 1


# Transcripts


def test_characters_add_up_to_the_text(tokenizer):
    ids = tokenizer("some text, é and \n more of it")["input_ids"] + [tokenizer.eos_token_id]
    assert sum(characters(ids, tokenizer)) == len(tokenizer.decode(ids, skip_special_tokens=True))


def test_a_character_of_several_tokens_belongs_to_the_one_that_ends_it():
    from transformers import AutoTokenizer

    from evalkit.model.checkpoint import EMBEDDED

    real = AutoTokenizer.from_pretrained(EMBEDDED / "dsa-nano")
    for text in ("a\U0001f600b", "naïve r12 = 40; " * 12 + "\U0001f600", "日本語 text"):
        ids = real(text)["input_ids"]
        added = characters(ids, real)
        whole = real.decode(ids, skip_special_tokens=True)
        assert sum(added) == len(whole)
        assert added == transcripts._characters_in_context(ids, real)
        place = 0
        for stop, count in enumerate(added, 1):
            place += count
            assert place == len(real.decode(ids[:stop], skip_special_tokens=True).rstrip("\ufffd"))
    assert characters(real("\U0001f600", add_special_tokens=False)["input_ids"], real)[-2:] == [0, 1]


def test_a_transcript_holds_what_was_asked_and_said(tokenizer):
    ids = tokenizer("42.")["input_ids"]
    row = {"arguments": [("x" * 500 + "the end", {"until": ["."]})], "resps": [["42"]], "target": "41"}
    kept = transcript(row, ids, tokenizer)
    assert kept["generated_text"] == "42"
    assert kept["generated_ids"] == ids
    assert kept["generated_chars"] == [1, 1, 1]
    assert kept["target"] == "41"
    assert kept["prompt_end"].endswith("xthe end")
    assert len(kept["prompt_end"]) == 240
    assert set(transcript(row, None, tokenizer).values()) == {None}
