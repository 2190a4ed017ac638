"""The datasets that the task files name: documents generated here, in memory, from a seed.

lm-eval loads this file by its path, beside the task files, wherever tasks/ lies; so is documents.py loaded.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from datasets import Dataset


def test_split(*, generator: str, length: int, seed: int, documents: int, **given: Any) -> dict[str, Dataset]:
    """Documents of one task as lm-eval's `custom_dataset` wants them.

    `generator`, `length` and the generator's options stand in the task file's dataset_kwargs, for a task's name
    says them; `seed` and `documents` in its metadata, where `--metadata seed=1` reaches them. lm-eval adds the
    model's arguments to the metadata; these change nothing.
    """
    options = given.pop("options", {})
    made = _documents().generate(generator, length=length, count=documents, seed=seed, **options)
    # `until` takes the closing full stop off a generation, and lm-eval's whitespace filter the leading space.
    rows = [{"prompt": d.prompt, "answer": d.target.strip().removesuffix(".")} for d in made]
    return {"test": Dataset.from_list(rows)}


def _documents() -> ModuleType:
    path = Path(__file__).resolve().with_name("documents.py")
    name = f"evalkit_task_documents:{path}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise ImportError(f"cannot load {path}")
        # dataclasses look their module up by name while it is being executed.
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
