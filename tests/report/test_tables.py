import math
from dataclasses import replace

import pytest

from evalkit.records import (
    CandidateRecord,
    EnvironmentRecord,
    LayerRecord,
    RunDirectory,
    TaskRecord,
    TokenRecord,
    only,
)
from evalkit.report import tables
from tests.report.conftest import CANDIDATES, layer_record


def test_the_bf16_control_is_the_first_row_though_recorded_last(run: RunDirectory):
    rows = tables.candidates(run.read()).rows
    assert [row[0] for row in rows] == ["bf16@reference", *CANDIDATES[:3]]


def test_a_candidates_row_holds_its_own_numbers(run: RunDirectory):
    records = run.read()
    shown = {row[0]: row for row in tables.candidates(records).rows}
    for candidate in CANDIDATES:
        worst = max(
            (r.relative_l2 or 0.0, r.layer)
            for r in only(records, LayerRecord)
            if (r.candidate, r.phase, r.mode, r.probe, r.rung)
            == (candidate, "decode", "propagated", "attention", "total")
        )
        assert shown[candidate][3] == (f"{tables.number(worst[0])} (layer {worst[1]})" if worst[0] else "0")
        loss = next(r for r in only(records, TaskRecord) if (r.candidate, r.task) == (candidate, "registers"))
        assert (
            shown[candidate][-1]
            == f"{100 * loss.loss:+.1f} [{100 * loss.loss_lower:+.1f}, {100 * loss.loss_upper:+.1f}]"
        )


def test_the_layer_table_holds_every_layer_of_every_candidate(run: RunDirectory):
    table = tables.layers(run.read())
    assert [row[0] for row in table.rows] == ["0", "1", "2", "3"]
    value = next(
        r.relative_l2
        for r in only(run.read(), LayerRecord)
        if (r.candidate, r.layer, r.phase, r.mode, r.probe, r.rung)
        == ("fp8_ds_mla@flashmla", 2, "decode", "isolated", "attention", "total")
    )
    assert table.rows[2][table.columns.index("fp8_ds_mla@flashmla")] == tables.number(value)


def test_rungs_stand_beside_the_floor_of_their_layer(run: RunDirectory):
    table = tables.rungs(run.read())
    assert table.columns[5:9] == ("format", "kernel", "total", "floor:other-kernel")
    floors = {
        (r.phase, str(r.layer)): tables.number(r.relative_l2)
        for r in only(run.read(), LayerRecord)
        if r.rung == "floor:other-kernel"
    }
    assert len(table.rows) == 32
    for row in table.rows:
        assert row[8] == floors[row[1], row[4]]


def test_every_record_has_its_row(run: RunDirectory):
    records = run.read()
    assert len(tables.probes(records).rows) == sum(r.rung == "total" for r in only(records, LayerRecord))
    assert len(tables.selection(records).rows) == 4 * 4 * 2
    assert len(tables.ranges(records).rows) == 4 * 4 * 2
    assert len(tables.tasks(records).rows) == 8
    assert len(tables.scoring(records).rows) == 8
    assert len(tables.tokens(records).rows) == 4
    assert len(tables.provenance(records).rows) == 4


@pytest.mark.parametrize(
    "make",
    [
        tables.candidates, tables.provenance, tables.layers, tables.probes, tables.rungs, tables.selection, tables.ranges,
        tables.tokens, tables.tasks, tables.scoring, tables.environment,
    ],
)  # fmt: skip
def test_rows_are_as_wide_as_their_heading(make, run: RunDirectory):
    table = make(run.read())
    assert table.rows
    assert {len(row) for row in table.rows} == {len(table.columns)}
    assert make([]).rows == ()


def test_packages_of_versions_that_were_not_tested_are_named_where_there_are_any(run: RunDirectory):
    (record,) = only(run.read(), EnvironmentRecord)
    line = "torch 2.16.0 is newer than 2.14, the newest tested"
    for untested, rows in ((None, []), ([], []), ([line], [("packages untested", line)])):
        found = tables.environment([replace(record, untested=untested)]).rows
        assert [row for row in found if row[0] == "packages untested"] == rows


def test_a_number_that_does_not_exist_reads_na(run: RunDirectory):
    candidate = replace(only(run.read(), CandidateRecord)[0], bytes_per_token_read_back=None)
    assert tables.provenance([candidate]).rows[0][-1] == "n/a"
    assert tables.candidates([candidate]).rows[0][2:] == ("n/a", "n/a", "n/a")
    task = replace(only(run.read(), TaskRecord)[0], loss_lower=None, loss_upper=None, score_lower=None)
    assert tables.tasks([task]).rows[0][4].endswith("[n/a]")
    assert tables.tasks([task]).rows[0][3].endswith("[n/a]")


def test_a_decode_step_stands_beside_the_bytes_where_one_was_timed(run: RunDirectory):
    """That of the task with most steps timed; how tasks were scored has each."""
    records = run.read()
    assert "decode step, ms" not in tables.candidates(records).columns
    assert {row[-4:-1] for row in tables.scoring(records).rows} == {("n/a", "n/a", "n/a")}
    timed = [
        replace(r, decode_step_ms=12.345, decode_step_lower_ms=None if r.task == "needle" else 11.0,
                decode_step_upper_ms=None if r.task == "needle" else 14.0, decode_sequences=8, decode_columns=700.0,
                decode_steps=2000 if r.task == "registers" else 3, decode_graph=r.task == "registers")
        if isinstance(r, TaskRecord) and r.candidate == CANDIDATES[2]
        else r
        for r in records
    ]  # fmt: skip
    table = tables.candidates(timed)
    assert table.columns[:3] == ("candidate", "bytes/token", "decode step, ms")
    steps = {row[0]: row[2] for row in table.rows}
    assert steps == {name: "12.3 [11, 14]" if name == CANDIDATES[2] else "n/a" for name in CANDIDATES}
    assert "decode step" in table.caption
    scoring = {row[:2]: row[-4:-1] for row in tables.scoring(timed).rows}
    assert scoring["registers", CANDIDATES[2]] == ("12.3 [11, 14]", "8", "2,000 (graph)")
    assert scoring["needle", CANDIDATES[2]] == ("12.3 [n/a]", "8", "3")
    assert {len(row) for row in table.rows} == {len(table.columns)}


def test_decode_steps_of_all_candidates_are_of_one_task(run: RunDirectory):
    """Answers differ in length: each candidate's own longest task would compare steps of different contexts."""
    steps = dict(zip(CANDIDATES, (100, 80, 90, 40), strict=True))
    timed = [
        replace(r, decode_step_ms=2.0 if r.task == "registers" else 1.0,
                decode_steps=60 if r.task == "registers" else steps[r.candidate])
        if isinstance(r, TaskRecord)
        else r
        for r in run.read()
    ]  # fmt: skip
    table = tables.candidates(timed)
    assert {row[0]: row[2] for row in table.rows} == dict.fromkeys(CANDIDATES, "1 [n/a]")
    assert "decode step, with its interval, on needle" in table.caption


def test_the_headline_divergence_is_of_the_free_running_model_over_the_most_tokens(run: RunDirectory):
    free = only(run.read(), TokenRecord)[0]
    others = [
        replace(free, frozen="selection+routing", kl_mean_nats=7.0, n=9000),
        replace(free, phase="decode", kl_mean_nats=8.0, n=32),
    ]
    candidate = only(run.read(), CandidateRecord)[0]
    assert (
        tables.candidates([candidate, *others, free]).rows[0][4]
        == f"{tables.number(free.kl_mean_nats)} (512)"
    )


def test_non_finite_values_are_shown_and_not_outshone_by_finite_ones():
    layers = [layer_record("fp8", 0, 0.5), layer_record("fp8", 1, None, nonfinite=3)]
    assert tables.worst_layer(layers, "fp8", "isolated") == "non-finite (layer 1)"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "n/a"),
        (0.0, "0"),
        (0.03125, "0.0312"),
        (1234.5, "1.23e+03"),
        (2e-5, "2.00e-05"),
        (-3e38, "-3.00e+38"),
        (1.0, "1"),
    ],
)
def test_numbers_keep_three_digits(value: float | None, text: str):
    assert tables.number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "n/a"),
        (0.0, "0.0%"),
        (1.0, "100.0%"),
        (0.5, "50.0%"),
        (1e-5, "1.00e-05"),
        (1 - 1e-5, "99.9990%"),
    ],
)
def test_a_share_that_is_not_quite_none_or_all_does_not_read_so(value: float | None, text: str):
    assert tables.share(value) == text


def test_numbers_read_back_within_half_a_digit():
    for exponent in range(-12, 12):
        value = 1.23456 * 10.0**exponent
        assert math.isclose(float(tables.number(value)), value, rel_tol=5e-3)
