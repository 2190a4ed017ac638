"""Where the loss shows, in tables: what is named, and what is not printed."""

from pathlib import Path

import pytest

from evalkit.records import (
    DivergenceRecord,
    FloorRecord,
    MissingScaleRecord,
    MultipleRecord,
    PhaseRecord,
    PositionRecord,
    RunDirectory,
    WorstTokenRecord,
)
from evalkit.report import html, where
from tests.report.conftest import layer_record

FP8 = "fp8_e4m3:one@reference"


def multiple(
    value: float, lower: float | None, upper: float | None, floor: str = where.KERNEL
) -> MultipleRecord:
    return MultipleRecord(
        candidate=FP8, layer=0, phase="decode", mode="isolated", probe="attention", frozen="none", floor=floor,
        multiple=value, lower=lower, upper=upper, interval_method="16 blocks", n=32,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("figures", "words"),
    [
        ((0.8, 0.7, 1.0), "below the floor"),
        ((0.8, 0.7, 1.01), "not told from the floor"),
        ((1.2, 1.0, 1.4), "not told from the floor"),
        ((1.2, 1.01, 1.4), "above the floor"),
        ((0.8, None, None), "n/a"),
        ((0.0, None, None), "no error"),
    ],
)
def test_below_the_floor_needs_the_intervals_upper_end(
    figures: tuple[float, float | None, float | None], words: str
):
    assert where.in_words(multiple(*figures)) == words


@pytest.mark.parametrize(
    ("floor", "there"), [(where.KERNEL, ("3.2", "2.1")), ("floor:noise", ("n/a", "n/a"))], ids=str
)
def test_the_first_divergence_shows_what_it_was_told_by(floor: str, there: tuple[str, str]):
    """Only another kernel's floor has multiples; another floor stands by its name alone."""
    record = DivergenceRecord(
        candidate=FP8, phase="decode", mode="isolated", probe="attention", floor=floor, first_layer=4, relative_l2=0.031,
        multiple=3.2, multiple_lower=2.1, interval_method="16 blocks", layers=6,
    )  # fmt: skip
    (row,) = where.divergence([record]).rows
    assert row[4:] == ("4", "0.031", *there)


def test_only_another_kernels_floor_has_multiples_and_the_others_stand_by_name():
    noise = layer_record("bf16@reference", 0, 0.0021, rung="floor:noise")
    missing = FloorRecord(rung="floor:kernel", candidate=None, reason="flashinfer needs a GPU")
    measured = FloorRecord(rung="floor:noise", candidate="bf16@reference", reason="")
    records = [missing, measured, noise, multiple(9.0, 8.0, 10.0, "floor:noise")]
    assert where.multiples(records).rows == ()
    table = where.floor_state(records)
    assert [row[:4] for row in table.rows] == [
        ("another kernel", "n/a", "flashinfer needs a GPU", "n/a"),
        ("2^-9 noise on rows", "bf16@reference", "measured", "0.0021"),
    ]
    assert "No multiple is printed" in table.caption
    assert where.multiples([*records, multiple(9.0, 8.0, 10.0)]).rows[0][5:8] == (
        "9",
        "[8, 10]",
        "above the floor",
    )


def phase(name: str, departs: bool | None) -> PhaseRecord:
    return PhaseRecord(
        candidate=FP8, layer=1, mode="isolated", probe="attention", phase=name, relative_l2=0.02, kl_mean_nats=None,
        least_other="prefill", multiple=2.0, lower=1.9, upper=2.1, interval_method="blocks", departs=departs, nonfinite=0, n=32,
    )  # fmt: skip


def test_a_departing_phase_is_named_first():
    table = where.phases([phase("prefill", False), phase("decode", True), phase("second_turn", None)])
    assert table.rows[0][3:5] == ("decode", "DEPARTS")
    assert f"Departing: {FP8} in decode. Of 1 of 3 rows it is not told" in table.caption
    assert "None departs." in where.phases([phase("prefill", False)]).caption


def test_layers_without_a_scale_are_named_in_spans():
    records = [
        MissingScaleRecord(candidate=FP8, layer=n, carried=0.25 if n == 3 else None) for n in (0, 1, 2, 3, 5)
    ]
    assert where.missing_scales(records).rows == (
        (FP8, "0-2, 5", "the checkpoint carries none"),
        (FP8, "3", "the checkpoint carries 0.25, not used"),
    )


def test_amplification_is_propagated_over_isolated():
    alone, moved = layer_record(FP8, 2, 0.02), layer_record(FP8, 2, 0.05, mode="propagated")
    assert where.amplification([alone, moved]).rows == ((FP8, "decode", "2", "0.02", "0.05", "2.5", "32"),)


def position(rung: str, cliff: bool | None) -> PositionRecord:
    return PositionRecord(
        candidate=FP8, rung=rung, layer=0, mode="isolated", probe="attention", axis="position", starts=[0, 64], means=[0.01, 0.0],
        counts=[64, 60], slope_per_1000_tokens=0.5, slope_lower=0.1, slope_upper=0.9, slope_method="by blocks", topk=64,
        below_topk_mean=0.01, above_topk_mean=0.02, cliff=cliff, nonfinite=0, n=124,
    )  # fmt: skip


def test_curves_stand_at_the_middle_of_their_bins_and_a_cliff_is_named():
    records = [position("floor:noise", False), position("total", True)]
    table = where.positions(records)
    assert len(table.rows) == 1
    assert table.rows[0][5] == "CLIFF at 64"
    assert f"Cliff at top-k: {FP8}." in table.caption
    both = where.positions([position("floor:noise", True), position("total", True)])
    assert both.rows[0][5] == "as a floor"
    assert "No cliff at top-k." in both.caption
    floor, curve = where.place_curves(records)
    assert (floor["role"], curve["role"]) == ("floor", "candidate")
    assert (curve["middle"], curve["value"], curve["n"]) == ([32, 96], [0.01, None], [64, 60])


def test_a_worst_token_cannot_become_markup(run: RunDirectory, tmp_path: Path):
    token = WorstTokenRecord(
        candidate=FP8, rank=1, document=0, position=7, phase="decode", kl_nats=1.25, text="<script>alert(1)</script>",
        next_token=" <b>", reference_top=[" <i>", "\n"], reference_p=[0.75, 0.125], candidate_top=["a", "b"],
        candidate_p=[0.5, 0.25], floor="floor:noise", first_divergent_layer=2, mass_layer=3, dropped_keys=4,
        reference_keys=512, mass_lost=0.0625,
    )  # fmt: skip
    page = html.render(run, [*run.read(), token])
    assert "<script>alert" not in page
    assert "␣&lt;i&gt;" in page
    assert "First divergent layer: 2 (floor: floor:noise)" in page
    assert "4 of the reference's 512 keys dropped at layer 3, with 6.25 % of its attention" in " ".join(
        page.split()
    ).replace("&#39;", "'")
