"""Checkpoints: their scales, their ranges, and random ones."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from evalkit.config import RunConfig
from evalkit.errors import InputError

app = typer.Typer()


class CalibrationMethod(StrEnum):
    """What of a layer's |x| its scale is made to fit."""

    max = "max"
    percentile = "percentile"


class CalibrationPart(StrEnum):
    """What shares a per-tensor scale."""

    latent = "latent"
    rope = "rope"


@app.command()
def calibrate(
    checkpoint: Annotated[
        str, typer.Option(metavar="DIR", help="A checkpoint's directory, or an embedded one's name.")
    ] = "dsa-nano",
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The file to write.  [default: kv-scales.safetensors]")
    ] = None,
    into: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Make this directory instead: the checkpoint, by links, with its scales."
        ),
    ] = None,
    method: Annotated[CalibrationMethod, typer.Option(help="What of |x| is to fit.")] = CalibrationMethod.max,
    percentile: Annotated[
        float | None,
        typer.Option(
            help="With --method percentile: the share of |x| that must not saturate.  [default: 99.99]"
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Prompts, one a line, or JSON lines; without it, generated documents."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each prompt, at most.")] = 2048,
    seed: Annotated[int, typer.Option(min=0, help="Of the generated documents.")] = 0,
    profile: Annotated[
        str, typer.Option(help="Ranges that the checkpoint is given first, as in `--set profile=`.")
    ] = "native",
    part: Annotated[
        list[CalibrationPart] | None,
        typer.Option(help="What the scale is to fit; once for each.  [default: latent and rope]"),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what was written before.")] = False,
) -> None:
    """Write per-layer scales for fp8_e4m3, one for latent and rope, as a checkpoint carries them.

    Example: evalkit calibrate --checkpoint dsa-nano --into dsa-nano-scaled --method percentile --percentile 99.99
    """
    if out is not None and into is not None:
        raise InputError("--out and --into: give one, a file or a directory to make")
    if method is CalibrationMethod.max and percentile is not None:
        raise InputError(f"--percentile {percentile:g} needs --method percentile")
    RunConfig(device=device)  # refuses a device that is none
    if into is None and out is None:
        out = Path("kv-scales.safetensors")
    from evalkit.calibrate import calibrate

    scales = calibrate(
        checkpoint,
        out=out,
        into=into,
        percentile=100 if method is CalibrationMethod.max else 99.99 if percentile is None else percentile,
        prompts=prompts,
        tokens=tokens,
        seed=seed,
        profile=profile,
        parts=[one.value for one in part or CalibrationPart],
        device=device,
        replace=force,
    )
    values = [layer.latent for layer in scales.values()]
    print(f"scales {min(values):.3g} to {max(values):.3g} over {len(values)} layers")
    print(into if into is not None else out)


@app.command()
def ranges(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint's directory, or an embedded one's name.")],
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Prompts, one a line, or JSON lines; without it, generated documents."
        ),
    ] = None,
    profile_out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write them as a range profile, for --set profile=FILE."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.")] = None,
) -> None:
    """Measure how large latent and rope are in every layer of a checkpoint.

    Example: evalkit ranges dsa-nano --profile-out own.toml
    """
    RunConfig(device=device)  # refuses a device that is none
    from evalkit.ranges import show

    show(checkpoint, prompts=prompts, profile_out=profile_out, device=device)


@app.command()
def synth(
    out: Annotated[Path, typer.Argument(help="The checkpoint's directory, to be made.")],
    dims: Annotated[str, typer.Option(help="deepseek-v3.2, glm-5, nano or nano-glm.")] = "deepseek-v3.2",
    layers: Annotated[int | None, typer.Option(help="Decoder layers; as published if not given.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=JSON", help="A key of config.json; repeatable.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the random weights.")] = 0,
    dtype: Annotated[str, typer.Option(help="fp8 (e4m3 in blocks of 128 x 128) or bf16.")] = "fp8",
) -> None:
    """Write a checkpoint of random weights with a published one's sizes and file layout.

    Example: evalkit synth /scratch/three-layers --dims deepseek-v3.2 --layers 3
    """
    from evalkit.model.synthetic.synth import changes_of, synth, synth_bytes, synth_config
    from evalkit.progress import progress

    config = synth_config(dims, layers, changes_of(set_ or ()), dtype)
    with progress("MB", synth_bytes(config) // 1_000_000) as advance:
        print(synth(out, config, seed, advance=advance))
