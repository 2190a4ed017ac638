"""The history of runs, and its dashboard."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from evalkit.commands.options import ALERT

app = typer.Typer()
history = typer.Typer(help="Runs kept for the dashboard.", no_args_is_help=True)
app.add_typer(history, name="history")
Store = Annotated[Path, typer.Option(metavar="DIR", help="The history's directory.")]
DEFAULT_STORE = Path("history")


@history.command()
def add(run: Annotated[Path, typer.Argument(help="A run directory.")], store: Store = DEFAULT_STORE) -> None:
    """Add a run that has ended; again, to replace what was known of it.

    Example: evalkit history add runs/2026-01-31T12-00-00Z-eval-fp8 --store history
    """
    from evalkit.report.history import History

    print(f"{History(store, create=True).add(run).name} is in {store}")


@history.command("list")
def list_(store: Store = DEFAULT_STORE) -> None:
    """List the runs, oldest first.

    Example: evalkit history list --store history
    """
    from evalkit.report.history import History, StoredRun

    for run in History(store).read(StoredRun):
        print(
            f"{run.started_utc}  {(run.commit_sha or 'unknown')[:8]:8}  {run.checkpoint} on {run.gpu}  {run.name}"
        )


@history.command()
def prune(
    keep: Annotated[int, typer.Option(help="How many of the newest runs stay.")], store: Store = DEFAULT_STORE
) -> None:
    """Remove all but the newest runs, with their reports.

    Example: evalkit history prune --keep 365 --store history
    """
    from evalkit.report.history import History

    print(f"removed {len(History(store).prune(keep))} runs")


@app.command()
def dashboard(
    store: Annotated[Path, typer.Argument(help="The history's directory.")] = DEFAULT_STORE,
    out: Annotated[Path, typer.Option(metavar="DIR", help="The site's directory.")] = Path("site"),
    expected: Annotated[
        float, typer.Option(metavar="HOURS", min=0, help="A run is missing after these; 0 expects none.")
    ] = 36,
    repository: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A git checkout, to name the commits between nights.")
    ] = None,
) -> None:
    """Write the history as a static site. Exit 20 where a verdict or level changed or a run is missing.

    Example: evalkit dashboard history --out site --repository .
    """
    from evalkit.report import dashboard

    site = dashboard.write(store, out, expected_h=expected, repository=repository)
    for alert in site.alerts:
        print(f"evalkit: {alert}", file=sys.stderr)
    print(site.page)
    if site.alerts:
        raise typer.Exit(ALERT)
