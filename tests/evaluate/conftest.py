import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import DeepseekV32Config, DeepseekV32ForCausalLM, PreTrainedTokenizerFast

import evalkit
from evalkit.evaluate.lm import EvalkitLM

TOPK = 16


@pytest.fixture(scope="session")
def tokenizer():
    """One token a character, and every token text, so that counts can be read off and decoding loses nothing."""
    alphabet = [chr(i) for i in range(33, 127)] + [
        "Ġ",
        "Ċ",
    ]  # how byte-level tokenizers write space and newline
    vocab = {token: i for i, token in enumerate(["<|pad|>", "<|bos|>", "<|eos|>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<|pad|>", bos_token="<|bos|>", eos_token="<|eos|>"
    )


@pytest.fixture(scope="session")
def plain_model(tokenizer):
    """A random DeepSeek-V3.2 of transformers, whose contexts outgrow its top-k."""
    torch.manual_seed(0)
    config = DeepseekV32Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        first_k_dense_replace=1,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        q_lora_rank=16,
        kv_lora_rank=512,
        qk_nope_head_dim=16,
        qk_rope_head_dim=64,
        v_head_dim=16,
        index_n_heads=16,
        index_head_dim=128,
        index_topk=TOPK,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.1,
        attn_implementation="eager",
    )
    return DeepseekV32ForCausalLM(config).float().eval()


@pytest.fixture(scope="session")
def checkpoint(plain_model, tokenizer, tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    plain_model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def grafted_model(checkpoint):
    return evalkit.load(checkpoint, "fp32@reference", device="cpu", dtype=torch.float32)


@pytest.fixture(params=["plain_model", "grafted_model"])
def model(request):
    """What runs in transformers' own way, and on evalkit's path: an LM must not care."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def make_lm(model, tokenizer):
    return lambda **options: EvalkitLM(model, tokenizer=tokenizer, **options)


@pytest.fixture
def lm(make_lm):
    return make_lm()


@pytest.fixture
def ask():
    """Requests as lm-eval makes them."""

    def requests(kind, *arguments):
        return [
            Instance(request_type=kind, doc={}, arguments=args, idx=0, metadata=("some_task", i, 1))
            for i, args in enumerate(arguments)
        ]

    return requests


@pytest.fixture(scope="session")
def warm_python(tmp_path_factory):
    """What starts a worker of vLLM's stand-in at once: see warm.py."""
    folder, program = tmp_path_factory.mktemp("warm"), Path(__file__).parent / "warm.py"
    socket, python = folder / "socket", folder / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -IS {program} ask {socket} "$@"\n')
    python.chmod(0o755)
    serve = [sys.executable, str(program), "serve", str(socket)]
    path = {"PYTHONPATH": str(Path(evalkit.__file__).parents[1])}
    with subprocess.Popen(
        serve, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | path
    ) as server:
        assert server.stdout.readline() == b"ready\n"
        yield python
