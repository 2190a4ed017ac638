"""Loads a checkpoint as a transformers model with the sparse MLA path grafted on."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from evalkit import environment, kv
from evalkit.candidate import Candidate
from evalkit.errors import InputError
from evalkit.kv import Scales
from evalkit.model.graft import ARCHITECTURES, Graft

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


def load(
    checkpoint: str | Path,
    candidate: Candidate | str = "bf16@reference",
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    scales: Mapping[int, Scales] | None = None,
) -> Any:
    """A transformers `…ForCausalLM` whose attention stores and reads its cache as `candidate` says.

    Args:
        checkpoint: directory of a DeepSeek-V3.2 or GLM-MoE-DSA checkpoint, or an embedded one's name.
        candidate: see `evalkit.candidate`. Without a backend, the first that can run on `device`.
        device: default: the GPU where there is one.
        dtype: default: bfloat16 on a GPU. On a CPU, where bf16 products are many times slower, the weights compute
            in float32 with query, latent, rope and attention output rounded to bf16; an explicit float32 rounds
            nothing.
        scales: layer -> Scales, for `calibrated`.

    Returns:
        The model in eval mode. `forward` and `generate` work as always; `model.evalkit` is its `Graft`. TF32 and
        reduced-precision sums are off from here on, in the whole process.

    Raises:
        InputError: the checkpoint, the candidate or the scales do not fit; nothing has been loaded.
    """
    wanted = Candidate.parse(candidate) if isinstance(candidate, str) else candidate
    directory = resolve_checkpoint(checkpoint)
    place, compute, rounding = placement(device, dtype)
    if wanted.scales == "calibrated" and scales is None:
        raise InputError(
            f"{candidate}: calibrated scales are not stored anywhere; pass scales={{layer: Scales}}"
        )
    if wanted.scales == "checkpoint":
        scales = kv.from_checkpoint(directory)

    environment.exact_numerics()
    if "quantization_config" in read_json(directory / "config.json"):
        from evalkit.model.stream import load_blocks

        model = load_blocks(directory, place, compute)
    else:
        model = _weights_of(directory, {"dtype": compute, "attn_implementation": "eager"}).to(place).eval()
    return graft(model, wanted, scales=scales, rounding=rounding)


def load_reference(
    checkpoint: str | Path, device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> Any:
    """As `load`, on bf16@reference, with a bar only on a terminal: what commands measure with."""
    from transformers.utils.logging import disable_progress_bar

    if not sys.stderr.isatty():
        disable_progress_bar()  # transformers' own, of loading weights
    return load(checkpoint, "bf16@reference", device=device, dtype=dtype)


def placement(
    device: str | torch.device | None, dtype: torch.dtype | None
) -> tuple[torch.device, torch.dtype, torch.dtype | None]:
    """Where a model lies, what it computes in, and what its rows are rounded to: see `load`.

    Raises:
        InputError: torch does not see the device.
    """
    place = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    if place.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {place} was asked for and torch sees no GPU: device=cpu runs here")
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {place} was asked for and torch sees {torch.cuda.device_count()} GPUs")
    compute = dtype if dtype is not None else torch.bfloat16 if place.type == "cuda" else torch.float32
    rounding = torch.bfloat16 if dtype is None and place.type == "cpu" else None
    return place, compute, rounding


def graft(
    model: Any,
    candidate: Candidate | str = "bf16@reference",
    scales: Mapping[int, Scales] | None = None,
    rounding: torch.dtype | None = None,
) -> Any:
    """Graft the path onto a loaded model and make `candidate` its own; returns the model."""
    model.evalkit = Graft(model, rounding)
    model.evalkit.scales = dict(scales or {})
    model.evalkit.candidate = model.evalkit.resolve(candidate)
    model.evalkit.new_cache()  # refuses missing scales now, not at the first token
    return model


def read_config(directory: Path) -> Any:
    """config.json as transformers' configuration of its architecture."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(directory)
    except (StrictDataclassError, OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{directory}/config.json is no configuration of a model: {error}") from None


def _weights_of(directory: Path, options: dict[str, Any]) -> Any:
    """The model as transformers loads it; a tensor that is missing or of another shape is refused.

    transformers would fill it with random numbers and warn, in a table that says less than one line here.
    """
    from transformers import AutoModelForCausalLM

    config = read_config(directory)
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(_is_no_report)  # a level would set transformers to checking plans that nothing uses
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            directory, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    finally:
        logger.removeFilter(_is_no_report)
    if found["mismatched_keys"]:
        name, stored, wanted = min(found["mismatched_keys"])
        raise InputError(
            f"{directory} stores {name} as {list(stored)}, and its config.json makes it {list(wanted)}"
        )
    if missing := sorted(found["missing_keys"]):
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(
            f"{directory} lacks the tensor {missing[0]}{others}, which its config.json calls for"
        )
    return model


def _is_no_report(record: logging.LogRecord) -> bool:
    """Whether a line of transformers' log is not its table of tensors, which `_weights_of` says in one line."""
    return "LOAD REPORT" not in record.getMessage()


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
