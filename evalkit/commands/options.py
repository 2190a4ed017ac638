"""Options that several commands take, and the exit codes."""

from pathlib import Path
from typing import Annotated

import typer

ANOMALOUS = 12
BAD_INPUT = 64
ALERT = 20
CRASH = 70
INTERRUPTED = 130


Config = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="A TOML file; without it, the defaults.")
]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Over the file; repeatable.")
]
