"""What is there: formats, what this machine's kernels read, and lm-eval itself."""

import os
import sys
from typing import Annotated

import typer

from evalkit.commands.options import CRASH

app = typer.Typer()


@app.command()
def formats() -> None:
    """List the formats of KV rows and of indexer keys, and what a token costs in each layer.

    Example: evalkit formats
    """
    from rich.console import Console
    from rich.table import Table

    from evalkit import kv

    bf16, served = kv.get("bf16").row_bytes, kv.index.get(kv.index.OPTIONS["fp8"]).key_bytes
    rows = Table(
        *("KV row", "bytes", "of bf16", f"+ {served}", "scales", "what"), box=None, padding=(0, 2, 0, 0)
    )
    for row_format in map(kv.get, kv.names()):
        rows.add_row(
            row_format.name,
            str(row_format.row_bytes),
            f"{row_format.row_bytes / bf16:.0%}",
            str(row_format.row_bytes + served),
            "given" if row_format.uses_scales else "none",
            row_format.what,
        )
    options = {name: option for option, name in kv.index.OPTIONS.items()}
    keys = Table(*("indexer key", "bytes", "index=", "what"), box=None, padding=(0, 2, 0, 0))
    for key_format in map(kv.index.get, kv.index.names()):
        option = options.get(key_format.name, "model")
        keys.add_row(key_format.name, str(key_format.key_bytes), option, key_format.what)
    for table in (rows, keys):
        table.columns[0].no_wrap = True
        Console().print(table)
        print()
    print(f"Bytes are of one token in one layer; + {served} is with the key that index=fp8 stores.")
    print("scales: given ones (:one, :checkpoint, :calibrated) change the row; others it keeps in itself.")


@app.command()
def doctor(
    heads: Annotated[int, typer.Option(min=1, help="Attention heads on one GPU.")] = 128,
    topk: Annotated[int, typer.Option(min=1, help="Selected tokens of each query.")] = 2048,
    index_heads: Annotated[int, typer.Option(min=1, help="Indexer heads.")] = 64,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Prove each by a small attention against an exact one.")
    ] = True,
) -> None:
    """Say what each backend can read here and prove it, and why not where it cannot.

    Packages come first: found, tested from, tested to. A line on stderr names each whose version was not tested.
    Exits with 70 where a self-check fails.

    Example: evalkit doctor --heads 16 --topk 512
    """
    import torch
    from rich.console import Console
    from rich.table import Table

    from evalkit import doctor, environment
    from evalkit.progress import progress

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(
        f"torch {torch.__version__} on {environment.gpu_name(str(device)) or 'CPU'}, {os.cpu_count()} cores"
    )
    found = doctor.packages()
    table = Table("package", "found", "tested from", "to", box=None, padding=(0, 2, 0, 0))
    for package in found:
        table.add_row(package.tested.name, package.words, package.tested.oldest, package.tested.newest)
    Console().print(table)
    for package in found:
        if package.warning is not None:
            print(f"warning: {package.warning}", file=sys.stderr)
    if check and device.type == "cuda":
        print("kernels compile at their first use, up to 20 s each; --no-check skips that", file=sys.stderr)
    environment.exact_numerics()
    findings = []
    with progress("self-checks", doctor.count()) as advance:
        for finding in doctor.examine(device, heads, topk, index_heads, check=check):
            findings.append(finding)
            advance()
    print(f"with {heads} attention heads, top-{topk} and {index_heads} indexer heads")
    for title, keys in (("KV rows", False), ("indexer keys", True)):
        table = Table("read by", title, "here", "", box=None, padding=(0, 2, 0, 0))
        table.columns[1].no_wrap = True
        for finding in findings:
            if finding.of_keys is keys:
                table.add_row(finding.subject, finding.format, finding.how, finding.words)
        Console().print(table)
    if failed := [finding for finding in findings if finding.failed]:
        print(f"evalkit: {len(failed)} self-checks FAILED", file=sys.stderr)
        raise typer.Exit(CRASH)


@app.command(
    "lm-eval",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
def lm_eval(
    arguments: Annotated[list[str] | None, typer.Argument(help="What lm-eval's own command takes.")] = None,
) -> None:
    """Run lm-eval itself, with the model `evalkit` and the tasks of evalkit known to it.

    Example: evalkit lm-eval run --model evalkit --model_args pretrained=dsa-nano --tasks gsm8k --limit 8
    """
    from evalkit.evaluate.lm import lm_eval_main

    lm_eval_main(arguments or [])
