"""junit.xml: the last judgement as test cases, one a check, for what shows continuous integration."""

import re
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree as ET

from evalkit.errors import InputError
from evalkit.records import Record, VerdictRecord, last_judgement, write_whole

PASSED, ANOMALOUS = "NON-INFERIOR", "ANOMALOUS"
SUMS = ("overall", "candidate")
# What XML 1.0 has no way to write, not even as a reference.
UNWRITABLE = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def write(run: Path, records: Sequence[Record]) -> Path:
    """Write junit.xml of the last judgement in `records` beside a run's own and return where it lies.

    Raises:
        InputError: there is no judgement.
    """
    path = run / "junit.xml"
    write_whole(path, render(records))
    return path


def render(records: Sequence[Record]) -> str:
    """The last judgement as XML: a suite a candidate, a case a check.

    What is ANOMALOUS is an error, and what is WORSE or INCONCLUSIVE a failure: a skipped case would read as passed.
    Characters that XML 1.0 does not allow read as U+FFFD.

    Raises:
        InputError: there is no judgement.
    """
    last = last_judgement(records)
    if not last:
        raise InputError("the run was not judged: `evalkit gate RUN --policy FILE` does")
    cases = [r for r in last if r.check not in SUMS]
    # A judgement that counts for less than its checks (POST-HOC) must not read as passed.
    if _overall(last).post_hoc:
        cases.append(_overall(last))
    root = ET.Element("testsuites", {"name": last[0].policy, **_counts(cases)})
    for candidate in dict.fromkeys(r.candidate for r in cases):
        mine = [r for r in cases if r.candidate == candidate]
        suite = ET.SubElement(
            root, "testsuite", {"name": candidate, "timestamp": last[0].judged_utc, **_counts(mine)}
        )
        for record in mine:
            _case(suite, record)
    ET.indent(root)
    text = ET.tostring(root, encoding="unicode", xml_declaration=True)
    return UNWRITABLE.sub("\ufffd", text) + "\n"


def _case(suite: ET.Element, record: VerdictRecord) -> None:
    case = ET.SubElement(suite, "testcase", classname=record.candidate, name=record.check)
    if record.verdict == PASSED:
        ET.SubElement(case, "system-out").text = record.reason
        return
    tag = "error" if record.verdict == ANOMALOUS else "failure"
    found = ET.SubElement(case, tag, type=record.verdict, message=record.reason)
    found.text = record.needs


def _counts(cases: Sequence[VerdictRecord]) -> dict[str, str]:
    errors = sum(r.verdict == ANOMALOUS for r in cases)
    failures = sum(r.verdict not in (PASSED, ANOMALOUS) for r in cases)
    return {"tests": str(len(cases)), "failures": str(failures), "errors": str(errors)}


def _overall(last: Sequence[VerdictRecord]) -> VerdictRecord:
    return next(r for r in last if r.check == "overall")
