from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest

from evalkit.errors import InputError
from evalkit.gate.evidence import Evidence
from evalkit.gate.limits import check_limits
from evalkit.gate.policy import Limit, Policy
from evalkit.gate.words import Check, Verdict
from evalkit.records import LayerRecord


def check(run: Path, policy: Policy) -> Check:
    evidence = Evidence.read(run)
    candidate = evidence.find("fp8_ds_mla")
    assert candidate is not None
    (found,) = check_limits(evidence.records, candidate, policy, date(2026, 1, 1))
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
