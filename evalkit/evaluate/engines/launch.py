"""What a vLLM engine is started with: a candidate in vLLM's words, its place and its size. Imports no vLLM."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from evalkit import kv
from evalkit.candidate import Candidate
from evalkit.errors import InputError
from evalkit.kv.aliases import FP8_MEANS

# vLLM's names for what this project calls a backend; of several, the first that its version has and this GPU runs.
BACKENDS: Mapping[str, tuple[str, ...]] = {
    "flashmla": ("FLASHMLA_SPARSE",),
    "flash_attn": ("FLASH_ATTN_MLA_SPARSE",),
    "flashinfer": ("FLASHINFER_MLA_SPARSE_SM90", "FLASHINFER_MLA_SPARSE"),
}
CACHE_DTYPES = {
    "bf16": "bfloat16",
    "fp8_e4m3": "fp8_e4m3",
    "fp8_ds_mla": "fp8_ds_mla",
    "nvfp4_ds_mla": "nvfp4_ds_mla",
}
# Where an engine runs, which does not decide what it answers.
PLACE = ("gpus", "memory_share", "shared", "cache_bytes")
BLOCK = 64  # tokens of a block of vLLM's cache
# Read by vLLM when it is imported: one process for engine and caller, so that hooks reach the model; functions may be
# sent to it where there are more; the second model runner, whose order of logits `inside` expects; no sampler that
# compiles at the first token; nothing is fetched.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One engine: everything that decides what it answers, and where it runs.

    checkpoint: directory in Hugging Face layout.
    candidate: `bf16@flashmla`, `fp8_ds_mla@flashmla`, …; vLLM stores indexer keys as fp8 with every one.
    format: the resolved row format. backends: vLLM's names, first wanted first. cache_dtype: vLLM's `kv_cache_dtype`.
    scales: layer to k_scale for `calibrated` and `checkpoint`; empty otherwise.
    eager: without CUDA graphs, which layer capture needs.
    tensor_parallel, pipeline_parallel: GPUs that share one engine, tensor_parallel x pipeline_parallel of them.
    expert_parallel: experts spread over those GPUs instead of each being cut.
    max_length: vLLM's `max_model_len`.
    sequences: vLLM's `max_num_seqs`, what runs together at most.
    memory_share: of the GPU's memory, vLLM's `gpu_memory_utilization`.
    shared: whether other engines run on the same GPU. Its cache then holds what `sequences` take at most, since vLLM
        cannot measure what memory is free while another engine takes or frees some.
    gpus: CUDA_VISIBLE_DEVICES, by number or name; empty leaves it as it is.
    force_stored: vLLM attends prompts up to top-k densely, past the cache; true has them read it.
    extra: further arguments of vLLM's `LLM`, which win.
    """

    checkpoint: Path
    candidate: str
    format: str
    backends: tuple[str, ...]
    cache_dtype: str
    max_length: int
    scales: Mapping[int, float] = field(default_factory=dict)
    eager: bool = True
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    expert_parallel: bool = False
    sequences: int = 64
    memory_share: float = 0.8
    shared: bool = False
    gpus: tuple[int | str, ...] = ()
    force_stored: bool = False
    seed: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        wanted = self.tensor_parallel * self.pipeline_parallel
        if wanted < 1 or (self.gpus and len(self.gpus) != wanted):
            raise InputError(
                f"{self.candidate}: tensor_parallel {self.tensor_parallel} x pipeline_parallel "
                f"{self.pipeline_parallel} takes {wanted} GPUs, {len(self.gpus)} are named"
            )
        if not 0 < self.memory_share <= 1:
            raise InputError(f"memory_share is {self.memory_share}: a share of the GPU's memory, up to 1")
        if "data_parallel_size" in self.extra:
            raise InputError(
                "vLLM's LLM refuses data_parallel_size in one process: start one engine for each GPU (gpus), or serve "
                "with `vllm serve --data-parallel-size` and name it as an endpoint"
            )

    @property
    def row_bytes(self) -> int:
        """Bytes a token that this candidate's cache has to show."""
        return int(kv.get(self.format).row_bytes)

    @property
    def cache_bytes(self) -> int | None:
        """vLLM's `kv_cache_memory_bytes` of each GPU where it is shared: rows and indexer keys of all sequences."""
        if not self.shared:
            return None
        layers = int(json.loads((self.checkpoint / "config.json").read_text())["num_hidden_layers"])
        keys = kv.index.get(kv.index.OPTIONS["fp8"]).key_bytes
        blocks = self.sequences * (-(-self.max_length // BLOCK) + 1)
        return layers * blocks * BLOCK * (self.row_bytes + keys)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {
            "checkpoint": str(self.checkpoint),
            "cache_bytes": self.cache_bytes,
            "scales": {str(layer): scale for layer, scale in self.scales.items()},
            "row_bytes": self.row_bytes,
        }

    @property
    def fingerprint(self) -> str:
        """Of all that decides what is answered: not the GPUs it runs on, nor what it takes of their memory."""
        values = {key: value for key, value in self.to_json().items() if key not in PLACE}
        return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


def launch(checkpoint: Path, candidate: str | Candidate, **options: Any) -> Launch:
    """What vLLM is to be started with for a candidate.

    Raises:
        InputError: vLLM has no such format or backend, or stores and reads rows in one way only and another was asked
            for.
    """
    wanted = Candidate.parse(candidate) if isinstance(candidate, str) else candidate
    backend = wanted.backend
    names = BACKENDS.get(backend, (backend,) if backend.isupper() else ())
    if not names:
        raise InputError(
            f"{wanted}: vLLM has no backend {backend!r}; give {', '.join(BACKENDS)}, or vLLM's own name in capitals"
        )
    alias = backend if backend in FP8_MEANS else names[0]
    format = kv.resolve(wanted.format, alias)
    if format not in CACHE_DTYPES:
        raise InputError(f"{wanted}: vLLM stores no {format}; it stores {', '.join(CACHE_DTYPES)}")
    if wanted.index not in ("model", "fp8"):
        raise InputError(
            f"{wanted}: vLLM writes indexer keys as fp8 with every candidate; leave index={wanted.index} out"
        )
    if (wanted.read, wanted.reader, wanted.write) != ("native", "exact", "rounded"):
        raise InputError(
            f"{wanted}: vLLM's kernels read and write in their own way; leave read=, reader= and write= out"
        )
    if wanted.scales != "one" and not options.get("scales"):
        raise InputError(f"{wanted} needs the scale of every layer: scales={{layer: scale}}")
    resolved = wanted.on(backend, format)
    return Launch(
        checkpoint=Path(checkpoint),
        candidate=str(resolved),
        format=format,
        backends=names,
        cache_dtype=CACHE_DTYPES[format],
        **options,
    )
