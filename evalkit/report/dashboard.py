"""A static site from a history: every candidate's verdict and trend, what changed and where; opens without a network.

- index.html: everything the page shows, its data as JSON once
- reports/: each run's report, by links where the file system allows them
"""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from evalkit.errors import InputError
from evalkit.records import write_whole
from evalkit.report.history import History, StoredRun
from evalkit.report.html import breakable
from evalkit.report.tables import MARKS as VERDICT_MARKS
from evalkit.report.tables import number
from evalkit.report.trends import Event, Series, Tile, tiles

EXPECTED_H = 36.0
# What has not run for this long is no longer expected every night.
RETIRED = timedelta(days=14)
NOT_JUDGED = "not judged"
MARKS = VERDICT_MARKS | {NOT_JUDGED: "–"}
SPARK_W, SPARK_H = 150, 34


@dataclass(frozen=True, kw_only=True)
class Site:
    """What was written, and what someone should look at."""

    page: Path
    alerts: tuple[str, ...]


def write(
    store: Path,
    out: Path,
    *,
    now: datetime | None = None,
    expected_h: float = EXPECTED_H,
    repository: Path | None = None,
) -> Site:
    """Write the site.

    Args:
        store: a history's directory.
        out: the site's directory; made when missing, and what it had is replaced.
        now: the time that a missing run is missed at.
        expected_h: hours after which a run is missing; 0 expects none.
        repository: a git checkout, to name commits.

    Raises:
        InputError: there is no history, it is empty, or the site cannot be written.
    """
    history = History(store)
    shown = tiles(history, repository)
    if not shown:
        raise InputError(f"the history at {store} has no run: `evalkit history add RUN --store {store}`")
    nights = {night.run: night for tile in shown for night in tile.nights}
    runs = sorted(nights.values(), key=lambda run: (run.started_utc, run.name))
    moment = now or datetime.now(UTC)
    alerts = _alerts(shown, moment, expected_h)
    try:
        _link_reports(history.reports, out / "reports")
        write_whole(out / "index.html", render(runs, shown, alerts, moment, expected_h))
    except OSError as error:
        raise InputError(f"the site cannot be written to {out}: {error.strerror}") from None
    return Site(page=out / "index.html", alerts=alerts)


def render(
    runs: Sequence[StoredRun], shown: Sequence[Tile], alerts: Sequence[str], now: datetime, expected_h: float
) -> str:
    """The page as text."""
    environment = Environment(
        loader=PackageLoader("evalkit.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = breakable
    place = {run.run: i for i, run in enumerate(runs)}
    return environment.get_template("dashboard.html.j2").render(
        data=_json(
            {
                "expected_h": expected_h,
                "newest": runs[-1].started_utc,
                "runs": [[r.name, r.started_utc, r.commit_sha, r.report] for r in runs],
                "tiles": [_tile_data(tile, place) for tile in shown],
            }
        ),
        groups=_groups(shown),
        alerts=alerts,
        runs=len(runs),
        newest=_minute(runs[-1].started_utc),
        written=now.astimezone(UTC).strftime("%Y-%m-%d %H:%M"),
        tasks=list(dict.fromkeys(s.name for t in shown for s in t.series if s.kind == "score")),
        formats=sorted({t.results[-1].format for t in shown}),
        gpus=sorted({t.gpu for t in shown}),
        checkpoints=sorted({t.checkpoint for t in shown}),
        verdicts=[v for v in MARKS if any((t.verdict or NOT_JUDGED) == v for t in shown)],
    )


def _groups(shown: Sequence[Tile]) -> list[dict[str, Any]]:
    """Tiles as the template shows them, by where they ran."""
    groups: dict[tuple[str, ...], dict[str, Any]] = {}
    for i, tile in enumerate(shown):
        key = (tile.checkpoint, tile.checkpoint_sha256, tile.profile, tile.gpu)
        ranges = "" if tile.profile == "native" else f", ranges of {tile.profile}"
        group = groups.setdefault(
            key,
            {
                "title": f"{tile.checkpoint}{ranges} on {tile.gpu}",
                "sha256": tile.checkpoint_sha256[:12],
                "tiles": [],
            },
        )
        verdict = tile.verdict or NOT_JUDGED
        group["tiles"].append(
            {
                "id": f"t{i}",
                "candidate": tile.candidate,
                "format": tile.results[-1].format,
                "gpu": tile.gpu,
                "checkpoint": tile.checkpoint,
                "bytes": f"{tile.results[-1].bytes_per_token:,}",
                "verdict": verdict,
                "mark": MARKS.get(verdict, "?"),
                "post_hoc": bool(tile.results[-1].post_hoc),
                "since": tile.since,
                "nights": len(tile.nights),
                "rows": [_row(series) for series in tile.series],
                "change": _last_change(tile),
            }
        )
    return list(groups.values())


def _row(series: Series) -> dict[str, Any]:
    last = next((v for v in reversed(series.values) if v is not None), None)
    return {
        "name": series.name,
        "kind": series.kind,
        "value": shown_value(series, last),
        "raw": last,
        "unit": "" if series.kind == "score" else series.unit,
        "spark": _spark(series),
    }


def shown_value(series: Series, value: float | None) -> str:
    """A value with the digits that a reader needs."""
    if value is None:
        return "n/a"
    return f"{100 * value:.1f}%" if series.kind == "score" else number(value)


def shown_change(series: Series, before: float, after: float) -> str:
    """`−2.0 points`, or `×1.8`."""
    if series.kind == "score":
        return f"{100 * (after - before):+.1f} points".replace("-", "−")
    return f"×{number(after / before)}"


def _spark(series: Series) -> Markup:
    """The series as a small line; what is common noise is not drawn as if it were much."""
    import math

    height = math.log if series.kind == "error" else float
    points = [
        (i, height(v))
        for i, v in enumerate(series.values)
        if v is not None and (series.kind == "score" or v > 0)
    ]
    if not points:
        return Markup("")
    low, high = min(y for _, y in points), max(y for _, y in points)
    least = 0.04 if series.kind == "score" else math.log(1.5)
    pad = max(least - (high - low), 0) / 2 + 0.05 * (high - low)
    low, high = low - pad, high + pad
    steps = max(len(series.values) - 1, 1)

    def x(i: float) -> float:
        return round(3 + (SPARK_W - 6) * i / steps, 1)

    def y(v: float) -> float:
        return round(3 + (SPARK_H - 6) * (high - v) / (high - low), 1)

    line = " ".join(f"{x(i)},{y(v)}" for i, v in points)
    marks = "".join(
        f'<line class="mark {_direction(series, c.before, c.after)}" x1="{x(c.at - 0.5)}" x2="{x(c.at - 0.5)}" y1="0" y2="{SPARK_H}"/>'
        for c in series.changes
    )
    i, v = points[-1]
    return Markup(  # noqa: S704 - numbers and words from above
        f'<svg class="spark" viewBox="0 0 {SPARK_W} {SPARK_H}" aria-hidden="true">{marks}<polyline points="{line}"/>'
        f'<circle cx="{x(i)}" cy="{y(v)}" r="2.6"/></svg>'
    )


def _direction(series: Series, before: float, after: float) -> str:
    """Whether the new level is worse: a score that fell, or an error that rose."""
    return "worse" if (after < before) == (series.kind == "score") else "better"


def _last_change(tile: Tile) -> dict[str, str] | None:
    """The newest change in words: its most telling series, when, and between which commits."""
    if not tile.events:
        return None
    event = tile.events[-1]
    series, before, after = (tile.series[event.series[0][0]], *event.series[0][1:])
    more = f" and {len(event.series) - 1} more" if len(event.series) > 1 else ""
    return {
        "what": f"{series.name} {shown_change(series, before, after)}{more}",
        "direction": _direction(series, before, after),
        "when": tile.nights[event.at].started_utc[:10],
        "commits": f"{_sha(event.commit_before)} → {_sha(event.commit_after)}",
    }


def _sha(commit: str | None) -> str:
    return "unknown" if commit is None else commit[:8] + "-dirty" * commit.endswith("-dirty")


def _tile_data(tile: Tile, place: dict[str, int]) -> dict[str, Any]:
    return {
        "candidate": tile.candidate,
        "where": f"{tile.checkpoint} ({tile.checkpoint_sha256[:12]}), ranges {tile.profile}, on {tile.gpu}",
        "bytes": tile.results[-1].bytes_per_token,
        "nights": [place[run.run] for run in tile.nights],
        "verdicts": [r.verdict for r in tile.results],
        "reason": tile.results[-1].reason,
        "policy": tile.results[-1].policy,
        "post_hoc": bool(tile.results[-1].post_hoc),
        "series": [
            {
                "name": s.name,
                "kind": s.kind,
                "unit": s.unit,
                "values": s.values,
                "lower": s.lower if any(v is not None for v in s.lower) else None,
                "upper": s.upper if any(v is not None for v in s.upper) else None,
                "n": s.n,
                "changes": [[c.at, c.found, c.before, c.after] for c in s.changes],
            }
            for s in tile.series
        ],
        "layers": {
            mode: {
                "layers": list(values),
                "values": [[_short(v) for v in night] for night in values.values()],
            }
            for mode, values in tile.layers.items()
        },
        "events": [_event_data(tile, event) for event in tile.events],
    }


def _event_data(tile: Tile, event: Event) -> dict[str, Any]:
    guilty = event.guilty
    return {
        "at": event.at,
        "found": event.found,
        "what": [
            [i, shown_change(tile.series[i], before, after), _direction(tile.series[i], before, after)]
            for i, before, after in event.series
        ],
        "before": _sha(event.commit_before),
        "after": _sha(event.commit_after),
        "commits": event.commits,
        "packages": event.packages,
        "guilty": None if guilty is None else guilty.layer,
        "layers": {
            mode: [[m.layer, _short(m.before), _short(m.after)] for m in moved]
            for mode, moved in event.layers.items()
        },
    }


def _short(value: float | None) -> float | None:
    """Six digits: there is one for each layer and night, and a page shows three."""
    return None if value is None else float(f"{value:.6g}")


def _json(values: object) -> Markup:
    """JSON that may stand in a script element."""
    text = json.dumps(values, allow_nan=False, separators=(",", ":"), ensure_ascii=False)
    return Markup(text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"))  # noqa: S704 - escaped here


def _alerts(shown: Sequence[Tile], now: datetime, expected_h: float) -> tuple[str, ...]:
    """A run that is missing, a verdict that changed in the newest run, a change point that it brought to light."""
    found = []
    newest = max(datetime.fromisoformat(tile.nights[-1].started_utc) for tile in shown)
    last: dict[str, datetime] = {}
    for tile in shown:
        where = f"{tile.checkpoint} on {tile.gpu}" + f", ranges of {tile.profile}" * (
            tile.profile != "native"
        )
        started = datetime.fromisoformat(tile.nights[-1].started_utc)
        last[where] = max(started, last.get(where, started))
    for where, started in last.items():
        age = now - started
        if expected_h and age > timedelta(hours=expected_h) and (age < RETIRED or started == newest):
            found.append(
                f"Missing: no run of {where} for {age / timedelta(hours=1):.0f} h, since {_minute(started.isoformat())} UTC; "
                f"one is expected every {expected_h:g} h."
            )
    for tile in shown:
        name = f"{tile.candidate} ({tile.checkpoint} on {tile.gpu})"
        before, after = (
            ([None, *(r.verdict for r in tile.results)][-2:]) if len(tile.results) > 1 else (None, None)
        )
        if before != after:
            found.append(f"Verdict: {name} went from {before or NOT_JUDGED} to {after or NOT_JUDGED}.")
        for event in tile.events:
            if event.found == len(tile.nights) - 1:
                words = ", ".join(
                    f"{tile.series[i].name} {shown_change(tile.series[i], b, a)}" for i, b, a in event.series
                )
                when = tile.nights[event.at].started_utc[:10]
                found.append(
                    f"Change: {name}: {words}, from {when} on, between {_sha(event.commit_before)} and {_sha(event.commit_after)}."
                )
    return tuple(found)


def _minute(text: str) -> str:
    return datetime.fromisoformat(text).astimezone(UTC).strftime("%Y-%m-%d %H:%M")


def _link_reports(source: Path, target: Path) -> None:
    """The store's reports and nothing else; a file that is the same already stays."""
    target.mkdir(parents=True, exist_ok=True)
    if target.samefile(source):
        return
    names = {path.name for path in source.iterdir() if path.suffix in (".html", ".js")}
    for path in target.iterdir():
        if path.name not in names or not path.samefile(source / path.name):
            path.unlink()
    for name in names:
        if not (target / name).exists():
            try:
                os.link(source / name, target / name)
            except OSError:
                shutil.copyfile(source / name, target / name)
