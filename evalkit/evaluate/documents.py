"""The document generators of tasks/, for what needs text without a task: layer comparison and calibration."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from evalkit.errors import InputError
from evalkit.shipped import tasks_dir

CALIBRATION_DOCUMENTS = 2
RANGE_SEEDS = (900_001, 900_002)  # not a run's, so that a profile makes the same model in every run
RANGE_TOKENS = 1024
SHORTEST_DOCUMENT = 256

Encode = Callable[[str], list[int]]


def calibration_documents(encode: Encode, tokens: int, seed: int) -> list[Tensor]:
    """What scales are calibrated on unless prompts are given: `CALIBRATION_DOCUMENTS` of token ids [tokens].

    None of them is the document that a run of this seed compares layers on: a scale fitted to the test would flatter
    its format.
    """
    return [generated_tokens(encode, tokens, seed + 1 + number) for number in range(CALIBRATION_DOCUMENTS)]


def range_documents(encode: Encode, longest: int) -> list[Tensor]:
    """What a checkpoint's ranges are measured on unless prompts are given: token ids [min(1024, longest)] each."""
    return [generated_tokens(encode, min(RANGE_TOKENS, longest), seed) for seed in RANGE_SEEDS]


def generated_tokens(encode: Encode, tokens: int, seed: int) -> Tensor:
    """The last `tokens` token ids of a generated document, so that they end in its answer."""
    length = max(tokens, SHORTEST_DOCUMENT)
    # Lengths are in dsa-nano's tokens; another tokenizer may need fewer for the same text.
    while len(ids := encode(generated_text("registers", length, seed))) < tokens:
        length += length // 2
    return torch.tensor(ids[-tokens:])


def generated_text(task: str, length: int, seed: int) -> str:
    """One document of `task`, prompt and answer: about `length` tokens of dsa-nano's tokenizer before the answer.

    Raises:
        InputError: `length` has no room for the task.
    """
    try:
        (document,) = generators(tasks_dir()).generate(task, length=length, count=1, seed=seed)
    except ValueError as error:
        raise InputError(f"a {task} document of {length} tokens: {error}") from error
    return f"{document.prompt}{document.target}"


@cache
def generators(tasks: Path) -> ModuleType:
    """The package documents/ in a folder of task files, loaded by its path: it lies elsewhere in a wheel."""
    path = tasks / "documents" / "__init__.py"
    name = f"evalkit_documents:{path}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load {path}")
    # A package's modules look it up by name while it is being executed.
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
