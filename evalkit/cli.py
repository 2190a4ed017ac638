"""The commands. Each one reads its input, calls one function, and prints where the result lies."""

import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Annotated, Self

import typer

from evalkit import __version__
from evalkit.config import RunConfig
from evalkit.errors import InputError

BAD_INPUT = 64
ALERT = 20
CRASH = 70
INTERRUPTED = 130
CLICK_USAGE = 2

app = typer.Typer(
    name="evalkit",
    help="What a KV-cache format costs in accuracy against bf16, where the loss arises, and on which tasks it shows.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class CalibrationMethod(StrEnum):
    """What of a layer's |x| its scale is made to fit."""

    max = "max"
    percentile = "percentile"


Config = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="A TOML file; without it, the defaults.")
]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Over the file; repeatable.")
]


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(f"evalkit {__version__}")
        raise typer.Exit


@app.command()
def run(
    config: Config = None,
    set_: Set = None,
    policy: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The policy the run is for, stored before anything is scored."),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with this run, from its last whole stage.")
    ] = None,
) -> None:
    """Compare layers, score tasks, write the report.

    Example: evalkit run --config configs/eval-fp8.toml --set task_documents=48
    """
    if resume is not None and (config is not None or set_ or policy is not None):
        raise InputError(
            f"--resume {resume} takes its configuration from the run: give neither --config nor --set nor --policy"
        )
    asked = _resumed(resume) if resume is not None else RunConfig.load(config, set_ or ())
    if policy is not None:
        asked = asked.with_values(policy=policy)
    from evalkit import pipeline

    print(pipeline.run(asked, resume))


@app.command()
def layers(config: Config = None, set_: Set = None) -> None:
    """Compare every layer with the reference, without tasks.

    Example: evalkit layers --set candidates=bf16@reference,fp8_e4m3:one@reference
    """
    asked = RunConfig.load(config, set_ or ())
    from evalkit import pipeline

    print(pipeline.run(asked.with_values(stages=("layers",))))


@app.command()
def tasks(config: Config = None, set_: Set = None) -> None:
    """Score tasks on the same documents for every candidate.

    Example: evalkit tasks --config configs/eval-fp8.toml --set task_documents=100
    """
    asked = RunConfig.load(config, set_ or ())
    from evalkit import pipeline

    print(pipeline.run(asked.with_values(stages=("tasks",))))


@app.command()
def report(
    run: Annotated[
        Path | None, typer.Argument(help="A run directory; without it, the newest under runs/.")
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option(metavar="FILE.zip", help="Write report, records and samples as one file.")
    ] = None,
) -> None:
    """Write a run's report.html and summary.md again, and print its tables.

    Example: evalkit report runs/2026-01-31T12-00-00Z-eval-fp8
    """
    from evalkit.report import bundle as bundles
    from evalkit.report import html, markdown, terminal

    path = run if run is not None else _newest(Path("runs"))
    if bundle is not None:
        print(f"{bundles.write(path, bundle)}  {bundle}")
        return
    markdown.write(path)
    page = html.write(path)
    terminal.show(path)
    print(page)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="A new directory.")],
) -> None:
    """Write a run's records as Parquet, one file a kind.

    Example: evalkit export runs/2026-01-31T12-00-00Z-eval-fp8 --out parquet
    """
    from evalkit.report.export import export

    for path in export(run, out):
        print(path)


history = typer.Typer(help="Runs kept for the dashboard.", no_args_is_help=True)
app.add_typer(history, name="history")
Store = Annotated[Path, typer.Option(metavar="DIR", help="The history's directory.")]
DEFAULT_STORE = Path("history")


@history.command()
def add(run: Annotated[Path, typer.Argument(help="A run directory.")], store: Store = DEFAULT_STORE) -> None:
    """Add a run that has ended; again, to replace what was known of it.

    Example: evalkit history add runs/2026-01-31T12-00-00Z-eval-fp8 --store history
    """
    from evalkit.report.history import History

    print(f"{History(store, create=True).add(run).name} is in {store}")


@history.command("list")
def list_(store: Store = DEFAULT_STORE) -> None:
    """List the runs, oldest first.

    Example: evalkit history list --store history
    """
    from evalkit.report.history import History, StoredRun

    for run in History(store).read(StoredRun):
        print(
            f"{run.started_utc}  {(run.commit_sha or 'unknown')[:8]:8}  {run.checkpoint} on {run.gpu}  {run.name}"
        )


@history.command()
def prune(
    keep: Annotated[int, typer.Option(help="How many of the newest runs stay.")], store: Store = DEFAULT_STORE
) -> None:
    """Remove all but the newest runs, with their reports.

    Example: evalkit history prune --keep 365 --store history
    """
    from evalkit.report.history import History

    print(f"removed {len(History(store).prune(keep))} runs")


@app.command()
def dashboard(
    store: Annotated[Path, typer.Argument(help="The history's directory.")] = DEFAULT_STORE,
    out: Annotated[Path, typer.Option(metavar="DIR", help="The site's directory.")] = Path("site"),
    expected: Annotated[
        float, typer.Option(metavar="HOURS", min=0, help="A run is missing after these; 0 expects none.")
    ] = 36,
    repository: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A git checkout, to name the commits between nights.")
    ] = None,
) -> None:
    """Write the history as a static site. Exit 20 where a verdict or level changed or a run is missing.

    Example: evalkit dashboard history --out site --repository .
    """
    from evalkit.report import dashboard

    site = dashboard.write(store, out, expected_h=expected, repository=repository)
    for alert in site.alerts:
        print(f"evalkit: {alert}", file=sys.stderr)
    print(site.page)
    if site.alerts:
        raise typer.Exit(ALERT)


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
    from evalkit.model.synth import changes_of, synth, synth_bytes, synth_config
    from evalkit.progress import progress

    config = synth_config(dims, layers, changes_of(set_ or ()), dtype)
    with progress("MB", synth_bytes(config) // 1_000_000) as advance:
        print(synth(out, config, seed, advance=advance))


@app.command()
def gate(
    run: Annotated[Path, typer.Argument(help="A run directory, or the bundle of one.")],
    policy: Annotated[Path, typer.Option(metavar="FILE", help="What to judge by.")],
    against: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Another run, to take the baselines' samples from.")
    ] = None,
) -> None:
    """Judge a finished run. Exit 0 NON-INFERIOR, 10 WORSE, 11 INCONCLUSIVE, 12 ANOMALOUS.

    Example: evalkit gate runs/2026-01-31T12-00-00Z-run --policy tasks/policies/default.toml
    """
    from evalkit.gate import policy as policies
    from evalkit.gate import verdict
    from evalkit.report import bundle, html, junit, markdown, terminal

    limits = policies.load(policy)
    with ExitStack() as stack:
        path = stack.enter_context(bundle.opened(run)) if run.is_file() else run
        judgement = verdict.judge(path, limits, against)
        verdict.store(path, judgement)
        terminal.show_verdicts(path)
        if path is run:  # a bundle stays as it was signed
            for write in (markdown.write, html.write, junit.write):
                print(write(run))
    raise typer.Exit(judgement.exit_code)


@app.command()
def plan(
    policy: Annotated[Path, typer.Argument(help="A policy.")],
    discordance: Annotated[
        float | None, typer.Option(help="Share of documents whose outcome differs, as 0.02.")
    ] = None,
    run: Annotated[
        Path | None, typer.Option(metavar="RUN", help="A run, to measure discordance and seconds by.")
    ] = None,
) -> None:
    """Say how many documents, and how many hours, a policy's decision needs.

    Example: evalkit plan tasks/policies/default.toml --discordance 0.02
    """
    from evalkit.gate import planning
    from evalkit.gate import policy as policies

    asked = policies.load(policy)
    for line in planning.words(asked, planning.plan(asked, discordance, run)):
        print(line)


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 done, 64 bad input, 70 crash, 130 interrupted.

    64 and 70 collide with none of Python's 1, the command-line library's 2 and make's 2.
    """
    with _ExitCode() as code:
        app(argv)
    sys.exit(code.value)


class _ExitCode:
    """Turns what ends a command into its exit code, printing what a user needs to see."""

    value = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        match error:
            case None:
                self.value = 0
            case SystemExit():
                self.value = error.code if isinstance(error.code, int) else int(error.code is not None)
                if self.value == CLICK_USAGE:
                    self.value = BAD_INPUT
            case InputError():
                print("evalkit: " + " ".join(str(error).split()), file=sys.stderr)
                self.value = BAD_INPUT
            case KeyboardInterrupt():
                self.value = INTERRUPTED
            case _:
                traceback.print_exception(kind, error, trace)
                self.value = CRASH
        return True


def _resumed(path: Path) -> RunConfig:
    from evalkit.records import RunDirectory

    return RunConfig.from_json(RunDirectory(path).config)


def _newest(out: Path) -> Path:
    found = sorted(path.parent for path in out.glob("[!.]*/run.json"))
    if not found:
        raise InputError(f"no run under {out}/: `evalkit run` makes one, or name a run directory")
    return found[-1]


if __name__ == "__main__":
    main()
