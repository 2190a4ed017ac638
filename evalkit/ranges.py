"""How large latent and rope are in every layer of a checkpoint, and the same as a range profile: `evalkit ranges`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from evalkit.calibrate import read_prompts
from evalkit.errors import InputError
from evalkit.evaluate.documents import range_documents
from evalkit.evaluate.lm import EvalkitLM
from evalkit.model.checkpoint import resolve_checkpoint
from evalkit.model.load import load_reference
from evalkit.model.ranges.profile import PARTS, to_toml
from evalkit.model.ranges.spread import measure
from evalkit.progress import progress
from evalkit.records import write_whole

COLUMNS = ("rms", "max", "tail", "zero channels")


def show(
    checkpoint: str,
    *,
    prompts: Path | None = None,
    profile_out: Path | None = None,
    device: str | None = None,
) -> None:
    """Measure a checkpoint's ranges, print them as a table, and write them to `profile_out` where it is given.

    Args:
        checkpoint: a directory, or an embedded checkpoint's name.
        prompts: a file, see `read_prompts`; None generates the documents that a run measures a profile on.
        profile_out: a TOML file that must not exist yet.
        device: as torch names it; None takes the GPU where there is one.

    Raises:
        InputError: something given is not usable, or a layer stores only zeros; nothing has been written.
    """
    directory = resolve_checkpoint(checkpoint)
    if profile_out is not None and profile_out.exists():
        raise InputError(f"{profile_out} exists: name another file, a profile is not overwritten")
    if profile_out is not None and not profile_out.absolute().parent.is_dir():
        raise InputError(f"{profile_out.absolute().parent} is no directory to write {profile_out.name} in")
    texts = None if prompts is None else read_prompts(prompts)
    model = load_reference(directory, device)
    lm = EvalkitLM(model)
    if texts is None:
        documents = range_documents(lm.tok_encode, lm.max_length)
    else:
        documents = [torch.tensor(lm.tok_encode(text)[: lm.max_length]) for text in texts]
    with progress("ranges", len(documents)) as advance:
        spreads = measure(model, documents, advance)
    found = [{part: spread[part].range() for part in PARTS} for spread in spreads]

    table = Table("layer", *(f"{part} {column}" for part in PARTS for column in COLUMNS))
    for layer, (spread, figures) in enumerate(zip(spreads, found, strict=True)):
        cells = [str(layer)]
        for part in PARTS:
            one = figures[part]
            cells += [*(f"{value:.3g}" for value in (one.rms, one.max, one.tail))]
            cells.append(str(spread[part].zero_channels))
        table.add_row(*cells)
    Console(width=None if sys.stdout.isatty() else 132).print(table)
    tokens = spreads[0]["latent"].tokens
    print(f"over {tokens:,} tokens; tail is the standard deviation over channels of ln(channel rms)")
    if profile_out is not None:
        write_whole(profile_out, to_toml(found, f"{directory.name}, measured over {tokens:,} tokens."))
        print(profile_out)
