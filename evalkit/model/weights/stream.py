"""A checkpoint larger than memory as a transformers model that has one decoder layer's weights at a time.

The model is built on the meta device. Embedding, last norm and head are loaded; `model.evalkit.weights_of(layer)`
gives a decoder layer its weights, which stay until another layer's are asked for. Asked for in order, each byte is
read once, and the next layer's are read while this one computes. Weights of fp8 blocks are multiplied out on the
device, a chunk of at most 32 MiB at a time, into transformers' own parameters.
"""

from __future__ import annotations

import os
import re
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from evalkit import environment
from evalkit.errors import InputError
from evalkit.model.checkpoint import read_config, read_json, resolve_checkpoint
from evalkit.model.graft import graft
from evalkit.model.placement import placement
from evalkit.model.weights.ahead import Chunk, ReadAhead, chunks_of
from evalkit.model.weights.fp8 import SCALE_SUFFIX, block_size, dequantise, scale_shape
from evalkit.model.weights.shards import Stored, stored_tensors

FP8: Final = torch.float8_e4m3fn
LAYER: Final = re.compile(r"model\.layers\.(\d+)\.(.+)")
EXPERT: Final = re.compile(r"mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight")
# Enough for all readers. Pinned memory takes 0.7 s a GiB to get, and a layer of 11 GiB is read in half a second.
AHEAD: Final = 1 << 29


def stream(
    checkpoint: str | Path, device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> Any:
    """As `evalkit.load`, but with the weights of one decoder layer at a time: `model.evalkit.weights_of(layer)`.

    `forward` and `generate` do not work; `evalkit.compare.layers` does. Numbers are those of the loaded model, and
    fp8 blocks may be cut off at a matrix's edge, which transformers refuses.

    Raises:
        InputError: the checkpoint lacks a tensor, stores it in another shape, or cannot be read.
    """
    place, compute, rounding = placement(device, dtype)
    environment.exact_numerics()
    model, weights = _without_layers(resolve_checkpoint(checkpoint), place, compute)
    graft(model, rounding=rounding)
    model.evalkit.weights = weights
    return model


def load_blocks(directory: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """The whole model of a checkpoint of fp8 blocks, not grafted.

    transformers refuses blocks that are cut off at a matrix's edge, as the published checkpoints have them.
    """
    model, weights = _without_layers(directory, device, dtype)
    weights.load_layers()
    return model


def _without_layers(directory: Path, device: torch.device, dtype: torch.dtype) -> tuple[Any, StreamedWeights]:
    """The model with everything loaded but its decoder layers, and what gives these their weights."""
    from transformers import AutoModelForCausalLM

    config = read_config(directory)
    config._name_or_path = str(directory)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
    _keep_wide(model, dtype)
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config=config).to(device)  # its buffers are in no checkpoint
    weights = StreamedWeights(model.eval().requires_grad_(False), directory, device)
    weights.load_resident()
    return model, weights


def should_stream(
    checkpoint: Path, device: str | None, dtype: torch.dtype | None, asked: Literal["auto"] | bool
) -> bool:
    """Whether a checkpoint's weights have to be streamed, because there is no room for them all, or are asked to be."""
    if asked != "auto":
        return asked
    place, compute, _ = placement(device, dtype)
    layers = read_json(checkpoint / "config.json").get("num_hidden_layers", 0)
    values = sum(
        tensor.nbytes // tensor.dtype.itemsize
        for name, tensor in stored_tensors(checkpoint).items()
        if (match := LAYER.fullmatch(name)) is None or int(match[1]) < layers
    )
    needed = values * compute.itemsize
    free = [_host_free()]  # transformers loads there first
    if place.type == "cuda":
        free.append(torch.cuda.mem_get_info(place)[0])
    return needed > min(free)


class StreamedWeights:
    """Gives a meta model's decoder layers their weights, one layer at a time.

    bytes_read: tensor bytes taken from files so far. bytes_stored: those that all layers and the rest take.
    """

    def __init__(self, model: Any, directory: Path, device: torch.device) -> None:
        self.model, self.directory, self.device = model, directory, device
        self.count = len(model.model.layers)
        config = directory / "config.json"
        self.block = block_size(read_json(config).get("quantization_config"), str(config))
        stored = stored_tensors(directory)
        self.resident = {
            name: tensor
            for name, tensor in stored.items()
            if LAYER.fullmatch(name) is None and name in dict(model.named_parameters())
        }
        self.layers: list[dict[str, Stored]] = [{} for _ in range(self.count)]
        for name, tensor in stored.items():
            match = LAYER.fullmatch(name)
            if match and int(match[1]) < self.count:  # past them: multi-token prediction
                self.layers[int(match[1])][match[2]] = tensor
        for number, layer in enumerate(self.layers):
            self._check(model.model.layers[number], layer, f"model.layers.{number}.")
        tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
        wanted = [name for name, _ in model.named_parameters() if LAYER.fullmatch(name) is None]
        if missing := [name for name in wanted if name not in self.resident and name not in tied]:
            raise InputError(f"{directory} lacks the tensor {missing[0]}, which its config.json calls for")
        sizes = [sum(tensor.nbytes for tensor in layer.values()) for layer in self.layers]
        self.bytes_stored = sum(sizes) + sum(tensor.nbytes for tensor in self.resident.values())
        self._ahead = ReadAhead(min(AHEAD, _host_free() // 2), pinned=device.type == "cuda")
        weakref.finalize(model, self._ahead.close)
        self._present: int | None = None
        self._in_line = -1  # the layer whose chunks are taken next
        self._spare: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}

    @property
    def bytes_read(self) -> int:
        return self._ahead.bytes_read

    @contextmanager
    def of(self, layer: int) -> Iterator[None]:
        """See `Graft.weights_of`. Layers in order, from whichever on, are read once and ahead."""
        if layer != self._present:
            self._drop()
            self._fill(layer)
        yield

    def load_resident(self) -> None:
        """Load what is no decoder layer's: embedding, last norm, head."""
        self._ahead.start(chunks_of(self.resident.values()))
        targets = {name: (name, None) for name in self.resident}
        for name in self.resident:
            _set(self.model, name, self._empty(self.model.get_parameter(name)))
        self._take(len(chunks_of(self.resident.values())), state_of(self.model), targets, prefix="")
        if self.model.config.tie_word_embeddings:
            self.model.lm_head.weight = self.model.model.embed_tokens.weight

    def load_layers(self) -> None:
        """Load every decoder layer, to stay."""
        for number in range(self.count):
            self._fill(number)
        self._present = None
        self._ahead.close()

    def close(self) -> None:
        """Free the layer's weights and stop reading."""
        self._drop()
        self._spare.clear()
        self._ahead.close()

    def _fill(self, number: int) -> None:
        module: nn.Module = self.model.model.layers[number]
        for name, tensor in state_of(module).items():
            _set(module, name, self._empty(tensor))
        if self._in_line != number:
            self._ahead.start(chunk for layer in self.layers[number:] for chunk in _in_order(layer))
        self._in_line = -1
        layer, parameters = self.layers[number], state_of(module)
        targets = {name: _target(name, parameters) for name in layer}
        self._take(len(_in_order(layer)), parameters, targets, prefix=f"model.layers.{number}.")
        self._present, self._in_line = number, number + 1

    def _drop(self) -> None:
        """Back to meta; the memory serves the next layer, since freed blocks of many GiB would be cut up."""
        if self._present is None:
            return
        module: nn.Module = self.model.model.layers[self._present]
        for name, tensor in state_of(module).items():
            self._spare.setdefault((tensor.shape, tensor.dtype), []).append(tensor)
            _set(module, name, torch.empty_like(tensor, device="meta"))
        self._present = None

    def _empty(self, like: Tensor) -> Tensor:
        spare = self._spare.get((like.shape, like.dtype))
        return spare.pop() if spare else torch.empty_like(like, device=self.device)

    @torch.no_grad()
    def _take(
        self, chunks: int, parameters: Mapping[str, Tensor], targets: Mapping[str, Any], prefix: str
    ) -> None:
        scales: dict[str, Tensor] = {}
        for _ in range(chunks):
            chunk, content = self._ahead.take()
            for stored, value in _views(chunk, content.to(self.device, non_blocking=True)):
                name = stored.name.removeprefix(prefix)
                if name.endswith(SCALE_SUFFIX):
                    scales[name.removesuffix(SCALE_SUFFIX)] = value.clone()  # the chunk is not kept for it
                elif targets[name] is not None:
                    parameter, place = targets[name]
                    out = parameters[parameter] if place is None else parameters[parameter][place]
                    if stored.dtype == FP8:
                        assert self.block is not None
                        dequantise(value, scales.pop(name), self.block, out)
                    else:
                        out.copy_(value)

    def _check(self, module: nn.Module, layer: Mapping[str, Stored], prefix: str) -> None:
        """Refuse a layer whose tensors do not make up its parameters."""
        parameters = state_of(module)
        filled = dict.fromkeys(parameters, 0)
        for name, stored in layer.items():
            target = _target(name, parameters)
            if name.endswith(SCALE_SUFFIX) or target is None:
                continue
            wanted = parameters[target[0]] if target[1] is None else parameters[target[0]][target[1]]
            if tuple(wanted.shape) != stored.shape:
                raise InputError(
                    f"{self.directory} stores {prefix}{name} as {list(stored.shape)}, and its config.json makes "
                    f"it {list(wanted.shape)}"
                )
            if stored.dtype == FP8:
                self._check_scale(name, layer, prefix)
            filled[target[0]] += wanted.numel()
        for name, tensor in parameters.items():
            if filled[name] != tensor.numel():
                lacking = next(part for part in sources(name, parameters) if part not in layer)
                raise InputError(
                    f"{self.directory} lacks the tensor {prefix}{lacking}, which its config.json calls for"
                )

    def _check_scale(self, name: str, layer: Mapping[str, Stored], prefix: str) -> None:
        if self.block is None:
            raise InputError(
                f"{self.directory} stores {prefix}{name} in fp8, and its config.json has no quantization_config"
            )
        scale = layer.get(name + SCALE_SUFFIX)
        wanted = scale_shape(layer[name].shape, self.block)
        if scale is None or scale.shape != wanted:
            raise InputError(
                f"{self.directory}: {prefix}{name + SCALE_SUFFIX} is "
                f"{'missing' if scale is None else list(scale.shape)}: {list(layer[name].shape)} in blocks of "
                f"{list(self.block)} has scales {list(wanted)}"
            )


def _in_order(layer: Mapping[str, Stored]) -> list[Chunk]:
    """A layer's chunks, the scales of fp8 weights before any of these."""
    first = [tensor for tensor in layer.values() if tensor.dtype != FP8]
    return chunks_of(first) + chunks_of(tensor for tensor in layer.values() if tensor.dtype == FP8)


def _views(chunk: Chunk, content: Tensor) -> Iterator[tuple[Stored, Tensor]]:
    start = 0
    for stored in chunk.tensors:
        part = content[start : start + stored.nbytes]
        if start % stored.dtype.itemsize:
            part = part.clone()  # a view of a wider dtype must begin at a multiple of it
        yield stored, part.view(stored.dtype).view(stored.shape)
        start += stored.nbytes


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, as a state dict names them."""
    return dict(module.state_dict(keep_vars=True))


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._buffers:
        owner._buffers[leaf] = value
    else:
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)


def _target(name: str, parameters: Mapping[str, Tensor]) -> tuple[str, Any] | None:
    """Which parameter a stored tensor goes to, and which part of it; None for what the model does not have.

    transformers holds all experts' matrices in two parameters: gate and up [E, 2 I, D], down [E, D, I].
    """
    match = EXPERT.fullmatch(name)
    if match is None:
        return (name, None) if name in parameters else None
    held = "mlp.experts.down_proj" if match[2] == "down" else "mlp.experts.gate_up_proj"
    expert = int(match[1])
    if held not in parameters or expert >= len(parameters[held]):
        return None
    width = parameters[held].shape[1] // 2
    half = {"down": slice(None), "gate": slice(0, width), "up": slice(width, None)}[match[2]]
    return held, (expert, half)


def sources(parameter: str, parameters: Mapping[str, Tensor]) -> list[str]:
    """The stored tensors that make up a parameter."""
    match = re.fullmatch(r"mlp\.experts\.(gate_up|down)_proj", parameter)
    if match is None:
        return [parameter]
    experts = range(len(parameters[parameter]))
    return [f"mlp.experts.{expert}.{part}_proj.weight" for expert in experts for part in match[1].split("_")]


def _keep_wide(model: Any, compute: torch.dtype) -> None:
    """Give float32 to what transformers keeps in it whatever the model's dtype: the router's correction bias."""
    plan = tuple(model._get_dtype_plan(compute))
    for name, tensor in state_of(model).items():
        if any(part in name for part in plan):
            _set(model, name, torch.empty_like(tensor, dtype=torch.float32))


def _host_free() -> int:
    """Bytes of host memory that can be had, page cache included."""
    meminfo = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text()) if meminfo.exists() else None
    return int(found[1]) * 1024 if found else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
