"""What a checkpoint's directory says: where it is, its configuration, and which files hold its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from evalkit.errors import InputError
from evalkit.model.graft import ARCHITECTURES

EMBEDDED = Path(__file__).parent.parent / "checkpoints"


def resolve_checkpoint(checkpoint: str | Path) -> Path:
    """The directory of a checkpoint: a path, or the name of one that evalkit carries (`dsa-nano`).

    Raises:
        InputError: there is no such directory, it has no config.json of a supported architecture, or a weights
            file is missing or truncated; the line names the file.
    """
    known = sorted(path.name for path in EMBEDDED.iterdir() if path.is_dir())
    directory = EMBEDDED / checkpoint if str(checkpoint) in known else Path(checkpoint)
    if not directory.is_dir():
        raise InputError(
            f"no checkpoint at {checkpoint}: give a directory with config.json, or one of: {', '.join(known)}"
        )
    if directory.name in ("", ".."):
        directory = directory.resolve()  # records name a checkpoint by its directory
    config = read_json(directory / "config.json")
    if config.get("model_type") not in ARCHITECTURES:
        raise InputError(
            f"{directory}/config.json has model_type {config.get('model_type')!r}; "
            f"evalkit runs {', '.join(ARCHITECTURES)}"
        )
    for name, wanted in (("kv_lora_rank", 512), ("qk_rope_head_dim", 64), ("index_head_dim", 128)):
        if config.get(name, wanted) != wanted:
            raise InputError(
                f"{directory}/config.json has {name} {config[name]}; the row formats hold {wanted}"
            )
    for file in weight_files(directory):
        _check_weights(file)
    return directory


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint, as its index lists them. Raises InputError where one is missing."""
    index = directory / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        listed = read_json(index).get("weight_map")
        if not isinstance(listed, dict) or not listed:
            raise InputError(f"{index} has no weight_map: it must say which file holds which tensor")
        names = sorted(set(listed.values()))
    for name in names:
        if not (directory / name).is_file():
            raise InputError(f"{directory} lacks the weights file {name}")
    return [directory / name for name in names]


def read_config(directory: Path) -> Any:
    """config.json as transformers' configuration of its architecture."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(directory)
    except (StrictDataclassError, OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{directory}/config.json is no configuration of a model: {error}") from None


def read_json(file: Path) -> dict[str, Any]:
    try:
        parsed = json.loads(file.read_text())
    except FileNotFoundError:
        raise InputError(f"{file.parent} is not a checkpoint: it has no {file.name}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise InputError(f"{file} holds a {type(parsed).__name__}, not an object")
    return parsed


def _check_weights(file: Path) -> None:
    try:
        with safe_open(file, framework="pt"):
            pass
    except SafetensorError as error:
        raise InputError(f"{file} is truncated or not safetensors: {error}") from None
