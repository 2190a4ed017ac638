"""How long a checkpoint takes that is streamed layer by layer, and what each further candidate adds.

    python -m benchmarks.stream /scratch/three-layers --dims deepseek-v3.2 --layers 3 --json stream.json

writes a checkpoint of random weights there (unless it is there), reads its files with `cat`, uploads as many bytes
from pinned memory, compares layers with the first candidate only and then with all, and prints a table. The page cache
is as writing or reading left it, and kernels have been compiled on a small checkpoint before. It also runs tiny on a
CPU: --dims nano --tokens 128 --device cpu --candidates bf16@reference,fp8_ds_mla@reference.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from evalkit import environment
from evalkit.compare.layers import compare
from evalkit.compare.passes import noise
from evalkit.errors import InputError
from evalkit.model.checkpoint import weight_files
from evalkit.model.synthetic.synth import synth, synth_config
from evalkit.model.weights.stream import stream
from evalkit.records import LayerRecord, only

CANDIDATES = (
    "bf16@reference",
    "fp8_e4m3:one@flashinfer",
    "fp8_e4m3:calibrated@flashinfer",
    "fp8_ds_mla@flashmla",
    "nvfp4_ds_mla@flashmla+read=decoded",
)
INSTEAD = (
    "fp8_ds_mla@reference",
    "nvfp4_ds_mla@reference",
    "fp8_e4m3:one@reference",
    "fp8_e4m3:calibrated@reference",
)
PUBLISHED = {"deepseek-v3.2": (3, 58), "glm-5": (3, 75)}  # dense and MoE layers
CALIBRATION_TOKENS = 2048
GIB = 1 << 30


class Clock:
    """Stands in for the comparison's state: notes when each layer ends."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.at = device, [now(device)]

    def restore(self, _stream: Any) -> int:
        return 0

    def keep(self, _stream: Any, _layer: int) -> None:
        self.at.append(now(self.device))


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def available(model: Any, wanted: list[str]) -> list[Any]:
    """The candidates that run here, as many as were wanted where others can stand in."""
    found: list[Any] = []
    for text in [*wanted, *INSTEAD]:
        try:
            candidate = model.evalkit.resolve(text)
        except InputError as refusal:
            print(f"  left out: {refusal}", flush=True)
            continue
        if candidate not in found and len(found) < len(wanted):
            found.append(candidate)
    return found


def measure(checkpoint: Path, wanted: list[str], tokens: int, device: torch.device) -> dict[str, Any]:
    """One comparison from nothing: loads, streams, compares; times in seconds, memory in bytes."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    began = now(device)
    model = stream(checkpoint, device)
    candidates = available(model, wanted)
    draw = torch.Generator().manual_seed(0)
    length = min(tokens, CALIBRATION_TOKENS)
    document, *calibration = (
        torch.randint(model.config.vocab_size, (size,), generator=draw) for size in (tokens, length, length)
    )
    clock = Clock(device)
    records = list(
        compare(
            model,
            [document],
            candidates,
            decode_tokens=0,
            floors=noise.floors(model, kernel_only=True, frozen=False),
            frozen=False,
            calibration=calibration,
            state=clock,
        )
    )
    ended = now(device)
    weights = model.evalkit.weights
    weights.close()
    worst = {
        r.candidate: r.relative_l2
        for r in only(records, LayerRecord)
        if (r.layer, r.mode, r.probe, r.rung) == (len(clock.at) - 2, "isolated", "attention", "total")
    }
    return {
        "candidates": list(map(str, candidates)),
        "wall_s": ended - began,
        "load_s": clock.at[0] - began,
        "layer_s": [after - before for before, after in zip(clock.at, clock.at[1:], strict=False)],
        "logits_s": ended - clock.at[-1],
        "bytes_read": weights.bytes_read,
        "peak_gpu_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "last_layer_relative_l2": worst,
        "records": len(records),
    }


def read_files(files: list[Path]) -> float:
    began = time.perf_counter()
    for file in files:
        subprocess.run(["cat", str(file)], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began


def upload(nbytes: int, device: torch.device) -> float:
    """Seconds to copy that many bytes to the device, from one pinned buffer of 256 MiB again and again."""
    host = torch.zeros(min(nbytes, 1 << 28), dtype=torch.uint8, pin_memory=device.type == "cuda")
    there = torch.empty_like(host, device=device)
    there.copy_(host)
    began = now(device)
    for _ in range(max(1, nbytes // len(host))):
        there.copy_(host, non_blocking=True)
    return now(device) - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path, help="the checkpoint; made if it is not there")
    parser.add_argument("--dims", default="deepseek-v3.2")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--candidates", default=",".join(CANDIDATES), help="the first is run alone, then all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="where the figures go as well")
    asked = parser.parse_args()
    device, wanted = torch.device(asked.device), asked.candidates.split(",")
    environment.exact_numerics()

    found: dict[str, Any] = {
        "torch": torch.__version__,
        "gpu": environment.gpu_name(str(device)),
        "tokens": asked.tokens,
    }
    if not asked.directory.exists():
        began = time.perf_counter()
        synth(asked.directory, synth_config(asked.dims, asked.layers, {}, "fp8"), device=device)
        found["synth_s"] = time.perf_counter() - began
        print(f"written in {found['synth_s']:.1f} s", flush=True)
    files = weight_files(asked.directory)
    found["file_bytes"] = sum(file.stat().st_size for file in files)

    small = asked.directory.with_name(asked.directory.name + "-small")
    shutil.rmtree(small, ignore_errors=True)
    few = {"n_routed_experts": 16, "moe_intermediate_size": 256, "intermediate_size": 512, "vocab_size": 1024}
    synth(small, synth_config(asked.dims, 2, few, "fp8"), device=device)
    began = time.perf_counter()
    measure(small, wanted, asked.tokens, device)
    shutil.rmtree(small)
    print(
        f"kernels compiled and tried on a small checkpoint in {time.perf_counter() - began:.1f} s", flush=True
    )

    found["read_s"], found["upload_s"] = read_files(files), upload(found["file_bytes"], device)
    print(f"cat {found['read_s']:.2f} s, pinned upload {found['upload_s']:.2f} s", flush=True)
    found["one"] = measure(asked.directory, wanted[:1], asked.tokens, device)
    print(f"{wanted[0]} alone: {found['one']['wall_s']:.2f} s", flush=True)
    found["all"] = measure(asked.directory, wanted, asked.tokens, device)
    summarise(found, asked.dims)
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=2) + "\n")


def summarise(found: dict[str, Any], dims: str) -> None:
    one, everything = found["one"], found["all"]
    further = max(1, len(everything["candidates"]) - 1)
    bound = found["read_s"] + found["upload_s"]
    found["seconds_per_further_candidate"] = (everything["wall_s"] - one["wall_s"]) / further
    found["share_per_further_candidate"] = found["seconds_per_further_candidate"] / one["wall_s"]
    found["one_over_read_and_upload"] = one["wall_s"] / bound
    found["all_over_read_and_upload"] = everything["wall_s"] / bound
    found["bytes_read_over_file_bytes"] = everything["bytes_read"] / found["file_bytes"]
    rows = [
        ("files, GB", f"{found['file_bytes'] / 1e9:.2f}"),
        ("bytes read / file bytes", f"{found['bytes_read_over_file_bytes']:.4f}"),
        ("cat + pinned upload, s", f"{found['read_s']:.2f} + {found['upload_s']:.2f}"),
        (f"{one['candidates'][0]} alone, s", f"{one['wall_s']:.2f}"),
        ("  over cat + upload (target 1.5)", f"{found['one_over_read_and_upload']:.2f}"),
        ("  by layer, s", " ".join(f"{s:.2f}" for s in one["layer_s"])),
        (f"{len(everything['candidates'])} candidates, s", f"{everything['wall_s']:.2f}"),
        ("  over cat + upload (target 1.5)", f"{found['all_over_read_and_upload']:.2f}"),
        ("  by layer, s", " ".join(f"{s:.2f}" for s in everything["layer_s"])),
        ("each further candidate, s", f"{found['seconds_per_further_candidate']:.2f}"),
        ("  share of the first (target 0.25)", f"{found['share_per_further_candidate']:.2f}"),
    ]
    if everything["peak_gpu_bytes"] is not None:
        rows.append(("peak GPU memory, GiB (target 48)", f"{everything['peak_gpu_bytes'] / GIB:.1f}"))
    if dims in PUBLISHED and len(everything["layer_s"]) > 1:
        dense, sparse = PUBLISHED[dims]
        for name, run in (("first", one), ("all", everything)):
            first, *rest = run["layer_s"]
            whole = run["load_s"] + dense * first + sparse * sum(rest) / len(rest) + run["logits_s"]
            found[f"published_layers_{name}_s"] = whole
            rows.append((f"{dense + sparse} layers, extrapolated, {name}, s", f"{whole:.0f}"))
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows))
    print("relative L2 of the last layer's attention:", json.dumps(everything["last_layer_relative_l2"]))


if __name__ == "__main__":
    main()
