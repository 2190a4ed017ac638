"""The figures as Markdown tables, and their places in a page."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.pages import write_tables
from evalkit.gate.words import Verdict

NA = "n/a"


def controls(found: dict[str, Any]) -> Iterator[str]:
    """What the controls were and what was decided on them."""
    plan, control = found["plan"], found["controls"]
    zero = found["doses"][0]
    yield from _table(
        ("", ""),
        (
            ("arms", f"{found['candidate']} against {found['baseline']}"),
            ("endpoint", f"{found['endpoint']}, margin {_points(found['margin'])}"),
            ("measured on", str(found["facts"].get("gpu") or "CPU")),
            ("discordance in the pilot", f"{plan['discordance']:.2%}"),
            ("documents a sample, planned", f"{plan['documents']:,} for power {found['power']:g}"),
            ("discordance, all samples", f"{zero['discordance']:.2%} of {zero['documents']:,}"),
            ("loss, all samples", _interval(zero)),
            ("baseline", f"{zero['baseline_score']:.1%} right"),
            (
                "scored tokens with more context than top-k",
                f"{found['share_over_topk']:.1%} at least of an arm's",
            ),
            ("samples judged", str(control["samples"])),
            *((str(verdict), str(control["verdicts"].get(verdict, 0))) for verdict in Verdict),
            ("asked", f"{control['asked']}: {'held' if control['passed'] else 'NOT held'}"),
        ),
        text=2,
    )


def doses(found: dict[str, Any]) -> Iterator[str]:
    """A line a dose: true loss, verdicts, and the shares of them that theory gives."""
    order = [Verdict.NON_INFERIOR, Verdict.INCONCLUSIVE, Verdict.WORSE, Verdict.ANOMALOUS]
    rows = []
    for one in found["doses"]:
        samples = sum(one["verdicts"].values())
        rows.append(
            (
                f"{one['noise']:.3g}",
                f"{one['documents']:,}",
                f"{one['score']:.1%}",
                f"{100 * one['expected_loss']:+.2f}",
                _interval(one),
                f"{one['loss'] / found['margin']:.2f}",
                f"{one['discordance']:.1%}",
                *(
                    f"{one['verdicts'].get(v, 0)} of {samples} ({one['predicted'][v] * samples:.1f})"
                    for v in order
                ),
            )
        )
    yield from _table(
        (
            "noise",
            "documents",
            "right",
            "titration said",
            "true loss, points",
            "in margins",
            "differ",
            *map(str, order),
        ),
        rows,
    )
    damage = found["damage"]
    yield ""
    yield (
        f"Asked: {damage['asked']}: {'held' if damage['passed'] else 'NOT held'}, "
        f"{damage['doses_at_twice_the_margin']} of the doses there. "
        f"{found['documents_scored']:,} documents were scored in {found['scoring_s']:.0f} s of process time."
    )


def formats(found: dict[str, Any]) -> Iterator[str]:
    """A line for each candidate, task and run."""
    rows = [
        (
            one["profile"],
            (one["gpu"] or "CPU").partition(",")[0],
            f"`{one['candidate']}`",
            task["task"],
            f"{task['n']:,}",
            f"{task['score']:.1%}",
            _interval(task),
            f"{task['lost']} / {task['gained']}" if task["lost"] is not None else NA,
            f"{task['wall_s']:.0f}",
            one["verdict"] or "",
        )
        for one in found.get("formats", [])
        for task in one["tasks"]
    ]
    yield from _table(
        (
            *("ranges", "on", "candidate", "task"),
            *("documents", "right", "loss, points", "lost / gained", "seconds", "verdict"),
        ),
        rows,
        text=4,
    )
    yield ""
    for one in found.get("formats", []):
        if one["reason"]:
            yield f"- `{one['candidate']}`, {one['profile']}: {one['reason']}"


def titration(rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    """What each noise cost."""
    yield from _table(
        ("noise", "documents", "right", "loss, points", "differ", "curve"),
        [
            (
                f"{one['noise']:.3g}",
                f"{one['documents']:,}",
                f"{one['score']:.1%}",
                _interval(one),
                f"{one['discordance']:.1%}",
                NA if one["curve"] is None else f"{100 * one['curve']:.1f}",
            )
            for one in rows
        ],
    )


TABLES = {"controls": controls, "doses": doses, "formats": formats}


def write(page: Path, found: dict[str, Any]) -> None:
    """Write the tables into a page; formats only where some were judged.

    Raises:
        InputError: the page lacks a place.
    """
    judged = bool(found.get("formats"))
    write_tables(page, {name: make(found) for name, make in TABLES.items() if judged or name != "formats"})


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], text: int = 0) -> Iterator[str]:
    yield _line(header)
    yield _line(["---" if place < text else "---:" for place in range(len(header))])
    yield from map(_line, rows)


def _line(values: Iterable[str]) -> str:
    return f"| {' | '.join(values)} |"


def _points(loss: float) -> str:
    return f"{100 * loss:g} points"


def _interval(one: dict[str, Any]) -> str:
    if one["loss_lower"] is None:
        return f"{100 * one['loss']:+.2f}"
    return f"{100 * one['loss']:+.2f} ({100 * one['loss_lower']:+.2f} to {100 * one['loss_upper']:+.2f})"
