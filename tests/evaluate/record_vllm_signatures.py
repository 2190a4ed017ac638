"""Write vllm_signatures.json: what evalkit relies on, read from the sources of vLLM wheels without importing them.

python tests/evaluate/record_vllm_signatures.py vllm-0.33.0-….whl
"""

import ast
import json
import sys
import zipfile
from pathlib import Path

from evalkit.evaluate.engines.launch import ENVIRONMENT

FILE = Path(__file__).with_name("vllm_signatures.json")
# Functions whose parameters are recorded, and classes whose fields are.
FUNCTIONS = {
    "LLM.__init__": "vllm/entrypoints/llm.py",
    "LLM.apply_model": "vllm/entrypoints/llm.py",
    "LLMEngine.add_request": "vllm/v1/engine/llm_engine.py",
    "LLMEngine.abort_request": "vllm/v1/engine/llm_engine.py",
    "LLMEngine.step": "vllm/v1/engine/llm_engine.py",
    "LLMEngine.has_unfinished_requests": "vllm/v1/engine/llm_engine.py",
    "tokens_input": "vllm/inputs/engine.py",
    "get_forward_context": "vllm/forward_context.py",
    "DeepseekV32Attention.forward": "vllm/models/deepseek_v32/attention.py",
    "LogitsProcessor.forward": "vllm/model_executor/layers/logits_processor.py",
    "AttentionBackend.supports_kv_cache_dtype": "vllm/v1/attention/backend.py",
    "AttentionBackend.supports_compute_capability": "vllm/v1/attention/backend.py",
}
FIELDS = {
    "EngineArgs": "vllm/engine/arg_utils.py",
    "SamplingParams": "vllm/sampling_params.py",
    "AttentionConfig": "vllm/config/attention.py",
    "CompletionOutput": "vllm/outputs.py",
    "Logprob": "vllm/logprobs.py",
}
MLA = "vllm/v1/attention/backends/mla/"
CACHES = {
    "FLASHMLA_SPARSE": MLA + "flashmla_sparse.py",
    "FLASH_ATTN_MLA_SPARSE": MLA + "flashattn_mla_sparse.py",
    "FLASHINFER_MLA_SPARSE": MLA + "flashinfer_mla_sparse.py",
}


def parsed(wheel: zipfile.ZipFile, path: str) -> ast.Module:
    return ast.parse(wheel.read(path).decode())


def found(tree: ast.Module, name: str) -> ast.AST:
    """The definition of `name` or `Class.name`."""
    scope: ast.AST = tree
    for part in name.split("."):
        scope = next(
            node
            for node in ast.iter_child_nodes(scope)
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == part
        )
    return scope


def parameters(function: ast.FunctionDef) -> list[str]:
    """Names in order; `*` goes before those that are keywords only, and `**` before what takes any other."""
    given = function.args
    names = [one.arg for one in (*given.posonlyargs, *given.args) if one.arg not in ("self", "cls")]
    if given.kwonlyargs:
        names += ["*", *(one.arg for one in given.kwonlyargs)]
    return names + ([f"**{given.kwarg.arg}"] if given.kwarg else [])


def fields(cls: ast.ClassDef) -> list[str]:
    return [
        node.target.id
        for node in cls.body
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and not node.target.id.startswith("_")
        and "ClassVar" not in ast.unparse(node.annotation)
    ]


def cache_dtypes(tree: ast.Module) -> list[str]:
    """The first backend class's `supported_kv_cache_dtypes` in a file."""
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.AnnAssign)
            and ast.unparse(node.target) == "supported_kv_cache_dtypes"
            and node.value is not None
        ):
            return [ast.literal_eval(one) for one in node.value.elts]
    raise ValueError("no supported_kv_cache_dtypes")


def members(tree: ast.Module) -> list[str]:
    enum = found(tree, "AttentionBackendEnum")
    return [
        node.targets[0].id
        for node in enum.body
        if isinstance(node, ast.Assign) and "MLA" in ast.unparse(node)
    ]


def attention_layer(wheel: zipfile.ZipFile) -> dict:
    """What the attention of a layer is on CUDA, and what it ends in."""
    cls = found(parsed(wheel, FUNCTIONS["DeepseekV32Attention.forward"]), "DeepseekV32Attention")
    return {
        "bases": [ast.unparse(one) for one in cls.bases],
        "returns": ast.unparse(found(cls, "forward").body[-1]),
    }


def recorded(path: Path) -> tuple[str, dict]:
    wheel = zipfile.ZipFile(path)
    variables = wheel.read("vllm/envs.py").decode()
    return path.name.split("-")[1], {
        "functions": {name: parameters(found(parsed(wheel, at), name)) for name, at in FUNCTIONS.items()},
        "fields": {name: fields(found(parsed(wheel, at), name)) for name, at in FIELDS.items()},
        "backends": members(parsed(wheel, "vllm/v1/attention/backends/registry.py")),
        "cache_dtypes": {name: cache_dtypes(parsed(wheel, at)) for name, at in CACHES.items()},
        "attention_layer": attention_layer(wheel),
        "environment": [name for name in ENVIRONMENT if f'"{name}"' in variables],
    }


if __name__ == "__main__":
    FILE.write_text(json.dumps(dict(recorded(Path(wheel)) for wheel in sys.argv[1:]), indent=1) + "\n")
