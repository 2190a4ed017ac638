"""The datasets that the task files read from a folder: `--metadata '{"data": "FOLDER"}'`, or `data` in a run's config.

Without a folder gsm8k comes from the hub; key-value retrieval is not there.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict

from evalkit.errors import InputError

GSM8K = "https://github.com/openai/grade-school-math, grade_school_math/data/{split}.jsonl"
KV = "https://github.com/nelson-liu/lost-in-the-middle, kv_retrieval_data/kv-retrieval-75_keys.jsonl.gz"


def gsm8k(*, data: str | None = None, **_: Any) -> dict[str, Dataset] | DatasetDict:
    """Splits train and test, from gsm8k_train.jsonl and gsm8k_test.jsonl in `data` or from the hub.

    Raises:
        InputError: neither is there.
    """
    if data is not None:
        return {
            split: Dataset.from_list(
                _rows(data, f"gsm8k_{split}.jsonl", GSM8K.format(split=split), ("question", "answer"))
            )
            for split in ("train", "test")
        }
    try:
        return datasets.load_dataset("openai/gsm8k", "main")
    except (OSError, ValueError) as error:
        raise InputError(
            "gsm8k: openai/gsm8k cannot be had from the hub; give data=FOLDER with gsm8k_train.jsonl and "
            f"gsm8k_test.jsonl ({GSM8K.format(split='train')} and test.jsonl): {str(error).splitlines()[0]}"
        ) from error


def key_values(*, data: str | None = None, **_: Any) -> dict[str, Dataset]:
    """Split test of kv_retrieval_75.jsonl.gz in `data`: 75 pairs of UUIDs a document, and one of their keys.

    Raises:
        InputError: no folder is given, or the file is not there.
    """
    name = "kv_retrieval_75.jsonl.gz"
    if data is None:
        raise InputError(f"key-value retrieval needs data=FOLDER with {name} (from {KV})")
    rows = []
    for row in _rows(data, name, KV, ("ordered_kv_records", "key", "value")):
        pairs = ",\n ".join(f'"{key}": "{value}"' for key, value in row["ordered_kv_records"])
        rows.append({"pairs": f"{{{pairs}}}", "key": row["key"], "value": row["value"]})
    return {"test": Dataset.from_list(rows)}


def _rows(folder: str, name: str, source: str, keys: tuple[str, ...]) -> list[dict[str, Any]]:
    path = Path(folder) / name
    try:
        text = (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode()
    except FileNotFoundError:
        raise InputError(f"no {name} in data={folder}: put it there (from {source})") from None
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}; take it from {source}") from None
    rows = []
    # Not splitlines(): JSON strings may hold U+2028 and other line ends of Unicode as they are.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path} line {number} is not JSON: {error}; take it from {source}") from None
        if not isinstance(row, dict) or any(key not in row for key in keys):
            raise InputError(f"{path} line {number} wants the keys {', '.join(keys)}; take it from {source}")
        rows.append(row)
    if not rows:
        raise InputError(f"{path} is empty: take it from {source}")
    return rows
