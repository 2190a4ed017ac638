"""Scales from prompts, written as a checkpoint would carry them: `evalkit calibrate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from evalkit import __version__, environment, kv
from evalkit.compare import layers
from evalkit.errors import InputError
from evalkit.evaluate.documents import Encode, calibration_documents, range_documents
from evalkit.evaluate.lm import EvalkitLM
from evalkit.evaluate.texts import text_of_line
from evalkit.kv import Scales
from evalkit.kv.scale_files import refuse_file, refuse_overlay, write_overlay, write_scales
from evalkit.model.checkpoint import resolve_checkpoint
from evalkit.model.load import load_reference
from evalkit.model.ranges import rescale
from evalkit.model.ranges.profile import load_profile
from evalkit.progress import progress

FORMAT = "fp8_e4m3"  # whose one scale for latent and rope a checkpoint's k_scale is


def calibrate(
    checkpoint: str,
    *,
    out: Path | None,
    into: Path | None,
    percentile: float = 100,
    prompts: Path | None = None,
    tokens: int = 2048,
    seed: int = 0,
    profile: str = "native",
    parts: Sequence[str] = layers.PARTS,
    device: str | None = None,
    replace: bool = False,
) -> dict[int, Scales]:
    """Calibrate every layer's scale and write it to the file `out`, or into `into`, an overlay of the checkpoint.

    Args:
        checkpoint: a directory, or an embedded checkpoint's name.
        out: a safetensors file to write; None where `into` is given.
        into: a directory to make; None where `out` is given.
        percentile: of |x|, of latent and of rope, that is not to saturate; 100 is the maximum.
        prompts: a file, see `read_prompts`; None generates the documents that a run's `:calibrated` scales come from.
        tokens: of each prompt, the first ones; of a generated document, its length.
        seed: of the generated documents.
        profile: the ranges that the checkpoint is given first, as a run under that profile gives it.
        parts: which of latent and rope the scale is to fit; vLLM #42956 fitted the latent alone.
        device: as torch names it; None takes the GPU where there is one.
        replace: whether an existing `out` or overlay is replaced.

    Raises:
        InputError: something given is not usable; nothing has been written.
    """
    directory = resolve_checkpoint(checkpoint)
    if not 0 < percentile <= 100:
        raise InputError(f"--percentile is {percentile:g}: above 0 and at most 100 is right")
    ranges = load_profile(profile)
    if into is not None:
        refuse_overlay(directory, into, replace=replace)
    if out is not None:
        refuse_file(out, replace=replace)
    texts = None if prompts is None else read_prompts(prompts)
    model = load_reference(directory, device)
    lm = EvalkitLM(model)
    length = min(tokens, lm.max_length)
    if texts is None:
        documents = calibration_documents(lm.tok_encode, length, seed)
    else:
        documents = _encoded(lm.tok_encode, texts, length)
    rescale.apply(model, ranges, range_documents(lm.tok_encode, lm.max_length))
    passes = int(model.config.num_hidden_layers) * len(documents)
    with progress("calibrate", passes) as advance:
        scales = layers.calibrate(model, documents, kv.get(FORMAT), advance, percentile, parts)
    metadata = {
        "method": "max" if percentile == 100 else f"percentile {percentile:g}",
        "kv_format": FORMAT,
        "fitted": ", ".join(parts),
        "profile": profile,
        "prompts": f"generated, seed {seed}" if prompts is None else prompts.name,
        "documents": str(len(documents)),
        "tokens": str(sum(map(len, documents))),
        "checkpoint": directory.name,
        "checkpoint_sha256": environment.sha256(directory),
        "evalkit": __version__,
    }
    if into is not None:
        write_overlay(directory, into, scales, metadata, replace=replace)
    if out is not None:
        write_scales(out, scales, metadata, replace=replace)
    return scales


def read_prompts(file: Path) -> list[str]:
    """A file's prompts, one a line; a line of a `.jsonl` file is a string or an object with `text` or `prompt`.

    Raises:
        InputError: no such file, no text in it, or a line of another form.
    """
    try:
        lines = file.read_text(encoding="utf-8").split("\n")  # as in evaluate/texts.py
    except OSError as error:
        raise InputError(f"--prompts: {file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"--prompts: {file} is not UTF-8 text: {error}") from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if file.suffix == ".jsonl":
        texts = [text_of_line(line, f"--prompts: {file}, line {number}") for number, line in numbered]
    else:
        texts = [line for _, line in numbered]
    if not texts:
        raise InputError(f"--prompts: {file} holds no prompt: one a line is needed")
    return texts


def _encoded(encode: Encode, texts: Sequence[str], length: int) -> list[Tensor]:
    return [torch.tensor(encode(text)[:length]) for text in texts]
