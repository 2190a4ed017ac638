"""Files that evalkit ships beside its code: task files, configurations and policies.

A configuration or policy has a name, which works in every folder: `eval-fp8` is configs/eval-fp8.toml and `default` is
tasks/policies/default.toml.
"""

import difflib
import os
from pathlib import Path
from typing import Final, Literal

import evalkit
from evalkit.errors import InputError

Kind = Literal["configuration", "policy"]

# What is in tasks/ and nowhere else, so that another project's tasks/ is not taken for ours.
MARKER: Final = "lm_eval_docs.py"
FOLDERS: Final[dict[Kind, str]] = {"configuration": "configs", "policy": "tasks/policies"}


def root() -> Path:
    """The folder of tasks/ and configs/: the checkout, or the package where a wheel was installed.

    Raises:
        InputError: neither has task files.
    """
    package = Path(evalkit.__file__).resolve().parent
    # In a checkout a copy beside the package would be an older installation's.
    for folder in (package.parent, package):
        if (folder / "tasks" / MARKER).is_file():
            return folder
    raise InputError(
        f"no task files in {package.parent / 'tasks'} or {package / 'tasks'}; install evalkit-kv again"
    )


def tasks_dir() -> Path:
    """Where the task files are."""
    return root() / "tasks"


def names(kind: Kind) -> list[str]:
    """The configurations or policies that evalkit ships."""
    return sorted(path.stem for path in (root() / FOLDERS[kind]).glob("*.toml"))


def find(kind: Kind, given: str | Path) -> Path:
    """The file that a path or a name stands for.

    A path to a file is that file. Otherwise a word without a folder is the file that evalkit ships under that name, with
    or without `.toml`. A folder in the way, such as `nightly/`, hides no name.

    Raises:
        InputError: there is neither such a file nor such a name.
    """
    text, path = str(given), Path(given)
    plain = os.sep not in text
    if _is_there(path) and not (plain and path.is_dir()):
        return path
    known = names(kind)
    if plain and (name := text.removesuffix(".toml")) in known:
        return root() / FOLDERS[kind] / f"{name}.toml"
    if _is_there(path):
        return path  # a folder: who reads it says so
    close = difflib.get_close_matches(path.name.removesuffix(".toml"), known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise InputError(
        f"no {kind} {text!r}, neither a file nor a name that evalkit ships: {hint}Give {', '.join(known)}, or a TOML file"
    )


def lasting(kind: Kind, given: str | Path) -> str:
    """What stands for the same file in every folder: its name where evalkit ships it, otherwise its absolute path.

    Raises:
        InputError: as `find` does.
    """
    path = find(kind, given)
    shipped = {os.path.realpath(root() / FOLDERS[kind] / f"{name}.toml"): name for name in names(kind)}
    return shipped.get(os.path.realpath(path), str(path.absolute()))


def _is_there(path: Path) -> bool:
    """Whether something is at the path. Where that cannot be seen, who reads the file says why."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # a null character is in no file's name
        return False
    except OSError:
        return True
    return True
