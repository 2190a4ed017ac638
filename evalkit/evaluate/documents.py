"""The document generators of tasks/, for what needs text without a task: layer comparison and calibration."""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from types import ModuleType

from evalkit.errors import InputError
from evalkit.evaluate.tasks import tasks_dir


def generated_text(task: str, length: int, seed: int) -> str:
    """One document of `task`, prompt and answer: about `length` tokens of dsa-nano's tokenizer before the answer.

    Raises:
        InputError: `length` has no room for the task.
    """
    try:
        (document,) = _generators().generate(task, length=length, count=1, seed=seed)
    except ValueError as error:
        raise InputError(f"a {task} document of {length} tokens: {error}") from error
    return f"{document.prompt}{document.target}"


@cache
def _generators() -> ModuleType:
    path, name = tasks_dir() / "documents.py", "evalkit_documents"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load {path}")
    # dataclasses look their module up by name while it is being executed.
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
