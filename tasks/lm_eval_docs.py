"""The datasets that the task files name: documents generated here, in memory, from a seed.

lm-eval loads this file by its path, beside the task files, wherever tasks/ lies; documents/ is the one beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from datasets import Dataset
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

from evalkit.errors import InputError
from evalkit.evaluate.documents import generators


def test_split(*, generate: Mapping[str, Any], seed: int, documents: int, **_: Any) -> dict[str, Dataset]:
    """Documents of one task as lm-eval's `custom_dataset` wants them.

    `generate` stands in the task file's dataset_kwargs: the generator, the length in tokens and the generator's
    options. Where one is a list, documents take its elements in turn, so that the first few have all of them.
    `seed` and `documents` stand in the metadata, where `--metadata` reaches them; lm-eval adds the model's arguments
    to these, which change nothing.

    Raises:
        InputError: what `generate` says cannot be made.
    """
    if isinstance(documents, bool) or not isinstance(documents, int) or documents < 1:
        raise InputError(f"documents is {documents!r}: want a whole number of at least 1")
    rungs = _rungs(generate)
    make = generators(Path(__file__).resolve().parent).document
    rows = []
    for index in range(documents):
        options = dict(rungs[index % len(rungs)])
        try:
            made = make(options.pop("generator"), options.pop("length"), seed, index, **options)
        except ValueError as error:
            raise InputError(f"document {index}: {error}") from error
        # `until` takes the closing full stop off a generation, and lm-eval's whitespace filter the leading space.
        queries = [{"prompt": p, "answer": t.strip().removesuffix(".")} for p, t in made.queries]
        rows.append(queries[-1] | {"queries": queries, "rung": index % len(rungs)})
    return {"test": Dataset.from_list(rows)}


def continuation(doc: Mapping[str, Any]) -> str:
    """The answer as it follows the prompt, for tasks that score it without generating."""
    return f" {doc['answer']}."


def _rungs(generate: Mapping[str, Any]) -> list[dict[str, Any]]:
    for key in ("generator", "length"):
        if key not in generate:
            raise InputError(f"generate says no {key}; it says {', '.join(generate) or 'nothing'}")
    sizes = {key: len(value) for key, value in generate.items() if isinstance(value, list)}
    if len(set(sizes.values())) > 1 or 0 in sizes.values():
        told = ", ".join(f"{key} {size}" for key, size in sizes.items())
        raise InputError(f"lists in generate must be equally long, and not empty: {told}")
    count = next(iter(sizes.values()), 1)
    return [
        {key: value[rung] if isinstance(value, list) else value for key, value in generate.items()}
        for rung in range(count)
    ]


class EveryQuery(ConfigurableTask):
    """Asks every query of a document, each after the right answers to those before it; all must be right."""

    def __init__(self, config: dict[str, Any]) -> None:
        # lm-eval leaves in the key that named this class, and then knows no such key.
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    def construct_requests(self, doc: dict[str, Any], ctx: str, **kwargs: Any) -> list[Instance]:
        del ctx  # the last query's prompt
        return [
            Instance(
                request_type="generate_until",
                doc=doc,
                arguments=(query["prompt"], deepcopy(self.config.generation_kwargs)),
                idx=number,
                metadata=kwargs["metadata"],
            )
            for number, query in enumerate(doc["queries"])
        ]

    def process_results(self, doc: dict[str, Any], results: list[str]) -> dict[str, float]:
        right = [query["answer"] == said for query, said in zip(doc["queries"], results, strict=True)]
        return {"exact_match": float(all(right))}
