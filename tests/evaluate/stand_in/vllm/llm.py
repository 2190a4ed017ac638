import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

import evalkit
from evalkit.compare.passes.capture import Capture
from vllm.attention import DeepseekV32Attention
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import CONTEXT
from vllm.recorded import RECORDED, SCRIPT, CompletionOutput, Logprob, takes
from vllm.v1.attention.backends.registry import AttentionBackendEnum

FORMATS = {"bfloat16": "bf16", "fp8_ds_mla": "fp8_ds_mla", "fp8_e4m3": "fp8_e4m3"}
PROBES = frozenset({"values", "output", "selection"})


class LogitsProcessor(nn.Module):
    def forward(self, lm_head, hidden_states, embedding_bias=None):
        return lm_head(hidden_states)


def model_of(native, options):
    """Modules by vLLM's names, through which what the native model computes is shown."""
    root = nn.Module()
    root.model = nn.Module()
    root.logits_processor = LogitsProcessor()
    root.lm_head = native.lm_head
    layers = []
    for number in range(len(native.evalkit.layers)):
        layers.append(nn.Module())
        layers[-1].self_attn = DeepseekV32Attention(f"layers.{number}", options)
    root.model.layers = nn.ModuleList(layers)
    return root


class LLM:
    def __init__(self, model, *, skip_tokenizer_init=False, **kwargs):
        taken = {one for one in RECORDED["functions"]["LLM.__init__"] if not one.startswith("*")}
        EngineArgs(
            **{
                name: value
                for name, value in kwargs.items()
                if name in RECORDED["fields"]["EngineArgs"] or name not in taken
            }
        )
        assert skip_tokenizer_init, "text would be tokenised twice"
        if "fail_start" in SCRIPT:
            print(f"ERROR 11-22 12:00:00 [core.py:1] {SCRIPT['fail_start']}", flush=True)
            raise RuntimeError("Engine core initialization failed. See root cause above.")
        backend = kwargs.get("attention_backend") or kwargs["attention_config"]["backend"]
        print("INFO 11-22 12:00:00 [cuda.py:1] Using", backend, "attention backend.")
        options = SimpleNamespace(
            backend=AttentionBackendEnum[SCRIPT.get("backend", backend)].get_class(),
            cache_dtype=kwargs["kv_cache_dtype"],
            blocks=kwargs["max_model_len"] // 64 + 1,
            heads=0,
        )
        format = FORMATS[kwargs["kv_cache_dtype"]]
        self.native = evalkit.load(model, f"{format}@reference+index=fp8", device="cpu")
        options.heads = self.native.config.num_attention_heads
        options.topk = self.native.config.index_topk
        self.model = model_of(self.native, options)
        # The difference between two kernels, and between two starts.
        self.noise = 2e-3 if backend == "FLASH_ATTN_MLA_SPARSE" else 0.0
        self.drift = SCRIPT.get("drift", 0.0)
        self.llm_engine = LLMEngine(self)

    def apply_model(self, func):
        return [func(self.model)]


class LLMEngine:
    def __init__(self, llm):
        self.llm, self.requests, self.steps = llm, {}, 0

    def add_request(self, request_id, prompt, params, **kwargs):
        takes("LLMEngine.add_request", request_id, prompt, params, **kwargs)
        assert prompt["type"] == "token"
        self.requests[request_id] = SimpleNamespace(ids=prompt["prompt_token_ids"], params=params, made=[])
        return request_id + "-0a1b"  # vLLM gives back a name of its own

    def abort_request(self, request_ids, internal=False):
        for one in request_ids:
            del self.requests[one]

    def has_unfinished_requests(self):
        return bool(self.requests)

    def step(self):
        self.steps += 1
        if self.steps == SCRIPT.get("raise_at"):
            raise RuntimeError(SCRIPT["say"])
        done = Path(SCRIPT["once"]).exists() if "once" in SCRIPT else False
        if self.steps == SCRIPT.get("die_at") and not done:
            if "once" in SCRIPT:
                Path(SCRIPT["once"]).touch()
            print(SCRIPT.get("say", "CUDA error: an illegal memory access was encountered"), file=sys.stderr)
            os._exit(SCRIPT.get("code", 1))
        return [self.advance(name, one) for name, one in list(self.requests.items())]

    @torch.inference_mode()
    def advance(self, name, request):
        params, prompt_logprobs = request.params, None
        ids = request.ids + request.made
        logits = self.llm.run(ids, 1 if request.made else len(ids))
        sampled = self.llm.model.logits_processor(lambda x: x, logits[-1:])
        if params.prompt_logprobs is not None and not request.made:
            # All of them in pieces of 1,024, those that were sampled from once more.
            pieces = logits.split(SCRIPT.get("piece", 1024))
            told = torch.cat([self.llm.model.logits_processor(lambda x: x, piece) for piece in pieces])[:-1]
            prompt_logprobs = [None, *tell(told, request.ids[1:], params.prompt_logprobs)]
        token = int(sampled[-1].argmax())
        request.made.append(token)
        request.told = [
            *getattr(request, "told", []),
            *tell(logits[-1:], [token], params.logprobs or 0),
        ]
        stop = token in params.stop_token_ids
        finished = stop or len(request.made) == params.max_tokens
        if finished:
            del self.requests[name]
        completion = CompletionOutput(
            index=0,
            token_ids=list(request.made),
            logprobs=request.told if params.logprobs is not None else None,
            finish_reason=("stop" if stop else "length") if finished else None,
        )
        return SimpleNamespace(
            request_id=name, outputs=[completion], finished=finished, prompt_logprobs=prompt_logprobs
        )


def tell(logits, tokens, count):
    found = []
    for row, token in zip(logits.float().log_softmax(-1), tokens, strict=True):
        likeliest = row.topk(count).indices.tolist() if count else []
        found.append({one: Logprob(logprob=float(row[one])) for one in (token, *likeliest)})
    return found


def run(self, ids, fresh):
    """Logits [T, V] of one sequence; what each layer sees of its last `fresh` tokens goes through the hooked modules."""
    native, cache = self.native, self.native.evalkit.new_cache()
    hooks, hidden = [], {}
    for number, path in enumerate(native.evalkit.layers):
        hooks.append(
            path.register_forward_pre_hook(
                lambda _m, args, kwargs, number=number: hidden.__setitem__(
                    number, kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
                ),
                with_kwargs=True,
            )
        )
    cache.state.observer = seen = PerLayer(PROBES)
    out = native(input_ids=torch.tensor([ids]), **cache.argument).logits[0]
    for hook in hooks:
        hook.remove()
    for number, layer in enumerate(self.model.model.layers):
        found = seen.layers[number].joined()
        values = self.disturbed(found["values"].flatten(1), len(ids) + number)
        layer.self_attn.show(
            cache.state.layers[number],
            values[-fresh:],
            found["selection"][-fresh:],
            found["output"][-fresh:],
        )
        places = torch.arange(len(ids))[-fresh:]
        CONTEXT.slot_mapping[layer.self_attn.layer_name] = places
        layer.self_attn(positions=places, hidden_states=hidden[number][0, -fresh:])
    return self.disturbed(out, len(ids)).bfloat16()


def disturbed(self, values, seed):
    for size, number in ((self.noise, seed), (self.drift, seed + 1000 * os.getpid())):
        generator = torch.Generator().manual_seed(number)
        values = values + size * torch.randn(values.shape, generator=generator)
    return values


LLM.run, LLM.disturbed = run, disturbed


class PerLayer:
    """An observer that keeps every layer's tensors apart."""

    keep_calls = False

    def __init__(self, probes):
        self.probes, self.layers = probes, {}

    def tensor(self, probe, layer, value):
        self.layers.setdefault(layer, Capture(self.probes, False)).tensor(probe, layer, value)

    def attention(self, layer, call):
        pass
