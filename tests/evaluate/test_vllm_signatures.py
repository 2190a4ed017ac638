"""What evalkit relies on in vLLM is in the versions recorded, and in the one that is installed."""

import inspect
import json
from dataclasses import fields
from pathlib import Path

import pytest

from evalkit.evaluate.engines import adapter
from evalkit.evaluate.engines.launch import BACKENDS, CACHE_DTYPES, ENVIRONMENT, launch

RECORDED = json.loads(Path(__file__).with_name("vllm_signatures.json").read_text())
EVERYTHING = {
    "tensor_parallel": 2,
    "pipeline_parallel": 2,
    "expert_parallel": True,
    "max_length": 4096,
    "shared": True,
    "force_stored": True,
}


def test_the_oldest_version_is_recorded():
    assert adapter.OLDEST in RECORDED


@pytest.mark.parametrize("version", RECORDED)
def test_every_argument_that_is_passed_exists(version, checkpoint):
    recorded = RECORDED[version]
    made = launch(checkpoint, "fp8_ds_mla@flashmla", **EVERYTHING).to_json()
    own = {one for one in recorded["functions"]["LLM.__init__"] if not one.startswith("*")}
    passed = adapter._arguments(made, "FLASHMLA_SPARSE")
    assert passed.keys() <= own | set(recorded["fields"]["EngineArgs"])
    assert "attention_backend" in recorded["fields"]["EngineArgs"]
    assert passed["attention_config"].keys() <= set(recorded["fields"]["AttentionConfig"])
    sampling = {"temperature", "stop_token_ids", "ignore_eos", "detokenize", "max_tokens", "logprobs"}
    assert sampling | {"prompt_logprobs"} <= set(recorded["fields"]["SamplingParams"])
    assert {"request_id", "prompt", "params"} <= set(recorded["functions"]["LLMEngine.add_request"][:3])
    assert {"token_ids", "logprobs"} <= set(recorded["fields"]["CompletionOutput"])
    assert recorded["environment"] == [name for name in ENVIRONMENT if name.startswith("VLLM_")]


@pytest.mark.parametrize("version", RECORDED)
def test_a_layer_is_the_module_that_is_hooked(version):
    recorded = RECORDED[version]
    assert recorded["attention_layer"]["bases"] == ["MLAAttention"]
    assert recorded["attention_layer"]["returns"].startswith("return self.o_proj(")
    assert recorded["functions"]["DeepseekV32Attention.forward"] == ["positions", "hidden_states"]


@pytest.mark.parametrize("version", RECORDED)
def test_every_backend_and_format_exists(version):
    recorded = RECORDED[version]
    for names in BACKENDS.values():
        assert set(names) <= set(recorded["backends"])
    assert set(CACHE_DTYPES.values()) <= {
        dtype for dtypes in recorded["cache_dtypes"].values() for dtype in dtypes
    }


def test_an_unknown_argument_is_refused_with_the_version():
    from evalkit.errors import InputError

    with pytest.raises(InputError, match=r"vLLM 0\.1 takes no attention_backend"):
        adapter.refuse_unknown({"attention_backend": "X", "model": "y"}, ["model"], "0.1")


def test_the_installed_vllm_has_the_recorded_signatures():
    vllm = pytest.importorskip("vllm", reason="vLLM is not installed")
    if vllm.__version__ not in RECORDED:
        pytest.skip(f"vLLM {vllm.__version__} is not one of {', '.join(RECORDED)}")
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    recorded = RECORDED[vllm.__version__]
    assert [field.name for field in fields(EngineArgs)] == recorded["fields"]["EngineArgs"]
    for name, function in (
        ("LLM.__init__", vllm.LLM.__init__),
        ("LLMEngine.add_request", LLMEngine.add_request),
    ):
        names = [one.lstrip("*") for one in recorded["functions"][name] if one != "*"]
        assert [one for one in inspect.signature(function).parameters if one != "self"] == names
