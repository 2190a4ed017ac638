"""Run the CUDA writers on an NVIDIA GPU, compare evalkit's bytes with theirs, and save theirs as fixtures.

    python -m tests.kv.make_fixtures --vllm 0.33.0

Prints one line for each format, kind of rows and scale: bytes that differ over all page sizes, from evalkit's writer
on CUDA and on CPU; every count must be 0. A writer that fails is reported, and the others are saved. Exit code 1 where
one failed or a byte differs.
"""

import argparse
import hashlib
import importlib.metadata
import sys
from pathlib import Path

import torch
from torch import Tensor

from evalkit.kv import Scales
from tests.kv.cuda_writers import (
    PAGE_SIZES,
    ROWS,
    WITHOUT_WRITER,
    WRITERS,
    Row,
    cache_ops_library,
    of_name,
    random_slots,
    written_by_evalkit,
)
from tests.kv.recorded import FILE, Case, Recording

HEAD = f"{'format':18}{'writer':42}{'rows':9}{'scales':18}{'tokens':>7}{'bytes':>9}{'CUDA':>7}{'CPU':>7}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=FILE, help="the .npz to write")
    parser.add_argument("--vllm", default=None, help="version of a vLLM library that is no installed package")
    args = parser.parse_args()
    recording = Recording(source=sources(args.vllm))
    for what, said in recording.source.items():
        print(f"{what}: {said}")
    print(f"\nbytes that differ from evalkit's, pages of {', '.join(map(str, PAGE_SIZES))}\n{HEAD}")
    agreed = [record(recording, name) for name in WRITERS]
    print(f"\nrule checked by the independent implementation in tests/kv only: {', '.join(WITHOUT_WRITER)}")
    recording.save(args.out)
    print(f"{args.out}: {args.out.stat().st_size / 2**20:.2f} MiB, {len(recording.cases)} cases")
    sys.exit(0 if all(agreed) else 1)


def sources(vllm: str | None) -> dict[str, str]:
    """What the bytes came from."""
    found = {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda}",
        "vllm": vllm or _version("vllm"),
        "flashinfer": _version("flashinfer-python"),
    }
    library = cache_ops_library()
    if library is not None:
        found["cache writers"] = f"{library.name}, SHA-256 {hashlib.sha256(library.read_bytes()).hexdigest()}"
    return found


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def record(recording: Recording, name: str) -> bool:
    """Run one format's writer on everything, and print its lines: whether no byte differs and none failed."""
    writer = WRITERS[name]
    start = f"{name:18}{writer.call:42}"
    reason = writer.unavailable_because()
    if reason is not None:
        print(f"{start}not run: {reason}")
        return True
    differing = 0
    for kind, make in ROWS.items():
        row = make()
        slots = random_slots(len(row[0]))
        for scales in writer.scales:
            try:
                counts, total = compare(recording, name, kind, row, slots, scales)
            except Exception as error:  # noqa: BLE001 -- one run records what it can of every writer
                print(f"{start}{kind:9}failed: {type(error).__name__}: {str(error)[:2000]}")
                return False
            given = f"{scales.latent:g}, {scales.rope:g}"
            print(f"{start}{kind:9}{given:18}{int((slots >= 0).sum()):7}{total:9}{counts[0]:7}{counts[1]:7}")
            differing += sum(counts)
    return differing == 0


def compare(
    recording: Recording, name: str, kind: str, row: Row, slots: Tensor, scales: Scales
) -> tuple[tuple[int, int], int]:
    """Record the writer's bytes at every page size: ((from evalkit on CUDA, on CPU) that differ, of how many)."""
    on_gpu, slots_on_gpu = (row[0].cuda(), row[1].cuda()), slots.cuda()
    format = of_name(name)
    from_cuda = from_cpu = total = 0
    for page_size in PAGE_SIZES:
        real = WRITERS[name].write(on_gpu, slots_on_gpu, scales, page_size).cpu()
        cuda = written_by_evalkit(format, on_gpu, slots_on_gpu, scales, page_size).cpu()
        cpu = written_by_evalkit(format, row, slots, scales, page_size)
        recording.add(Case(format=name, rows=kind, scales=scales, page_size=page_size), row, slots, real)
        from_cuda += int((real != cuda).sum())
        from_cpu += int((real != cpu).sum())
        total += real.numel()
    return (from_cuda, from_cpu), total


if __name__ == "__main__":
    main()
