"""Options that several commands take, and the exit codes."""

from typing import Annotated

import typer

ANOMALOUS = 12
BAD_INPUT = 64
ALERT = 20
CRASH = 70
INTERRUPTED = 130


Config = Annotated[
    str | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="A TOML file, or eval-fp8 or nightly, which evalkit ships. Without it, the defaults.",
    ),
]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Over the file; repeatable.")
]
