"""What the report says of an attribution: who is blamed, with what share, and when it is not to be relied on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from evalkit.compare.passes.variants import FROZEN
from evalkit.records import AttributionRecord, RunDirectory
from evalkit.report import attribution, html, markdown, terminal

NAME = "fp8_e4m3:one@flashinfer"
# By place, what latent and rope do alone, and all together.
FIGURES: dict[int | str, tuple[float, float, float]] = {
    0: (4e-4, 1e-4, 5e-4),
    1: (9e-4, 6e-5, 1e-3),
    2: (1e-4, 3e-4, 4e-4),
    FROZEN: (2e-3, 1e-3, 2.5e-3),
    "none": (6e-3, 7e-3, 8e-3),
}


def records() -> list[AttributionRecord]:
    found = []
    for place, (latent, rope, whole) in FIGURES.items():
        arms = {
            ("none", None): 0.0,
            ("all", None): whole,
            ("only", "latent"): latent,
            ("without", "latent"): 1.5 * rope,
            ("only", "rope"): rope,
            ("without", "rope"): 1.5 * latent,
            ("interaction", None): whole - latent - rope,
        }
        if isinstance(place, int):
            arms["apart", None] = 0.0
        for (arm, component), value in arms.items():
            layer = place if isinstance(place, int) else None
            found.append(
                AttributionRecord(
                    candidate=NAME,
                    layer=layer,
                    mode="propagated" if layer is None else "isolated",
                    frozen="none" if isinstance(place, int) else place,
                    arm=arm,
                    component=component,
                    squared_relative_l2=None if layer is None else value,
                    kl_mean_nats=value if layer is None else None,
                    nonfinite=0,
                    n=1024 if layer is None else 4096,
                )
            )
    return found


def changed(
    layer: int, arm: str, component: str | None = None, **values: float | None
) -> list[AttributionRecord]:
    return [
        replace(r, **values) if (r.layer, r.arm, r.component) == (layer, arm, component) else r
        for r in records()
    ]


def test_the_sentence_names_the_component_at_the_worst_layer_and_of_the_divergence():
    (sentence,) = attribution.sentences(records())
    assert sentence == (
        f"{NAME}: at layer 1, its worst (relative L2 0.0316), 90.0% of the squared attention error comes from the stored "
        "latent; of the KL divergence with selection and routing frozen, 80.0% from the stored latent; of the KL "
        "divergence free, 87.5% from the stored rope."
    )


def test_a_large_interaction_is_said():
    records = changed(1, "interaction", squared_relative_l2=-2.5e-4)
    assert "with an interaction of -25.0%" in attribution.sentences(records)[0]
    assert "interaction" not in attribution.sentences(changed(1, "interaction", squared_relative_l2=5e-5))[0]


def test_where_one_component_makes_far_more_than_the_whole_no_share_is_given():
    flipped = [
        replace(r, kl_mean_nats=3e-3) if (r.frozen, r.layer, r.arm) == ("none", None, "all") else r
        for r in records()
    ]
    (sentence,) = attribution.sentences(flipped)
    assert sentence.endswith(
        "the KL divergence free does not divide, the stored rope alone makes 2.3 times the whole."
    )


@pytest.mark.parametrize(
    ("records", "reason"),
    [
        (
            changed(2, "none", squared_relative_l2=1e-12),
            "with nothing enabled layer 2 is not the reference's",
        ),
        (changed(0, "none", squared_relative_l2=None), "with nothing enabled layer 0 is not the reference's"),
        (
            changed(1, "apart", squared_relative_l2=4e-4),
            "not its own attention at layer 1: relative L2 0.02 ",
        ),
    ],
)
def test_figures_of_which_a_control_failed_blame_nobody(records: list[AttributionRecord], reason: str):
    (sentence,) = attribution.sentences(records)
    assert reason in sentence
    assert "comes from" not in sentence


def test_attention_that_is_not_finite_is_blamed_on_the_component_that_makes_it_so():
    broken = [
        replace(r, squared_relative_l2=None, nonfinite=7)
        if r.layer == 1 and (r.arm, r.component) in (("all", None), ("only", "rope"))
        else r
        for r in records()
    ]
    assert (
        "at layer 1, 7 values of the attention are not finite, with the stored rope"
        in attribution.sentences(broken)[0]
    )


def test_a_candidate_without_error_is_said_to_have_none():
    nothing = [
        replace(
            r,
            squared_relative_l2=None if r.layer is None else 0.0,
            kl_mean_nats=0.0 if r.layer is None else None,
        )
        for r in records()
    ]
    assert attribution.sentences(nothing) == [f"{NAME}: attention is the reference's at every layer."]
    assert {value for one in attribution.bars(nothing)[0]["series"] for value in one["share"]} == {None}


def test_the_table_has_each_components_own_worst_layer():
    rows = {row[1]: row[2:] for row in attribution.table(records()).rows}
    assert rows["latent"] == (
        "1", "0.03", "90.0%", "0.00949", "0.002", "80.0%", "0.0015", "0.006", "75.0%", "0.0105",
    )  # fmt: skip
    assert rows["rope"][:4] == ("2", "0.0173", "75.0%", "0.0122")
    assert rows["interaction"][:3] == ("1", "n/a", "4.0%")
    assert rows["all"][:3] == ("1", "0.0316", "100.0%")


def test_bars_add_up_to_a_hundred_percent_everywhere():
    (chart,) = attribution.bars(records())
    assert (chart["layers"], chart["wholes"]) == ([0, 1, 2], ["KL frozen", "KL free"])
    assert [one["name"] for one in chart["series"]] == ["the stored latent", "the stored rope", "interaction"]
    for place in range(5):
        assert sum(one["share"][place] for one in chart["series"]) == pytest.approx(100)


def test_every_report_shows_the_attribution_and_none_without_one(
    tmp_path: Path, run: RunDirectory, capsys: pytest.CaptureFixture[str]
):
    page, text = html.render(run, run.read()), markdown.render(run, run.read())
    assert 'id="attribution"' not in page
    assert "Attribution" not in text
    with run.stage("attribution") as write:
        for record in records():
            write.write(record)
    page, text = html.render(run, run.read()), markdown.render(run, run.read())
    terminal.show(run.path)
    assert 'id="attribution"' in page
    for shown in (page, text, " ".join(capsys.readouterr().out.split())):
        assert "90.0% of the squared attention error comes from the stored latent" in shown
    assert "| interaction |" in text
