"""The installed vLLM, asked through the few names that its versions 0.25.1 and 0.33.0 share. Runs in a worker only.

What a version lacks is refused with its reason. The signatures that are relied on are recorded in
tests/evaluate/vllm_signatures.json, read from both versions' sources.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

from evalkit.errors import InputError
from evalkit.evaluate.engines import repair

EXTENSION = "evalkit.evaluate.engines.extension.Extension"


def start(launch: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """vLLM's `LLM` for a launch (as `Launch.to_json`), and what is to be said about it.

    Raises:
        InputError: vLLM is missing, or this version or this GPU lacks what was asked for.
    """
    vllm = _vllm()
    llm = vllm.LLM  # first, as its modules import each other in the order that this one begins
    backend = _backend(launch, vllm.__version__)
    repairs = []
    if launch["format"] == "fp8_ds_mla" and repair.needed():
        repair.repair()
        repairs.append(repair.STATED)
    wanted = _arguments(launch, backend, bool(repairs))
    refuse_unknown(wanted, arguments_of(llm), vllm.__version__)
    said = {"vllm": vllm.__version__, "backend": backend, "repairs": repairs}
    return llm(**wanted), said | {"dense_prefill_tokens": dense_prefill_tokens(launch)}


def dense_prefill_tokens(launch: dict[str, Any]) -> int:
    """Up to how many tokens of context a prompt may be attended densely, on keys that were never stored; 0 is never.

    Newer versions do so where every prompt of a step has at most top-k tokens.
    """
    try:
        from vllm.model_executor.layers.attention import sparse_mla_attention
    except ImportError:
        return 0
    if launch["force_stored"] or not hasattr(sparse_mla_attention, "_use_dense_mha_prefill"):
        return 0
    return int(json.loads(Path(launch["checkpoint"], "config.json").read_text())["index_topk"])


def repeats_last_logits(llm: Any) -> bool:
    """Whether a prompt's logits hold those of its last token, which are sampled from, once more.

    They do in the second of vLLM's model runners, which newer versions take for every model.
    """
    return bool(getattr(llm.llm_engine.vllm_config, "use_v2_model_runner", False))


def _vllm() -> Any:
    try:
        import vllm
    except ImportError as error:
        raise InputError(
            f"vLLM cannot be imported here ({error}): install it, or put it on PYTHONPATH"
        ) from error
    return vllm


def _arguments(launch: dict[str, Any], backend: str, repaired: bool) -> dict[str, Any]:
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
    if repaired and launch["tensor_parallel"] * launch["pipeline_parallel"] > 1:
        wanted["worker_extension_cls"] = EXTENSION
    if launch["force_stored"]:
        wanted["attention_config"] = {
            "sparse_mla_force_mqa": True,
            "backend": wanted.pop("attention_backend"),
        }
    return {**wanted, **launch["extra"]}


def arguments_of(llm: Any) -> set[str]:
    """What `LLM` takes: its own arguments, and the fields of EngineArgs that it passes on."""
    from vllm.engine.arg_utils import EngineArgs

    own = inspect.signature(llm.__init__).parameters
    taken = {name for name, one in own.items() if one.kind is not inspect.Parameter.VAR_KEYWORD} - {"self"}
    passes_on = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in own.values())
    return taken | ({field.name for field in fields(EngineArgs)} if passes_on else set())


def refuse_unknown(wanted: dict[str, Any], known: Iterable[str], version: str) -> None:
    """Raise InputError for an argument that this version's LLM does not take."""
    if unknown := sorted(wanted.keys() - set(known)):
        raise InputError(f"vLLM {version} takes no {', '.join(unknown)}")
    if "sparse_mla_force_mqa" in (wanted.get("attention_config") or {}):
        from vllm.config.attention import AttentionConfig

        if "sparse_mla_force_mqa" not in {field.name for field in fields(AttentionConfig)}:
            raise InputError(
                f"vLLM {version} reads the cache for every prompt already and has no sparse_mla_force_mqa: "
                "leave force_stored out"
            )


def _backend(launch: dict[str, Any], version: str) -> str:
    """The first of the wanted backends that this version has and this GPU and format suit."""
    from vllm.config.cache import CacheDType
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    dtype, candidate = launch["cache_dtype"], launch["candidate"]
    if dtype not in get_args(CacheDType):
        raise InputError(f"{candidate}: vLLM {version} has no kv_cache_dtype {dtype}")
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
