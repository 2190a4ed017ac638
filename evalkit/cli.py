"""The command line. Each command reads its input, calls one function, and prints where the result lies."""

import errno
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Annotated, Self

import typer

from evalkit import __version__
from evalkit.commands import checkpoints, machine, nights, runs, verdicts
from evalkit.commands.options import ANOMALOUS, BAD_INPUT, CRASH, INTERRUPTED
from evalkit.errors import EngineDiedError, InputError, TruncatedError

__all__ = ["BAD_INPUT", "app", "main"]

CLICK_USAGE = 2
ONE_LINE = {InputError: BAD_INPUT, EngineDiedError: CRASH, TruncatedError: ANOMALOUS}
# What the machine refuses, which no change of the code would help.
REFUSED = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS,
}  # fmt: skip

app = typer.Typer(
    name="evalkit",
    help="What a KV-cache format costs in accuracy against bf16, where the loss arises, and on which tasks it shows.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for group in (runs, verdicts, nights, checkpoints, machine):
    app.add_typer(group.app)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(f"evalkit {__version__}")
        raise typer.Exit


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 done, 12 anomalous, 64 bad input, 70 crash, 130 interrupted.

    None collides with Python's 1, the command-line library's 2 and make's 2.
    """
    with _ExitCode() as code:
        app(argv)
    sys.exit(code.value)


class _ExitCode:
    """Turns what ends a command into its exit code, printing what a user needs to see."""

    value = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        match error:
            case None:
                self.value = 0
            case SystemExit():
                self.value = error.code if isinstance(error.code, int) else int(error.code is not None)
                if self.value == CLICK_USAGE:
                    self.value = BAD_INPUT
            case InputError() | EngineDiedError() | TruncatedError():
                print("evalkit: " + " ".join(str(error).split()), file=sys.stderr)
                self.value = next(code for kind, code in ONE_LINE.items() if isinstance(error, kind))
            case OSError(errno=number, filename=str() | Path() as name) if number in REFUSED:
                print(f"evalkit: {name}: {error.strerror}", file=sys.stderr)
                self.value = BAD_INPUT
            case KeyboardInterrupt():
                self.value = INTERRUPTED
            case _:
                traceback.print_exception(kind, error, trace)
                self.value = CRASH
        return True


if __name__ == "__main__":
    main()
