"""What runs inside vLLM's processes, on the model itself: proof of its path, hooks that keep tensors, scales.

Each function takes the model first, as `LLM.apply_model` calls it, and works on vLLM's modules by their class names. A
layer's attention is one `DeepseekV32Attention`, a subclass of `MLAAttention`: it projects, writes the cache, selects,
attends, and ends in its `o_proj`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

# Tensors of the request since `begin`, by name; hooks live from `watch` to `forget`.
KEPT: dict[str, list[Tensor]] = {}
HOOKS: list[Any] = []


@dataclass
class Request:
    """The logits of the request that runs, alone.

    forced: what it is to generate, whatever they say, in order.
    rows: how many rows of its prompt's logits are still to come.
    prompt: its prompt's logits, in pieces. sampled: what its tokens are sampled from, a row each. vLLM's second model
        runner computes the row of the prompt's last token twice: first in `sampled`, then at the end of `prompt`.
    """

    forced: list[int]
    rows: int
    prompt: list[Tensor] = field(default_factory=list)
    sampled: list[Tensor] = field(default_factory=list)


REQUEST = Request([], 0)


def attention_layers(model: Any) -> Iterator[tuple[int, Any]]:
    """Number and `MLAAttention`, or a subclass of it, of every decoder layer in this process."""
    for name, module in model.named_modules():
        if _is_attention(module) and (found := re.search(r"\.layers\.(\d+)\.", name)):
            yield int(found[1]), module


def describe(model: Any) -> list[dict[str, Any]]:
    """Of every layer: backend, what its cache is made of, and the scales that it uses."""
    return [
        {
            "layer": layer,
            "backend": module.attn_backend.get_name(),
            "implementation": type(module.impl).__name__,
            "cache_dtype": str(module.kv_cache_dtype),
            "cache_tensor": str(module.kv_cache.dtype).removeprefix("torch."),
            "row_bytes": module.kv_cache.shape[-1] * module.kv_cache.element_size(),
            "slots": module.kv_cache.shape[0] * module.kv_cache.shape[1],
            "heads": module.num_heads,
            "k_scale": float(module._k_scale),
            "q_scale": float(module._q_scale),
            # Without a quantisation method there is no parameter that a checkpoint's scale could be loaded into.
            "loads_scales": type(getattr(module, "quant_method", None)).__name__.endswith("KVCacheMethod"),
        }
        for layer, module in attention_layers(model)
    ]


def set_scales(model: Any, scales: dict[int, float]) -> int:
    """Give layers their k_scale, as the cache writer and the kernels read it; returns how many layers got one."""
    given = 0
    for layer, module in attention_layers(model):
        module._k_scale.fill_(scales[layer])
        module._k_scale_float = scales[layer]
        if hasattr(module, "_k_scale_cpu"):
            module._k_scale_cpu.fill_(scales[layer])
        given += 1
    return given


def watch(model: Any, layers: bool, operands: bool = False) -> None:
    """From now on keep the logits, and with `layers` what every attention layer reads and gives.

    With `operands` also what its writer rounds, and the query in latent space that its kernel is given.
    """
    forget(model)
    processors = [module for module in model.modules() if type(module).__name__ == "LogitsProcessor"]
    HOOKS.extend(module.register_forward_hook(_logits) for module in processors)
    for layer, module in attention_layers(model) if layers else ():
        HOOKS.append(module.o_proj.register_forward_pre_hook(_values(layer)))
        HOOKS.append(module.register_forward_hook(_whole_layer(layer), with_kwargs=True))
        if operands:
            HOOKS.extend(_Operands.watch(layer, module))


def forget(_model: Any) -> None:
    """Stop keeping."""
    while HOOKS:
        HOOKS.pop().remove()
    begin(_model, [], 0)


def begin(_model: Any, forced: list[int], prompt: int) -> None:
    """A request follows, which runs alone: what it is to generate after its `prompt` tokens."""
    global REQUEST
    REQUEST = Request(list(forced), prompt)
    KEPT.clear()


def take(_model: Any, path: str, prompt: int, decoded: int, tensor_parallel: int = 1) -> dict[str, list[int]]:
    """Write what was kept of one request, of `prompt` tokens at once and `decoded` one by one; returns shapes by name.

    The safetensors file has of every tensor [prompt + decoded, ...], logits [prompt + decoded, V] being what predicts
    the token after each. Where several processes share an engine, the first of the last pipeline stage has the logits and
    writes `path`, and the others their heads or layers to `path` with their rank appended.

    Raises:
        ValueError: the prompt was not computed in one piece, or other steps were seen than were asked for.
    """
    from safetensors.torch import save_file

    wanted, seen = [prompt, *[1] * decoded], {name: list(map(len, parts)) for name, parts in KEPT.items()}
    if REQUEST.sampled:
        first, *later = map(len, REQUEST.sampled)
        # The last of the prompt's rows is the first of those that are sampled from, once more.
        seen["logits"] = [prompt - REQUEST.rows - 1 + first, *later]
    for name, pieces in seen.items():
        if pieces != wanted:
            raise ValueError(
                f"{name}: pieces of {pieces} rows were seen, {wanted} were expected; where the prompt is cut, raise "
                "max_num_batched_tokens"
            )
    found = {name: torch.cat(parts) for name, parts in KEPT.items()}
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    # vLLM gathers logits for every tensor-parallel rank, and counts those ranks first.
    if REQUEST.sampled and rank % tensor_parallel == 0:
        found["logits"] = torch.cat([torch.cat(REQUEST.prompt)[: prompt - 1], *REQUEST.sampled])
    found = {name: tensor.cpu() for name, tensor in found.items()}
    KEPT.clear()
    if found:
        save_file(found, path if "logits" in found else f"{path}.rank{rank}")
    return {name: list(tensor.shape) for name, tensor in found.items()}


def _logits(_module: Any, _args: Any, logits: Tensor | None) -> Tensor | None:
    """Keeps the logits; of those that are sampled from, gives back what leaves no choice where a token is forced."""
    if logits is None:
        return None
    kept = logits.detach().clone()
    if REQUEST.sampled and REQUEST.rows > 0:
        REQUEST.prompt.append(kept)
        REQUEST.rows -= len(kept)
        return None
    REQUEST.sampled.append(kept)
    if not REQUEST.forced:
        return None
    forced = torch.full_like(logits, -torch.inf)
    forced[:, REQUEST.forced.pop(0)] = 0
    return forced


def _whole_layer(layer: int) -> Any:
    def hook(module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], out: Tensor) -> None:
        """Called (positions, hidden) -> output; its rows have been written."""
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[1]
        _keep(layer, hidden=hidden, output=out, **_stored(module, len(hidden)))

    return hook


def _values(layer: int) -> Any:
    def hook(_module: Any, args: tuple[Tensor, ...]) -> None:
        """o_proj(values): what a whole layer attended, after W_UV."""
        _keep(layer, values=args[0])

    return hook


@dataclass
class _Replaced:
    """A name of vLLM's that stands for something else until it is removed."""

    names: dict[str, Any]
    name: str
    own: Any = None

    def remove(self) -> None:
        if self.own is None:
            del self.names[self.name]
        else:
            self.names[self.name] = self.own


class _Operands:
    """Keeps a layer's query, and its latent and rope before they are rounded to its cache's format.

    vLLM's writer computes latent and rope in float32 and rounds them to the format at once. It gives the same values
    to tensors of the caller's, rounded to their dtype: here it is handed float32 ones.
    """

    written: ClassVar[tuple[Tensor, Tensor]]  # latent [T, C] and rope [T, R] of the layer that runs, float32

    @classmethod
    def watch(cls, layer: int, module: Any) -> Iterator[_Replaced]:
        names, name = type(module).forward.__globals__, "fused_norm_rope"
        own = names[name]
        if not hasattr(own, "keeps_operands"):  # one function for all layers

            def write(*args: Any, kv_c_out: Tensor, k_pe_out: Tensor, **kwargs: Any) -> Any:
                cls.written = latent, rope = kv_c_out.float(), k_pe_out.float()
                found = own(*args, kv_c_out=latent, k_pe_out=rope, **kwargs)
                kv_c_out.copy_(latent)
                k_pe_out.copy_(rope)
                return found

            write.keeps_operands = True  # type: ignore[attr-defined]
            names[name] = write
            yield _Replaced(names, name, own)
        attend = module._sparse_indexer_and_attn

        def attended(*args: Tensor) -> None:
            """Called (…, query's latent [T, H, C], query's rope [T, H, R], output)."""
            latent, rope = cls.written
            q_latent, q_rope = args[-3:-1]
            widths = q_latent.shape[-1], q_rope.shape[-1]
            if widths != (latent.shape[-1], rope.shape[-1]):
                raise ValueError(
                    f"layer {layer}: the query's parts are {widths[0]} and {widths[1]} wide, the row's "
                    f"{latent.shape[-1]} and {rope.shape[-1]}; the query is not in latent space, as where prompts of at "
                    "most top-k tokens are attended densely"
                )
            _keep(layer, latent=latent, rope=rope, query=torch.cat([q_latent, q_rope], -1).flatten(1))
            attend(*args)

        module._sparse_indexer_and_attn = attended
        yield _Replaced(vars(module), "_sparse_indexer_and_attn")


def _keep(layer: int, **named: Tensor) -> None:
    for name, value in named.items():
        KEPT.setdefault(f"{layer}.{name}", []).append(value.detach().clone())


def _stored(module: Any, tokens: int) -> dict[str, Tensor]:
    """The rows of this step's tokens, as bytes, and what they selected."""
    from vllm.forward_context import get_forward_context

    slots = get_forward_context().slot_mapping[module.layer_name][:tokens]
    cache = module.kv_cache  # [blocks, tokens a block, row]
    size = cache.shape[1]
    rows = cache[slots // size, slots % size]
    return {
        "rows": rows.view(torch.uint8),
        "selection": module.impl.topk_indices_buffer[:tokens],
    }


def _is_attention(module: Any) -> bool:
    return any(kind.__name__ == "MLAAttention" for kind in type(module).__mro__)
