from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest

from evalkit.errors import InputError
from evalkit.gate.evidence import Evidence
from evalkit.gate.limits import check_limits
from evalkit.gate.policy import Exemption, Limit, Policy
from evalkit.gate.words import Check, Verdict
from evalkit.records import LayerRecord

TODAY = date(2026, 1, 1)
L2 = Limit(name="l2", figure="layer.relative_l2", where={"rung": "total"}, at_most=0.01)


def until(day: date, reason: str = "a fix is under way", **changes: str) -> Exemption:
    return Exemption(
        **({"candidate": "fp8_ds_mla", "limit": "l2", "expires": day, "reason": reason} | changes)
    )


def check(run: Path, policy: Policy) -> Check:
    evidence = Evidence.read(run)
    candidate = evidence.find("fp8_ds_mla")
    assert candidate is not None
    (found,) = check_limits(evidence.records, candidate, policy, TODAY)
    return found


@pytest.mark.parametrize(("bound", "verdict"), [(0.02, Verdict.NON_INFERIOR), (0.0199, Verdict.INCONCLUSIVE)])
def test_a_limit_holds_up_to_its_bound(
    make_run: Callable[..., Path], with_policy: Callable[..., Policy], bound: float, verdict: Verdict
):
    limit = Limit(name="l2", figure="layer.relative_l2", where={"rung": "total"}, at_most=bound)
    found = check(make_run(), with_policy(limits=(limit,)))
    assert found.verdict is verdict
    assert "layer.relative_l2 is 0.02 at layer 0" in found.reason


def test_a_figure_without_a_value_does_not_pass(
    make_run: Callable[..., Path], with_policy: Callable[..., Policy]
):
    limit = Limit(name="sqnr", figure="layer.sqnr_db", at_least=1.0)
    found = check(make_run(layers=(0.02, {"sqnr_db": None})), with_policy(limits=(limit,)))
    assert found.verdict is Verdict.INCONCLUSIVE
    assert "has no value in 4 of 4 records" in found.reason


def test_an_exception_excuses_a_breach_up_to_its_last_day(
    make_run: Callable[..., Path], with_policy: Callable[..., Policy]
):
    run = make_run()
    for day, verdict in ((TODAY, Verdict.NON_INFERIOR), (date(2025, 12, 31), Verdict.INCONCLUSIVE)):
        found = check(run, with_policy(limits=(L2,), exceptions=(until(day),)))
        assert found.verdict is verdict
        assert str(day) in found.reason
        assert "layer.relative_l2 is 0.02 at layer 0" in found.reason


def test_an_exception_that_ended_hides_none_that_has_not(
    make_run: Callable[..., Path], with_policy: Callable[..., Policy]
):
    """An exception is renewed by an entry more."""
    run, ended, lasting = make_run(), until(date(2025, 1, 1)), until(date(2027, 1, 1), "renewed")
    for entries in ((ended, lasting), (lasting, ended)):
        found = check(run, with_policy(limits=(L2,), exceptions=entries))
        assert found.verdict is Verdict.NON_INFERIOR
        assert "Excepted until 2027-01-01: renewed" in found.reason


def test_an_exception_is_for_one_candidate_and_one_limit(
    make_run: Callable[..., Path], with_policy: Callable[..., Policy]
):
    run, later = make_run(), date(2027, 1, 1)
    for entry in (until(later, candidate="bf16"), until(later, limit="another")):
        found = check(run, with_policy(limits=(L2,), exceptions=(entry,)))
        assert found.verdict is Verdict.INCONCLUSIVE
        assert "xcept" not in found.reason


@pytest.mark.parametrize(
    ("limit", "layers", "said"),
    [
        (replace(L2, figure="range.zero_share", where={}), {}, "was not recorded for this candidate"),
        (replace(L2, figure="layer.sqnr_db"), {"sqnr_db": None}, "has no value in 2 of 2 records"),
    ],
)
def test_an_exception_excuses_no_figure_that_was_not_recorded(
    make_run: Callable[..., Path],
    with_policy: Callable[..., Policy],
    limit: Limit,
    layers: dict[str, None],
    said: str,
):
    found = check(
        make_run(layers=(0.02, layers)), with_policy(limits=(limit,), exceptions=(until(date(2027, 1, 1)),))
    )
    assert found.verdict is Verdict.INCONCLUSIVE
    assert said in found.reason
    assert found.needs


@pytest.mark.parametrize(
    ("figure", "format", "verdict"),
    [
        ("range.saturated_share", "fp8_ds_mla", Verdict.NON_INFERIOR),
        ("range.saturated_share", "bf16", Verdict.NON_INFERIOR),
        ("range.headroom", "fp8_ds_mla", Verdict.NON_INFERIOR),
        ("range.zero_share", "fp8_ds_mla", Verdict.INCONCLUSIVE),
        ("range.saturated_share", "fp8_e4m3", Verdict.INCONCLUSIVE),
        ("range.saturated_share", "nvfp4_ds_mla", Verdict.INCONCLUSIVE),
    ],
)
def test_a_format_that_is_given_no_scale_saturates_none(
    make_run: Callable[..., Path],
    with_policy: Callable[..., Policy],
    figure: str,
    format: str,
    verdict: Verdict,
):
    """fp8_ds_mla has no such record in any run, and could else never be made a default."""
    limit = Limit(name="ranges", figure=figure, at_most=1e-4)
    found = check(make_run(candidate={"format": format}), with_policy(limits=(limit,)))
    assert found.verdict is verdict
    said = "takes no scale from outside" if verdict is Verdict.NON_INFERIOR else "was not recorded"
    assert said in found.reason


def test_a_word_of_fields_without_a_fixed_list_is_refused_where_no_record_holds_it(
    make_run: Callable[..., Path], with_policy: Callable[..., Policy]
):
    limit = Limit(name="n", figure="task.loss_upper", where={"task": "neddle"}, at_most=1.0)
    with pytest.raises(InputError, match="no task record has task 'neddle'; there are needle"):
        check(make_run(), with_policy(limits=(limit,)))


def test_a_word_that_no_record_holds_is_refused(
    make_run: Callable[..., Path], with_policy: Callable[..., Policy]
):
    limit = Limit(name="l2", figure="layer.relative_l2", where={"probe": "attenton"}, at_most=1.0)
    with pytest.raises(InputError, match="no layer record has probe 'attenton'; there are attention"):
        check(make_run(), with_policy(limits=(limit,)))


@pytest.mark.parametrize(
    ("figure", "where"),
    [
        ("layer.relative_l2", {"rung": "format"}),
        ("layer.relative_l2", {"rung": "kernel"}),
        ("layer.relative_l2", {"probe": "index_scores"}),
        ("layer.relative_l2", {"probe": "hidden"}),
        ("layer.relative_l2", {"probe": "routing"}),
        ("layer.relative_l2", {"frozen": "selection+routing"}),
        ("layer.relative_l2", {"mode": "isolated", "phase": "decode"}),
        ("layer.relative_l2", {"rung": "floor:start"}),
    ],
)
def test_what_a_serving_engine_does_not_show_is_missing_and_no_unknown_word(
    make_run: Callable[..., Path], with_policy: Callable[..., Policy], figure: str, where: dict[str, str]
):
    limit = Limit(name="l2", figure=figure, where=where, at_most=1.0)
    run = make_run()
    records = [
        replace(r, probe="values", mode="propagated", phase="prefill") if isinstance(r, LayerRecord) else r
        for r in Evidence.read(run).records
        if not (isinstance(r, LayerRecord) and r.rung != "total")
    ]
    candidate = Evidence.read(run).find("fp8_ds_mla")
    assert candidate is not None
    (found,) = check_limits(records, candidate, with_policy(limits=(limit,)), date(2026, 1, 1))
    assert found.verdict is Verdict.INCONCLUSIVE
    assert "was not recorded for this candidate" in found.reason
