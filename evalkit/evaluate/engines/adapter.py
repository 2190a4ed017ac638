"""The installed vLLM, asked through few of its names. Runs in a worker only.

A version older than `OLDEST` is refused. A newer one runs, and what it lacks is refused with its reason.
tests/evaluate/vllm_signatures.json records the signatures that are relied on, read from the sources of `OLDEST`.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version

from evalkit.errors import InputError
from evalkit.versions import TESTED

OLDEST = next(package.oldest for package in TESTED if package.name == "vLLM")


def start(launch: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """vLLM's `LLM` for a launch (as `Launch.to_json`), and what is to be said about it.

    Raises:
        InputError: vLLM is missing or too old, or this version or this GPU lacks what was asked for.
    """
    vllm = _vllm()
    llm = vllm.LLM  # first, as its modules import each other in the order that this one begins
    backend = _backend(launch, vllm.__version__)
    wanted = _arguments(launch, backend)
    refuse_unknown(wanted, arguments_of(llm), vllm.__version__)
    said = {
        "vllm": vllm.__version__,
        "backend": backend,
        "dense_prefill_tokens": dense_prefill_tokens(launch),
    }
    return llm(**wanted), said


def dense_prefill_tokens(launch: dict[str, Any]) -> int:
    """Up to how many tokens of context a prompt may be attended densely, on keys that were never stored; 0 is never.

    vLLM does so where every prompt of a step has at most top-k tokens.
    """
    if launch["force_stored"]:
        return 0
    return int(json.loads(Path(launch["checkpoint"], "config.json").read_text())["index_topk"])


def _vllm() -> Any:
    try:
        import vllm
    except ImportError as error:
        raise InputError(
            f"vLLM cannot be imported here ({error}): install it, or put it on PYTHONPATH"
        ) from error
    refuse_older(vllm.__version__)
    return vllm


def refuse_older(version: str) -> None:
    """Raise InputError for a version older than `OLDEST`; a build without a version number is taken."""
    try:
        older = Version(version) < Version(OLDEST)
    except InvalidVersion:
        return
    if older:
        raise InputError(
            f"vLLM {version} is installed here, and the oldest supported is {OLDEST}: install that or a newer one"
        )


def _arguments(launch: dict[str, Any], backend: str) -> dict[str, Any]:
    """Arguments of `LLM`; what equals vLLM's own default is left to it."""
    wanted: dict[str, Any] = {
        "model": launch["checkpoint"],
        "skip_tokenizer_init": True,  # token ids go in and come out
        "dtype": "bfloat16",
        "kv_cache_dtype": launch["cache_dtype"],
        "attention_backend": backend,
        "enforce_eager": launch["eager"],
        "max_model_len": launch["max_length"],
        "max_num_seqs": launch["sequences"],
        "gpu_memory_utilization": launch["memory_share"],
        "enable_prefix_caching": False,  # a cached prefix changes what a prompt's batches look like
        "seed": launch["seed"],
    }
    if launch["shared"]:
        wanted["kv_cache_memory_bytes"] = launch["cache_bytes"]
    if launch["tensor_parallel"] > 1:
        wanted["tensor_parallel_size"] = launch["tensor_parallel"]
    if launch["pipeline_parallel"] > 1:
        wanted["pipeline_parallel_size"] = launch["pipeline_parallel"]
    if launch["expert_parallel"]:
        wanted["enable_expert_parallel"] = True
    if launch["force_stored"]:
        wanted["attention_config"] = {
            "sparse_mla_force_mqa": True,
            "backend": wanted.pop("attention_backend"),
        }
    return {**wanted, **launch["extra"]}


def arguments_of(llm: Any) -> set[str]:
    """What `LLM` takes: its own arguments, and the fields of EngineArgs that it passes on."""
    from vllm.engine.arg_utils import EngineArgs

    return set(inspect.signature(llm.__init__).parameters) | {field.name for field in fields(EngineArgs)}


def refuse_unknown(wanted: dict[str, Any], known: Iterable[str], version: str) -> None:
    """Raise InputError for an argument that this version's LLM does not take."""
    if unknown := sorted(wanted.keys() - set(known)):
        raise InputError(f"vLLM {version} takes no {', '.join(unknown)}")


def _backend(launch: dict[str, Any], version: str) -> str:
    """The first of the wanted backends that this version has and this GPU and format suit."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    dtype, candidate = launch["cache_dtype"], launch["candidate"]
    refused = []
    for name in launch["backends"]:
        if name not in AttentionBackendEnum.__members__:
            refused.append(f"vLLM {version} has no {name}")
            continue
        try:
            kind = AttentionBackendEnum[name].get_class()
        except ImportError as error:
            refused.append(f"{name} does not import: {error}")
            continue
        capability = current_platform.get_device_capability()
        if capability is None:
            refused.append("vLLM sees no GPU here")
        elif not kind.supports_compute_capability(capability):
            refused.append(f"{name} does not run on SM{capability.major}{capability.minor}")
        elif not kind.supports_kv_cache_dtype(dtype):
            refused.append(f"{name} reads {', '.join(kind.supported_kv_cache_dtypes)}, not {dtype}")
        else:
            return str(name)
    raise InputError(f"{candidate}: {'; '.join(refused)}")
