"""What evalkit relies on in vLLM is in every version recorded, and in the one that is installed."""

import inspect
import json
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest

from evalkit.evaluate.engines import adapter
from evalkit.evaluate.engines.launch import BACKENDS, CACHE_DTYPES, launch

RECORDED = json.loads(Path(__file__).with_name("vllm_signatures.json").read_text())
EVERYTHING = {
    "tensor_parallel": 2,
    "pipeline_parallel": 2,
    "expert_parallel": True,
    "max_length": 4096,
}


@pytest.mark.parametrize("version", RECORDED)
def test_every_argument_that_is_passed_exists(version, checkpoint):
    recorded = RECORDED[version]
    made = launch(checkpoint, "fp8_ds_mla@flashmla", **EVERYTHING).to_json()
    own = {one for one in recorded["functions"]["LLM.__init__"] if not one.startswith("*")}
    passed = adapter._arguments(made, "FLASHMLA_SPARSE", True)
    assert passed.keys() <= own | set(recorded["fields"]["EngineArgs"])
    assert {"attention_backend", "kv_cache_dtype", "worker_extension_cls"} <= passed.keys()
    sampling = {"temperature", "stop_token_ids", "ignore_eos", "detokenize", "max_tokens", "logprobs"}
    assert sampling | {"prompt_logprobs"} <= set(recorded["fields"]["SamplingParams"])
    assert {"request_id", "prompt", "params"} <= set(recorded["functions"]["LLMEngine.add_request"][:3])
    layer = recorded["attention_layer"]
    assert layer["forward"][:2] == ["positions", "hidden_states"]
    assert layer["returns"].startswith("return self.o_proj(")
    if not layer["is_mla_attention"]:
        assert layer["class"] == "MultiHeadLatentAttentionWrapper"
        assert recorded["functions"]["MLAAttention.forward"][:3] == ["q", "kv_c_normed", "k_pe"]
    assert {"token_ids", "logprobs"} <= set(recorded["fields"]["CompletionOutput"])


def test_the_versions_have_both_kinds_of_layers_that_are_hooked():
    assert [recorded["attention_layer"]["is_mla_attention"] for recorded in RECORDED.values()] == [
        False,
        True,
    ]


def test_each_backend_and_format_is_in_some_version():
    versions = RECORDED.values()
    for names in BACKENDS.values():
        assert any(set(names) & set(recorded["backends"]) for recorded in versions)
    for dtype in CACHE_DTYPES.values():
        assert any(dtype in recorded["CacheDType"] for recorded in versions)
    # Why there is a repair, and when it is not needed.
    assert [recorded["spec_states_quant_mode"] for recorded in versions] == [False, True]


def test_an_unknown_argument_is_refused_with_the_version():
    from evalkit.errors import InputError

    with pytest.raises(InputError, match=r"vLLM 0\.1 takes no attention_backend"):
        adapter.refuse_unknown({"attention_backend": "X", "model": "y"}, ["model"], "0.1")


def test_the_installed_vllm_has_the_recorded_signatures():
    vllm = pytest.importorskip("vllm", reason="vLLM is not installed")
    if vllm.__version__ not in RECORDED:
        pytest.skip(f"vLLM {vllm.__version__} is not one of {', '.join(RECORDED)}")
    from vllm.config.cache import CacheDType
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    recorded = RECORDED[vllm.__version__]
    assert [field.name for field in fields(EngineArgs)] == recorded["fields"]["EngineArgs"]
    assert list(get_args(CacheDType)) == recorded["CacheDType"]
    for name, function in (
        ("LLM.__init__", vllm.LLM.__init__),
        ("LLMEngine.add_request", LLMEngine.add_request),
    ):
        names = [one.lstrip("*") for one in recorded["functions"][name] if one != "*"]
        assert [one for one in inspect.signature(function).parameters if one != "self"] == names
