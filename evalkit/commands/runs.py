"""Make a run: compare layers, score tasks; and read one."""

from pathlib import Path
from typing import Annotated

import typer

from evalkit.commands.options import Config, Set
from evalkit.config import RunConfig
from evalkit.errors import InputError

app = typer.Typer()


@app.command()
def run(
    config: Config = None,
    set_: Set = None,
    policy: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="The policy the run is for, stored before anything is scored: a TOML file, or one that evalkit ships, "
            "such as default.",
        ),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with this run, from its last whole stage.")
    ] = None,
) -> None:
    """Compare layers, score tasks, write the report.

    Example: evalkit run --config eval-fp8 --set task_documents=48
    """
    if resume is not None and (config is not None or set_ or policy is not None):
        raise InputError(
            f"--resume {resume} takes its configuration from the run: give neither --config nor --set nor --policy"
        )
    asked = _resumed(resume) if resume is not None else RunConfig.load(config, set_ or (), policy)
    from evalkit import pipeline

    print(pipeline.run(asked, resume))


@app.command()
def layers(config: Config = None, set_: Set = None) -> None:
    """Compare every layer with the reference, without tasks.

    Example: evalkit layers --set candidates=bf16@reference,fp8_e4m3:one@reference
    """
    asked = RunConfig.load(config, set_ or ())
    from evalkit import pipeline

    print(pipeline.run(asked.with_values(stages=("layers",))))


@app.command()
def kld(
    text: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="A text, or JSON lines, a text a line; repeatable."),
    ] = None,
    transcripts: Annotated[
        Path | None, typer.Option(metavar="RUN", help="What a run's baseline was asked and answered.")
    ] = None,
    config: Config = None,
    set_: Set = None,
) -> None:
    """KL divergence of every candidate's next token from the reference's, on any text or on a run's answers.

    Example: evalkit kld --text book.txt --set candidates=bf16@reference,fp8_ds_mla@reference
    """
    asked = RunConfig.load(config, set_ or ())
    if text:
        asked = asked.with_values(kld_texts=tuple(map(str, text)))
    if transcripts is not None:
        asked = asked.with_values(kld_run=transcripts)
    if not asked.kld_texts and asked.kld_run is None:
        raise InputError("no text to compare on: give --text FILE or --transcripts RUN")
    from evalkit import pipeline

    print(pipeline.run(asked.with_values(stages=("kld",))))


@app.command()
def tasks(config: Config = None, set_: Set = None) -> None:
    """Score tasks on the same documents for every candidate.

    Example: evalkit tasks --config eval-fp8 --set task_documents=100
    """
    asked = RunConfig.load(config, set_ or ())
    from evalkit import pipeline

    print(pipeline.run(asked.with_values(stages=("tasks",))))


@app.command()
def report(
    run: Annotated[
        Path | None, typer.Argument(help="A run directory; without it, the newest under runs/.")
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option(metavar="FILE.zip", help="Write report, records and samples as one file.")
    ] = None,
) -> None:
    """Write a run's report.html and summary.md again, and print its tables.

    Example: evalkit report runs/2026-01-31T12-00-00Z-eval-fp8
    """
    from evalkit.report import bundle as bundles
    from evalkit.report import html, markdown, terminal

    path = run if run is not None else _newest(Path("runs"))
    if bundle is not None:
        print(f"{bundles.write(path, bundle)}  {bundle}")
        return
    markdown.write(path)
    page = html.write(path)
    terminal.show(path)
    print(page)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="A new directory.")],
) -> None:
    """Write a run's records as Parquet, one file a kind.

    Example: evalkit export runs/2026-01-31T12-00-00Z-eval-fp8 --out parquet
    """
    from evalkit.report.export import export

    for path in export(run, out):
        print(path)


def _resumed(path: Path) -> RunConfig:
    from evalkit.records import RunDirectory

    return RunConfig.from_json(RunDirectory(path).config)


def _newest(out: Path) -> Path:
    found = sorted(path.parent for path in out.glob("[!.]*/run.json"))
    if not found:
        raise InputError(f"no run under {out}/: `evalkit run` makes one, or name a run directory")
    return found[-1]
