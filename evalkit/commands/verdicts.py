"""Judge a run by a policy, and plan one."""

import sys
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command()
def gate(
    run: Annotated[Path, typer.Argument(help="A run directory, or the bundle of one.")],
    policy: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="What to judge by: a TOML file, or a policy that evalkit ships, such as default.",
        ),
    ],
    against: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN",
            help="Another run: its baselines are judged, too, and each candidate is compared with itself there.",
        ),
    ] = None,
) -> None:
    """Judge a finished run. Exit 0 NON-INFERIOR, 10 WORSE, 11 INCONCLUSIVE, 12 ANOMALOUS.

    Example: evalkit gate runs/2026-01-31T12-00-00Z-run --policy default
    """
    from evalkit.gate import policy as policies
    from evalkit.gate import verdict
    from evalkit.report import bundle, html, junit, markdown, terminal

    limits = policies.load(policy)
    with ExitStack() as stack:
        path = stack.enter_context(bundle.opened(run)) if run.is_file() else run
        judgement = verdict.judge(path, limits, against)
        said = verdict.verdict_records(judgement, datetime.now(UTC))
        terminal.show_verdicts(said)
        if path is run:  # a bundle stays as it was signed
            try:
                verdict.store(path, judgement)
                for page in (markdown.write(path), html.write(path), junit.write(path, said)):
                    print(page)
            except OSError as error:  # an archived run: the judgement counts all the same
                where = f"{error.filename}: {error.strerror}"
                print(f"evalkit: the run could not store this judgement: {where}", file=sys.stderr)
    raise typer.Exit(judgement.exit_code)


@app.command()
def plan(
    policy: Annotated[
        str, typer.Argument(help="A policy: a TOML file, or one that evalkit ships, such as default.")
    ],
    discordance: Annotated[
        float | None, typer.Option(help="Share of documents whose outcome differs, as 0.02.")
    ] = None,
    run: Annotated[
        Path | None, typer.Option(metavar="RUN", help="A run, to measure discordance and seconds by.")
    ] = None,
    damaged: Annotated[
        float | None,
        typer.Option(help="Share of documents that planted damage of twice the margin changes, as 0.06."),
    ] = None,
) -> None:
    """Say how many documents, and how many hours, a policy's decision needs.

    Example: evalkit plan default --discordance 0.02
    """
    from evalkit.gate import planning
    from evalkit.gate import policy as policies

    asked = policies.load(policy)
    for line in planning.words(asked, planning.plan(asked, discordance, run, damaged)):
        print(line)
