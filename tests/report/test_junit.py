from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from evalkit.errors import InputError
from evalkit.records import RunDirectory, VerdictRecord
from evalkit.report import junit, tables


def record(candidate: str, check: str, verdict: str, **changes: object) -> VerdictRecord:
    values = {
        "reason": f"{check} <found>",
        "needs": "more & better" if verdict != "NON-INFERIOR" else "",
        "policy": "made-up",
        "policy_sha256": "a" * 64,
        "post_hoc": False,
        "against": None,
        "judged_utc": "2026-01-31T12:00:00+00:00",
    }
    return VerdictRecord(candidate=candidate, check=check, verdict=verdict, **(values | changes))  # type: ignore[arg-type]


def judgement(**changes: object) -> list[VerdictRecord]:
    return [
        record("all that decide", "overall", "ANOMALOUS", **changes),
        record("a", "candidate", "NON-INFERIOR", **changes),
        record("a", "scope", "NON-INFERIOR", **changes),
        record("b", "candidate", "ANOMALOUS", **changes),
        record("b", "scope", "INCONCLUSIVE", **changes),
        record("b", "needle", "WORSE", **changes),
        record("b", "finite values", "ANOMALOUS", **changes),
    ]


def test_each_check_is_a_case_and_none_that_failed_reads_as_passed():
    root = ET.fromstring(junit.render(judgement()))
    assert dict(root.attrib) == {"name": "made-up", "tests": "4", "failures": "2", "errors": "1"}
    cases = {(c.get("classname"), c.get("name")): [child.tag for child in c] for c in root.iter("testcase")}
    assert cases == {
        ("a", "scope"): ["system-out"],
        ("b", "scope"): ["failure"],
        ("b", "needle"): ["failure"],
        ("b", "finite values"): ["error"],
    }
    error = root.find(".//error")
    assert error is not None
    assert (error.get("type"), error.get("message"), error.text) == (
        "ANOMALOUS",
        "finite values <found>",
        "more & better",
    )


def test_only_the_last_judgement_is_shown():
    later = [record("c", "scope", "NON-INFERIOR", judged_utc="2026-02-01T12:00:00+00:00")]
    later.insert(0, record("all", "overall", "NON-INFERIOR", judged_utc="2026-02-01T12:00:00+00:00"))
    root = ET.fromstring(junit.render([*judgement(), *later]))
    assert [s.get("name") for s in root.iter("testsuite")] == ["c"]
    assert [row[0] for row in tables.verdicts([*judgement(), *later]).rows] == ["all"]


def test_a_post_hoc_judgement_fails():
    passed = [
        record("all", "overall", "INCONCLUSIVE", post_hoc=True),
        record("a", "scope", "NON-INFERIOR", post_hoc=True),
    ]
    root = ET.fromstring(junit.render(passed))
    assert root.get("failures") == "1"
    assert "POST-HOC" in tables.verdicts(passed).caption


def test_what_xml_has_no_way_to_write_is_replaced():
    """A policy's name is text of any kind, and a file that does not parse shows no failure."""
    odd, seen = (
        "a\x07b\x00\ud800\ufffe<&>\t\u2028\U0001f600",
        "a\ufffdb\ufffd\ufffd\ufffd<&>\t\u2028\U0001f600",
    )
    text = junit.render(judgement(policy=odd, reason=odd, needs=odd))
    text.encode("utf-8")
    root = ET.fromstring(text)
    assert root.get("name") == seen
    assert {(found.get("message"), found.text) for found in root.iter("failure")} == {(seen, seen)}


def test_a_run_that_was_not_judged_is_refused(run: RunDirectory, tmp_path: Path):
    with pytest.raises(InputError, match="was not judged"):
        junit.write(run.path, run.read())
    assert not (run.path / "junit.xml").exists()
