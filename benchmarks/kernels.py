"""Every format on every backend that reads it here: how far from exact attention, and how long a call takes.

    python -m benchmarks.kernels [--heads 128 --queries 64 --topk 2048 --slots 16384] [--also-selected] [--json FILE]

Times are medians over interleaved repeats; compare within one run only. `device` sums the kernels and copies that one
call runs on the GPU, as CUPTI reports them (on a CPU it is the time of the call); `host` is the time until a call
returns; `bare` is the kernel alone, its plan and operands ready; `pass` reads and writes the rows that decoding touches
once, as bf16: the whole cache, or, of a larger one, the selected rows. Under the table each target says PASS or over,
and a ratio of whose case. Errors are relative L2 against exact attention on the same rows, read as the backend does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from evalkit import environment, kv
from evalkit.attention import backends
from evalkit.attention.backends import decoded, flashinfer, flashmla
from evalkit.attention.backends.reference import Reference
from evalkit.kv import RowFormat, Scales

SM_SCALE = 192**-0.5
SIZES = {
    "cuda": {"heads": 128, "queries": 64, "topk": 2048, "slots": 16384},
    "cpu": {"heads": 8, "queries": 4, "topk": 64, "slots": 512},
}
CALLS = 5  # of one task in a measurement
YARDSTICK = ("fp8_e4m3", "flashinfer", "native")
SELECTED_SLOTS = 262144  # more than the default sizes select, so that rows are decoded as they are selected
MARK = "spin_kernel"  # of torch.cuda._sleep, between the kernels of two tasks

COLUMNS = (
    *("format", "backend", "read", "B/token", "rel. L2", "worst query", "device ms", "bare ms", "x bare"),
    *("x fp8@flashinfer", "host ms", "plan ms", "decode ms", "eager ms", "pass ms", "x pass", "decoder"),
)

Call = Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One call's inputs, apart from the rows' format."""

    q_latent: Tensor  # [T, H, C] bf16
    q_rope: Tensor  # [T, H, R] bf16
    latent: Tensor  # [N, C] bf16
    rope: Tensor  # [N, R] bf16
    indices: Tensor  # [T, K] int32, all valid

    @classmethod
    def draw(cls, heads: int, queries: int, topk: int, slots: int, device: torch.device) -> Problem:
        """Rows whose sizes differ by two orders of magnitude, selected at random without repetition."""
        draw = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draw, device=device)

        size = torch.logspace(-2, 0, slots, device=device)[:, None]
        size = size[torch.randperm(slots, generator=draw, device=device)]
        chosen = [
            torch.randperm(slots, generator=draw, device=device)[:topk].sort().values for _ in range(queries)
        ]
        # The path too makes one query of both parts.
        query = torch.cat([normal(queries, heads, 512), normal(queries, heads, 64)], -1).bfloat16()
        return cls(
            q_latent=query[..., :512],
            q_rope=query[..., 512:],
            latent=(normal(slots, 512) * size).bfloat16(),
            rope=(normal(slots, 64) * size).bfloat16(),
            indices=torch.stack(chosen).int(),
        )


@dataclass(kw_only=True)
class Row:
    """One line of the table; None is n/a. Times are milliseconds of one call."""

    format: str
    backend: str
    read: str
    kernel: str
    bytes_per_token: int
    relative_l2: float
    worst_query_relative_l2: float
    device_ms: float
    host_ms: float
    bare_ms: float | None = None
    over_bare: float | None = None
    over_flashinfer_fp8: float | None = None
    plan_ms: float | None = None
    decode_ms: float | None = None
    decode_eager_ms: float | None = None
    pass_ms: float | None = None
    decode_over_pass: float | None = None
    decoder: str | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """A format on a backend, with its rows written."""

    format: RowFormat
    backend: backends.Backend
    read: str
    cache: Tensor
    scales: Scales
    problem: Problem

    @property
    def key(self) -> tuple[str, str, str]:
        return self.format.name, self.backend.name, self.read

    def attend(self) -> tuple[Tensor, Tensor]:
        x = self.problem
        return self.backend.attend(
            x.q_latent, x.q_rope, self.cache, self.format, x.indices, SM_SCALE, self.scales
        )

    def errors(self) -> tuple[float, float]:
        """Relative L2 against exact attention over all queries, and of the worst one."""
        got, x, reference = self.attend()[0].float(), self.problem, backends.get("reference")
        assert isinstance(reference, Reference)
        queries = x.q_latent.float(), x.q_rope.float()
        inputs = (*queries, self.cache, self.format, x.indices, SM_SCALE, self.scales)
        want = reference.attend(*inputs, reader=self.backend)[0]
        error, size = (y.flatten(1).norm(dim=-1) for y in (got - want, want))
        return float(error.norm() / size.norm()), float((error / size).max())

    def decode(self) -> tuple[Tensor, Tensor]:
        return decoded.decode(self.format, self.cache, self.problem.indices, self.scales)

    @property
    def decodes_whole(self) -> bool:
        return self.problem.indices.numel() >= len(self.problem.latent)

    def decode_eagerly(self) -> Tensor:
        """As `decode`, without a kernel for it."""
        planes, slots = self.format.byte_planes(self.cache), self.problem.indices.flatten()
        return decoded._eager(self.format, planes, None if self.decodes_whole else slots, self.scales)

    def decoder(self, device: torch.device) -> str:
        """What decodes: nothing where the rows are bf16 already."""
        if self.decode()[0].data_ptr() == self.cache.data_ptr():
            return "none"
        if device.type == "cpu" or self.format.name in decoded._EAGER:
            return "eager"
        return "compiled" if self.format.layout is None else "kernel"

    def pass_over_rows(self) -> Call:
        """Read and write once the rows that decoding touches: as bf16, or as float32 where they are wider."""
        rows = torch.cat([self.problem.latent, self.problem.rope], -1)
        if self.format.row_bytes > rows.shape[1] * rows.element_size():
            rows = rows.float()
        if self.decodes_whole:
            copy = torch.empty_like(rows)
            return lambda: copy.copy_(rows)
        index, out = self.problem.indices.flatten(), rows.new_empty(self.problem.indices.numel(), 576)
        return lambda: torch.index_select(rows, 0, index, out=out)

    def bare(self) -> tuple[Call | None, Call | None]:
        """The backend's kernel alone, and its planner, on what the case hands to it."""
        format, cache, indices, scales = self.format, self.cache, self.problem.indices, self.scales
        if self.read == "decoded":
            (cache, indices), format, scales = self.decode(), kv.get("bf16"), Scales()
        makers = {"flashinfer": _bare_flashinfer, "flashmla": _bare_flashmla}
        make = makers.get(self.backend.name)
        return (None, None) if make is None else make(self.problem, format, cache, indices, scales)


def _bare_flashinfer(
    x: Problem, format: RowFormat, cache: Tensor, indices: Tensor, scales: Scales
) -> tuple[Call, Call]:
    latent, rope, options = flashinfer._READS[format.name](format.planes(cache), scales)
    plan = flashinfer._Plan()
    lengths = plan.take(indices)
    wrapper = plan.prepared(indices, lengths, 0, x.q_latent, latent.dtype, SM_SCALE)
    slots = indices.flatten().contiguous()
    options |= {
        "out": x.q_latent.new_empty(x.q_latent.shape),
        "return_lse": True,
        "return_lse_base_on_e": True,
    }
    options["lse"] = x.q_latent.new_empty(x.q_latent.shape[:2], dtype=torch.float32)

    def run() -> Any:
        return wrapper.run(query=(x.q_latent, x.q_rope), kv_cache=(latent, rope), **options)

    return run, lambda: flashinfer._plan(slots, lengths, x.q_latent, latent.dtype, SM_SCALE)


def _bare_flashmla(
    x: Problem, format: RowFormat, cache: Tensor, indices: Tensor, _scales: Scales
) -> tuple[Call, None]:
    decodes = format.name in flashmla.DS_MLA
    queries, heads = x.q_latent.shape[:2]
    query = flashmla._query(x.q_latent, x.q_rope, queries, 64 if heads <= 64 else 128)
    slots = flashmla._padded(indices, queries, 64 if decodes else 128)
    call, rows = flashmla._decode if decodes else flashmla._prefill, format.planes(cache).rows
    return lambda: call(query, rows, slots, SM_SCALE), None


def device_times(calls: dict[Any, Call], device: torch.device) -> dict[Any, float]:
    """What each call runs on the device, idle time left out, in ms; on a CPU, how long it takes.

    One profile holds all of them, since starting one takes longer than most calls. Kernels of a stream run in order,
    so a marking kernel before each task's says whose they are.
    """
    if device.type == "cpu":
        return host_times(calls, device)
    from torch._C._autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Profiler clears events")
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            for call in calls.values():
                torch.cuda._sleep(1)
                for _ in range(CALLS):
                    call()
            torch.cuda.synchronize()
        events = [event for event in seen.events() or () if event.device_type == DeviceType.CUDA]
    sums: list[float] = []
    for event in sorted(events, key=lambda event: event.time_range.start):
        if MARK in event.name:
            sums.append(0.0)
        elif sums:
            sums[-1] += event.time_range.elapsed_us()
    if len(sums) != len(calls):
        raise SystemExit(
            f"the profiler saw {len(sums)} of {len(calls)} tasks on the GPU: CUPTI is needed to measure device time"
        )
    return {key: total / 1e3 / CALLS for key, total in zip(calls, sums, strict=True)}


def host_times(calls: dict[Any, Call], device: torch.device) -> dict[Any, float]:
    """How long each call keeps its caller, the device idle before, in ms."""
    times = {}
    for key, call in calls.items():
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times[key] = (time.perf_counter() - start) * 1e3
    return times


def medians(
    calls: dict[Any, Call],
    clock: Callable[[dict[Any, Call], torch.device], dict[Any, float]],
    device: torch.device,
    repeats: int,
) -> dict[Any, float]:
    """Each call's median time, the calls taking turns."""
    for call in calls.values():
        call()
    rounds = [clock(calls, device) for _ in range(repeats)]
    return {key: statistics.median(times[key] for times in rounds) for key in calls}


def cases(problem: Problem, device: torch.device) -> tuple[list[Case], dict[str, list[str]]]:
    """Every format on every backend, read natively and decoded, that runs here; the others by why they do not.

    Decoding is for kernels: on a GPU, exact attention over decoded rows tells nothing that it does not.
    """
    found: list[Case] = []
    refused: dict[str, list[str]] = {}
    kernels = set(backends.PREFERENCE) - ({"reference"} if device.type == "cuda" else set())
    heads, topk = problem.q_latent.shape[1], problem.indices.shape[1]
    slots = torch.arange(len(problem.latent), device=device)
    for format in map(kv.get, kv.names()):
        amax = (float(part.abs().max()) for part in (problem.latent, problem.rope))
        scales = format.calibrate(*amax) if format.uses_scales else Scales()
        cache = format.allocate(len(slots), device=device)
        format.store(cache, slots, problem.latent, problem.rope, scales)
        for name in backends.names():
            for read in ("native", "decoded") if name in kernels else ("native",):
                backend = backends.reading(name, read=read)
                reason = backend.unavailable_because(format, device, heads, topk)
                if reason is not None:
                    refused.setdefault(reason, []).append(f"{format.name}@{name} {read}")
                    continue
                found.append(
                    Case(
                        format=format, backend=backend, read=read, cache=cache, scales=scales, problem=problem
                    )
                )
    return found, refused


def measure(found: list[Case], device: torch.device, repeats: int) -> list[Row]:
    """Errors first, then every time, all cases taking turns."""
    rows = {}
    for case in found:
        over_all, worst = case.errors()
        rows[case.key] = Row(
            format=case.format.name,
            backend=case.backend.name,
            read=case.read,
            kernel=case.backend.kernel_on(device),
            bytes_per_token=case.format.row_bytes,
            relative_l2=over_all,
            worst_query_relative_l2=worst,
            device_ms=0.0,
            host_ms=0.0,
        )
    on_device: dict[Any, Call] = {("device_ms", case.key): case.attend for case in found}
    on_host: dict[Any, Call] = {("host_ms", case.key): case.attend for case in found}
    for case in found:
        kernel, planner = case.bare()
        if kernel is not None:
            on_device["bare_ms", case.key] = kernel
        if planner is not None:
            on_host["plan_ms", case.key] = planner
        if case.read == "decoded":
            on_device["decode_ms", case.key] = case.decode
            on_device["decode_eager_ms", case.key] = case.decode_eagerly
            on_device["pass_ms", case.key] = case.pass_over_rows()
            rows[case.key].decoder = case.decoder(device)
    for calls, clock in ((on_device, device_times), (on_host, host_times)):
        for (field, key), value in medians(calls, clock, device, repeats).items():
            setattr(rows[key], field, value)
    yardstick = rows.get(YARDSTICK)
    for row in rows.values():
        row.over_bare = _ratio(row.device_ms, row.bare_ms)
        row.decode_over_pass = _ratio(row.decode_ms, row.pass_ms)
        row.over_flashinfer_fp8 = _ratio(row.device_ms, yardstick.device_ms if yardstick else None)
    return list(rows.values())


def _ratio(value: float | None, by: float | None) -> float | None:
    return None if value is None or not by else value / by


def table(rows: list[Row], title: str) -> Table:
    """The rows as a terminal shows them."""
    shown = Table(*COLUMNS, title=title)

    def time_of(value: float | None) -> str:
        return "n/a" if value is None else f"{value:.4f}"

    def ratio_of(value: float | None) -> str:
        return "n/a" if value is None else f"{value:.2f}"

    for r in rows:
        errors = f"{r.relative_l2:.2e}", f"{r.worst_query_relative_l2:.2e}"
        times = (
            time_of(r.device_ms),
            time_of(r.bare_ms),
            ratio_of(r.over_bare),
            ratio_of(r.over_flashinfer_fp8),
        )
        host = time_of(r.host_ms), time_of(r.plan_ms)
        decoding = [time_of(value) for value in (r.decode_ms, r.decode_eager_ms, r.pass_ms)]
        decoding += [ratio_of(r.decode_over_pass), r.decoder or "n/a"]
        shown.add_row(r.format, r.backend, r.read, str(r.bytes_per_token), *errors, *times, *host, *decoding)
    return shown


def targets(rows: list[Row]) -> list[str]:
    """One line a target: whether every ratio that it limits is within it, and each ratio."""
    decoding = [(row, row.decode_over_pass) for row in rows]
    native = [(row, row.over_bare) for row in rows if row.read == "native"]
    emulated = [
        (row, row.over_flashinfer_fp8)
        for row in rows
        if (row.format, row.backend) == ("fp8_e4m3", "emulated")
    ]
    return [
        _target("a native call over its bare kernel", 1.10, native),
        _target("decoding over one pass", 1.0, decoding),
        _target("emulated fp8_e4m3 over flashinfer's", 5.0, emulated),
    ]


def _target(what: str, limit: float, found: list[tuple[Row, float | None]]) -> str:
    ratios = [(f"{row.format}@{row.backend}", ratio) for row, ratio in found if ratio is not None]
    if not ratios:
        return f"{what} <= {limit:.2f}: n/a, not measured here"
    within = all(ratio <= limit for _, ratio in ratios)
    each = ", ".join(f"{name} {ratio:.3f}{'' if ratio <= limit else ' (over)'}" for name, ratio in ratios)
    return f"{what} <= {limit:.2f}: {'PASS' if within else 'over'}: {each}"


def show(found: Table) -> None:
    """Print a table as wide as it is: a line that wraps is no line of a table."""
    width = Console(width=1000).measure(found).maximum
    Console(width=width).print(found)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the tables and the targets, and write the figures as JSON where asked."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name, value in SIZES[device.type].items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default here {value}")
    parser.add_argument(
        "--also-selected", action="store_true", help=f"a second table, with at least {SELECTED_SLOTS} slots"
    )
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each time (default 5)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    given = parser.parse_args(arguments)
    sizes = {name: getattr(given, name) for name in SIZES[device.type]}
    if min(*sizes.values(), given.repeats) < 1 or given.topk > given.slots:
        parser.error(f"every size must be at least 1 and topk at most slots, given {sizes}")
    environment.exact_numerics()
    gpu = environment.gpu_name(str(device)) or "CPU"
    facts = {"gpu": gpu, "torch": torch.__version__, "repeats": given.repeats}
    figures = facts | tabulated(sizes, device, given.repeats, gpu)
    if given.also_selected:
        larger = sizes | {"slots": max(SELECTED_SLOTS, 2 * sizes["queries"] * sizes["topk"])}
        figures["selected"] = tabulated(larger, device, given.repeats, gpu)
    if given.json is not None:
        given.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


@torch.no_grad()
def tabulated(sizes: dict[str, int], device: torch.device, repeats: int, gpu: str) -> dict[str, Any]:
    """Measure at these sizes, print what was found, and return it as JSON holds it."""
    found, refused = cases(Problem.draw(**sizes, device=device), device)
    rows = measure(found, device, repeats)
    shape = ", ".join(f"{value} {name}" for name, value in sizes.items())
    show(table(rows, f"{shape}; {gpu}, torch {torch.__version__}"))
    for reason, names in refused.items():
        print(f"not here: {reason}: {', '.join(names)}")
    lines = targets(rows)
    print(*lines, sep="\n", flush=True)
    return {"sizes": sizes, "rows": [asdict(row) for row in rows], "refused": refused, "targets": lines}


if __name__ == "__main__":
    main()
