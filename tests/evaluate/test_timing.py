"""What a decode step took: which calls count, what is said of them, and where it is recorded."""

import json
import time
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lm_eval.api.registry import get_model
from scipy import stats

import evalkit
from evalkit.attention.backends.reference import Reference
from evalkit.attention.paged_layer import BLOCK
from evalkit.evaluate.engines import decoding, timing
from evalkit.evaluate.engines.base import Label, Prompt, Span
from evalkit.evaluate.engines.decoding import TIMED_CALLS, Decoder
from evalkit.evaluate.engines.native import NativeEngine
from evalkit.evaluate.engines.timing import Call, HostClock, StreamClock, step_time
from evalkit.evaluate.lm import EvalkitLM
from evalkit.evaluate.tasks import load_tasks, run_tasks, task_records
from evalkit.schema import from_values, to_line


def asked(count, max_new, tokens=20):
    return [
        Prompt(label=Label("t", i), ids=[3 + (i * 7 + j * j) % 90 for j in range(tokens)], max_new=max_new)
        for i in range(count)
    ]


def call(seconds, steps=1, **changes):
    return Call(**({"seconds": seconds, "steps": steps, "sequences": 4, "columns": 64, "graph": False} | changes))  # fmt: skip


# The account


@pytest.fixture
def clock(monkeypatch):
    """Every mark is a second later than the one before, and a step of a decoder takes a hundred."""
    now = {"s": 0.0}

    def mark(self):
        now["s"] += 1.0
        return now["s"]

    def stepped(what):
        def wrapped(self, *given):
            now["s"] += 100.0
            return what(self, *given)

        return wrapped

    monkeypatch.setattr(HostClock, "mark", mark)
    monkeypatch.setattr(Decoder, "_step", stepped(Decoder._step))
    fill = Decoder.fill
    monkeypatch.setattr(Decoder, "fill", lambda *given: (now.update(s=now["s"] + 1e6), fill(*given))[1])
    return now


def test_every_call_but_the_first_is_timed_and_no_prompt_is(grafted_model, tokenizer, clock):
    """Prompts take a million seconds each time, also those that are filled between steps."""
    engine = NativeEngine(grafted_model, tokenizer=tokenizer, batch_size=3)
    assert len(dict(engine.generate(asked(7, max_new=6)))) == 7
    assert clock["s"] > 3e6
    assert len(engine.timed) == 14, "three waves of five steps, less the first call"
    columns = min(26, BLOCK)
    assert set(engine.timed) == {call(101.0, sequences=3, columns=columns)}


def test_a_call_of_many_steps_counts_them(grafted_model, tokenizer, clock, monkeypatch):
    monkeypatch.setitem(decoding.STEPS_AT_ONCE, "cpu", 4)
    engine = NativeEngine(grafted_model, tokenizer=tokenizer, batch_size=2)
    list(engine.generate(asked(2, max_new=12)))
    assert [(one.seconds, one.steps) for one in engine.timed[:2]] == [(401.0, 4), (301.0, 3)]


def test_a_call_of_no_step_is_no_call(grafted_model, tokenizer, clock):
    """What follows one token only is read from the pass over the prompt; others have gone on before."""
    engine = NativeEngine(grafted_model, tokenizer=tokenizer, batch_size=2)
    requests = [*asked(2, max_new=12, tokens=40), *asked(2, max_new=1)]
    assert [len(one.ids) for _, one in sorted(dict(engine.generate(requests)).items())] == [12, 12, 1, 1]
    assert [(one.seconds, one.steps) for one in engine.timed] == [(101.0, 1)] * TIMED_CALLS


def test_short_answers_are_followed_by_steps_that_nobody_reads(grafted_model, tokenizer, clock):
    long = dict(NativeEngine(grafted_model, tokenizer=tokenizer, batch_size=2).generate(asked(2, max_new=20)))
    for most in (1, 2, 3):
        engine = NativeEngine(grafted_model, tokenizer=tokenizer, batch_size=2)
        answers = dict(engine.generate(asked(2, max_new=most)))
        assert [answers[i].ids for i in (0, 1)] == [long[i].ids[:most] for i in (0, 1)]
        assert [(one.seconds, one.steps) for one in engine.timed] == [(101.0, 1)] * TIMED_CALLS


@pytest.mark.parametrize("long", [True, False])
def test_recorded_steps_are_timed_once_their_recording_is_made(grafted_model, tokenizer, clock, monkeypatch, long):  # fmt: skip
    """Without a GPU a replay is the step itself; a recording is made with the fifth step here."""
    monkeypatch.setattr(Reference, "steady", lambda self, full: self)
    monkeypatch.setitem(decoding.STEPS_AT_ONCE, "cuda", 4)
    monkeypatch.setitem(decoding.STEPS_AT_ONCE, "cpu", 4)
    begin, made = Decoder.__init__, []

    def begun(self, *given):
        begin(self, *given)
        self._records = True

    def record(self):
        made.append(clock["s"])
        return SimpleNamespace(replay=lambda: self._step(self._ragged.columns))

    monkeypatch.setattr(Decoder, "__init__", begun)
    monkeypatch.setattr(Decoder, "_record", record)
    engine = NativeEngine(grafted_model, tokenizer=tokenizer, batch_size=2)
    requests = asked(2, max_new=80 if long else 4)
    answers = dict(engine.generate(requests))
    assert {len(one.ids) for one in answers.values()} == {80 if long else 4}
    assert len(made) == 1
    # Of 79 steps in fours, the first call precedes a recording, the second makes it, and the last has three.
    assert len(engine.timed) == (18 if long else TIMED_CALLS)
    whole = call(401.0, 4, sequences=2, columns=20 + requests[0].max_new, graph=True)
    assert set(engine.timed) == ({whole, replace(whole, steps=3, seconds=301.0)} if long else {whole})


def test_steps_that_cannot_be_recorded_are_timed_one_by_one(grafted_model, tokenizer, clock, monkeypatch):
    """On a GPU each of them takes as long as several recorded ones, and nobody reads what they give."""
    monkeypatch.setitem(decoding.STEPS_AT_ONCE, "cuda", 4)
    monkeypatch.setitem(decoding.STEPS_AT_ONCE, "cpu", 4)
    begin, taken = Decoder.__init__, []

    def begun(self, *given):
        begin(self, *given)
        self._records = True

    monkeypatch.setattr(Decoder, "__init__", begun)
    monkeypatch.setattr(Decoder, "_step", lambda self, visible: taken.append(visible))
    engine = NativeEngine(grafted_model, tokenizer=tokenizer, batch_size=2)
    assert len(dict(engine.generate(asked(2, max_new=2)))) == 2
    assert [one.steps for one in engine.timed] == [1] * TIMED_CALLS
    assert len(taken) == 4 + TIMED_CALLS, "those that warm up, and those that are timed"


def test_plain_transformers_and_scoring_tell_no_time(plain_model, grafted_model, tokenizer):
    plain = NativeEngine(plain_model, tokenizer=tokenizer, batch_size=2)
    assert len(dict(plain.generate(asked(2, max_new=3)))) == 2
    scoring = NativeEngine(grafted_model, tokenizer=tokenizer, batch_size=2)
    list(scoring.score([Span(label=Label("t", 0), context=[5, 6, 7], continuation=[8, 9])]))
    assert plain.timed == scoring.timed == []


# The figure


def test_the_interval_is_students_over_calls():
    seconds = [0.011, 0.012, 0.0105, 0.013, 0.0115, 0.012, 0.0125, 0.0118, 0.0122]
    found = step_time([call(one) for one in seconds])
    mean = np.mean(seconds)
    low, high = stats.t.interval(0.95, len(seconds) - 1, loc=0, scale=stats.sem(seconds) / mean)
    assert found.ms == pytest.approx(1e3 * mean)
    assert (found.lower_ms, found.upper_ms) == pytest.approx((1e3 * mean * np.exp(low), 1e3 * mean * np.exp(high)))  # fmt: skip
    assert (found.steps, found.sequences, found.columns, found.graph) == (9, 4, 64, False)


def test_calls_weigh_by_their_steps():
    found = step_time([call(1.6, 16, columns=64), call(0.3, 1, columns=128)])
    assert found.ms == pytest.approx(1e3 * 1.9 / 17)
    assert found.columns == pytest.approx((16 * 64 + 128) / 17)
    assert found.steps == 17


def test_the_interval_of_many_calls_is_over_runs_of_them():
    """A machine that was busy for half of the time is no certainty about the other half."""
    seconds = [0.01 + 0.0001 * (i % 3) for i in range(100)] + [0.02 + 0.0001 * (i % 3) for i in range(100)]
    found = step_time([call(one) for one in seconds])
    runs = np.array_split(np.array(seconds), timing.RUNS)
    means = [run.mean() for run in runs]
    low, high = stats.t.interval(0.95, timing.RUNS - 1, loc=0, scale=stats.sem(means) / np.mean(means))
    assert (found.lower_ms, found.upper_ms) == pytest.approx((found.ms * np.exp(low), found.ms * np.exp(high)))  # fmt: skip
    assert found.steps == 200


@pytest.mark.parametrize("calls", [1, 7])
def test_few_calls_have_a_mean_and_no_interval(calls):
    found = step_time([call(0.01 * (1 + i)) for i in range(calls)])
    assert found.ms == pytest.approx(10 * (calls + 1) / 2)
    assert (found.lower_ms, found.upper_ms) == (None, None)


def test_no_call_is_no_time():
    assert step_time([]) is None


def test_steps_that_were_recorded_and_steps_that_were_not_are_not_averaged():
    eager, graph = [call(0.5, 16)] * 3, [call(0.032, 16, columns=640, graph=True)] * 9
    for calls in (eager + graph, graph + eager):
        found = step_time(calls)
        assert (found.ms, found.columns, found.steps, found.graph) == (pytest.approx(2.0), 640, 144, True)
    found = step_time(graph[:2] + eager)
    assert (found.ms, found.steps, found.graph) == (pytest.approx(31.25), 48, False)


def test_steps_of_other_shapes_have_no_common_time():
    with pytest.raises(ValueError, match=r"advance \[2, 4\] sequences"):
        step_time([call(0.1), call(0.1, sequences=2)])


# The record


class Telling(get_model("dummy")):
    """Answers nothing, and says that every call of its second task took a second, of its third two, and so on."""

    def __init__(self, engine):
        super().__init__()
        self.engine, self.asked = engine, 0

    def generate_until(self, requests, disable_tqdm=False):
        if hasattr(self.engine, "timed"):
            self.engine.timed += [call(float(self.asked))] * (9 if self.asked else 0)
        self.asked += 1
        return [""] * len(requests)


def records(run):
    return list(
        task_records("b", "a", run.samples, run.samples, wall_s=1.0, mean_context_tokens=None, share_over_topk=None,
                     share_stored_rows=None, step=run.step)
    )  # fmt: skip


def test_each_task_has_the_steps_of_its_own_answers():
    lm = Telling(SimpleNamespace(timed=[call(7.0)]))
    none, first, second = run_tasks(
        lm, ["evalkit_needle_1024", "evalkit_walk_1024", "evalkit_variables_1024"], 2, 0, candidate="a"
    )
    assert none.step is None
    assert (first.step.ms, second.step.ms) == (1000.0, 2000.0)
    (record,) = records(second)
    assert (record.decode_step_ms, record.decode_sequences, record.decode_columns) == (2000.0, 4, 64.0)
    assert (record.decode_steps, record.decode_graph) == (9, False)
    assert record.decode_step_lower_ms == second.step.lower_ms is not None
    assert record.decode_step_upper_ms == second.step.upper_ms is not None


def test_an_engine_that_tells_no_time_has_none():
    for engine in (None, SimpleNamespace()):
        (run,) = run_tasks(Telling(engine), ["evalkit_needle_1024"], 2, 0, candidate="a")
        (record,) = records(run)
        assert {value for name, value in asdict(record).items() if name.startswith("decode_")} == {None}


def test_a_run_of_the_real_model_times_what_generates_and_not_what_scores():
    lm = EvalkitLM("dsa-nano", "fp8_ds_mla@reference", device="cpu", batch_size=2)
    generated, scored = run_tasks(
        lm, ["evalkit_multi_key_384", "evalkit_registers_forced"], 2, 0, candidate="a"
    )
    (record,) = records(generated)
    answer = max(one.scored_tokens for one in generated.coverage)
    assert answer < TIMED_CALLS
    assert record.decode_steps == TIMED_CALLS
    assert record.decode_sequences == 2
    assert record.decode_graph is False
    assert record.decode_step_ms > 0
    assert scored.step is None
    assert all(one.decode_step_ms is None and one.decode_steps is None for one in records(scored))


def test_steps_that_nobody_reads_are_no_part_of_what_a_task_takes(monkeypatch):
    """`evalkit plan` makes hours of it."""
    further, pause = Decoder.time_on, 4.0
    monkeypatch.setattr(Decoder, "time_on", lambda self: (time.sleep(pause), further(self)))
    lm = EvalkitLM("dsa-nano", "fp8_ds_mla@reference", device="cpu", batch_size=2)
    asked_of_it = (["evalkit_multi_key_384"], 2, 0)
    load_tasks(tuple(asked_of_it[0]), *asked_of_it[1:])
    began = time.perf_counter()
    (run,) = run_tasks(lm, *asked_of_it, candidate="a")
    assert run.step.steps == TIMED_CALLS
    assert 0 < run.wall_s < time.perf_counter() - began - pause


def test_a_line_written_before_decode_times_were_still_reads():
    (run,) = run_tasks(Telling(None), ["evalkit_needle_1024"], 2, 0, candidate="a")
    (record,) = records(run)
    values = json.loads(to_line(record))
    old = {name: value for name, value in values.items() if not name.startswith("decode_")}
    assert len(values) - len(old) == 7
    assert from_values(old, "a line") == record
    timed = replace(record, decode_step_ms=1.5, decode_steps=3)
    assert from_values(json.loads(to_line(timed)), "a line") == timed


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("candidate", ["bf16@flashinfer", "fp8_e4m3:one@flashinfer", "fp8_ds_mla@flashmla"])
def test_short_answers_are_timed_in_replayed_steps_of_one_shape(candidate):
    model = evalkit.load("dsa-nano", device="cuda")
    requests = asked(6, max_new=4, tokens=model.config.index_topk + 60)
    engine = NativeEngine(model, candidate, batch_size=4)
    assert {len(one.ids) for one in dict(engine.generate(requests)).values()} <= {1, 2, 3, 4}
    assert len(engine.timed) == TIMED_CALLS
    assert {(one.steps, one.sequences, one.graph) for one in engine.timed} == {(16, 4, True)}
    found = step_time(engine.timed)
    assert 0 < found.lower_ms <= found.ms <= found.upper_ms


@pytest.mark.gpu
def test_what_was_queued_before_a_call_is_not_in_its_time():
    """The device sleeps for about a second before the first mark, which does not wait for it."""
    device = torch.device("cuda")
    watch, x = StreamClock(device), torch.ones(8, device=device)
    (x + 1).tolist()
    before = watch.mark()
    torch.cuda._sleep(2_000_000_000)
    start = watch.mark()
    assert not start.query(), "a mark returns before the device reaches it"
    y = x + 1
    end = watch.mark()
    y.tolist()
    slept, took = watch.seconds(before, start), watch.seconds(start, end)
    assert 0 < took < slept / 10
