"""report.html: one file that opens anywhere, without a network."""

import re
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from evalkit.records import (
    EnvironmentRecord,
    Record,
    RunDirectory,
    TaskRecord,
    only,
    read,
    read_samples,
    write_whole,
)
from evalkit.report import attribution, flips, plots, ranges, starts, tables, where
from evalkit.report.answers import answers


def write(run: Path) -> Path:
    """Write a run's report beside its records and return where it lies.

    Raises:
        InputError: `run` is not a run directory that this version reads.
    """
    path = run / "report.html"
    write_whole(path, render(RunDirectory(run), read(run)))
    return path


def breakable(text: str) -> Markup:
    """A name that a narrow column may break at its joints: `fp8_e4m3:one@reference` before `@`."""
    joints = re.compile(r"([@+_:])")
    return Markup("").join(
        Markup("<wbr>") + part if joints.fullmatch(part) else escape(part) for part in joints.split(text)
    )


def visible(text: str) -> str:
    """A token with its spaces and line ends to be seen."""
    return text.replace(" ", "\u2423").replace("\n", "\u21b5").replace("\t", "\u21e5") or "(nothing)"


def render(run: RunDirectory, records: Sequence[Record]) -> str:
    """The page as text."""
    views, losses = plots.layer_views(records), plots.loss_points(records)
    shares, places = attribution.bars(records), where.place_curves(records)
    flipped, tradeoff = flips.browse(records, read_samples(run.path)), plots.tradeoff(records)
    drawn = views or losses or shares or places or tradeoff["candidates"]
    environment = Environment(
        loader=PackageLoader("evalkit.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = breakable
    environment.filters["visible"] = visible
    return environment.get_template("report.html.j2").render(
        name=run.path.name,
        marks=tables.MARKS,
        command=run.command,
        started=run.started_utc,
        environment=next(iter(only(records, EnvironmentRecord)), None),
        documents=sorted({(r.task, r.n) for r in only(records, TaskRecord)}),
        unjudged=tables.unjudged(records),
        first=[
            table
            for table in (
                tables.verdicts(records),
                tables.candidates(records),
                tables.tasks(records),
                starts.scores(records),
                starts.next_tokens(records),
                answers(records),
            )
            if table.rows
        ],
        more=[
            table
            for table in (
                tables.rungs(records),
                tables.tokens(records),
                tables.selection(records),
                tables.scoring(records),
            )
            if table.rows
        ],
        folded=[table for table in (tables.ranges(records), tables.probes(records)) if table.rows],
        ending=[table for table in (tables.provenance(records), tables.environment(records)) if table.rows],
        where=[
            table
            for table in (
                where.floor_state(records),
                where.multiples(records),
                where.divergence(records),
                where.amplification(records),
                where.positions(records),
                where.phases(records),
                where.direction(records),
                where.confidence(records),
                where.missing_scales(records),
                where.task_floor(records),
            )
            if table.rows
        ],
        places=places,
        worst=where.worst(records),
        views=views,
        inside=tables.seen_inside(records),
        losses=losses,
        shares=shares,
        attribution=attribution.table(records),
        blame=attribution.sentences(records),
        faults=ranges.sentences(records),
        flips=flipped,
        tradeoff=tradeoff,
        timed=any(task["time"] for one in tradeoff["candidates"] for task in one["tasks"]),
        library=Markup(plots.library() if drawn else ""),  # noqa: S704 - plotly.js, from its own package
    )
