"""Where a run happens: versions, hardware, numerics switches, and the checkpoint's hash."""

import hashlib
import importlib.util
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

from evalkit import __version__, versions
from evalkit.errors import InputError
from evalkit.records import EnvironmentRecord

PACKAGES = ("torch", "triton", "transformers", "safetensors", "lm_eval", "datasets", "numpy", "scipy")
KERNEL_PACKAGES = ("flashinfer-python", "vllm")


def collect(
    checkpoint: Path, device: str, dtype: str, command: str | None = None, identity: str | None = None
) -> EnvironmentRecord:
    """The environment as it is now.

    Args:
        checkpoint: the checkpoint's directory.
        device: the device the run uses, as torch names it.
        dtype: the dtype the model computes in, in words.
        command: what would repeat the run; None takes this process's.
        identity: what names the checkpoint's bytes; None hashes them all.
    """
    packages = _packages()
    return EnvironmentRecord(
        commit=commit(),
        python=platform.python_version(),
        packages=packages,
        device=f"{platform.system()} {platform.machine()}, {device}",
        gpu=gpu_name(device),
        dtype=dtype,
        checkpoint=checkpoint.name,
        checkpoint_sha256=sha256(checkpoint) if identity is None else identity,
        flags=numerics_flags(),
        command=command if command is not None else command_line(sys.argv),
        started_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        untested=versions.untested(packages),
    )


def exact_numerics() -> None:
    """Switch TF32 and reduced-precision reductions off, so that no difference comes from a GEMM's choice."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def numerics_flags() -> dict[str, bool | str]:
    """The switches that `exact_numerics` sets, as they stand."""
    return {
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "cudnn.allow_tf32": bool(torch.backends.cudnn.allow_tf32),
        "cuda.matmul.allow_tf32": bool(torch.backends.cuda.matmul.allow_tf32),
        "cuda.matmul.allow_bf16_reduced_precision_reduction": bool(
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
        ),
        "cuda.matmul.allow_fp16_reduced_precision_reduction": bool(
            torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
        ),
    }


def gpu_name(device: str) -> str | None:
    """`NVIDIA H200, SM90, CUDA 13.0`; None for a CPU."""
    if not device.startswith("cuda"):
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)}, SM{major}{minor}, CUDA {torch.version.cuda}"


def sha256(checkpoint: Path) -> str:
    """One hash over a checkpoint's files, their names included.

    Raises:
        InputError: the directory holds no files.
    """
    paths = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.suffix != ".md")
    if not paths:
        raise InputError(f"checkpoint {checkpoint} holds no files")
    total = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{digest}  {path.relative_to(checkpoint).as_posix()}\n".encode())
    return total.hexdigest()


def command_line(argv: Sequence[str]) -> str:
    """The command that was typed, as one that can be typed again."""
    program = Path(argv[0])
    start = "python -m evalkit.cli" if program.suffix == ".py" else program.name
    return shlex.join([*shlex.split(start), *argv[1:]])


def _packages() -> dict[str, str]:
    installed = {name: version_of(name) for name in (*PACKAGES, *KERNEL_PACKAGES)}
    return {
        "evalkit": __version__,
        **{name: version for name, version in installed.items() if version is not None},
    }


def version_of(name: str) -> str | None:
    """The version of an installed package; None where there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The checkout's commit, with `-dirty` where files differ from it; None outside a checkout."""
    here = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            check=False,
        )
        # An installed package may lie inside someone else's checkout.
        tracked = subprocess.run(
            ["git", "-C", str(here), "ls-files", "--error-unmatch", Path(__file__).name],
            capture_output=True,
            check=False,
        )
    except FileNotFoundError:
        return None
    return found.stdout.strip() if found.returncode == 0 and tracked.returncode == 0 else None


def has_triton() -> bool:
    """Whether the package triton is installed: what is written in it is imported only then."""
    return importlib.util.find_spec("triton") is not None
