"""Grafts the sparse MLA path onto a transformers model, and makes the caches that carry a candidate through it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from evalkit import kv
from evalkit.attention import backends
from evalkit.attention.cache import ARGUMENT, OLD_ARGUMENT, PagedCache
from evalkit.attention.path import SparseMLA
from evalkit.attention.state import PathState
from evalkit.candidate import BEST, Candidate
from evalkit.errors import InputError
from evalkit.kv import Scales
from evalkit.spans import spans

ARCHITECTURES = ("deepseek_v32", "glm_moe_dsa")


class Graft:
    """The path in one model: its modules, the model's own candidate, and `new_cache` for any other.

    layers: the path module of each decoder layer.
    candidate: what `model(...)` and `model.generate(...)` run on when they are given no cache.
    rounding: see `PathState`.
    weights: what gives a streamed checkpoint's layers their weights (`evalkit.model.weights.stream`); None where the model
        has them all.
    """

    weights: Any = None

    def __init__(self, model: Any, rounding: torch.dtype | None) -> None:
        if model.config.model_type not in ARCHITECTURES:
            raise InputError(
                f"{model.config.model_type!r} has no sparse MLA path; supported: {', '.join(ARCHITECTURES)}"
            )
        self.model, self.rounding = model, rounding
        self.layers: list[SparseMLA] = []
        for number, layer in enumerate(model.model.layers):
            path = SparseMLA(layer.self_attn)
            layer.self_attn = path
            self.layers.append(path)
            router = getattr(layer.mlp, "gate", None)
            if router is not None:
                router.register_forward_hook(partial(_route, path, number))
        self.candidate = self.resolve(Candidate(format="bf16", backend="reference"))
        self.scales: Mapping[int, Scales] = {}
        model.model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        model.model.register_forward_hook(self._after_forward, with_kwargs=True)
        _intercept_generate(model, self.new_cache)

    def weights_of(self, layer: int) -> AbstractContextManager[None]:
        """Within the block, that decoder layer has its weights."""
        return nullcontext() if self.weights is None else self.weights.of(layer)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return torch.device(self.model.device)

    def resolve(self, candidate: Candidate | str) -> Candidate:
        """The candidate with backend and format named; refused in one line where it cannot run here."""
        if isinstance(candidate, str):
            candidate = Candidate.parse(candidate)
        config = self.model.config
        shape = (self.device, config.num_attention_heads, config.index_topk)
        name, read = candidate.backend, candidate.read
        name = backends.best(candidate.format, *shape, read) if name == BEST else name
        backends.reading(name, candidate.reader, read)
        resolved = candidate.on(name, kv.resolve(candidate.format, name))
        backends.refuse_unavailable(name, resolved.format, *shape, read)
        wide = name == "reference" or backends.reading(name, read=read).takes_float32
        if not wide and self.model.dtype != torch.bfloat16:
            raise InputError(
                f"{resolved}: the kernel takes bfloat16 queries, the model runs in {self.model.dtype}"
            )
        return resolved

    def new_cache(
        self, candidate: Candidate | str | None = None, scales: Mapping[int, Scales] | None = None
    ) -> PagedCache:
        """An empty cache for `candidate` (by default the model's own), with its per-layer scales.

        Raises:
            InputError: the candidate cannot run here, or `calibrated` comes without scales for every layer.
        """
        own = candidate is None
        resolved = self.candidate if candidate is None else self.resolve(candidate)
        given = scales if scales is not None else (self.scales if own else {})
        if resolved.scales == "one" and given:
            raise InputError(
                f"{resolved} uses scale 1.0 and was given scales: name it {resolved.format}:calibrated"
            )
        if resolved.scales != "one":
            missing = [layer for layer in range(len(self.layers)) if layer not in given]
            if missing:
                raise InputError(
                    f"{resolved} needs the scales of every layer, none given for layers {spans(missing)}: "
                    "pass scales={layer: Scales(...)}"
                )
        state = PathState(
            candidate=resolved, scales=given, layer_count=len(self.layers), rounding=self.rounding
        )
        return PagedCache(state)

    def _before_forward(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Give the base model a PagedCache and its padding; transformers' own mask is not needed."""
        names = (
            "input_ids",
            "attention_mask",
            "position_ids",
            ARGUMENT,
            "inputs_embeds",
            "use_cache",
        )
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        before = kwargs.pop(OLD_ARGUMENT, None)
        cache = kwargs.get(ARGUMENT)
        if cache is None:
            cache = before
        if cache is None:
            cache = self.new_cache()
            use_cache = kwargs.get("use_cache")
            cache.is_transient = not (self.model.config.use_cache if use_cache is None else use_cache)
        elif not isinstance(cache, PagedCache):
            raise InputError(
                f"{ARGUMENT} is a {type(cache).__name__}, which the sparse MLA path cannot read: "
                "pass model.evalkit.new_cache() or nothing"
            )
        inputs = kwargs.get("input_ids")
        batch, length = (inputs if inputs is not None else kwargs["inputs_embeds"]).shape[:2]
        columns = cache.get_seq_length() + length
        limit = self.model.config.max_position_embeddings
        if columns > limit:
            raise InputError(f"the context is {columns} tokens, the model holds {limit}: shorten the prompt")
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.dim() != 2:
            raise InputError(f"attention_mask has shape {tuple(mask.shape)}; the path takes [batch, columns]")
        if mask is not None and tuple(mask.shape) != (batch, columns):
            raise InputError(
                f"attention_mask has shape {tuple(mask.shape)}, the cache and this step make {(batch, columns)}"
            )
        if mask is not None:
            cache.state.valid = mask.bool()
        elif cache.state.valid is not None:
            cache.state.valid = nn.functional.pad(cache.state.valid, (0, length), value=True)
        cache.state.selections.clear()  # layers share a selection within a pass
        # A mask of four dimensions passes through transformers untouched, and no [T, S] mask is built.
        unused = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device)
        return (), {**kwargs, **cache.argument, "attention_mask": unused}

    def _after_forward(
        self, _module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """With `use_cache=False` the caller sees no cache: transformers returns whatever it was given."""
        if kwargs[ARGUMENT].is_transient:
            setattr(output, ARGUMENT, None)


def _route(
    path: SparseMLA, layer: int, router: Any, _args: tuple[Any, ...], result: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Report a router's choice to the step in progress, or replace it with the forced one."""
    state, start = (None, 0) if path.step is None else (path.step[0](), path.step[1])
    if state is None:
        return None
    logits, weights, experts = result
    forced = None if state.forced_routing is None else state.forced_routing.get(layer)
    if forced is not None:
        batch = state.layers[layer].block_table.shape[0]
        experts = forced[:, start : start + experts.shape[0] // batch].flatten(0, 1).to(experts.dtype)
        weights = logits.sigmoid().gather(1, experts)
        if router.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        weights = weights * router.routed_scaling_factor
    if state.observer is not None and "routing" in state.observer.probes:
        state.observer.tensor("routing", layer, experts)
    return logits, weights, experts


def _intercept_generate(model: Any, new_cache: Callable[[], PagedCache]) -> None:
    """Make generate() start from a PagedCache wherever transformers would make a cache of its own."""
    prepare = model._prepare_cache_for_generation

    def prepared(generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        given = model_kwargs.get(ARGUMENT)
        if isinstance(given, Cache) and not isinstance(given, PagedCache):
            if given.get_seq_length() > 0:
                raise InputError(
                    f"generate() was given a filled {type(given).__name__}, which the sparse MLA path cannot read: "
                    "pass model.evalkit.new_cache() or nothing"
                )
            del model_kwargs[ARGUMENT]
        result = prepare(generation_config, model_kwargs, *args, **kwargs)
        made = model_kwargs.get(ARGUMENT)
        if isinstance(made, Cache) and not isinstance(made, PagedCache):
            model_kwargs[ARGUMENT] = new_cache()
        return result

    model._prepare_cache_for_generation = prepared


def graft(
    model: Any,
    candidate: Candidate | str = "bf16@reference",
    scales: Mapping[int, Scales] | None = None,
    rounding: torch.dtype | None = None,
) -> Any:
    """Graft the path onto a loaded model and make `candidate` its own; returns the model."""
    model.evalkit = Graft(model, rounding)
    model.evalkit.scales = dict(scales or {})
    model.evalkit.candidate = model.evalkit.resolve(candidate)
    model.evalkit.new_cache()  # refuses missing scales now, not at the first token
    return model
