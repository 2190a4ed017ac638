"""Loads a checkpoint as a transformers model with the sparse MLA path grafted on."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from evalkit import environment, kv
from evalkit.candidate import Candidate
from evalkit.errors import InputError
from evalkit.kv import Scales
from evalkit.model.checkpoint import read_config, read_json, resolve_checkpoint
from evalkit.model.graft import graft
from evalkit.model.placement import placement
from evalkit.model.weights.stream import load_blocks


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
